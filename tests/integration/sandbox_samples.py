"""One running sandbox for all tests of a process, and images to run on."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from cv_lightning.sandbox import Sandbox, SandboxConfig

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))


@functools.cache
def general() -> Sandbox:
    """Every snippet in a child; closed when the process ends."""
    sandbox = Sandbox(SandboxConfig(plan_tier=False, timeout_s=2.0))
    sandbox.start()
    return sandbox


@functools.cache
def smooth_image(width: int = 240, height: int = 180) -> Image.Image:
    """RGB; every pixel differs, neighbours only a little, so that filters and resizes keep places recognisable."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 60 * np.sin(x / 17.0) + 50 * np.cos(y / 11.0 + x / 60.0)
    channels = [x * 255 // width, y * 255 // height, np.clip(128 + waves, 0, 255)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
