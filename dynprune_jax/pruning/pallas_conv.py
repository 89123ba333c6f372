"""A convolution that reads only the kept groups of channels: an implicit matrix product."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

# Chosen for an H100 from what Triton compiles to (registers, shared memory), not from timings.
_SLICE = 128  # bytes of channels in one step: the widest line that the matrix unit reads
_TILES = 96 * 1024  # bytes of the tiles in flight: two programs fit on one multiprocessor
_MAX_STAGES = 6  # steps in flight where the tiles are small


def kept_groups_conv(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    groups: Int[Array, "batch kept_groups"],
    *,
    group_size: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    block_rows: int = 128,
    block_features: int = 128,
    interpret: bool = False,
) -> Float[Array, "batch out_height out_width features"]:
    """Convolves the kept groups of channels of each input, at stride 1 and dilation 1.

    Equal, to rounding, to the dense convolution of `x` with all other groups set to zero. One
    Pallas kernel sums over the kept groups and over the positions in `kernel` (the taps) in
    float32 and writes each output once; it never reads the other groups.

    The padded map's rows are laid end to end. Along that line, each tap of consecutive outputs
    reads consecutive positions. Outputs that would straddle two rows, `kernel_width - 1` in each,
    are computed too and cropped.

    It lowers for NVIDIA GPUs through Pallas's Triton back end, of which JAX 0.12 warns that it is
    deprecated; with `interpret` it runs anywhere. It is for inference: it has no gradient.

    Args:
      x: the feature maps. Float32 is multiplied at JAX's default precision: TF32 on such a GPU.
      kernel: of the dtype of `x`.
      groups: what each input keeps, ascending. Group `g` is the `group_size` channels from
        `g * group_size`. That they are in range is not checked.
      group_size: channels in a group; without `interpret`, a multiple of 16.
      padding: zeros before and after the height, then the width.
      block_rows: positions in a tile of the output, fewer for a small map; without `interpret`,
        a power of two and at least 16.
      block_features: features in a tile of the output, likewise.
      interpret: whether to evaluate the kernel with plain JAX operations: slow, for tests.

    Returns:
      The outputs, of the dtype of `x`.

    Raises:
      ValueError: for no kept group, groups that do not divide the channels, a kernel larger than
        the padded map, or a size that Triton cannot tile.
    """
    batch, height, width, channels = x.shape
    kernel_height, kernel_width, _, features = kernel.shape
    (top, bottom), (left, right) = padding
    padded_height = top + height + bottom
    padded_width = left + width + right
    out_height = padded_height - kernel_height + 1
    out_width = padded_width - kernel_width + 1
    if not groups.shape[1]:
        raise ValueError("no group is kept; each input must keep at least one")
    if channels % group_size:
        raise ValueError(f"{channels} channels cannot be divided into groups of {group_size}")
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"the kernel, {kernel_height} x {kernel_width}, is larger than the padded map,"
            f" {padded_height} x {padded_width}"
        )
    if not interpret:
        if group_size % 16:
            raise ValueError(f"group_size is {group_size}; Triton needs a multiple of 16")
        for name, block in (("block_rows", block_rows), ("block_features", block_features)):
            if block < 16 or block != pl.next_power_of_2(block):
                raise ValueError(f"{name} is {block}; Triton needs a power of two, at least 16")

    positions = out_height * padded_width
    block_rows = min(block_rows, max(16, pl.next_power_of_2(positions)))
    block_features = min(block_features, max(16, pl.next_power_of_2(features)))
    row_tiles = pl.cdiv(positions, block_rows)
    feature_tiles = pl.cdiv(features, block_features)

    # The last tap of the last tile reads past the padded map: whole rows more, in the same pad.
    read = row_tiles * block_rows + (kernel_height - 1) * padded_width + kernel_width - 1
    extra = pl.cdiv(read, padded_width) - padded_height
    line = jnp.pad(x, ((0, 0), (top, bottom + extra), (left, right), (0, 0)))
    line = line.reshape(batch, -1, channels)
    weights = kernel.reshape(kernel_height * kernel_width * channels, features)
    weights = jnp.pad(weights, ((0, 0), (0, feature_tiles * block_features - features)))

    # A step multiplies one slice of the channels; a wide group is several slices.
    slice_size = math.gcd(group_size, _SLICE // x.dtype.itemsize)
    per_group = group_size // slice_size
    slices = groups.astype(jnp.int32)[:, :, None] * per_group + jnp.arange(per_group)[None, None]
    slices = slices.reshape(batch, -1)

    stage_bytes = (block_rows + block_features) * slice_size * x.dtype.itemsize
    y = pl.pallas_call(
        functools.partial(
            _tile,
            kernel_size=(kernel_height, kernel_width),
            padded_width=padded_width,
            slice_size=slice_size,
        ),
        # CUDA advances the first axis fastest: the programs that run at a time then share the
        # positions of a few inputs, which stay in the cache.
        grid=(feature_tiles, row_tiles, batch),
        in_specs=[
            pl.BlockSpec((None, slices.shape[1]), lambda feature, row, image: (image, 0)),
            pl.BlockSpec((None, *line.shape[1:]), lambda feature, row, image: (image, 0, 0)),
            pl.BlockSpec((len(weights), block_features), lambda feature, row, image: (0, feature)),
        ],
        out_specs=pl.BlockSpec(
            (None, block_rows, block_features), lambda feature, row, image: (image, row, feature)
        ),
        # Whole tiles, as not every version of the back end masks a store that reaches beyond.
        out_shape=jax.ShapeDtypeStruct(
            (batch, row_tiles * block_rows, feature_tiles * block_features), x.dtype
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if block_rows * block_features > 64 * 128 else 4,
            num_stages=min(_MAX_STAGES, max(2, _TILES // stage_bytes)),
        ),
        interpret=interpret,
    )(slices, line, weights)
    y = y[:, :positions, :features].reshape(batch, out_height, padded_width, features)
    return y[:, :, :out_width]


def _tile(slices_ref, line_ref, weights_ref, y_ref, *, kernel_size, padded_width, slice_size):
    """Computes one tile of the output of one input.

    Args:
      slices_ref: the slices of the channels that the input keeps, `(kept_slices,)`.
      line_ref: its padded map, `(positions, channels)`.
      weights_ref: those of the tile's features, `(taps * channels, block_features)`.
      y_ref: the tile, `(block_rows, block_features)`.
      kernel_size: height and width.
      padded_width: positions in a row of the padded map.
      slice_size: channels in a slice.
    """
    kernel_height, kernel_width = kernel_size
    taps = kernel_height * kernel_width
    kept = slices_ref.shape[0]
    channels = line_ref.shape[1]
    block_rows = y_ref.shape[0]
    first_row = pl.program_id(1) * block_rows

    # Triton overlaps the loads of later steps with a product within the innermost loop alone, so
    # there is one loop over (slice, tap). The channel is carried, read one step ahead: a load
    # that waits for another of its own step would halve how many steps are in flight.
    def step(index, carry):
        total, channel = carry
        tap = lax.rem(index, taps)
        row = first_row + lax.div(tap, kernel_width) * padded_width + lax.rem(tap, kernel_width)
        total += lax.dot_general(
            line_ref[pl.ds(row, block_rows), pl.ds(channel, slice_size)],
            weights_ref[pl.ds(tap * channels + channel, slice_size), :],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        following = jnp.minimum(lax.div(index + 1, taps), kept - 1)
        return total, slices_ref[following] * slice_size

    start = jnp.zeros(y_ref.shape, jnp.float32), slices_ref[0] * slice_size
    total, _ = lax.fori_loop(0, kept * taps, step, start)
    y_ref[...] = total.astype(y_ref.dtype)
