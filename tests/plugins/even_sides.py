"""An image rule of one's own: a Qwen3-VL that sees images with an even number of tokens a side."""

from __future__ import annotations

from dataclasses import dataclass

from cv_lightning.images import ImageLimits, ImageRule
from cv_lightning.models.adapters.qwen3_vl import Qwen3VLAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenSides(ImageLimits):
    """`factor` covers two tokens a side, so that each square of it takes four."""

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Four tokens for each square of `factor` pixels."""
        return 4 * ImageLimits.num_tokens(self, size)


class EvenSidesAdapter(Qwen3VLAdapter):
    """Qwen3-VL with sides of an even number of tokens, and at most `max_tokens` tokens an image."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.max_tokens = max_tokens

    def make_image_rule(self) -> ImageRule:
        """The smallest image has two tokens a side."""
        side = super().make_image_rule().factor
        return EvenSides(factor=2 * side, min_pixels=4 * side**2, max_pixels=self.max_tokens * side**2)
