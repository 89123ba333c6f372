"""`lax.conv_general_dilated`, the same function, where XLA for CPUs is slow to train it.

Two things can take most of the time of a step on a CPU (with jax 0.10 and 0.12; docs/speed.md has
what it gains):

- A map that is smaller than the kernel falls out of XLA's fast convolutions. VGG16 spent three
  quarters of its time on the maps of 2x2 columns in its last block, 9 % of its MACs.
- The gradient of a kernel reads the convolution's input again. XLA would rather work that input
  out anew than read it where it is kept, and of a residual network it is the sum of every unit
  before it: the deeper the network, the longer each of those sums.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def convolve(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width group_channels features"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "batch out_height out_width features"]:
    """Convolves as `lax.conv_general_dilated` does, to rounding: `nnx.Conv` takes it by that name.

    Args:
      x: the maps.
      kernel: of the convolution.
      window_strides: step of the kernel, in rows and columns.
      padding: as of `lax.conv_general_dilated`.
      lhs_dilation: likewise.
      rhs_dilation: likewise.
      feature_group_count: likewise.
      **options: what else `lax.conv_general_dilated` is to be given.
    """
    if jax.default_backend() == "cpu":
        # Where `training_options` hold, what is behind this is not worked out anew.
        x = lax.optimization_barrier(x)
        plain = feature_group_count == 1 and all(
            step == 1 for dilation in (lhs_dilation, rhs_dilation) for step in dilation or ()
        )
        if plain and any(n < k for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)):
            wanted = {k: options.get(k) for k in ("precision", "preferred_element_type")}
            return _product_of_patches(x, kernel, window_strides, padding, **wanted)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=feature_group_count,
        **options,
    )


def training_options() -> dict[str, str]:
    """The `compiler_options` for `jax.jit` of a step of training that goes through `convolve`.

    On a CPU XLA takes barriers out before it fuses operations; it is told not to.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def _product_of_patches(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """A convolution as one matrix product, the taps of its input laid out beside each other."""
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [max(0, n - k + 1) for n, k in zip(x.shape[1:3], size, strict=True)]
    taps = [
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]
    patches = jnp.concatenate(taps, axis=-1)
    return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), **options)
