import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from networks import trained

import dynprune_jax
from dynprune_jax import make_dynamic, scale_ratios_to_time
from dynprune_jax.pruning import time_budget
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.time_budget import Trial, _search


@pytest.fixture
def images():
    return jax.numpy.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), "float32")


@pytest.fixture
def as_slow_as_kept(monkeypatch):
    """As if every gated convolution took as many milliseconds as the share that it keeps."""

    monkeypatch.setattr(time_budget, "_milliseconds", lambda model, *_: sum(kept(model)))


def kept(model):
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, CompactConv)]
    return [1.0 - (layer.channel_ratio or 0.0) for layer in layers]


def ratios(model):
    return [float(ratio) for ratio in jax.tree.leaves(nnx.state(model, dynprune_jax.PruneRatio))]


def test_ratios_are_scaled_to_a_budget_of_time(images, few_forms, as_slow_as_kept):
    model = make_dynamic(trained("small_vgg"), (0.2, 0.4))
    model.train()
    before, trials = ratios(model), []
    fast = scale_ratios_to_time(model, 2.5, images, progress=trials.append)
    assert not next(iter(dynprune_jax.dynamic_layers(model).values())).deterministic
    factors = np.array(ratios(model)) / before
    np.testing.assert_allclose(factors, factors[0], rtol=2e-3)
    assert trials[0].milliseconds == len(kept(fast))
    assert 2.3 < sum(kept(fast)) <= 2.5
    assert len(trials) <= 8
    assert min(trials, key=lambda trial: abs(2.5 - trial.milliseconds)).model is fast
    model.eval()
    np.testing.assert_allclose(fast(images), model(images), rtol=1e-4, atol=1e-5)
    cut = dynprune_jax.measure(model, images)[1].mac_reduction
    assert cut == pytest.approx(next(trial.cut for trial in trials if trial.model is fast))


def test_a_lucky_moment_is_not_enough(images, few_forms, monkeypatch):
    """The second time it takes longer than the first; what does not keep the budget has but one."""
    model = make_dynamic(trained("small_vgg"), (0.2, 0.4))
    timed, trials = [], []

    def milliseconds(model, *_):
        taken = sum(kept(model)) + (0.3 if timed and timed[-1] is model else 0.0)
        timed.append(model)
        return taken

    monkeypatch.setattr(time_budget, "_milliseconds", milliseconds)
    fast = scale_ratios_to_time(model, 2.5, images, progress=trials.append)
    assert 2.0 < sum(kept(fast)) <= 2.2
    assert timed.count(fast) == 2
    assert timed.count(trials[0].model) == 1


def test_a_network_that_is_fast_enough_is_not_pruned(images, few_forms):
    model = make_dynamic(trained("small_vgg"), (0.2, 0.4))
    fast = scale_ratios_to_time(model, 1e9, images)
    assert set(ratios(model)) == {0.0}
    model.eval()
    np.testing.assert_allclose(fast(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("milliseconds", "message"),
    [
        (1e-9, r"milliseconds is 1e-09; the network takes [\d.]+ with all ratios at 0, and"),
        (0.0, "milliseconds is 0.0; it must be above 0"),
        (math.nan, "milliseconds is nan; it must be above 0"),
        (math.inf, "milliseconds is inf; it must be above 0, and finite"),
    ],
)
def test_a_budget_of_time_that_cannot_be_kept_changes_nothing(
    milliseconds, message, images, few_forms
):
    model = make_dynamic(trained("small_vgg"), (0.2, 0.4))
    before = ratios(model)
    with pytest.raises(ValueError, match=message):
        scale_ratios_to_time(model, milliseconds, images)
    assert ratios(model) == before


@given(st.lists(st.floats(0.1, 10.0), min_size=8, max_size=8), st.floats(0.1, 10.0))
def test_whatever_the_times_what_is_found_has_kept_the_budget(times, budget):
    """They need not fall with the cut: they are measured."""
    trials = []

    def trial(cut):
        trials.append(Trial(0.0, cut, times[len(trials)], nnx.Module()))
        return trials[-1]

    try:
        found = _search(trial, lambda: 0.9, budget)
    except ValueError:
        assert all(t.milliseconds > budget for t in trials)
        assert [t.cut for t in trials] == [0.0, 0.9]
        return
    kept = [t for t in trials if t.milliseconds <= budget]
    assert found.cut == min(t.cut for t in kept)
    assert all(0.0 <= t.cut <= 0.9 for t in trials)
