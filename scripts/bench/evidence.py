"""Measures the proof that rewards rest on: what it costs, and whom it pays.

    python scripts/bench/evidence.py --json FILE                 processor time of the proof at 12 megapixels
    python scripts/bench/evidence.py --programs 2000 --seed 7    attacks and honest programs in the real sandbox, too

Prints one figure a line. The programs and the measure of legibility are those of tests/integration.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration"), str(ROOT / "tests" / "unit")]
from cv_lightning.sandbox.effect import net_effect  # noqa: E402
from cv_lightning.sandbox.geometry import turn  # noqa: E402
from cv_lightning.sandbox.sandbox import sealed_pixels  # noqa: E402
from cv_lightning.types import IDENTITY, Affine  # noqa: E402

Figures = dict[str, float]
SIZE = 4000, 3000


def photo() -> Image.Image:
    """12 megapixels with structure at every scale."""
    rng = np.random.default_rng(0)
    total = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    for factor in (4, 16, 64, 256):
        noise = rng.normal(0, 12 * factor**0.3, (SIZE[1] // factor + 1, SIZE[0] // factor + 1, 3)).astype(np.float32)
        total += cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8))


def page() -> Image.Image:
    """12 megapixels, mostly white, with lines of text."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    for row in range(12):
        draw.text((400, 300 + 40 * row), "the quick brown fox 0123456789 jumps over the lazy dog " * 3, fill="black")
    return image


def cases(image: Image.Image) -> dict[str, tuple[Image.Image, list[Affine], bool]]:
    """Results of 12 megapixels, or made from as many: image, claims, and if the first claim is direct."""
    half = turn("rotate_180", *SIZE)
    turned = image.transpose(Image.Transpose.ROTATE_180)
    part = image.crop((400, 300, 3800, 2900))
    return {
        "turned": (turned, [half], True),
        "quarter": (image.transpose(Image.Transpose.ROTATE_90), [turn("rotate_90", *SIZE)], True),
        "contrast": (ImageEnhance.Contrast(turned).enhance(1.3), [half], True),
        "blurred": (turned.filter(ImageFilter.BoxBlur(9)), [half], True),
        "blend": (Image.blend(turned, image, 0.4), [half], True),
        "tilted": (image.rotate(7), [Affine(0.992546, -0.121869, 197.7, 0.121869, 0.992546, -232.6)], True),
        "crop": (part, [Affine(1, 0, 400, 0, 1, 300)], True),
        "enlarged": (image.crop((400, 300, 1400, 1050)).resize(SIZE), [Affine(0.25, 0, 400, 0, 0.25, 300)], True),
        "copied slice": (part, [IDENTITY], False),
        "copied and turned": (part.transpose(Image.Transpose.ROTATE_90), [IDENTITY], False),
        "another image": (Image.effect_noise(SIZE, 60).convert("RGB"), [IDENTITY, half], False),
        "white": (Image.new("RGB", SIZE, "white"), [half], True),
    }


def processor_ms(function: Callable[[], object]) -> float:
    """Processor time of a call in this process."""
    begun = time.process_time()
    function()
    return 1000 * (time.process_time() - begun)


def proof_cost(number: int) -> Figures:
    """Processor time of the proof, of decoding the same images and of copying a result, in ms."""
    cv2.setNumThreads(1)
    times: list[float] = []
    ratios: list[float] = []
    figures: Figures = {}
    for kind, image in (("photo", photo()), ("page", page())):
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        decoding = min(processor_ms(lambda: Image.open(io.BytesIO(data.getvalue())).load()) for _ in range(5))  # noqa: B023
        figures[f"decode_{kind}_ms"] = decoding
        for name, (result, claims, direct) in cases(image).items():
            found = [
                processor_ms(lambda: net_effect(claims, image, result, direct=direct))  # noqa: B023
                for _ in range(number)
            ]
            figures[f"proof_{kind}_{name.replace(' ', '_')}_ms"] = statistics.median(found)
            times += found
            ratios += [one / decoding for one in found]
    times.sort()
    ratios.sort()
    figures["proof_p50_ms"], figures["proof_p99_ms"] = times[len(times) // 2], times[int(0.99 * len(times))]
    figures["proof_over_decoding_p99"] = ratios[int(0.99 * len(ratios))]
    return figures | {"copy_input_ms": statistics.median(processor_ms(lambda: _copied(image)) for _ in range(9))}


def _copied(image: Image.Image) -> None:
    import os

    os.close(sealed_pixels(image))


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--number", type=int, default=10, help="proofs by case")
    parser.add_argument("--programs", type=int, default=0, help="attacks, and as many honest programs")
    parser.add_argument("--seed", type=int, default=20261130)
    options = parser.parse_args()
    figures = proof_cost(options.number)
    if options.programs:
        from view_trials import trial_figures

        figures |= trial_figures(options.seed, options.programs)
    for name, value in figures.items():
        print(f"{name:36} {value:.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
