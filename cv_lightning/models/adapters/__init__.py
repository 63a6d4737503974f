"""Model families. A family needs one file here, or a user's class named by `policy.adapter`."""

from __future__ import annotations

import importlib
import json
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cv_lightning.models.adapters.base import Architecture, ImageInputs, ModelAdapter, Part
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = [
    "Architecture",
    "ImageInputs",
    "ModelAdapter",
    "Part",
    "adapter_for",
    "adapter_of_checkpoint",
    "known_types",
]


@cache
def _families() -> dict[str, type[ModelAdapter]]:
    """Adapter classes of this folder by model type."""
    found: dict[str, type[ModelAdapter]] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, ModelAdapter):
                found |= dict.fromkeys(value.model_types, value)
    return found


def known_types() -> list[str]:
    """Model types that have an adapter in this package."""
    return sorted(_families())


def adapter_for(model_type: str, where: str = "policy.path") -> ModelAdapter:
    """The adapter of a model type.

    Args:
        model_type: The value in config.json.
        where: Name of the checkpoint, for the message.

    Raises:
        CheckpointError: The package has no adapter for it.
    """
    if model_type not in _families():
        raise CheckpointError(
            f"{where}: model type {model_type}; this project knows {', '.join(known_types())}. For another family give "
            "policy.adapter the class_path of a ModelAdapter (cv_lightning.models.adapters.base)"
        )
    return _families()[model_type]()


def adapter_of_checkpoint(path: str, processor: ProcessorMixin) -> ModelAdapter:
    """The adapter for a checkpoint's `model_type`, or for its processor if it has no config.json.

    Args:
        path: Hugging Face folder, or a name on the hub.
        processor: The checkpoint's processor.

    Raises:
        CheckpointError: Its config.json cannot be read, or its family is not known.
    """
    from transformers import PretrainedConfig

    folder, kind = Path(path), type(processor).__name__
    if folder.is_dir() and not (folder / "config.json").exists():
        for family in _families().values():
            if family.processor_class == kind:
                return family()
    try:
        fields = (
            json.loads((folder / "config.json").read_text())
            if folder.is_dir()
            else PretrainedConfig.get_config_dict(path)[0]
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"policy.path {path}: its config.json cannot be read ({error}), and no known family has {kind}; "
            "copy it from the base model, or name the family's adapter as policy.adapter"
        ) from error
    return adapter_for(str(fields.get("model_type")), f"policy.path {path}")
