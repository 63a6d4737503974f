"""Config of a tiny random-weight model of any family."""

from __future__ import annotations

from dataclasses import dataclass

from cv_lightning.models.adapters import adapter_for, known_types
from cv_lightning.models.adapters.sizes import TinySizes


@dataclass(frozen=True, kw_only=True)
class TinyModelConfig(TinySizes):
    """Family and sizes of a tiny model."""

    family: str = "qwen3_vl"
    """Architecture: a model type that has an adapter."""

    def __post_init__(self) -> None:
        TinySizes.__post_init__(self)
        if self.family not in known_types():
            raise ValueError(f"--family {self.family} is not known; there are {', '.join(known_types())}")
        adapter_for(self.family).check_tiny(self)

    @property
    def factor(self) -> int:
        """Side of a vision token in pixels."""
        return adapter_for(self.family).tiny_patch_size * self.merge_size
