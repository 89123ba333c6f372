import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dynprune_jax.pruning import exported
from dynprune_jax.pruning.masks import Masks
from dynprune_jax.pruning.pallas_conv import kept_groups_conv

SAME = ((1, 1), (1, 1))


def masked_conv(x, kernel, channels, padding):
    """The masked path in float32."""
    return jax.lax.conv_general_dilated(
        Masks(channels).apply(x).astype(jnp.float32),
        kernel.astype(jnp.float32),
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def check(rng, dtype, batch, size, kernel_size, padding, group_size, kept, total, features, blocks):
    """Compares with the masked path; the groups that are not kept hold NaN, to be left alone."""
    channels = total * group_size
    x = jnp.asarray(rng.normal(size=(batch, *size, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, channels, features)), dtype)
    groups = np.stack([np.sort(rng.permutation(total)[:kept]) for _ in range(batch)])
    kept_groups = np.zeros((batch, total), bool)
    kept_groups[np.arange(batch)[:, None], groups] = True
    channel_mask = jnp.asarray(np.repeat(kept_groups, group_size, axis=1))

    @jax.jit
    def both(x, kernel, groups, channel_mask):
        y = kept_groups_conv(
            jnp.where(channel_mask[:, None, None], x, jnp.asarray(jnp.nan, dtype)),
            kernel,
            groups,
            group_size=group_size,
            padding=padding,
            block_rows=blocks[0],
            block_features=blocks[1],
            interpret=True,
        )
        return y, masked_conv(x, kernel, channel_mask, padding)

    y, expected = both(x, kernel, jnp.asarray(groups), channel_mask)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(
        np.asarray(y, np.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@hypothesis.settings(max_examples=12)
@given(st.data())
def test_equals_the_masked_convolution(data):
    kernel_size, size, padding = [], [], []
    for _ in range(2):
        taps, cells = data.draw(st.sampled_from([1, 3, 5])), data.draw(st.integers(1, 9))
        before = data.draw(st.integers(0, 2))
        after = data.draw(st.integers(max(0, taps - cells - before), 4))
        kernel_size.append(taps)
        size.append(cells)
        padding.append((before, after))
    total = data.draw(st.integers(1, 4))
    check(
        np.random.default_rng(data.draw(st.integers(0, 99))),
        data.draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
        batch=data.draw(st.integers(1, 3)),
        size=size,
        kernel_size=kernel_size,
        padding=tuple(padding),
        group_size=data.draw(st.sampled_from([1, 2, 16])),
        kept=data.draw(st.integers(1, total)),
        total=total,
        features=data.draw(st.integers(1, 20)),
        blocks=data.draw(st.sampled_from([(4, 4), (16, 16), (128, 128)])),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [48, 128])
def test_a_group_wider_than_a_step_is_several(dtype, group_size):
    check(
        np.random.default_rng(0),
        dtype,
        batch=2,
        size=(4, 5),
        kernel_size=(3, 3),
        padding=SAME,
        group_size=group_size,
        kept=2,
        total=3,
        features=5,
        blocks=(16, 16),
    )


# JAX deprecates the back end from 0.12 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("taps", "group_size", "features"), [(1, 16, 20), (3, 48, 200)])
def test_lowers_for_cuda_without_a_gpu(dtype, taps, group_size, features):
    args = (
        jax.ShapeDtypeStruct((2, 9, 9, 2 * group_size), dtype),
        jax.ShapeDtypeStruct((taps, taps, 2 * group_size, features), dtype),
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
    )
    conv = functools.partial(kept_groups_conv, group_size=group_size, padding=SAME)
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        lowered = jax.jit(conv).trace(*args).lower(lowering_platforms=("cuda",))
    assert exported._UNCHECKED[-1] in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": jnp.zeros((1, 0), jnp.int32)}, "no group is kept"),
        ({"group_size": 24}, "64 channels cannot be divided into groups of 24"),
        ({"padding": ((0, 0), (0, 1))}, "the kernel, 3 x 3, is larger than the padded map, 2 x 3"),
        ({"group_size": 8}, "group_size is 8; Triton needs a multiple of 16"),
        ({"block_rows": 8}, "block_rows is 8; Triton needs a power of two"),
        ({"block_features": 48}, "block_features is 48; Triton needs a power of two"),
    ],
)
def test_says_what_is_wrong_with_the_arguments(change, message):
    arguments = {"groups": jnp.zeros((1, 1), jnp.int32), "group_size": 16, "padding": SAME}
    with pytest.raises(ValueError, match=message):
        kept_groups_conv(jnp.zeros((1, 2, 2, 64)), jnp.zeros((3, 3, 64, 4)), **(arguments | change))
