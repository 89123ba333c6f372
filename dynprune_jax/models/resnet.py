"""ResNets for ImageNet: ResNet-18 of basic units and ResNet-50 of bottleneck units."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dynprune_jax.models.layers import check_image_size, classifier, conv, norm, scaled


def stem_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """Takes the maximum of 3x3 windows with stride 2, padded by one column on every side."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


class BasicUnit(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 projection where the shape changes."""

    expansion = 1  # output channels per channel of the 3x3 convolutions

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv1 = conv(in_channels, channels, stride=stride, dtype=dtype, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = conv(channels, channels, dtype=dtype, rngs=rngs)
        self.norm2 = norm(channels, zero_scale=True, rngs=rngs)
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.shortcut = conv(
                in_channels, channels, kernel_size=1, stride=stride, dtype=dtype, rngs=rngs
            )
            self.shortcut_norm = norm(channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Adds the residual branch to the shortcut, then relu."""
        y = nnx.relu(self.norm1(self.conv1(x))).astype(x.dtype)
        y = self.norm2(self.conv2(y))
        shortcut = self.shortcut_norm(self.shortcut(x)) if self.projects else x.astype(y.dtype)
        return nnx.relu(y + shortcut).astype(x.dtype)


class BottleneckUnit(nnx.Module):
    """1x1, 3x3 (with the stride, "v1.5") and 1x1 convolutions beside a shortcut."""

    expansion = 4  # output channels per channel of the 3x3 convolution

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, kernel_size=1, dtype=dtype, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = conv(channels, channels, stride=stride, dtype=dtype, rngs=rngs)
        self.norm2 = norm(channels, rngs=rngs)
        self.conv3 = conv(channels, out_channels, kernel_size=1, dtype=dtype, rngs=rngs)
        self.norm3 = norm(out_channels, zero_scale=True, rngs=rngs)
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.shortcut = conv(
                in_channels, out_channels, kernel_size=1, stride=stride, dtype=dtype, rngs=rngs
            )
            self.shortcut_norm = norm(out_channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Adds the residual branch to the shortcut, then relu."""
        y = nnx.relu(self.norm1(self.conv1(x))).astype(x.dtype)
        y = nnx.relu(self.norm2(self.conv2(y))).astype(x.dtype)
        y = self.norm3(self.conv3(y))
        shortcut = self.shortcut_norm(self.shortcut(x)) if self.projects else x.astype(y.dtype)
        return nnx.relu(y + shortcut).astype(x.dtype)


class ResNet(nnx.Module):
    """A 7x7 stem with a max pool, four stages of 64 to 512 channels, a linear head.

    Attributes:
      stem, stem_norm: the first convolution and its normalization.
      blocks: one `nnx.Sequential` of units per stage of equal resolution.
      head: the linear layer on the mean of the last map.

    Args:
      unit: class of the residual units.
      units: number of units of each stage.
      num_classes: width of the logits.
      in_channels: channels of the image.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    References:
      He et al. 2015, arXiv 1512.03385, table 1.
    """

    def __init__(
        self,
        unit: type[BasicUnit] | type[BottleneckUnit],
        units: Sequence[int],
        num_classes: int,
        *,
        in_channels: int,
        width: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inputs = scaled(64, width)
        self.stem = conv(in_channels, inputs, kernel_size=7, stride=2, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(inputs, rngs=rngs)
        blocks = []
        for stage, count in enumerate(units):
            channels = scaled(64 * 2**stage, width)
            layers = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(unit(inputs, channels, stride=stride, dtype=dtype, rngs=rngs))
                inputs = channels * unit.expansion
            blocks.append(nnx.Sequential(*layers))
        self.blocks = nnx.List(blocks)
        self.head = classifier(inputs, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Classifies images; the logits are float32 in every compute dtype."""
        x = self.stem(images)
        x = nnx.relu(self.stem_norm(x)).astype(x.dtype)
        x = stem_pool(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def resnet18(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Builds ResNet-18 for ImageNet: basic units, 11.69 M parameters at 1000 classes.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 32.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 4 blocks.

    Raises:
      ValueError: if `image_size` is below 32, or `width` is not above 0.
    """
    check_image_size("resnet18", image_size, at_least=32)
    return ResNet(
        BasicUnit,
        (2, 2, 2, 2),
        num_classes,
        in_channels=in_channels,
        width=width,
        dtype=dtype,
        rngs=rngs,
    )


def resnet50(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Builds ResNet-50 (v1.5) for ImageNet: 25.56 M parameters at 1000 classes.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 32.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 4 blocks.

    Raises:
      ValueError: if `image_size` is below 32, or `width` is not above 0.
    """
    check_image_size("resnet50", image_size, at_least=32)
    return ResNet(
        BottleneckUnit,
        (3, 4, 6, 3),
        num_classes,
        in_channels=in_channels,
        width=width,
        dtype=dtype,
        rngs=rngs,
    )
