"""VGG networks with batch normalization: for CIFAR, for ImageNet and for 16x16 digits."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dynprune_jax.models.layers import check_image_size, classifier, conv, norm, scaled

# (number of convolutions, their channels) of each block; VGG16 is column D of the paper's table 1.
_VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
_DIGITS = ((2, 32), (2, 64), (3, 128))


class VGGUnit(nnx.Module):
    """A 3x3 convolution, batch normalization and relu."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm = norm(out_channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Maps a feature map to the next, of the same resolution."""
        y = self.conv(x)
        return nnx.relu(self.norm(y)).astype(y.dtype)


def max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """Takes the maximum of each 2x2 window, with stride 2; an odd last row or column is left."""
    # XLA fuses this with the relu before it; for a window on a CPU it writes out the relu's zeros.
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def global_mean(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch channels"]:
    """Averages each channel over all columns."""
    return jnp.mean(x, axis=(1, 2))


def flatten(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
    """Lays each example's whole map out as one vector."""
    return x.reshape(x.shape[0], -1)


def _plan(plan: Sequence[tuple[int, int]], width: float) -> list[tuple[int, int]]:
    return [(count, scaled(channels, width)) for count, channels in plan]


class VGG(nnx.Module):
    """Blocks of 3x3 convolutions, each closed by a 2x2 max pool, then a head.

    Attributes:
      blocks: one `nnx.Sequential` per block: its `VGGUnit`s, then the max pool.
      to_features: turns the last map into one vector per example.
      head: turns that vector into logits.

    Args:
      plan: (number of convolutions, their channels) of each block.
      to_features: as the attribute.
      head: as the attribute.
      in_channels: channels of the image.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    References:
      Simonyan and Zisserman 2014, arXiv 1409.1556.
    """

    def __init__(
        self,
        plan: Sequence[tuple[int, int]],
        to_features: Callable[[Array], Array],
        head: nnx.Module,
        *,
        in_channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        blocks = []
        for count, channels in plan:
            inputs = (in_channels, *[channels] * (count - 1))
            units = [VGGUnit(n, channels, dtype=dtype, rngs=rngs) for n in inputs]
            blocks.append(nnx.Sequential(*units, max_pool))
            in_channels = channels
        self.blocks = nnx.List(blocks)
        self.to_features = to_features
        self.head = head

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Classifies images; the logits are float32 in every compute dtype."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.head(self.to_features(x))


def vgg16(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> VGG:
    """Builds VGG16-BN with the small head: global mean, then one linear layer.

    Dense cost at 32x32 and 10 classes: 313.2 M MACs per image.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 32.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 5 blocks.

    Raises:
      ValueError: if `image_size` is below 32, or `width` is not above 0.
    """
    check_image_size("vgg16", image_size, at_least=32)
    plan = _plan(_VGG16, width)
    head = classifier(plan[-1][1], num_classes, rngs=rngs)
    return VGG(plan, global_mean, head, in_channels=in_channels, dtype=dtype, rngs=rngs)


def vgg16_imagenet(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> VGG:
    """Builds VGG16-BN with the paper's head: two layers of 4096 with dropout 0.5, one linear.

    The head reads the flattened last map, so the model takes images of `image_size` only.
    Dense cost of the convolutions at 224x224: 15.35 G MACs per image.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 32.
      width: factor on the channels of every convolution and on the 4096 of the head's two hidden
        layers, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys and of the dropout's.

    Returns:
      The model, in training mode, with 5 blocks.

    Raises:
      ValueError: if `image_size` is below 32, or `width` is not above 0.
    """
    check_image_size("vgg16_imagenet", image_size, at_least=32)
    plan = _plan(_VGG16, width)
    side = image_size // 32
    hidden = scaled(4096, width)
    head = nnx.Sequential(
        nnx.Linear(side * side * plan[-1][1], hidden, dtype=dtype, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
        classifier(hidden, num_classes, rngs=rngs),
    )
    return VGG(plan, flatten, head, in_channels=in_channels, dtype=dtype, rngs=rngs)


def vgg_digits(
    num_classes: int,
    *,
    in_channels: int = 1,
    image_size: int = 16,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> VGG:
    """Builds a small VGG for greyscale digits: 7 convolutions of 32, 64 and 128 channels.

    Args:
      num_classes: width of the logits.
      in_channels: channels of the image.
      image_size: side of the square image, in pixels, at least 8.
      width: factor on the channels of every convolution, rounded, at least 1 channel.
      dtype: compute dtype; parameters and batch statistics are float32.
      rngs: source of the kernels' keys.

    Returns:
      The model, in training mode, with 3 blocks.

    Raises:
      ValueError: if `image_size` is below 8, or `width` is not above 0.
    """
    check_image_size("vgg_digits", image_size, at_least=8)
    plan = _plan(_DIGITS, width)
    head = classifier(plan[-1][1], num_classes, rngs=rngs)
    return VGG(plan, global_mean, head, in_channels=in_channels, dtype=dtype, rngs=rngs)
