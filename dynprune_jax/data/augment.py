"""Augmentation on the device: pure, jit-able, keyed functions of whole batches of images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Key, Shaped, UInt8

# Inception's bounds of width / height of a random crop, and of its share of the area.
ASPECTS = (3 / 4, 4 / 3)
_LEAST_AREA = 0.08


def random_crop(
    key: Key[Array, ""],
    images: UInt8[Array, "batch height width channels"],
    padding: int,
    size: int,
) -> UInt8[Array, "batch size size channels"]:
    """Cuts a square window out of each image at its own random place.

    Args:
      key: of the places.
      images: the images.
      padding: pixels of zeros put around each image first.
      size: height and width of the window, in pixels.

    Raises:
      ValueError: the window is larger than the padded image.
    """
    batch, height, width, channels = images.shape
    room = (height + 2 * padding - size, width + 2 * padding - size)
    if min(room) < 0:
        raise ValueError(f"cannot cut {size}x{size} from {height}x{width} + {padding}")
    if padding == 0 and room == (0, 0):
        return images
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(key, (batch, 2), 0, jnp.array([room]) + 1)

    def cut(image: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (size, size, channels))

    return jax.vmap(cut)(padded, starts)


def random_flip(
    key: Key[Array, ""], images: Shaped[Array, "batch height width channels"]
) -> Shaped[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability one half; any dtype, which is kept."""
    flipped: Bool[Array, " batch"] = jax.random.bernoulli(key, 0.5, images.shape[:1])
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def cutout(
    key: Key[Array, ""], images: Shaped[Array, "batch height width channels"], size: int
) -> Shaped[Array, "batch height width channels"]:
    """Blackens a square of each image, around a random pixel of it; any dtype, which is kept.

    What of the square lies outside of the image is lost, so the blackened part varies in size.
    DeVries and Taylor 2017, arXiv 1708.04552. They fill the square with the data's mean, this
    with black, as `random_crop` pads.

    Args:
      key: of the places.
      images: the images.
      size: height and width of the square, in pixels; 0 changes nothing.
    """
    batch, height, width, _ = images.shape
    row_key, column_key = jax.random.split(key)

    def inside(key: Array, length: int) -> Bool[Array, "batch length"]:
        first = jax.random.randint(key, (batch, 1), 0, length) - size // 2
        place = jnp.arange(length)[None]
        return (first <= place) & (place < first + size)

    rows, columns = inside(row_key, height), inside(column_key, width)
    blank = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(blank, jnp.zeros((), images.dtype), images)


def random_resized_crop(
    key: Key[Array, ""],
    images: UInt8[Array, "batch height width channels"],
    size: int,
) -> Float32[Array, "batch size size channels"]:
    """Cuts a random rectangle out of each image and resizes it to a square, as for Inception.

    The rectangle covers a share of the image's area, uniform in [0.08, 1], and has an
    aspect, log-uniform in [3/4, 4/3]; a side that would stick out is shortened to the image's
    (others draw again instead). Bilinear, without aliasing.

    Args:
      key: of the rectangles.
      images: the images.
      size: height and width of the result, in pixels.

    Returns:
      Values from 0 to 255.
    """
    batch, height, width, channels = images.shape
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (batch,), jnp.float32, _LEAST_AREA, 1.0) * (height * width)
    low, high = jnp.log(jnp.array(ASPECTS, jnp.float32))
    aspect = jnp.exp(jax.random.uniform(aspect_key, (batch,), jnp.float32, low, high))
    sides = jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)], axis=1)
    limits = jnp.array([[height, width]], jnp.float32)
    sides = jnp.clip(sides, 1.0, limits)
    starts = jax.random.uniform(place_key, (batch, 2), jnp.float32) * (limits - sides)

    def cut(image: Array, start: Array, side: Array) -> Array:
        scale = size / side
        return jax.image.scale_and_translate(
            image, (size, size, channels), (0, 1), scale, -start * scale, "linear"
        )

    # The filter's weights do not overshoot, but rounding may pass 255 by a hair.
    return jax.vmap(cut)(images.astype(jnp.float32), starts, sides).clip(0.0, 255.0)


def center_crop(
    images: UInt8[Array, "batch height width channels"], size: int
) -> UInt8[Array, "batch size size channels"]:
    """Cuts the central square of `size` pixels out of each image.

    Raises:
      ValueError: the square is larger than the images.
    """
    _, height, width, _ = images.shape
    if size > min(height, width):
        raise ValueError(f"cannot cut {size}x{size} from {height}x{width}")
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, top : top + size, left : left + size]


def normalise(
    images: UInt8[Array, "batch height width channels"]
    | Float32[Array, "batch height width channels"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "batch height width channels"]:
    """Returns `(images / 255 - mean) / std`, computed in float32, as `dtype`.

    Args:
      images: values from 0 to 255.
      mean: one value for each channel, or one for all, of images scaled to [0, 1].
      std: likewise.
      dtype: of the result.
    """
    shift = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    scale = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    return ((images.astype(jnp.float32) / 255.0 - shift) / scale).astype(dtype)


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "batch height width channels"],
    *,
    image_size: int,
    crop_padding: int,
    flip: bool,
    resized_crop: bool,
    cutout_size: int = 0,
) -> (
    UInt8[Array, "batch image_size image_size channels"]
    | Float32[Array, "batch image_size image_size channels"]
):
    """Augments a training batch: a crop to `image_size`, a flip, a cutout.

    Args:
      key: of all that is random here.
      images: the images, at least `image_size` minus the padding in height and width.
      image_size: height and width of the result, in pixels.
      crop_padding: pixels of zeros around the image before `random_crop`; not used by
        `random_resized_crop`.
      flip: mirror every second image, by chance.
      resized_crop: crop by `random_resized_crop` instead of `random_crop`.
      cutout_size: side of the square that `cutout` blackens, in pixels; 0: none.

    Returns:
      Values from 0 to 255: float32 after `random_resized_crop`, else uint8.
    """
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if resized_crop:
        images = random_resized_crop(crop_key, images, image_size)
    else:
        images = random_crop(crop_key, images, crop_padding, image_size)
    if flip:
        images = random_flip(flip_key, images)
    return cutout(cutout_key, images, cutout_size) if cutout_size else images
