"""The net effect of a snippet on a picture that encodes each pixel's coordinates in its colour."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.sandbox import Sandbox
from cv_lightning.types import Effect

WIDTH, HEIGHT = 400, 300


@functools.cache
def coordinate_picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """RGB picture in which every pixel has its own colour (up to 512x512): smooth in x and y, so that filters keep it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x // 2, y // 2, 64 * (x % 2) + 128 * (y % 2) + (x + 2 * y) // 16]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def net_effect(sandbox: Sandbox, code: str) -> Effect:
    """What a snippet does to the geometry of a 400x300 picture; an empty effect where it fails.

    Args:
        sandbox: a started sandbox.
        code: the snippet.
    """
    return sandbox.run_sync(coordinate_picture(), code).effect or Effect(to_input=None)


@functools.cache
def _sandbox() -> Sandbox:
    sandbox = Sandbox(SandboxConfig(num_zygotes=1, max_code_chars=20_000))
    sandbox.start()
    return sandbox


def golden_transforms(case: dict[str, Any]) -> dict[str, Any]:
    """Answer to a case of golden/transforms: its `code` may be null or empty; the description is not read."""
    code = case.get("code")
    effect = net_effect(_sandbox(), code) if isinstance(code, str) and code.strip() else Effect(to_input=None)
    return {"core": list(effect.core), "crop_box": list(effect.crop_box) if effect.crop_box else None}
