"""A policy as a Hugging Face folder, written shard by shard: no second model is ever in memory.

Folders appear whole or not at all. Names are those of the published checkpoints, so that transformers, vLLM and others
load them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cv_lightning.models.lora import LoraConfig, target_pattern
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from cv_lightning.models.adapters import ModelAdapter

SHARD_BYTES = 5_000_000_000
"""Size from which on a model is cut into several files; the hub's custom."""
INDEX = "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""Before every name in a peft folder."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once the context ends without an error."""
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
    """Write tensors as safetensors, one file, or several with an index.

    Args:
        folder: exists; holds no weights yet.
        tensors: (name in the model, whole tensor); read one after the other, and kept until their shard is written.
        model: knows how its names translate into those of published checkpoints; may be on the meta device.
        shard_bytes: a file is closed before it gets larger.

    Returns:
        Bytes written.
    """
    shards: list[dict[str, int]] = []
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard, model))
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard, model))
    return _name_shards(folder, shards)


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, int]:
    """Write one file.

    Returns:
        Published name to bytes.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    published: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    save_file(published, folder / f"shard-{number}", metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in published.items()}


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> int:
    total = sum(sum(shard.values()) for shard in shards)
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return total
    where: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return total


def write_config_and_processor(folder: Path, model: PreTrainedModel, adapter: ModelAdapter) -> None:
    """Write what stands beside the weights: config, generation config, processor with the adapter's chat template.

    Args:
        folder: exists.
        model: gives the configs; may be on the meta device.
        adapter: Bound to the model's processor. Its chat template replaces the model's own, which may open a thought
            in its generation prompt.
    """
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_processor(folder, adapter.processor, adapter.chat_template())


def write_processor(folder: Path, processor: ProcessorMixin, chat_template: str) -> None:
    """Write the processor with this chat template."""
    own, processor.chat_template = processor.chat_template, chat_template
    processor.save_pretrained(folder)
    processor.chat_template = own


def write_adapter(
    folder: Path, factors: Mapping[str, torch.Tensor], lora: LoraConfig, adapter: ModelAdapter, base: str
) -> int:
    """Write low-rank adapters alone, as peft and vLLM load them on top of the base model.

    Args:
        folder: exists.
        factors: by name in the model, as peft names them (`<layer>.lora_A.default.weight`).
        lora: as they were trained.
        adapter: of the model's family.
        base: folder or hub name of the model that they are for.

    Returns:
        Bytes written.
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
        given: shape of every tensor that there is.
        wanted: shapes that the model has.
        family: its `model_type`, for the message.
        where: they come from, for the message.
        remedy: what to change.

    Raises:
        CheckpointError: names or shapes differ.
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
            f"{where} does not fit the {family} that it should be of: {problems[0]} "
            f"(one of {len(problems)} differences); {remedy}"
        )
