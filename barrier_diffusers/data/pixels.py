"""A picture as people see it: the one way in which a file or a PIL image becomes pixels.

Training, evaluation, FID and both extensions come through here, so that one picture has the same pixels everywhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: turned as its EXIF data say, more than 8 bits scaled down, transparency on white.

    An ordinary 8-bit RGB image keeps its values; palettes and grey are converted as Pillow does it, CMYK by the colour
    profile in the file, and without one (or with a broken one) as browsers do: (1 - ink) (1 - black).

    Raises:
        ValueError: numbers whose range says nothing about brightness.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "CMYK":
        return _from_inks(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_numbers(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _from_inks(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """One channel of whole numbers (16 bits, or 32 of which 16 are used) or floats (from 0 to 1, or to 255)."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    floats = image.mode == "F"
    limit = (1.0 if high <= 1 else 255.0) if floats else 65535.0
    if not (np.isfinite(values).all() and 0 <= low and high <= limit):
        raise ValueError(
            f"its values go from {low:g} to {high:g}, which says nothing about brightness: save it with 8 or 16 bits"
        )
    return Image.fromarray((values * (255 / limit)).round().astype(np.uint8)).convert("RGB")


def open_rgb(path: Path) -> Image.Image:
    """The picture in a file, as `as_rgb` gives it.

    Raises:
        ValueError: no image, a damaged one, or one with more pixels than Pillow opens; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise ValueError(f"image {str(path)!r} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why an image could not be read, in words that say what to do."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels: scale it down"
    return str(error) or type(error).__name__
