"""Measures what rounding to bfloat16 changes, over seeds of weights and data, beside what planted faults change.

    python scripts/bench/bf16.py --json FILE                            every part with its number of seeds
    python scripts/bench/bf16.py --json FILE --only gradients --seeds 8 parts of it
    python scripts/bench/bf16.py --json FILE --table                    the table of what FILE holds; measures nothing

Every measurement is a line of FILE, and what FILE holds already is not measured again. The models, runs and faults are
those of tests/integration/test_bf16*.py. No GPU; parts: `gradients`, `sft` and `grpo` (two gloo ranks, one to three
minutes a seed on an idle machine), `forward`, `sequences` and `engine` (one process, seconds a seed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import pytest  # noqa: E402
import test_bf16 as whole  # noqa: E402
import test_bf16_engine as agreement  # noqa: E402
import test_bf16_sequences as sequences  # noqa: E402
import torch  # noqa: E402
from engine_samples import Policy  # noqa: E402
from rank_runs import Run, perform  # noqa: E402
from test_bf16_faults import FAMILIES, module_of, plant  # noqa: E402
from test_zero import launch  # noqa: E402

from cv_lightning.callbacks import start_check  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.digits.modules import DigitSFTDataModule  # noqa: E402
from cv_lightning.digits.scenes import DigitsConfig  # noqa: E402
from cv_lightning.models.adapters.tiny import TinyModelConfig  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy  # noqa: E402
from cv_lightning.models.logprobs import packed_logprobs  # noqa: E402
from cv_lightning.models.packing import pack_sequences  # noqa: E402
from cv_lightning.models.vision import VisionCache  # noqa: E402

Figures = Iterator[tuple[str, float]]
LARGE = 0.2
"""Standard deviation of weights with which every part of a model shows in its log-probabilities."""
VISIBLE = 8
"""Conversations of several images that the forwards are compared on."""


def checkpoint(folder: Path, **sizes: object) -> Path:
    """Write a tiny model."""
    write(TinyCheckpoint(out=folder, model=TinyModelConfig(**sizes)))  # type: ignore[arg-type]
    return folder


def mean(differences: torch.Tensor) -> float:
    """Mean size of differences of log-probabilities."""
    return float(differences.abs().mean())


# ------------------------------------------------------------------ two ranks
def gradients(family: str, seed: int, folder: Path) -> Figures:
    """Errors of summed gradients on each of two ranks: the norm of the error over the norm of the exact ones."""
    deep = {"deepstack_layers": (0,)} if family == "qwen3_vl" else {"full_attention_every": 1}
    small = {"num_layers": 1, "vision_depth": 1, "hidden_size": 64, "num_key_value_heads": 2}
    path = checkpoint(folder / "model", family=family, seed=seed, **small, **deep)
    many = Run(
        checkpoint=str(path), dtype="bfloat16", module="sft", steps=1, strategy="zero2", seed=seed, micro_batches=48
    )
    eight = replace(many, strategy="zero3", micro_batches=8)
    runs = {
        "48 micro-batches, ZeRO-2": many,
        "48 micro-batches, ZeRO-3": replace(many, strategy="zero3"),
        "48 micro-batches, sent in float32": replace(many, communication="float32"),
        "planted: 48 micro-batches summed in bfloat16": replace(many, accumulation="policy"),
        "8 micro-batches of GRPO": replace(eight, module="grpo"),
        "planted: SFT, one of 8 dropped": replace(eight, fault="dropped_micro_batch"),
        "planted: GRPO, one of 8 dropped": replace(eight, module="grpo", fault="dropped_micro_batch"),
    }
    found = launch(folder, {str(number): run for number, run in enumerate(runs.values())})
    for number, what in enumerate(runs):
        yield what, whole.gradient_error(found[str(number)])


def sft(family: str, seed: int, folder: Path) -> Figures:
    """Distances of 20 steps of supervised fine-tuning, vision tower frozen; see `distances_of`."""
    return distances_of("sft", family, seed, folder, module="sft", steps=20, freeze_vision=True)


def grpo(family: str, seed: int, folder: Path) -> Figures:
    """Distances of 10 iterations of GRPO; see `distances_of`."""
    return distances_of("grpo", family, seed, folder)


def distances_of(kind: str, family: str, seed: int, folder: Path, **settings: object) -> Figures:
    """Distances of whole runs on two ranks from one process, as `test_bf16.py` takes them."""
    path = checkpoint(folder / "model", family=family, seed=seed, tie_embeddings=family == "qwen2_5_vl")
    run = replace(Run(checkpoint=str(path), dtype="bfloat16", seed=seed), **settings)  # type: ignore[arg-type]
    many = {strategy: replace(run, strategy=strategy) for strategy in whole.STRATEGIES}
    many["lora"] = replace(run, strategy="zero3", lora=True)
    many["dropped"] = replace(run, strategy="zero3", fault="dropped_micro_batch")
    ranks = launch(folder, many)
    copies = replace(run, float32_copies=True)
    plain = perform(copies, folder)
    ones = {"ddp": perform(run, folder), "lora": perform(replace(copies, lora=True), folder)}
    for name, found in ranks.items():
        for what, value in whole.distances(found, ones.get(name, plain), kind).items():
            yield f"{'planted: ' * (name == 'dropped')}{what.split('/')[-1]}, {name}", value


# ------------------------------------------------------------------ one process
def forward(family: str, seed: int, folder: Path) -> Figures:
    """Differences of log-probabilities that the start-up check of SFT looks at; mean over tokens, and the extremes."""
    module = module_of(checkpoint(folder / "model", family=family, seed=seed, initializer_range=LARGE))
    module.policy = load_policy(module.policy_config)
    data = DigitSFTDataModule(digits=DigitsConfig(seed=seed), num_steps=1, conversations_per_step=48, warm_up_share=0.0)
    made = list(data.train_dataloader().build(0).conversations)
    data.teardown("fit")
    several = [c for c in made if any(turn.result_image is not None for turn in c.turns)][:VISIBLE]
    assert len(several) == VISIBLE

    def compared() -> list[start_check.StartReport]:
        with torch.no_grad():
            pairs = [start_check._choose(module, [conversation]) for conversation in several]
            other = pairs[1:] + pairs[:1]  # packed with another conversation
            return [
                start_check.StartReport(*start_check._differences(module, a + b))
                for a, b in zip(pairs, other, strict=True)
            ]

    honest = compared()
    for column, name in ((0, "ours against transformers' own"), (1, "packed against alone")):
        means = [float(report[column].abs().mean()) for report in honest]
        yield name, statistics.fmean(means)
        yield f"{name}, the worst conversation", max(means)
    for fault in ("swapped_image", "shifted_position"):
        with pytest.MonkeyPatch.context() as patch:
            plant(fault, patch)
            means = [float(report.from_plain.abs().mean()) for report in compared()]
        yield f"planted: {fault.replace('_', ' ')}", statistics.fmean(means)
        yield f"planted: {fault.replace('_', ' ')}, the least", min(means)


def sequence_lengths(family: str, seed: int, folder: Path) -> Figures:
    """Long and shared-prefix sequences against transformers' own forward of each alone; mean over learned tokens."""
    path = checkpoint(
        folder / "model", family=family, seed=seed, num_layers=2, max_positions=8192, initializer_range=LARGE
    )
    policy = load_policy(PolicyConfig(path=str(path), dtype="bfloat16")), load_adapter(PolicyConfig(path=str(path)))
    images, cache = sequences.images_of(policy[1], 4), VisionCache(policy[1])
    long = sequences.sequence_of(policy, images, cache, sequences.LENGTH, seed)
    yield "4,200 tokens, 4 images", mean(sequences.gap(policy, [long], [images]))
    yield "planted: 4,200 tokens, rotary frequencies rounded", mean(sequences.rounded_rotary(policy, long))
    first = sequences.sequence_of(policy, images[:2], cache, 300, seed)
    group = [first, *sequences.siblings(first, 3, seed + 1000)]
    other = sequences.sequence_of(policy, images[2:], cache, 200, seed + 2000)
    yield "shared prefix and packed", mean(sequences.gap(policy, [*group, other], [images[:2]] * 4 + [images[2:]]))
    with torch.no_grad():
        packed = pack_sequences(group, policy[0].config, policy[1])
        together = packed_logprobs(policy[0], packed).logprobs
        alone = [
            packed_logprobs(policy[0], pack_sequences([one], policy[0].config, policy[1])).logprobs for one in group
        ]
    apart = [together[packed.sequence_index == number] - one for number, one in enumerate(alone)]
    yield "shared prefix against alone", mean(torch.cat(apart))


def engine(family: str, seed: int, folder: Path) -> Figures:
    """Trainer minus vLLM over three syncs of one engine, and under planted faults; mean over sampled tokens."""
    from cv_lightning.engines.vllm import VLLMEngine

    path = checkpoint(folder / "model", family=family, seed=seed, initializer_range=LARGE)
    policy = Policy.load(path, dtype="bfloat16")
    vllm = VLLMEngine(str(path), agreement.CONFIG, policy.adapter, dtype="bfloat16")
    try:
        for version in (1, 2, 3):
            agreement.sync(policy, vllm, version)
            found = agreement.differences(policy, vllm, seed=100 * seed + version).abs()
            yield f"agreement, sync {version}", float(found.mean())
            yield f"agreement, 99th percentile, sync {version}", float(torch.quantile(found, 0.99))
        swapped = agreement.differences(policy, vllm, 100 * seed + 4, agreement.SHAPES[1:2], swap=True)
        yield "planted: images swapped", float(swapped.abs().mean())
        with pytest.MonkeyPatch.context() as patch:
            plant("shifted_position", patch)
            yield "planted: positions shifted", float(agreement.differences(policy, vllm, 100 * seed + 5).abs().mean())
        names = [name for name, _ in policy.model.named_parameters()]
        agreement.sync(policy, vllm, 4, stale=names[len(names) // 3 : 2 * len(names) // 3])
        yield "planted: a stale third", float(agreement.differences(policy, vllm, seed=100 * seed + 6).abs().mean())
    finally:
        vllm.close()


PARTS: dict[str, tuple[Callable[[str, int, Path], Figures], int]] = {
    "forward": (forward, 8),
    "sequences": (sequence_lengths, 8),
    "engine": (engine, 3),
    "gradients": (gradients, 5),
    "sft": (sft, 3),
    "grpo": (grpo, 3),
}
"""What measures each part, and its number of seeds."""


# ------------------------------------------------------------------ lines of the file
def measured(file: Path) -> list[dict[str, object]]:
    """The lines of the file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measure(file: Path, only: list[str], families: list[str], seeds: int | None) -> None:
    """Measure what the file lacks, seed by seed."""
    for part in only:
        take, usual = PARTS[part]
        for seed in range(seeds or usual):
            for family in families:
                if any((line["part"], line["family"], line["seed"]) == (part, family, seed) for line in measured(file)):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    figures = list(take(family, seed, Path(folder)))  # type: ignore[arg-type]
                with file.open("a") as out:
                    for what, value in figures:
                        line = {"part": part, "family": family, "what": what, "seed": seed, "value": value}
                        out.write(json.dumps(line) + "\n")
                print(part, family, seed, "done", flush=True)


def table(file: Path) -> str:
    """Minimum, median and maximum over seeds of everything that the file holds, a line each."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for line in measured(file):
        groups.setdefault((line["part"], line["what"], line["family"]), []).append(float(str(line["value"])))
    rows = ["| part | what | family | seeds | min | median | max |", "|---|---|---|---|---|---|---|"]
    for key in sorted(groups, key=str):
        values = groups[key]
        figures = " | ".join(f"{value:.2g}" for value in (min(values), statistics.median(values), max(values)))
        rows.append(f"| {' | '.join(map(str, key))} | {len(values)} | {figures} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of measurements, one a line")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, help="as many of each part instead of its usual number")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.table:
        measure(options.json, options.only, options.families, options.seeds)
    print(table(options.json))


if __name__ == "__main__":
    main()
