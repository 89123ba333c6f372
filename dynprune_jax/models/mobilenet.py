"""MobileNetV2, whose 3x3 convolutions are depthwise: for ImageNet and for CIFAR."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dynprune_jax.models.layers import check_image_size, classifier, conv, norm, scaled

# A row of the paper's table 2: expansion, output channels, number of units, stride of the first.
Row = tuple[int, int, int, int]
_STAGES: tuple[tuple[Row, ...], ...] = (
    ((1, 16, 1, 1),),
    ((6, 24, 2, 2),),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedUnit(nnx.Module):
    """1x1 to more channels, 3x3 of each by itself, 1x1 to few; beside the input where that fits.

    Of an expansion of 1 the first is left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        n = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand = conv(in_channels, n, kernel_size=1, dtype=dtype, rngs=rngs)
            self.expand_norm = norm(n, rngs=rngs)
        self.depthwise = conv(n, n, stride=stride, groups=n, dtype=dtype, rngs=rngs)
        self.depthwise_norm = norm(n, rngs=rngs)
        self.project = conv(n, out_channels, kernel_size=1, dtype=dtype, rngs=rngs)
        self.project_norm = norm(out_channels, rngs=rngs)
        self.adds = stride == 1 and in_channels == out_channels

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Adds the branch to its input where both have one shape; there is no relu behind it."""
        y = x
        if self.expands:
            y = nnx.relu6(self.expand_norm(self.expand(y))).astype(x.dtype)
        y = nnx.relu6(self.depthwise_norm(self.depthwise(y))).astype(x.dtype)
        y = self.project_norm(self.project(y))
        return (x.astype(y.dtype) + y if self.adds else y).astype(x.dtype)


class LastUnit(nnx.Module):
    """The 1x1 convolution to the many channels that the head reads, normalization and relu6."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(in_channels, out_channels, kernel_size=1, dtype=dtype, rngs=rngs)
        self.norm = norm(out_channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Maps a feature map to the last one, of the same resolution."""
        y = self.conv(x)
        return nnx.relu6(self.norm(y)).astype(y.dtype)


class MobileNetV2(nnx.Module):
    """A 3x3 stem, five stages of inverted units, a 1x1 convolution to 1280 channels, a linear head.

    Attributes:
      stem, stem_norm: the first convolution and its normalization.
      blocks: one `nnx.Sequential` of units per stage; at 224x224 each has a resolution of its own.
        The last convolution is the last unit of the last.
      head: the linear layer on the mean of the last map.

    Args:
      stem_stride: of the first convolution.
      stages: the rows of each.
      num_classes: width of the logits.
      in_channels: channels of the image.
      width: factor on the channels of every convolution, rounded, at least 1 channel; below 1 the
        last one keeps its own, as in the paper.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    References:
      Sandler et al. 2018, arXiv 1801.04381, table 2.
    """

    def __init__(
        self,
        stem_stride: int,
        stages: Sequence[Sequence[Row]],
        num_classes: int,
        *,
        in_channels: int,
        width: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inputs = scaled(32, width)
        self.stem = conv(in_channels, inputs, stride=stem_stride, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(inputs, rngs=rngs)
        blocks = []
        for rows in stages:
            units = []
            for expansion, channels, count, stride in rows:
                for i in range(count):
                    outputs = scaled(channels, width)
                    units.append(
                        InvertedUnit(
                            inputs,
                            outputs,
                            expansion=expansion,
                            stride=1 if i else stride,
                            dtype=dtype,
                            rngs=rngs,
                        )
                    )
                    inputs = outputs
            blocks.append(units)
        outputs = scaled(1280, max(width, 1.0))
        blocks[-1].append(LastUnit(inputs, outputs, dtype=dtype, rngs=rngs))
        self.blocks = nnx.List([nnx.Sequential(*units) for units in blocks])
        self.head = classifier(outputs, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Classifies images; the logits are float32 in every compute dtype."""
        x = self.stem(images)
        x = nnx.relu6(self.stem_norm(x)).astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def mobilenet_v2(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> MobileNetV2:
    """Builds MobileNetV2 for ImageNet: 3.50 M parameters, 300.8 M MACs at 1000 classes.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 32.
      width: factor on the channels of every convolution, rounded, at least 1 channel; below 1 the
        last one keeps its own.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 5 blocks.

    Raises:
      ValueError: if `image_size` is below 32, or `width` is not above 0.
    """
    check_image_size("mobilenet_v2", image_size, at_least=32)
    return MobileNetV2(
        2,
        _STAGES,
        num_classes,
        in_channels=in_channels,
        width=width,
        dtype=dtype,
        rngs=rngs,
    )


def mobilenet_v2_cifar(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> MobileNetV2:
    """Builds MobileNetV2 for small images, without its first two strides.

    Dense cost at 32x32 and 10 classes: 88.0 M MACs per image, with 2.24 M parameters.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 8.
      width: factor on the channels of every convolution, rounded, at least 1 channel; below 1 the
        last one keeps its own.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 5 blocks.

    Raises:
      ValueError: if `image_size` is below 8, or `width` is not above 0.
    """
    check_image_size("mobilenet_v2_cifar", image_size, at_least=8)
    return MobileNetV2(
        1,
        (_STAGES[0], ((6, 24, 2, 1),), *_STAGES[2:]),
        num_classes,
        in_channels=in_channels,
        width=width,
        dtype=dtype,
        rngs=rngs,
    )
