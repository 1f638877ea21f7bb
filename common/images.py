"""Pictures and videos in and out, and the error for what a user can cause."""

import io
from pathlib import Path

from PIL import Image


class UserError(ValueError):
    """Wrong usage or bad input: the message names the file or flag, says what was wrong and what to type.

    Commands print it as one line and end with status 2; any other exception is a bug of ours and keeps its traceback."""


def encode_image(image, path, **options) -> bytes:
    """A PIL image in the format that the suffix of `path` names, to be written whole. Raises UserError for an unknown suffix."""
    if (suffix := Path(path).suffix.lower()) not in Image.registered_extensions():
        raise UserError(f"{path}: no picture has the suffix {suffix!r}; take .png")
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[suffix], **options)
    return content.getvalue()
