"""Writing a policy as a Hugging Face folder, shard by shard, so that memory never holds a second model.

Folders appear complete or not at all. Names are those of the published checkpoints, so that transformers, vLLM and
others load them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cv_lightning.models.gather import batched_by_size
from cv_lightning.models.lora import LoraConfig, target_pattern
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from cv_lightning.models.adapters import ModelAdapter

SHARD_BYTES = 5_000_000_000
"""Largest file; larger models are split, as is usual on the hub."""
INDEX = "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""Prefix of every name in a peft folder."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager: a temporary folder that replaces `folder` when the context ends without an error."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: PreTrainedModel,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write tensors as safetensors: one file, or several with an index.

    Args:
        folder: Existing folder without weights.
        tensors: (name in the model, full tensor); each is kept until its shard is written.
        model: Translates its names into those of published checkpoints; may be on the meta device.
        shard_bytes: Largest file.

    Returns:
        Number of bytes written.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    on_host = ((name, tensor.detach().cpu().contiguous()) for name, tensor in tensors)
    shards: list[dict[str, int]] = []
    for shard in batched_by_size(on_host, lambda named: named[1].nbytes, shard_bytes):
        published: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(shard))
        save_file(published, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in published.items()})
        del shard, published  # or the next shard would be collected while this one is in memory
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    total = sum(sum(shard.values()) for shard in shards)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return total


def write_config_and_processor(folder: Path, model: PreTrainedModel, adapter: ModelAdapter) -> None:
    """Write config, generation config and processor with the adapter's chat template.

    Args:
        folder: Existing folder.
        model: Model with the configs; may be on the meta device.
        adapter: Adapter with the processor. Its chat template replaces the model's own, which may open a thought in
            the generation prompt.
    """
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_processor(folder, adapter.processor, adapter.chat_template())


def write_processor(folder: Path, processor: ProcessorMixin, chat_template: str) -> None:
    """Write a processor with another chat template."""
    own, processor.chat_template = processor.chat_template, chat_template
    processor.save_pretrained(folder)
    processor.chat_template = own


def write_adapter(
    folder: Path, factors: Mapping[str, torch.Tensor], lora: LoraConfig, adapter: ModelAdapter, base: str
) -> int:
    """Write low-rank adapters alone, as peft and vLLM load them on top of the base model.

    Args:
        folder: Existing folder.
        factors: Their tensors by peft's name (`<layer>.lora_A.default.weight`).
        lora: The config that they were trained with.
        adapter: The model's adapter.
        base: Folder or hub name of the base model.

    Returns:
        Number of bytes written.
    """
    from safetensors.torch import save_file

    named = {PEFT_PREFIX + name.replace(".default.", "."): t.cpu().contiguous() for name, t in factors.items()}
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": target_pattern(lora, adapter),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1))
    return sum(tensor.nbytes for tensor in named.values())


def check_shapes(
    given: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], family: str, where: str, remedy: str
) -> None:
    """Refuse weights of another model.

    Args:
        given: Shape of every tensor of the weights, by name.
        wanted: Shape of every tensor of the model, by name.
        family: The model's `model_type`, for the message.
        where: Where the weights come from, for the message.
        remedy: What to change, for the message.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name} is {list(given[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit the {family} model: {problems[0]} (one of {len(problems)} differences); {remedy}"
        )
