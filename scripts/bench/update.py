"""Measures the GRPO update on the fixed length mix: packed rows against what trainers without packing do.

    python scripts/bench/update.py --json FILE

The trajectories of `lengths.json` (log-uniform 64 to 1,024 tokens, 1 to 4 images) on the tiny Qwen3-VL. One module
takes turns between packed rows, micro-batches of one trajectory without padding (the reference's setting), padded
batches of eight as they come by transformers' own forward, and a bare loop: forward and backward of the model over the
packed rows with nothing but a cross-entropy. Updates hold everything from trajectories to weights, images included.
Medians of wall-clock, and of the process's CPU seconds (`_cpu`), which a busy machine hardly disturbs; all variants
must agree on the loss after 20 steps. Peak memory of the loss is counted on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.data.modules import StepLoader  # noqa: E402
from cv_lightning.models.adapters.base import LOGIT_BAN, joined  # noqa: E402
from cv_lightning.models.attention import NAME, use_attention  # noqa: E402
from cv_lightning.models.loading import PolicyConfig  # noqa: E402
from cv_lightning.models.logprobs import LogProbs, packed_logprobs  # noqa: E402
from cv_lightning.models.packing import PackedBatch, TrainSequence, pack_sequences  # noqa: E402
from cv_lightning.modules.base import OptimizerConfig, StepResult  # noqa: E402
from cv_lightning.modules.grpo import GRPOModule  # noqa: E402
from cv_lightning.rl.algorithm import AlgorithmConfig  # noqa: E402
from cv_lightning.types import Group, Iteration, Task, Trajectory, TrajectoryImage  # noqa: E402

LENGTHS = Path(__file__).parent / "lengths.json"
VARIANTS = ("packed", "single", "padded", "bare")
ROW_TOKENS, PADDED_ROWS = 1024, 8
"""Tokens of a packed row that fit a CPU's cache (on a GPU longer rows are faster), and sequences of a padded batch."""
STEPS_TO_AGREE = 20
VOCABULARY, LOSS_TOKENS = 151_936, 8192
BARS = {"update_packed_over_single": 1.3, "update_packed_over_padded": 1.5, "update_over_floor": 0.85}
MEMORY_BAR = 0.2


class BenchModule(GRPOModule):
    """GRPO that packs, pads or does neither, by `variant`; it notes the seconds of everything but data and logging."""

    variant = "packed"

    def __init__(self, folder: Path) -> None:
        policy = PolicyConfig(path=str(folder), dtype="float32", attention="packed")
        super().__init__(
            policy, OptimizerConfig(lr=1e-4, weight_decay=0.0), ROW_TOKENS, algorithm=AlgorithmConfig(num_minibatches=1)
        )
        self.padded: dict[int, dict[str, torch.Tensor]] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)
        self.step_seconds: dict[str, list[float]] = defaultdict(list)

    def training_step(self, batch: Iteration, batch_idx: int) -> None:
        """One timed update by the variant whose turn it is."""
        assert self.policy is not None
        use_attention(self.policy, "sdpa" if self.variant == "padded" else NAME)
        self.max_tokens_per_row = 1 if self.variant == "single" else ROW_TOKENS
        self.padded.clear()
        begun, cpu = time.perf_counter(), time.process_time()
        super().training_step(batch, batch_idx)
        self.seconds[self.variant].append(time.perf_counter() - begun)
        self.cpu_seconds[self.variant].append(time.process_time() - cpu)

    def pack_micro_batches(self, sequences: Sequence[TrainSequence]) -> list[PackedBatch]:
        """As the module does, or eight sequences at a time."""
        if self.variant != "padded":
            return super().pack_micro_batches(sequences)
        assert self.policy is not None
        batches = []
        for first in range(0, len(sequences), PADDED_ROWS):
            chunk = sequences[first : first + PADDED_ROWS]
            batches.append(pack_sequences(chunk, self.policy.config, self.adapter))
            self.padded[id(batches[-1])] = self._pad(chunk)
        return batches

    def _pad(self, sequences: Sequence[TrainSequence]) -> dict[str, torch.Tensor]:
        width = max(len(sequence.token_ids) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        learned = torch.zeros(len(sequences), width, dtype=torch.bool)
        for number, sequence in enumerate(sequences):
            length = len(sequence.token_ids)
            ids[number, :length], mask[number, :length] = torch.tensor(sequence.token_ids), 1
            learned[number, : length - 1] = torch.tensor(sequence.loss_mask[1:])
        vision = [v for sequence in sequences for v in sequence.vision]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.encoder.image_pad_id).long(),
            **joined(vision),
            "learned": learned,
        }

    def logprobs(self, batch: PackedBatch, **options: Any) -> LogProbs:
        """As the module does, or by transformers' own forward of a padded batch, logits at the loss positions only."""
        if self.variant != "padded":
            return super().logprobs(batch, **options)
        assert self.policy is not None
        inputs = dict(self.padded[id(batch)])
        learned = inputs.pop("learned")
        states = self.policy.model(**inputs, use_cache=False).last_hidden_state[learned]
        logits = self.policy.get_output_embeddings()(states).float()
        logits[:, list(self.adapter.vision_ids)] += LOGIT_BAN
        logprobs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return LogProbs(logprobs.gather(-1, batch.targets[:, None])[:, 0], entropy)

    def accumulate_and_step(self, micro_batches: Sequence[Any], loss: Any) -> StepResult:
        """Time forwards, backwards and step; the bare loop replaces the loss and takes no step."""
        begun = time.perf_counter()
        if self.variant == "bare":
            for batch in micro_batches:
                self._bare(batch)
            self.step_seconds["bare"].append(time.perf_counter() - begun)
        result = super().accumulate_and_step([] if self.variant == "bare" else micro_batches, loss)
        if self.variant != "bare":
            self.step_seconds[self.variant].append(time.perf_counter() - begun)
        return result

    def _bare(self, batch: PackedBatch) -> None:
        assert self.policy is not None
        states = self.adapter.packed_hidden(self.policy, batch)[0].index_select(0, batch.loss_positions)
        logits = self.policy.get_output_embeddings()(states).float()
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()


class TakeTurns(pl.Callback):
    """The variants one after the other, or the same one all the time; keeps losses."""

    def __init__(self, variants: Sequence[str]) -> None:
        self.variants = variants
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Select the variant of this step."""
        module.variant = self.variants[batch_idx % len(self.variants)]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(float(trainer.callback_metrics.get("policy/loss", torch.tensor(0.0))))


def trajectories(module: GRPOModule, mix: Sequence[dict[str, int]]) -> list[Trajectory]:
    """Trajectories of the given lengths: images at random places, two thirds of the text sampled."""
    rng = random.Random(0)
    made = []
    for number, shape in enumerate(mix):
        pictures = [Image.frombytes("RGB", (96, 96), rng.randbytes(96 * 96 * 3)) for _ in range(shape["images"])]
        views = [module.encoder.model_image(picture) for picture in pictures]
        pads = [[module.encoder.image_pad_id] * module.encoder.num_image_tokens(view.size) for view in views]
        text = shape["tokens"] - sum(map(len, pads))
        cuts = sorted(rng.sample(range(1, text), len(pads)))
        ids: list[int] = []
        for first, last, pad in zip([0, *cuts], [*cuts, text], [*pads, []], strict=True):
            ids += [rng.randrange(300) for _ in range(last - first)] + pad
        mask = [token != module.encoder.image_pad_id and rng.random() < 0.67 for token in ids]
        mask[0] = False
        made.append(
            Trajectory(
                task=Task(id=str(number), question="", images=(), ground_truth=""),
                sample=0,
                token_ids=ids,
                loss_mask=mask,
                logprobs=[-6.5 if learned else 0.0 for learned in mask],
                num_prompt_tokens=1,
                images=[TrajectoryImage(original=view, model_image=view) for view in views],
                advantage=rng.choice([-1.0, 1.0]) * rng.uniform(0.2, 1.5),
            )
        )
    return made


def fit(folder: Path, mix: Sequence[dict[str, int]], variants: Sequence[str], steps: int) -> tuple[Any, list[float]]:
    """Train for so many steps; the module with its timings, and the losses."""
    torch.manual_seed(0)
    module, turns = BenchModule(folder), TakeTurns(variants)
    made = trajectories(module, mix)

    def build(step: int) -> Iteration:
        batch = Iteration(step, [])
        batch.groups = [Group(task=t.task, trajectories=[t]) for t in made]
        return batch

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns],
    )
    trainer.fit(module, train_dataloaders=StepLoader(build, steps))
    return module, turns.losses


def agree(folder: Path, mix: Sequence[dict[str, int]]) -> dict[str, float]:
    """Loss of every trained variant after 20 steps on the shorter half of the mix.

    Raises:
        AssertionError: they differ.
    """
    shorter = sorted(mix, key=lambda shape: shape["tokens"])[: len(mix) // 2]
    found = {variant: fit(folder, shorter, [variant], STEPS_TO_AGREE)[1] for variant in VARIANTS[:3]}
    last = {variant: losses[-1] for variant, losses in found.items()}
    moved = abs(found["packed"][0] - last["packed"])
    assert max(last.values()) - min(last.values()) < 0.02 * moved, f"losses after {STEPS_TO_AGREE} steps: {last}"
    return last


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known[key] = size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def loss_memory(width: int = 128) -> tuple[float, float]:
    """Peak bytes of the loss, forward and backward, at the released vocabulary: ours, and with all logits."""
    head = torch.nn.Linear(width, VOCABULARY, bias=False, device="meta")
    states = torch.empty(1, LOSS_TOKENS + 1, width, device="meta", requires_grad=True)
    targets = torch.zeros(LOSS_TOKENS, dtype=torch.long, device="meta")
    batch: Any = SimpleNamespace(
        loss_positions=torch.zeros(LOSS_TOKENS, dtype=torch.long, device="meta"), targets=targets
    )
    batch.adapter = SimpleNamespace(packed_hidden=lambda model, batch: states)
    model: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY)),
        get_output_embeddings=lambda: head,
    )
    with LiveBytes() as ours:
        packed_logprobs(model, batch, temperature=0.7).logprobs.sum().backward()
    head.weight.grad = states.grad = None
    with LiveBytes() as full:
        logits = head(states[0, :-1]).float() / 0.7
        torch.log_softmax(logits, -1).gather(-1, targets[:, None]).sum().backward()
    return float(ours.peak), float(full.peak)


def measure(repeats: int) -> dict[str, float]:
    """Medians of every variant, and the ratios."""
    mix = json.loads(LENGTHS.read_text())
    tokens = sum(shape["tokens"] for shape in mix)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(TinyCheckpoint(out=folder))
        losses = agree(folder, mix)
        module, _ = fit(folder, mix, VARIANTS, len(VARIANTS) * (repeats + 1))
    cpu = {v: statistics.median(module.cpu_seconds[v][1:]) for v in VARIANTS[:3]}
    update = {v: statistics.median(module.seconds[v][1:]) for v in VARIANTS[:3]}  # the first round warms up
    step = {v: statistics.median(module.step_seconds[v][1:]) for v in ("packed", "bare")}
    ours, full = loss_memory()
    return {
        "update_packed_over_single": update["single"] / update["packed"],
        "update_packed_over_padded": update["padded"] / update["packed"],
        "update_over_floor": step["bare"] / step["packed"],
        "loss_memory_ratio": ours / full,
        "update_packed_over_single_cpu": cpu["single"] / cpu["packed"],
        "update_packed_over_padded_cpu": cpu["padded"] / cpu["packed"],
        **{f"update_{v}_tokens_per_s": tokens / seconds for v, seconds in update.items()},
        **{f"loss_after_{STEPS_TO_AGREE}_steps_{v}": value for v, value in losses.items()},
        "loss_memory_gb": ours / 1e9,
        "loss_memory_full_gb": full / 1e9,
        "tokens": float(tokens),
        "threads": float(torch.get_num_threads()),
    }


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="updates of each variant")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    options = parser.parse_args()
    figures = measure(options.repeats)
    for name, value in figures.items():
        print(f"{name:34} {value:12.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    missed = [name for name, bar in BARS.items() if figures[name] < bar]
    missed += ["loss_memory_ratio"] if figures["loss_memory_ratio"] > MEMORY_BAR else []
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
