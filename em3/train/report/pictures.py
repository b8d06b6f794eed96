"""Pictures of items, small and inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

WIDTH, HEIGHT = 96, 144  # pixels, the largest a thumbnail gets


class PictureError(ValueError):
    """A picture that cannot be read; the message names it and the reason."""


def thumbnail(path: Path) -> str:
    """A ``data:`` address with the picture as a JPEG that fits into ``WIDTH`` times ``HEIGHT``.

    Raises:
        PictureError: the file is missing or is no picture that can be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * WIDTH, 2 * HEIGHT))  # large JPEGs are decoded at a fraction of their size
            picture = ImageOps.exif_transpose(file).convert("RGB")
            picture.thumbnail((WIDTH, HEIGHT))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise PictureError(f"{path}: {error}") from error
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
