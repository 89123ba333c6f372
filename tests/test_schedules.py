import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprune_jax.pruning.schedules import elastic, ratio_ascent


def test_the_ascent_by_hand():
    schedule = ratio_ascent(jnp.asarray([0.0, 0.05, 0.22]), interval_steps=3)
    steps = [0, 2, 3, 5, 6, 8, 9, 50]
    third = [0.1, 0.1, 0.15, 0.15, 0.2, 0.2, 0.22, 0.22]
    expected = [[0.0, 0.05, ratio] for ratio in third]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(steps)), expected, rtol=1e-6)


@given(st.floats(0, 0.99), st.integers(1, 100), st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_it_never_falls_and_arrives(target, interval, warmup, increment):
    schedule = ratio_ascent(target, interval_steps=interval, warmup=warmup, increment=increment)
    arrival = max(0, math.ceil((target - 1e-6 - warmup) / increment)) * interval
    ratios = [
        float(schedule(step)) for step in (0, max(arrival - interval, 0), arrival, arrival + 999)
    ]
    assert ratios == sorted(ratios)
    np.testing.assert_allclose(ratios[2:], target, atol=2e-6)
    assert arrival == 0 or ratios[1] < target


def test_an_interval_of_no_step_is_refused_and_one_of_ages_is_not():
    with pytest.raises(ValueError, match="interval_steps is 0; it must be at least 1"):
        ratio_ascent(0.3, interval_steps=0)
    with pytest.raises(ValueError, match=r"target is 1.5; it must be in \[0, 1\)"):
        ratio_ascent(1.5, interval_steps=1)
    with pytest.raises(ValueError, match=r"target is .*; it must be in \[0, 1\)"):
        ratio_ascent(jnp.asarray([0.5, 1.5]), interval_steps=1)
    with pytest.raises(ValueError, match=r"warmup is -1; it must be in \[0, 1\)"):
        ratio_ascent(0.5, interval_steps=1, warmup=-1)
    with pytest.raises(ValueError, match=r"increment is -0.1; it must be at least 0"):
        ratio_ascent(0.5, interval_steps=1, increment=-0.1)
    assert ratio_ascent(0.3, interval_steps=10**10)(jnp.int32(3)) == jnp.float32(0.1)


def test_an_elastic_schedule_draws_fractions_and_a_share_of_the_steps_is_whole():
    high = ratio_ascent(jnp.asarray([0.2, 0.6]), interval_steps=10, warmup=0.3, increment=0.3)
    schedule = elastic(high, jax.random.key(3), lowest=0.4, at_highest=0.25)
    steps = jnp.arange(1000)
    fractions = np.asarray(jax.vmap(schedule)(steps) / jax.vmap(high)(steps))
    np.testing.assert_allclose(fractions[:, 0], fractions[:, 1], rtol=1e-6)  # of one key alike
    whole = fractions[:, 0] == 1.0
    assert 0.2 < whole.mean() < 0.3
    others = np.sort(fractions[~whole, 0])  # uniform in [.4, 1]
    np.testing.assert_allclose(others, np.linspace(0.4, 1.0, len(others)), atol=0.04)
    # One that has gone on from a checkpoint draws the same.
    np.testing.assert_array_equal(schedule(jnp.int32(700)), jax.vmap(schedule)(steps)[700])
    other = elastic(high, jax.random.key(4), lowest=0.4)
    assert not np.array_equal(jax.vmap(other)(steps), jax.vmap(schedule)(steps))


def test_the_ends_of_an_elastic_schedule():
    high, key = ratio_ascent(0.5, interval_steps=1), jax.random.key(0)
    for whole in (elastic(high, key, lowest=1.0), elastic(high, key, at_highest=1.0)):
        assert [float(whole(step)) for step in range(9)] == [float(high(s)) for s in range(9)]
    for name in ("lowest", "at_highest"):
        with pytest.raises(ValueError, match=rf"{name} is 1.5; it must be in \[0, 1\]"):
            elastic(high, key, **{name: 1.5})


def test_by_default_a_fourth_of_the_steps_is_whole():
    high = ratio_ascent(0.5, interval_steps=1)
    steps = jnp.arange(1000)
    drawn = jax.vmap(elastic(high, jax.random.key(3)))(steps)
    assert 0.2 < np.mean(np.asarray(drawn == jax.vmap(high)(steps))) < 0.3
    assert np.min(np.asarray(drawn)) < 0.01  # and the others go down to nothing
