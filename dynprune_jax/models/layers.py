"""The convolution and the batch normalization that every architecture here is made of."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Builds a square convolution without bias, He-normal (fan-out) initialised.

    Args:
      in_channels: channels of the input map.
      out_channels: channels of the output map.
      kernel_size: side of the kernel in columns, an odd number.
      stride: step of the kernel in columns.
      dtype: compute dtype; the kernel itself is float32.
      rngs: source of the kernel's key.

    Returns:
      The convolution; a side of n columns leaves it with ceil(n / stride).

    References:
      He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852.
    """
    # Padding is the same on both sides, as in the original networks. "SAME" would put the extra
    # column of a strided convolution on the right only, one column off a subsampled shortcut.
    side = (kernel_size // 2, kernel_size // 2)
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=(side, side),
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalization computed in float32 that returns the dtype of its input.

    Momentum is 0.9 and epsilon 1e-5. `model.train()` uses and updates the batch statistics,
    `model.eval()` uses the stored ones.

    Args:
      num_features: channels of the map.
      zero_scale: start the scale at zero, so that a residual branch starts as the identity
        (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
      rngs: source of keys; none is drawn, the initial values are constants.
    """

    def __init__(self, num_features: int, *, zero_scale: bool = False, rngs: nnx.Rngs):
        ones_or_zeros = nnx.initializers.zeros if zero_scale else nnx.initializers.ones
        super().__init__(
            num_features,
            momentum=0.9,
            epsilon=1e-5,
            # Statistics of a half-precision map would lose most of their digits.
            dtype=jnp.float32,
            scale_init=ones_or_zeros,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """Normalizes a feature map.

        Args:
          x: the map, in any float dtype.
          use_running_average: overrides the mode set by `train()` and `eval()`.
          mask: broadcastable to `x`; positions that count in the batch statistics.

        Returns:
          The normalized map, in the dtype of `x`.
        """
        return super().__call__(x, use_running_average, mask=mask).astype(x.dtype)


def check_image_size(name: str, image_size: int, at_least: int) -> None:
    """Refuses an image that the strides of a model would reduce to nothing.

    Args:
      name: the factory's name, for the message.
      image_size: side of the square image, in pixels.
      at_least: the smallest side the model takes, in pixels.

    Raises:
      ValueError: if `image_size` is below `at_least`.
    """
    if image_size < at_least:
        raise ValueError(
            f"image_size {image_size} pools to nothing: {name} needs at least {at_least}"
        )
