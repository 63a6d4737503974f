"""Requests with images for a real engine, and the trainer's log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedModel

from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.engines.base import Completion, Engine, Request
from cv_lightning.models.adapters import ModelAdapter
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import TrainSequence, pack_sequences
from cv_lightning.models.vision import VisionCache
from cv_lightning.types import Task

WORDS = PromptConfig(system="none")
SHAPES = [[(96, 96)], [(64, 96), (128, 64)], [(96, 96), (96, 64), (64, 160)], [(200, 90)]]
"""Sizes of the images of every prompt."""


@dataclass
class Policy:
    """The parts of a trainer: model, adapter, encoder."""

    path: Path
    model: PreTrainedModel
    adapter: ModelAdapter
    encoder: DialogueEncoder
    banned: list[int]

    @classmethod
    def load(
        cls,
        path: Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Policy:
        config = PolicyConfig(path=str(path), dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
        model, adapter = load_policy(config), load_adapter(config)
        return cls(path, model, adapter, DialogueEncoder(adapter), list(adapter.vision_ids))

    @torch.no_grad()
    def perturb(self, seed: int, scale: float = 0.05) -> None:
        """Change every parameter, so that a missed one shows after a sync."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)

    def dialogue(self, sizes: Sequence[tuple[int, int]], seed: int = 0) -> Dialogue:
        """A prompt with noisy images of these sizes."""
        torch.manual_seed(seed)
        images = [Image.fromarray(torch.randint(0, 256, (h, w, 3), dtype=torch.uint8).numpy()) for w, h in sizes]
        task = Task(id="t", question="Read it.", images=tuple(images), ground_truth="1")
        return self.encoder.start(task, [self.encoder.model_image(image) for image in images], WORDS, tools=())

    @torch.no_grad()
    def logprobs(self, dialogue: Dialogue, done: Completion, temperature: float = 1.0) -> torch.Tensor:
        """The trainer's log-probabilities of the sampled tokens. Shape [tokens]."""
        row = TrainSequence(
            token_ids=[*dialogue.token_ids, *done.token_ids],
            loss_mask=[False] * len(dialogue.token_ids) + [True] * len(done.token_ids),
            vision=VisionCache(self.adapter).get(dialogue.images),
        )
        batch = pack_sequences([row], self.model.config, self.adapter)
        return packed_logprobs(self.model, batch, temperature=temperature, banned_ids=self.banned).logprobs


def request_of(
    dialogue: Dialogue,
    banned: Sequence[int],
    *,
    name: str = "r",
    tokens: int = 12,
    temperature: float = 1.0,
    seed: int = 0,
) -> Request:
    """The next turn of a dialogue."""
    return Request(
        id=name,
        prompt_ids=tuple(dialogue.engine_ids),
        images=tuple(dialogue.images),
        max_tokens=tokens,
        temperature=temperature,
        top_p=1.0,
        seed=seed,
        banned_ids=banned,
    )


def finish(engine: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    """Run requests to their end."""
    for request in requests:
        engine.add_request(request)
    done: dict[str, Completion] = {}
    while engine.has_unfinished():
        done |= {completion.id: completion for completion in engine.step()}
    return done


def worst_gap(
    policy: Policy, engine: Engine, temperature: float = 1.0, shapes: Sequence[Sequence[tuple[int, int]]] = SHAPES
) -> float:
    """Largest difference between the engine's log-probabilities and the trainer's, over prompts with 1 to 3 images."""
    return gap_of(policy, engine, [policy.dialogue(sizes, seed=i) for i, sizes in enumerate(shapes)], temperature)


def gap_of(policy: Policy, engine: Engine, given: Sequence[Dialogue], temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probabilities and the trainer's of the next turns of dialogues."""
    dialogues = {f"p{i}": dialogue for i, dialogue in enumerate(given)}
    requests = [request_of(d, policy.banned, name=n, temperature=temperature, seed=7) for n, d in dialogues.items()]
    gaps = []
    for name, done in finish(engine, requests).items():
        assert not done.error, done.error
        assert done.prompt_ids in (None, dialogues[name].token_ids)  # SGLang does not tell
        gaps.append((policy.logprobs(dialogues[name], done, temperature) - torch.tensor(done.logprobs)).abs().max())
    return float(torch.stack(gaps).max())
