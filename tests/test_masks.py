import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynprune_jax.pruning import masks
from dynprune_jax.pruning.masks import (
    Masks,
    drop_targets,
    highest,
    keep_highest,
    keep_highest_of_few,
    kept_count,
    kept_indices,
    plain_kept_count,
)


@pytest.mark.parametrize(
    ("ratio", "n", "kept"),
    [(0.29, 100, 71), (0.0, 7, 7), (0.5, 7, 4), (0.999, 4, 1), (0.9, 512, 52), (0.1, 9, 9)],
)
def test_kept_count_by_hand(ratio, n, kept):
    assert int(kept_count(ratio, n)) == kept
    assert int(jax.jit(kept_count, static_argnums=1)(ratio, n)) == kept
    assert plain_kept_count(ratio, n) == kept


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2048))
@example(0.7951, 449)
def test_a_plain_number_keeps_as_many(ratio, n):
    ratio = min(ratio, 0.999)
    assert plain_kept_count(ratio, n) == int(kept_count(ratio, n))


@given(st.integers(1, 224 * 224), st.data())
def test_a_ratio_of_p_over_n_prunes_p(n, data):
    pruned = data.draw(st.integers(0, n - 1))
    assert int(kept_count(pruned / n, n)) == n - pruned


@given(st.integers(0, 999), st.integers(1, 2048))
def test_decimal_ratios_prune_what_exact_arithmetic_says(thousandths, n):
    exact = n - math.floor(Fraction(thousandths, 1000) * n)
    assert int(kept_count(thousandths / 1000, n)) == max(exact, 1)


def test_masks_are_chosen_outside_of_jit_too():
    scores = jnp.asarray([[0.2, 0.7, 0.1, 0.7, 0.5]])
    with jax.disable_jit():
        np.testing.assert_array_equal(keep_highest(scores, 2), [[False, True, False, True, False]])


def slow_mask(scores, count):
    """Keeps the highest by repeatedly taking the first of the best."""
    mask = np.zeros(scores.shape, bool)
    for row, kept in zip(scores, mask, strict=True):
        left = [(-math.inf if math.isnan(value) else value) for value in row.tolist()]
        order = sorted(range(len(left)), key=lambda i: (-left[i], i))
        kept[order[:count]] = True
    return mask


few_values = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, np.nan])
# Few, as each is compiled; a running count goes in blocks of 64.
SHAPES = ((1, 1), (2, 3), (3, 8), (1, 64), (2, 65), (1, 150))
score_rows = st.sampled_from(SHAPES).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=few_values)
)


def some_count(n):
    return st.sampled_from(sorted({1, (n + 1) // 2, n}))


@given(score_rows, st.data())
def test_keep_highest_equals_the_slow_way_ties_and_nan_included(scores, data):
    count = data.draw(st.integers(1, scores.shape[1]))
    traced = jax.jit(keep_highest)(jnp.asarray(scores), count)
    np.testing.assert_array_equal(traced, slow_mask(scores, count))
    keys, kept = jax.jit(masks._ordered)(jnp.asarray(scores)), jnp.asarray(count)
    by_sort, by_search = map(jax.jit, (masks._threshold_by_sort, masks._threshold_by_search))
    np.testing.assert_array_equal(by_sort(keys, kept), by_search(keys, kept))  # on GPUs; on CPUs
    assert (np.sum(traced, axis=1) == count).all()


def test_ties_go_to_the_lower_index():
    mask = keep_highest(jnp.asarray([[1.0, 2.0, 1.0, 1.0, 2.0]]), 3)
    np.testing.assert_array_equal(mask, [[True, True, False, False, True]])


def test_no_gradient_flows_through_the_ranking():
    def f(x):
        return jnp.sum(jnp.where(keep_highest(x, 2), x, 0.0))

    np.testing.assert_array_equal(jax.grad(f)(jnp.asarray([[3.0, 1.0, 2.0]])), [[1.0, 0.0, 1.0]])


def test_targets_are_dropped_with_their_probability_and_nothing_else():
    mask = jnp.tile(jnp.asarray([True, False]), (20_000, 1))
    np.testing.assert_array_equal(drop_targets(jax.random.key(0), mask, 1.0), mask)
    kept = drop_targets(jax.random.key(0), mask, 0.7)
    assert kept[:, 0].all()
    assert abs(float(kept[:, 1].mean()) - 0.3) < 0.02  # 6 standard deviations


def test_masks_zero_what_is_not_kept():
    x = jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    channels = jnp.asarray([[True, False]])
    columns = jnp.asarray([[[True, False], [True, True]]])
    expected = [[[[1, 0], [0, 0]], [[5, 0], [7, 0]]]]
    np.testing.assert_array_equal(Masks(channels, columns).apply(x), expected)
    assert Masks().apply(x) is x
    assert Masks(channels).apply(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@given(st.sampled_from(SHAPES), st.integers(0, 99), st.data())
def test_kept_indices_are_those_of_the_mask(shape, seed, data):
    count = data.draw(some_count(shape[1]))
    scores = np.random.default_rng(seed).normal(size=shape)
    mask = slow_mask(scores, count)
    kept, place = jax.device_get(jax.jit(kept_indices, static_argnums=1)(mask, count))
    for row, indices, places in zip(mask, kept, place, strict=True):
        np.testing.assert_array_equal(indices, np.flatnonzero(row))
        np.testing.assert_array_equal(places[row], np.arange(count))
        assert (places[~row] == count).all()


def test_an_empty_batch_has_no_masks():
    scores = jnp.zeros((0, 5))
    assert keep_highest(scores, 2).shape == (0, 5)
    assert kept_indices(keep_highest(scores, 2), 2)[0].shape == (0, 2)


@given(score_rows, st.data())
def test_highest_are_the_indices_of_what_keep_highest_marks(scores, data):
    count = data.draw(some_count(scores.shape[1]))
    mask = slow_mask(scores, count)
    of_few, best = (jax.jit(f, static_argnums=1) for f in (keep_highest_of_few, highest))
    np.testing.assert_array_equal(of_few(scores, count), mask)
    for row, indices in zip(mask, jax.device_get(best(scores, count)), strict=True):
        np.testing.assert_array_equal(np.sort(indices), np.flatnonzero(row))
