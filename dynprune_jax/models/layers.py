"""The convolution and the batch normalization that every architecture here is made of."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dynprune_jax.convolution import convolve


def conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Builds a square convolution without bias, He-normal (fan-out) initialised.

    Args:
      in_channels: channels of the input map.
      out_channels: channels of the output map.
      kernel_size: side of the kernel in columns, an odd number.
      stride: step of the kernel in columns.
      groups: of channels that are convolved by themselves.
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
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def norm(channels: int, *, zero_scale: bool = False, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Builds a batch normalization with momentum 0.9 and epsilon 1e-5.

    It returns float32 whatever it is given: statistics of a half-precision map would lose most
    of their digits. The units below add and rectify in float32 too and round the finished map
    once, to the compute dtype; XLA fuses all of it into one pass. (A bfloat16 relu would also
    meet a fault of jaxlib 0.12.0: on a CPU it can come out as zeros or NaN.)

    Args:
      channels: channels of the map.
      zero_scale: start the scale at zero, so that a residual branch starts as nothing
        (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
      rngs: source of keys; the initial values are constants.

    Returns:
      The normalization; `train()` makes it use and update the statistics of the batch, `eval()`
      the stored ones.
    """
    return nnx.BatchNorm(
        channels,
        momentum=0.9,
        epsilon=1e-5,
        dtype=jnp.float32,
        scale_init=nnx.initializers.zeros if zero_scale else nnx.initializers.ones,
        rngs=rngs,
    )


def classifier(features: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Builds the layer that ends a model: it computes float32 logits whatever it is given.

    A bfloat16 logit of 10 is off by up to 0.03, and a loss sees every digit.

    Args:
      features: of the vector that it reads.
      num_classes: width of the logits.
      rngs: source of the kernel's key.
    """
    return nnx.Linear(features, num_classes, dtype=jnp.float32, rngs=rngs)


def scaled(channels: int, width: float) -> int:
    """Scales a number of channels, for a physically smaller or larger network.

    Args:
      channels: the number at width 1.
      width: the factor, above 0.

    Returns:
      `channels * width`, rounded, at least 1.

    Raises:
      ValueError: if `width` is not a finite number above 0.
    """
    if not 0.0 < width < math.inf:
        raise ValueError(f"width is {width}; it must be a finite number above 0")
    return max(1, round(channels * width))


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
