"""A model's architecture without its weights, from its folder or, for the recipes' models, from the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cv_lightning.models.adapters import ModelAdapter, adapter_for
from cv_lightning.models.loading import PolicyConfig, set_trainable
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RELEASED_FOLDER = Path(__file__).parent / "released"
RELEASED = {file.stem.replace("_", "-"): file for file in sorted(RELEASED_FOLDER.glob("*.json"))}
"""config.json of published models, by the part that their names and folders made of them share."""


def model_config(path: str, adapter: ModelAdapter | None = None) -> PreTrainedConfig:
    """The config of a model folder; if the folder does not exist, that of the published model that `path` names.

    Args:
        path: Folder or name of a model.
        adapter: The family's adapter; None: the model type must be known.

    Raises:
        CheckpointError: There is no such folder or published model, or its family is not known.
    """
    from transformers import AutoConfig

    file = Path(path) / "config.json"
    if not file.is_file():
        name = re.sub(r"[._]", "-", path.lower())
        known = next((released for key, released in RELEASED.items() if key in name), None)
        if known is None:
            raise CheckpointError(
                f"policy.path {path}: there is no {file}, and the name is none of the built-in {', '.join(RELEASED)}; "
                "download at least the model's config.json, or put the model's name into the path"
            )
        file = known
    fields = json.loads(file.read_text())
    if adapter is None:
        adapter_for(str(fields.get("model_type")), str(file))
    config: PreTrainedConfig = AutoConfig.for_model(**fields)
    return config


def empty_policy(config: PolicyConfig) -> PreTrainedModel:
    """The policy on the meta device, with names, shapes, types and trainable parameters, but no memory.

    Raises:
        CheckpointError: The architecture is not known, or no layer matches the LoRA targets.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    architecture = model_config(config.path, config.adapter)
    adapter = config.adapter or adapter_for(architecture.model_type, f"policy.path {config.path}")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            architecture, dtype=getattr(torch, config.dtype)
        )
        set_trainable(model, config, adapter)
    return model
