import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprune_jax.pruning.schedules import ascent_steps, ratio_ascent


def test_the_ascent_by_hand():
    schedule = ratio_ascent(jnp.asarray([0.0, 0.05, 0.22]), interval_steps=3)
    steps = [0, 2, 3, 5, 6, 8, 9, 50]
    third = [0.1, 0.1, 0.15, 0.15, 0.2, 0.2, 0.22, 0.22]
    expected = [[0.0, 0.05, ratio] for ratio in third]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(steps)), expected, rtol=1e-6)


@given(st.floats(0, 0.99), st.integers(1, 100), st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_it_never_falls_and_arrives_when_it_says(target, interval, warmup, increment):
    options = {"interval_steps": interval, "warmup": warmup, "increment": increment}
    schedule = ratio_ascent(target, **options)
    arrival = ascent_steps(target, **options)
    ratios = [
        float(schedule(step)) for step in (0, max(arrival - interval, 0), arrival, arrival + 999)
    ]
    assert ratios == sorted(ratios)
    np.testing.assert_allclose(ratios[2:], target, atol=2e-6)
    assert arrival == 0 or ratios[1] < target


def test_an_interval_of_no_step_is_refused_and_one_of_ages_is_not():
    with pytest.raises(ValueError, match="interval_steps is 0; it must be at least 1"):
        ratio_ascent(0.3, interval_steps=0)
    assert ratio_ascent(0.3, interval_steps=10**10)(jnp.int32(3)) == jnp.float32(0.1)
