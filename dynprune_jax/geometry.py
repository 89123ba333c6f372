"""Where the taps of a convolution fall on its input."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

# Paddings that repeat the map instead of adding zeros around it.
_REPEATING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the taps of a convolution fall on its input: all static.

    Attributes:
      height: of the input, in columns.
      width: of the input, in columns.
      kernel: height and width of the kernel.
      strides: down and across.
      dilation: of the kernel, down and across.
      padding: zeros before and after, down and across.
    """

    height: int
    width: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @classmethod
    def of(cls, conv: nnx.Conv, height: int, width: int) -> "Geometry":
        """The geometry of a convolution of maps of this size.

        A padding that repeats the map is no part of it: `repeat_map` adds that before.
        """
        kernel, strides = pair(conv.kernel_size), pair(conv.strides)
        dilation, padding = pair(conv.kernel_dilation), conv.padding
        if repeats(conv):
            padding = "VALID"
        if isinstance(padding, str):
            padding = lax.padtype_to_pads((height, width), spans(conv), strides, padding)
        elif isinstance(padding, int):
            padding = (padding, padding)
        down, across = (pair(side) for side in padding)
        return cls(height, width, kernel, strides, dilation, (down, across))

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            max(0, (n + sum(pad) - (k - 1) * d - 1) // s + 1)
            for n, pad, k, d, s in zip(
                (self.height, self.width),
                self.padding,
                self.kernel,
                self.dilation,
                self.strides,
                strict=True,
            )
        )
        return height, width

    def down(self, tap: int) -> slice:
        """The rows of the padded input that a row of the kernel meets, one for each output row."""
        return self._meets(0, tap)

    def across(self, tap: int) -> slice:
        """The same of columns of the kernel and of the padded input."""
        return self._meets(1, tap)

    def patches(
        self, padded: Float[Array, "*batch padded_height padded_width channels"]
    ) -> Float[Array, "*batch out_height out_width taps_channels"]:
        """Of each column of the output, the taps of the padded input beside each other."""
        views = [
            padded[..., self.down(i), self.across(j), :]
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]
        return views[0] if len(views) == 1 else jnp.concatenate(views, axis=-1)

    def _meets(self, axis: int, tap: int) -> slice:
        start, count, step = tap * self.dilation[axis], self.out[axis], self.strides[axis]
        return slice(start, start + (count - 1) * step + 1 if count else start, step)


def repeats(conv: nnx.Conv) -> bool:
    """Whether the padding repeats the map."""
    return isinstance(conv.padding, str) and conv.padding in _REPEATING  # it may be a list


def repeat_map(
    conv: nnx.Conv, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch padded_height padded_width channels"]:
    """Adds the padding that `CIRCULAR` and `REFLECT` mean, as `nnx.Conv` does."""
    sides = [((span - 1) // 2, span // 2) for span in spans(conv)]
    return jnp.pad(x, ((0, 0), *sides, (0, 0)), mode=_REPEATING[str(conv.padding)])


def spans(conv: nnx.Conv) -> list[int]:
    """The columns that a kernel spans, down and across."""
    sizes = zip(pair(conv.kernel_size), pair(conv.kernel_dilation), strict=True)
    return [(size - 1) * dilation + 1 for size, dilation in sizes]


def pair(value: Any) -> tuple[int, int]:
    """What is set for both sides at once, or is not set, as one number for each side."""
    if value is None:
        return (1, 1)
    if isinstance(value, int | np.integer):
        return (int(value), int(value))
    first, second = value
    return int(first), int(second)
