"""The net effect of a snippet on an image that encodes each pixel's coordinates in its colour."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import Effect

WIDTH, HEIGHT = 400, 300


@functools.cache
def coordinate_image(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """RGB image of up to 512x512 in which every pixel has its own colour, smooth in x and y for filters."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x // 2, y // 2, 64 * (x % 2) + 128 * (y % 2) + (x + 2 * y) // 16]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@functools.cache
def _sandbox() -> Sandbox:
    sandbox = Sandbox(SandboxConfig(num_zygotes=1, max_code_chars=20_000))
    sandbox.start()
    return sandbox


def golden_transforms(case: dict[str, Any]) -> dict[str, Any]:
    """Answer to a case of golden/transforms: its `code` may be null or empty; the description is not read."""
    code = case.get("code")
    effect = None
    if isinstance(code, str) and code.strip():
        effect = _sandbox().run_sync(coordinate_image(), code).effect
    effect = effect or Effect(to_input=None)
    return {"core": list(effect.core), "crop_box": list(effect.crop_box) if effect.crop_box else None}
