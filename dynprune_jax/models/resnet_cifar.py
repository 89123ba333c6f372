"""ResNets for 32x32 images with parameter-free shortcuts: ResNet-20, 56 and 110."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dynprune_jax.models.layers import check_image_size, classifier, conv, norm, scaled


def option_a_shortcut(
    x: Float[Array, "batch height width channels"], out_channels: int, stride: int
) -> Float[Array, "batch out_height out_width out_channels"]:
    """Fits a map to its residual branch without parameters ("option A").

    Args:
      x: the unit's input.
      out_channels: channels of the branch's output, at least those of `x`.
      stride: stride of the branch, in columns.

    Returns:
      Every `stride`-th column of `x`, with zero channels appended.

    References:
      He et al. 2015, arXiv 1512.03385, sections 3.3 and 4.2.
    """
    extra = out_channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, extra)))


class CifarUnit(nnx.Module):
    """Two 3x3 convolutions beside an option-A shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(in_channels, out_channels, stride=stride, dtype=dtype, rngs=rngs)
        self.norm1 = norm(out_channels, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = norm(out_channels, rngs=rngs)
        self.out_channels = out_channels
        self.stride = stride

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Adds the residual branch to the shortcut, then relu."""
        y = nnx.relu(self.norm1(self.conv1(x))).astype(x.dtype)
        y = self.norm2(self.conv2(y))
        shortcut = option_a_shortcut(x, self.out_channels, self.stride)
        return nnx.relu(y + shortcut.astype(y.dtype)).astype(x.dtype)


class CifarResNet(nnx.Module):
    """A stem, three stages of basic units with 16, 32 and 64 channels, a linear head.

    Attributes:
      stem, stem_norm: the first convolution and its normalization.
      blocks: one `nnx.Sequential` of `CifarUnit`s per stage of equal resolution.
      head: the linear layer on the mean of the last map.

    Args:
      units: residual units per stage; the depth is 6 x units + 2.
      num_classes: width of the logits.
      in_channels: channels of the image.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    References:
      He et al. 2015, arXiv 1512.03385, section 4.2.
    """

    def __init__(
        self,
        units: int,
        num_classes: int,
        *,
        in_channels: int,
        width: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        first, second, third = (scaled(channels, width) for channels in (16, 32, 64))
        self.stem = conv(in_channels, first, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(first, rngs=rngs)
        self.blocks = nnx.List(
            nnx.Sequential(
                CifarUnit(inputs, channels, stride=stride, dtype=dtype, rngs=rngs),
                *[
                    CifarUnit(channels, channels, stride=1, dtype=dtype, rngs=rngs)
                    for _ in range(units - 1)
                ],
            )
            for inputs, channels, stride in (
                (first, first, 1),
                (first, second, 2),
                (second, third, 2),
            )
        )
        self.head = classifier(third, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Classifies images; the logits are float32 in every compute dtype."""
        x = self.stem(images)
        x = nnx.relu(self.stem_norm(x)).astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def resnet20(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> CifarResNet:
    """Builds ResNet-20 for CIFAR: 3 units per stage, 0.27 M parameters.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 4.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 3 blocks.

    Raises:
      ValueError: if `image_size` is below 4, or `width` is not above 0.
    """
    check_image_size("resnet20", image_size, at_least=4)
    return CifarResNet(3, num_classes, in_channels=in_channels, width=width, dtype=dtype, rngs=rngs)


def resnet56(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> CifarResNet:
    """Builds ResNet-56 for CIFAR: 9 units per stage, 0.85 M parameters.

    Dense cost at 32x32 and 10 classes: 125.5 M MACs per image.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 4.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 3 blocks.

    Raises:
      ValueError: if `image_size` is below 4, or `width` is not above 0.
    """
    check_image_size("resnet56", image_size, at_least=4)
    return CifarResNet(9, num_classes, in_channels=in_channels, width=width, dtype=dtype, rngs=rngs)


def resnet110(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> CifarResNet:
    """Builds ResNet-110 for CIFAR: 18 units per stage, 1.7 M parameters.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 4.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 3 blocks.

    Raises:
      ValueError: if `image_size` is below 4, or `width` is not above 0.
    """
    check_image_size("resnet110", image_size, at_least=4)
    return CifarResNet(
        18, num_classes, in_channels=in_channels, width=width, dtype=dtype, rngs=rngs
    )
