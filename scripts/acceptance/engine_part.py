"""The engine beside the trainer's model in bfloat16: agreement after every sync, sleep and wake; seconds of a sync."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_samples import SHAPES, finish, request_of
from PIL import Image
from results import Line

from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.engines import Completion, EngineConfig
from cv_lightning.engines.hf import TransformersEngine
from cv_lightning.models.adapters import ModelAdapter
from cv_lightning.models.gather import gather_full_params
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy, load_processor
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import TrainSequence, pack_sequences
from cv_lightning.models.shapes import model_config
from cv_lightning.models.vision import VisionCache
from cv_lightning.types import Task

MEAN, P99 = 0.02, 0.2
"""Differences of log-probabilities that rounding explains in bfloat16."""
LAYERS = 4
"""Language layers of the engine's checkpoint: released widths, and 10 GB less to write."""
CYCLES = 3
WORDS = PromptConfig(system="none")
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Ids in the model's config that the tiny tokenizer has its own of."""


def checkpoint(options: argparse.Namespace) -> Path:
    """A folder with random weights: the tiny model, or the released widths with the tiny model's tokenizer."""
    folder: Path = options.work / "checkpoint"
    if (folder / "config.json").exists():
        return folder
    partial = options.work / "checkpoint.partial"
    write(TinyCheckpoint(out=partial))
    if not options.cpu:
        from transformers import AutoModelForImageTextToText

        processor = load_processor(str(partial))
        config = model_config(options.model)
        config.get_text_config().num_hidden_layers = LAYERS
        if getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = config.get_text_config().layer_types[:LAYERS]
        for name, token in TOKENS.items():
            setattr(config, name, processor.tokenizer.convert_tokens_to_ids(token))
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for file in partial.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(partial)
    partial.rename(folder)
    return folder


@dataclass
class Trainer:
    """The trainer's side."""

    folder: Path
    model: Any
    adapter: ModelAdapter
    encoder: DialogueEncoder
    banned: list[int]

    @classmethod
    def load(cls, options: argparse.Namespace) -> Trainer:
        """Load the policy in bfloat16."""
        folder = checkpoint(options)
        config = PolicyConfig(path=str(folder), dtype="bfloat16")
        adapter, model = load_adapter(config), load_policy(config).to("cpu" if options.cpu else "cuda")
        return cls(folder, model, adapter, DialogueEncoder(adapter), list(adapter.vision_ids))

    def dialogue(self, sizes: Sequence[tuple[int, int]], seed: int) -> Dialogue:
        """A prompt with noisy images."""
        generator = torch.Generator().manual_seed(seed)
        pixels = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for w, h in sizes]
        images = [Image.fromarray(image.numpy()) for image in pixels]
        task = Task(id="t", question="Read it.", images=tuple(images), ground_truth="1")
        return self.encoder.start(task, [self.encoder.model_image(image) for image in images], WORDS, tools=())

    @torch.no_grad()
    def logprobs(self, dialogue: Dialogue, done: Completion) -> torch.Tensor:
        """The trainer's log-probabilities of a completion, [tokens]."""
        row = TrainSequence(
            token_ids=[*dialogue.token_ids, *done.token_ids],
            loss_mask=[False] * len(dialogue.token_ids) + [True] * len(done.token_ids),
            vision=VisionCache(self.adapter).get(dialogue.images),
        )
        batch = pack_sequences([row], self.model.config, self.adapter).to(self.model.device)
        return packed_logprobs(self.model, batch, banned_ids=self.banned).logprobs.float().cpu()

    @torch.no_grad()
    def perturb(self, seed: int) -> None:
        """Change every parameter by a quarter of its size."""
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            parameter += 0.25 * parameter.abs().mean() * torch.randn_like(parameter)

    def differences(self, engine: Any) -> torch.Tensor:
        """Engine minus trainer over a prompt without images and then prompts with one to three, [tokens].

        The first step after waking has no images: it reads the deepstack inputs as sleeping left them.

        Raises:
            RuntimeError: The engine refused a request, or expanded a prompt otherwise.
        """
        dialogues = {f"p{i}": self.dialogue(sizes, seed=i) for i, sizes in enumerate(([], *SHAPES))}
        requests = [request_of(d, self.banned, name=n, tokens=16, seed=7) for n, d in dialogues.items()]
        found = []
        for name, done in (finish(engine, requests[:1]) | finish(engine, requests[1:])).items():
            if done.error or done.logprobs is None or done.prompt_ids != dialogues[name].token_ids:
                raise RuntimeError(f"{name}: {done.error or 'another prompt'}")
            found.append((self.logprobs(dialogues[name], done) - torch.tensor(done.logprobs)).abs())
        return torch.cat(found)


class StandInEngine(TransformersEngine):
    """What a GPU does that a CPU cannot: it loses its weights while it sleeps, until a weight sync brings others."""

    def sleep(self) -> bool:
        """Lose the weights."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
        return True


def agreement(check: str, trainer: Trainer, engine: Any) -> Line:
    """A line on whether engine and trainer agree."""
    found = trainer.differences(engine)
    mean, p99 = float(found.mean()), float(torch.quantile(found, 0.99))
    verdict = "pass" if mean <= MEAN and p99 <= P99 else "fail"  # not a number fails, too
    return Line(
        check=check, verdict=verdict, value=f"{mean:.4f} mean, {p99:.3f} p99",
        detail=f"|difference| of log-probabilities, <= {MEAN} and {P99}; {len(found)} tokens",
    )  # fmt: skip


def staleness(check: str, trainer: Trainer, engine: Any) -> Line:
    """A line on whether the comparison can fail: the trainer's weights have changed, the engine's have not."""
    mean = float(trainer.differences(engine).mean())
    return Line(check=check, verdict="pass" if mean > MEAN else "fail", value=f"{mean:.4f} mean", detail=f"> {MEAN}")


def sizes(**settings: Any) -> EngineConfig:
    """A small engine."""
    return EngineConfig(max_model_len=1024, max_num_seqs=16, max_images=4, gpu_memory_utilization=0.4, **settings)


def cycles(unit: str, options: argparse.Namespace, *, async_scheduling: bool, stand_in: bool = False) -> Iterator[Line]:
    """Three sleeps at each level, the weights changed meanwhile, and agreement after each.

    Args:
        unit: Name of the setting.
        options: The command line.
        async_scheduling: vLLM's.
        stand_in: Take an engine that only imitates sleeping.
    """
    trainer = Trainer.load(options)
    for level in (1, 2):
        settings = sizes(sleep="never" if stand_in else "always", sleep_level=level, async_scheduling=async_scheduling)
        engine: Any
        if stand_in:
            engine = StandInEngine(copy.deepcopy(trainer.model), trainer.adapter, settings)
        else:
            from cv_lightning.engines.vllm import VLLMEngine

            engine = VLLMEngine(str(trainer.folder), settings, trainer.adapter, dtype="bfloat16")
        name = f"{unit}{' (stand-in)' if stand_in else ''} level {level}"
        engine.update_weights(gather_full_params(trainer.model), 0)
        yield agreement(f"{name}, awake", trainer, engine)
        trainer.perturb(0)
        yield staleness(f"{name}, stale weights are noticed", trainer, engine)
        for cycle in range(1, CYCLES + 1):
            before = 0 if stand_in else torch.cuda.mem_get_info()[0]
            if not engine.sleep():
                yield Line(check=f"{name}, sleep {cycle}", verdict="fail", detail="the engine did not sleep")
                return
            freed = 0 if stand_in else torch.cuda.mem_get_info()[0] - before
            trainer.perturb(cycle)
            engine.update_weights(gather_full_params(trainer.model), cycle)
            yield agreement(f"{name}, sleep {cycle}", trainer, engine)
            if not stand_in:
                yield Line(check=f"{name}, freed {cycle}", verdict="pass" if freed > 1e9 else "fail",
                           value=f"{freed / 1e9:.1f} GB", detail="> 1 GB")  # fmt: skip
        engine.close()


def cpu_engine(options: argparse.Namespace) -> Iterator[Line]:
    """VLLM's real CPU build in bfloat16, before and after a sync, with images rendered in the background."""
    from cv_lightning.engines.vllm import VLLMEngine

    trainer = Trainer.load(options)
    engine = VLLMEngine(str(trainer.folder), sizes(background_rendering="always"), trainer.adapter, dtype="bfloat16")
    for version in range(2):
        engine.update_weights(gather_full_params(trainer.model), version)
        yield agreement(f"CPU build, sync {version + 1}", trainer, engine)
        trainer.perturb(version)
    yield staleness("CPU build, stale weights are noticed", trainer, engine)
    engine.close()


def sync_seconds(options: argparse.Namespace, repeats: int = 3) -> Iterator[Line]:
    """Seconds and GB/s of a weight sync into an engine that is awake."""
    from cv_lightning.engines.vllm import VLLMEngine

    trainer = Trainer.load(options)
    engine = VLLMEngine(str(trainer.folder), sizes(), trainer.adapter, dtype="bfloat16")
    total = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / 1e9
    seconds = []
    for version in range(repeats):
        begun = time.perf_counter()
        engine.update_weights(gather_full_params(trainer.model), version)
        if not options.cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    yield Line(
        check="sync", verdict="measured", value=f"{median:.3f} s", detail=f"{total:.3f} GB, {total / median:.2f} GB/s"
    )
    yield agreement("after the syncs", trainer, engine)
    engine.close()
