"""Loading a policy and its processor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cv_lightning.early import local_folder_error
from cv_lightning.models.adapters import ModelAdapter, adapter_for, adapter_of_checkpoint
from cv_lightning.models.lora import LoraConfig, add_adapters
from cv_lightning.ranges import PositiveInt
from cv_lightning.types import CheckpointError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Names on the hub: MODEL or ORGANISATION/MODEL."""

HUB_TIMEOUT_S = 10.0

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy model and how it is loaded."""

    path: str
    """Hugging Face folder or hub name of a vision-language model."""
    adapter: ModelAdapter | None = None
    """Adapter of the model's family; null: selected by the checkpoint's `model_type`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Parameter type in trainer and engine."""
    min_pixels: PositiveInt | None = None
    """Smallest image the model sees, in pixels; None: the processor's own."""
    max_pixels: PositiveInt | None = None
    """Largest image the model sees, in pixels; None: the processor's own."""
    freeze_vision: bool = False
    """Freeze the vision tower (the recipe's SFT)."""
    freeze_projector: bool = False
    """With `freeze_vision`, also freeze the projector between vision tower and language model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; null: full fine-tuning."""
    attention: Literal["auto", "packed", "flash_attention_2", "sdpa"] = "auto"
    """`auto` and `packed`: exact attention on packed sequences that computes a group's prompt once. On a GPU it uses
    flash-attn's kernel or else PyTorch's `varlen_attn`, elsewhere SDPA (`doctor` names it). The others are
    transformers' own."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """`liger`: liger-kernel's fused norms, rotary embeddings and gated units, as far as they run in the family. `auto`:
    the same on a GPU if liger-kernel is installed, else PyTorch's operations."""


def load_processor(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> ProcessorMixin:
    """The processor of a model folder, with other pixel limits where given.

    Raises:
        CheckpointError: The folder does not exist or has no processor.
    """
    from transformers import AutoProcessor

    folder = Path(path)
    if not folder.exists():
        said = local_folder_error(path)
        if said or not HUB_NAME.fullmatch(path):
            raise CheckpointError(f"policy.path {path}: {said or 'no such folder, nor can it be a name on the hub'}")
        _check_hub(path)
    else:
        if not folder.is_dir():
            raise CheckpointError(f"policy.path {path}: {local_folder_error(path)}")
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise CheckpointError(
                f"policy.path {path}: no processor (preprocessor_config.json or processor_config.json) in this folder; "
                "copy it from the base model, or use a folder that `export` or ExportCallback wrote"
            )
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        where = "" if folder.exists() else "there is no such folder here, and as a name on the hub "
        raise CheckpointError(f"policy.path {path}: {where}its processor cannot be loaded ({error})") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"policy.path {path}: {type(processor).__name__} has no image processor; not a vision-language model?"
        )
    size = processor.image_processor.size
    size["shortest_edge"] = min_pixels or size["shortest_edge"]
    size["longest_edge"] = max_pixels or size["longest_edge"]
    return processor


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has a model, so that a mistyped folder is not tried again and again.

    Raises:
        CheckpointError: It has no such model, or does not answer and no copy of the model is here.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        model_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        reason = "the hub has no model of that name (or shows it to those who are logged in)"
    except HfHubHTTPError:
        return  # a mirror may not have this question; loading gives the reason
    except Exception as error:  # the errors of two HTTP libraries, and of an offline mode
        reason = f"as a name on the hub it cannot be looked up ({str(error).splitlines()[0][:160]})"
    raise CheckpointError(
        f"policy.path {name}: there is no such folder here, and {reason}. Give a Hugging Face folder of a model"
    )


def load_adapter(config: PolicyConfig) -> ModelAdapter:
    """The adapter of a policy, bound to its processor. No weights are loaded.

    Raises:
        CheckpointError: The folder has no processor, or the family is not known.
    """
    processor = load_processor(config.path, config.min_pixels, config.max_pixels)
    return (config.adapter or adapter_of_checkpoint(config.path, processor)).bind(processor)


def model_positions(folder: Path) -> int | None:
    """Longest sequence that a model folder declares; None: not declared, or positions are scaled."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    text = config.get("text_config") or config
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    found = text.get("max_position_embeddings")
    return None if "factor" in scaling or not isinstance(found, int) else found


def load_policy(config: PolicyConfig) -> PreTrainedModel:
    """Load the model. Frozen parameters do not require gradients.

    Raises:
        CheckpointError: It is not a model folder, or the family is not known.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from cv_lightning.models.attention import NAME, attention_name

    attention = attention_name(config.attention)
    try:
        # While loading, transformers takes our name for a flash-attention build; `prepare_policy` sets it later.
        model = AutoModelForImageTextToText.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa" if attention == NAME else attention,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"policy.path {config.path}: the model cannot be loaded ({error})") from error
    prepare_policy(model, config)
    return model


def prepare_policy(model: PreTrainedModel, config: PolicyConfig) -> None:
    """Set attention, faster operations and trainable parameters of a new model.

    Raises:
        CheckpointError: The family is not known, no layer matches the LoRA targets, or the requested kernels are not
            available.
    """
    from cv_lightning.models.attention import attention_name, use_attention
    from cv_lightning.models.logprobs import use_one_call_head
    from cv_lightning.models.patches import use_liger, use_linear_patches

    adapter = config.adapter or adapter_for(model.config.model_type, f"policy.path {config.path}")
    use_attention(model, attention_name(config.attention))
    use_linear_patches(model)
    use_one_call_head(model)
    if config.kernels != "torch":
        use_liger(model, adapter, required=config.kernels == "liger")
    set_trainable(model, config, adapter)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_trainable(model: PreTrainedModel, config: PolicyConfig, adapter: ModelAdapter) -> None:
    """Freeze the parts that the config freezes, and add its low-rank adapters.

    Raises:
        CheckpointError: No layer matches the LoRA targets.
    """
    if config.freeze_vision:
        frozen = ("vision", "projector") if config.freeze_projector else ("vision",)
        for name, parameter in model.named_parameters():
            if adapter.part_of(name) in frozen:
                parameter.requires_grad_(False)
    if config.lora is not None:
        add_adapters(model, config.lora, adapter)
