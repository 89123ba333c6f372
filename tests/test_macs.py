import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune_jax.convolution import convolve
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.macs import conv_usage, linear_usage, program_macs
from dynprune_jax.pruning.masks import Masks

PLACE = {"name": "conv", "order": 0}


def slow_executed_macs(conv, x_shape, channels, columns, features=None, out_columns=None):
    """Walks over every output, every tap and every input channel of one image."""
    height, width, c_in = x_shape
    (k_h, k_w), (s_h, s_w), (d_h, d_w) = conv.kernel_size, conv.strides, conv.kernel_dilation
    if conv.padding == "VALID":
        pads = ((0, 0), (0, 0))
    elif conv.padding == "SAME":
        pads = []
        for n, k, s, d in ((height, k_h, s_h, d_h), (width, k_w, s_w, d_w)):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads.append((total // 2, total - total // 2))
    else:
        pads = conv.padding
    (top, bottom), (left, right) = pads
    out_h = (height + top + bottom - (k_h - 1) * d_h - 1) // s_h + 1
    out_w = (width + left + right - (k_w - 1) * d_w - 1) // s_w + 1
    fan_out = conv.out_features // conv.feature_group_count
    executed = dense = 0
    for i, j, a, b in itertools.product(range(out_h), range(out_w), range(k_h), range(k_w)):
        dense += c_in * fan_out
        h, w = i * s_h - top + a * d_h, j * s_w - left + b * d_w
        if out_columns is not None and not out_columns[i, j]:
            continue
        if 0 <= h < height and 0 <= w < width and columns[h, w]:
            for c in range(c_in):
                wanted = fan_out if features is None else int(features.sum())
                executed += wanted if channels[c] else 0
    return executed, dense


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    kernel=sizes,
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((0, 2), (1, 0)), ((3, 3), (2, 1))]),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_macs_equal_a_walk_over_every_tap(kernel, strides, dilation, padding, groups, seed):
    random = np.random.default_rng(seed)
    shape = (int(random.integers(7, 10)), int(random.integers(7, 10)), 4)
    conv = nnx.Conv(
        4, 4 if groups == 4 else 8, kernel, strides, padding=padding, kernel_dilation=dilation,
        feature_group_count=groups, conv_general_dilated=convolve, rngs=nnx.Rngs(0),
    )  # fmt: skip
    channels = random.random((2, 4)) < 0.6
    # An ungrouped convolution chooses its outputs; a depthwise one has them as its inputs are.
    features = {1: random.random((2, 8)) < 0.6, 4: channels}.get(groups)
    columns = random.random((2, *shape[:2])) < 0.6
    out = jax.eval_shape(conv, jnp.zeros((1, *shape))).shape[1:3]
    out_columns = random.random((2, *out)) < 0.6 if seed % 2 else None
    masks = Masks(
        jnp.asarray(channels),
        jnp.asarray(columns),
        features=None if features is None else jnp.asarray(features),
        out_columns=None if out_columns is None else jnp.asarray(out_columns),
    )
    usage = conv_usage(conv, (2, *shape), masks, **PLACE)
    for image in range(2):
        wanted = features[image] if groups == 1 else None
        places = None if out_columns is None else out_columns[image]
        executed, dense = slow_executed_macs(
            conv, shape, channels[image], columns[image], wanted, places
        )
        assert usage.executed_macs[image] == executed
        assert usage.dense_macs == dense
        share = channels[image].mean() * (1.0 if wanted is None else wanted.mean())
        if places is None:
            share *= columns[image].mean()
        else:
            left, _ = slow_executed_macs(conv, shape, np.ones(4), columns[image], None, places)
            share *= left / slow_executed_macs(conv, shape, np.ones(4), np.ones(shape[:2]))[0]
        np.testing.assert_allclose(usage.macs[image], dense * share)
    everything = slow_executed_macs(conv, shape, np.ones(4), np.ones(shape[:2]))
    assert usage.dense_executed_macs == everything[0]
    assert program_macs(conv, jnp.zeros((1, *shape))) == usage.dense_macs


@pytest.mark.parametrize(
    "padding",
    ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", 1, [1, (2, 0)], ((-1, 2), (0, -2))],
    ids=str,
)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [((2, 3), 1, 1), ((3, 2), (2, 3), 2)])
def test_taps_are_those_that_the_convolution_itself_sums(padding, kernel, stride, dilation):
    conv = nnx.Conv(
        1, 1, kernel, stride, padding=padding, kernel_dilation=dilation, use_bias=False,
        kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0),
    )  # fmt: skip
    ones = jnp.ones((1, 7, 6, 1))
    usage = conv_usage(conv, ones.shape, Masks(), **PLACE)
    assert usage.dense_executed_macs == int(jax.jit(conv)(ones).sum())
    assert usage.dense_macs == program_macs(conv, ones)


def test_a_figure_beyond_32_bits_is_exact():
    conv = nnx.eval_shape(lambda: nnx.Conv(4096, 4096, (3, 3), rngs=nnx.Rngs(0)))
    usage = conv_usage(conv, (1, 64, 64, 4096), Masks(), **PLACE)
    assert usage.dense_macs == 64 * 64 * 9 * 4096**2
    assert usage.executed_macs[0] == (3 * 64 - 2) ** 2 * 4096**2
    assert usage.executed_macs.dtype == np.int64


def test_taps_beyond_32_bits_are_refused():
    conv = nnx.eval_shape(lambda: nnx.Conv(1, 1, (7, 7), rngs=nnx.Rngs(0)))
    assert conv_usage(conv, (1, 6000, 6000, 1), Masks(), **PLACE).dense_taps == (7 * 6000 - 12) ** 2
    with pytest.raises(ValueError, match="map of 8192 x 8192 has 3286958224 taps"):
        conv_usage(conv, (1, 8192, 8192, 1), Masks(), **PLACE)


def test_circular_padding_wraps_onto_kept_columns():
    conv = nnx.Conv(2, 3, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0))
    columns = jnp.ones((1, 4, 4), bool).at[0, 0, 0].set(False)
    usage = conv_usage(conv, (1, 4, 4, 2), Masks(columns=columns), **PLACE)
    assert usage.dense_executed_macs == usage.dense_macs == 16 * 9 * 2 * 3
    assert usage.executed_macs[0] == 15 * 9 * 2 * 3  # a corner is read by nine places too


@given(
    side=st.integers(1, 5),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    apart=st.integers(1, 3),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(max_examples=30, deadline=None)
def test_zeros_between_columns_are_multiplied_by_nothing(side, kernel, stride, apart, pads):
    """As a transposed convolution has them: what is counted is taps on columns and padding."""
    wide = (side - 1) * apart + 1
    places = range(-pads[0], wide + pads[1] - kernel + 1, stride)
    taps = [at + k for at in places for k in range(kernel)]
    on_column = sum(0 <= tap < wide and tap % apart == 0 for tap in taps)
    conv = nnx.Conv(
        2, 3, (kernel, 1), (stride, 1), padding=(pads, (0, 0)), input_dilation=(apart, 1),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    usage = conv_usage(conv, (1, side, 4, 2), Masks(), **PLACE)
    assert usage.dense_macs == sum(tap % apart == 0 for tap in taps) * 4 * 2 * 3
    assert usage.dense_executed_macs == on_column * 4 * 2 * 3
    assert program_macs(conv, jnp.zeros((1, side, 4, 2))) == usage.dense_macs


def test_a_transposed_convolution_multiplies_each_column_by_the_whole_kernel():
    up = nnx.ConvTranspose(3, 5, (2, 2), (2, 2), rngs=nnx.Rngs(0))
    assert program_macs(up, jnp.zeros((1, 4, 6, 3))) == 4 * 6 * 2 * 2 * 3 * 5


def test_linear_layers_count_and_positions_multiply():
    linear = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    usage = linear_usage(linear, (3, 2, 5), Masks(), **PLACE)
    assert usage.dense_macs == 2 * 5 * 7
    np.testing.assert_array_equal(usage.macs, [70, 70, 70])
    np.testing.assert_array_equal(usage.executed_macs, [70, 70, 70])
    assert usage.gate_operations == 0


def test_the_cost_of_a_gate_by_hand():
    rngs = nnx.Rngs(0)
    gate = DynamicConv(nnx.Conv(4, 8, (3, 3), rngs=rngs), channel_ratio=0.5, rngs=rngs)
    channels = jnp.asarray([[True, True, False, False], [True] * 4])
    usage = conv_usage(gate, (2, 3, 3, 4), Masks(channels), **PLACE)
    assert usage.gate_operations == 36 + 8  # additions for the means, 4 * log2(4) comparisons
    grouped = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs)
    gate = DynamicConv(grouped, channel_ratio=0.5, column_ratio=0.5, rngs=rngs)
    both = Masks(channels, jnp.ones((2, 3, 3), bool))
    usage = conv_usage(gate, (2, 3, 3, 4), both, **PLACE)
    assert usage.gate_operations == 36 + 2 * 1 + 36 + 9 * 4  # 2 groups, 9 columns


def test_program_macs_finds_products_inside_loops_and_branches():
    def f(x, w):
        x, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, length=3)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
        return jax.jit(lambda x: jnp.einsum("ij,kj->ik", x, x))(x)

    assert program_macs(f, jnp.ones((2, 4)), jnp.ones((4, 4))) == (3 + 2) * 2 * 16 + 2 * 2 * 4
