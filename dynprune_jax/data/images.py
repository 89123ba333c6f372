"""Image bytes to square uint8 arrays and back, with Pillow."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


class UndecodableImageError(Exception):
    """The bytes are not a whole image of a known format; the message says why."""


def open_image(data: bytes, draft_side: int = 0) -> Image.Image:
    """Decodes an image completely, so that a truncated one is found.

    Args:
      data: the bytes of a file.
      draft_side: if positive, a JPEG may be decoded at a fraction of its size, as long as
        both its sides stay at least this many pixels long; several times faster.

    Raises:
      UndecodableImageError: the bytes cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if draft_side:
            image.draft(None, (draft_side, draft_side))
        image.load()
    except Exception as error:  # Pillow raises nearly every type on damaged files.
        reason = "unknown image format" if "identify" in str(error) else str(error)
        raise UndecodableImageError(" ".join(reason.split())) from error
    return image


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts to greyscale (1 channel) or RGB (3 channels); transparency is dropped."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow would clip to 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette otherwise.
    return image.convert(mode)


def decode_square(data: bytes, side: int, channels: int) -> UInt8[np.ndarray, "side side channels"]:
    """Decodes an image, cuts out its central square and resizes that to `side` pixels.

    The same as resizing the shorter side and cutting the centre, in one step. Bilinear;
    when shrinking, the filter widens so that nothing is aliased.

    Raises:
      UndecodableImageError: the bytes cannot be decoded.
    """
    image = with_channels(open_image(data, draft_side=side), channels)
    width, height = image.size
    if (width, height) != (side, side):
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def encode_png(image: Image.Image) -> bytes:
    """Encodes an image as PNG, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
