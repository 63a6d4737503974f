"""Parts of a chat message in OpenAI's form, and the text of a completion. Pure functions."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

from PIL import Image


def text_part(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def image_part(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG") -> dict[str, Any]:
    """An image part of a message, with the image inside."""
    return {"type": "image_url", "image_url": {"url": data_url(image, kind)}}


def data_url(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """An image as a data URL; PNG is lossless."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {"quality": 90}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def reply_text(body: object) -> str | None:
    """The text of a chat completion, without a server's separate reasoning; None where there is none."""
    try:
        text = body["choices"][0]["message"]["content"]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) and text.strip() else None
