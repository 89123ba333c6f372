"""`lax.conv_general_dilated`, the same function, where XLA for CPUs is slow to train it.

Four things can take most of the time of a step on a CPU (docs/speed.md has what that costs):

- A map that is smaller than the kernel falls out of XLA's fast convolutions. VGG16 spent three
  quarters of its time on the maps of 2x2 columns in its last block, 9 % of its MACs.
- A depthwise convolution goes through one value at a time. MobileNetV2 spent nine tenths of its
  time on a tenth of its MACs, forwards alone.
- Any other grouped convolution goes through one value at a time too, and its gradients take many
  times as long as it does. Its groups one after the other are ordinary convolutions.
- The gradient of a kernel reads the convolution's input again. XLA would rather work that input
  out anew than read it where it is kept, and of a residual network it is the sum of every unit
  before it: the deeper the network, the longer each of those sums.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dynprune_jax.geometry import Geometry, pair

# What the call of a depthwise convolution is named in a traced program: by that it is counted.
DEPTHWISE = "sum_of_shifted_maps"
_MOST_TAPS = 49  # of more the gradient of such a sum takes long to compile
MOST_GROUPS = 64  # of more the convolutions, one for each, take long to compile

_IMAGES = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def convolve(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Convolves as `lax.conv_general_dilated` does, to rounding; its options are those it has too.

    For `nnx.Conv(..., conv_general_dilated=convolve)`. Which way it goes is decided when it is
    traced, by the default device: a program that is exported from there keeps it. A depthwise one
    has no derivative in forward mode (`jax.jvp`) on a CPU.

    Args:
      x: maps, from `nnx.Conv` `(batch, height, width, channels)`.
      kernel: likewise `(height, width, channels of a group, features)`.
      window_strides: of the kernel, in rows and columns.
      padding: rows and columns of zeros before and after, or `SAME` or `VALID`.
      lhs_dilation: of the maps.
      rhs_dilation: of the kernel.
      dimension_numbers: the order of the axes.
      feature_group_count: groups of channels.
      precision: of the products.
      preferred_element_type: of the result.
      out_sharding: of the result.

    Returns:
      From `nnx.Conv` `(batch, out_height, out_width, features)`.

    Raises:
      TypeError, ValueError: what `lax.conv_general_dilated` raises.
    """
    dense = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if jax.default_backend() != "cpu":
        return dense(x, kernel)
    # Where `training_options` hold, what is in front of this is not worked out anew.
    x = lax.optimization_barrier(x)
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    if x.ndim != 4 or numbers != _IMAGES or out_sharding is not None or not kernel.size:
        return dense(x, kernel)
    dtype = jax.eval_shape(dense, x, kernel).dtype  # refuses what it refuses
    size = kernel.shape[:2]
    dilated = any(step != 1 for by in (lhs_dilation, rhs_dilation) for step in by or ())
    depthwise = 1 < feature_group_count == x.shape[-1] == kernel.shape[-1]
    single = depthwise and not dilated
    single &= jnp.issubdtype(x.dtype, jnp.floating) and size[0] * size[1] <= _MOST_TAPS
    single &= preferred_element_type in (None, x.dtype, jnp.float32)
    if single:
        y: Any = _depthwise(*_padded(x, size, window_strides, padding), kernel)
        return y.astype(dtype)
    if 1 < feature_group_count <= MOST_GROUPS and not depthwise:
        of_group = functools.partial(dense, feature_group_count=1)
        parts = (jnp.split(a, feature_group_count, axis=-1) for a in (x, kernel))
        return jnp.concatenate(list(map(of_group, *parts)), axis=-1)
    small = x.shape[1] < size[0] and x.shape[2] < size[1] and not dilated
    if small and feature_group_count == 1:
        geometry, padded = _padded(x, size, window_strides, padding)
        return jnp.matmul(
            geometry.patches(padded),
            kernel.reshape(-1, kernel.shape[-1]),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    return dense(x, kernel)


@functools.partial(jax.jit, static_argnums=0)  # so that the program has its name, `DEPTHWISE`
def sum_of_shifted_maps(
    geometry: Geometry,
    padded: Float[Array, "*batch padded_height padded_width channels"],
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
) -> Float[Array, "*batch out_height out_width channels"]:
    """Convolves each channel by itself: shifted maps, each times one tap of the kernel, added up.

    XLA makes one pass over the map of it.

    Args:
      geometry: of the convolution, on the map without its padding.
      padded: the map with zeros around it.
      kernel: its taps, one for each channel.

    Returns:
      The map, in float32, or in the dtype of `padded` if that is wider.
    """
    dtype = padded.dtype if jnp.finfo(padded.dtype).bits > 32 else jnp.float32
    padded = padded.astype(dtype)  # as a whole: so the gradient too is rounded once
    taps = kernel.astype(dtype).reshape(*kernel.shape[:2], *[1] * (padded.ndim - 1), -1)
    terms = (
        padded[..., geometry.down(i), geometry.across(j), :] * taps[i, j]
        for i in range(geometry.kernel[0])
        for j in range(geometry.kernel[1])
    )
    return functools.reduce(jnp.add, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(geometry: Geometry, padded: Array, kernel: Array) -> Array:
    """`sum_of_shifted_maps`, with the gradient of the kernel worked out row by row.

    By itself XLA would write out a product of two maps for every tap, and keep them all.
    """
    return sum_of_shifted_maps(geometry, padded, kernel)


def _forwards(geometry: Geometry, padded: Array, kernel: Array) -> tuple[Array, Any]:
    return sum_of_shifted_maps(geometry, padded, kernel), (padded, kernel)


def _backwards(geometry: Geometry, held: Any, dy: Array) -> tuple[Array, Array]:
    padded, kernel = held
    dy = lax.optimization_barrier(dy)  # it is read for every tap, and not worked out for each
    (dx,) = jax.vjp(lambda padded: sum_of_shifted_maps(geometry, padded, kernel), padded)[1](dy)
    height, width = geometry.kernel

    def add_row(row: Any, sums: list[Array]) -> list[Array]:
        of_output = lax.dynamic_index_in_dim(dy, row, -3, keepdims=False)
        met = []
        for i in range(height):
            place = row * geometry.strides[0] + i * geometry.dilation[0]
            of_input = lax.dynamic_index_in_dim(padded, place, -3, keepdims=False).astype(dy.dtype)
            met += [of_input[..., geometry.across(j), :] for j in range(width)]
        return [total + x * of_output for total, x in zip(sums, met, strict=True)]

    # A row, of the same sharding if it has one.
    nothing = jnp.zeros_like(jnp.sum(dy[..., :1, :, :], axis=-3))
    sums = lax.fori_loop(0, geometry.out[0], add_row, [nothing] * (height * width))
    taps = jnp.stack([jnp.sum(total, range(total.ndim - 1)) for total in sums])
    return dx, taps.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_forwards, _backwards)


def training_options() -> dict[str, str]:
    """The `compiler_options` for `jax.jit` of a step of training that goes through `convolve`.

    On a CPU XLA takes barriers out before it fuses operations; it is told not to. The options are
    for the outermost `jax.jit`; `nnx.jit` takes none.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def _padded(
    x: Array, size: tuple[int, ...], strides: Sequence[int], padding: Any
) -> tuple[Geometry, Array]:
    """Where the taps fall on a map, and the map with zeros around it."""
    height, width = x.shape[1:3]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads((height, width), size, strides, padding)
    down, across = map(pair, padding)
    # Padding may be negative, which `jnp.pad` refuses.
    sides = [(0, 0, 0), (*down, 0), (*across, 0), (0, 0, 0)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), sides)
    return Geometry(height, width, pair(size), pair(strides), padding=(down, across)), padded
