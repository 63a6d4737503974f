"""Measures the GRPO update of a model of released shape with random weights on one GPU: tokens/s, MFU, peak memory.

    python scripts/bench/gpu_update.py --json FILE [--model Qwen3-VL-8B] [--layers N]

bf16, packed rows of 16,384 tokens, gradient checkpointing, AdamW. Without --layers as many language layers as leave
room for rows: full fine-tuning of all 36 of the 8 B model takes more than one GPU. MFU counts the floating-point
operations of one forward and its backward (`forward_flops`), without those of recomputing, over the GPU's dense bf16
peak. On a machine without a GPU it runs with --layers 1 --vision_layers 1 --row_tokens 64 as a test of itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from update import trajectories  # noqa: I001 - it prepares the environment

import lightning.pytorch as pl
import torch
from transformers import AutoModelForImageTextToText

from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.modules import StepLoader
from cv_lightning.planner.footprint import forward_flops, shape_of
from cv_lightning.models.loading import PolicyConfig, prepare_policy
from cv_lightning.models.shapes import model_config
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.types import Group, Iteration

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "H800": 989.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16, from the makers' data sheets."""
BYTES_A_PARAMETER = 8
"""bf16 weights, gradients and two moments."""
ROOM_FOR_ROWS = 0.25
"""Share of the memory that is left to activations."""
BAR = 0.40


class BigModule(GRPOModule):
    """GRPO on a model made in place, with random weights."""

    def __init__(self, tokenizer_folder: Path, config: Any, row_tokens: int) -> None:
        policy = PolicyConfig(path=str(tokenizer_folder), dtype="bfloat16", gradient_checkpointing=True)
        super().__init__(policy, OptimizerConfig(lr=1e-6), row_tokens, algorithm=AlgorithmConfig(num_minibatches=1))
        self.architecture = config
        self.encoder.image_pad_id = config.image_token_id
        self.adapter.vision_ids = ()
        self.adapter.image_id = config.image_token_id

    def configure_model(self) -> None:
        """Make the policy on the device, as `load_policy` would have loaded it."""
        if self.policy is not None:
            return
        with torch.device(self.trainer.strategy.root_device):
            model = AutoModelForImageTextToText.from_config(self.architecture, dtype=torch.bfloat16)
        prepare_policy(model, self.policy_config)
        self.policy = model.train()


class Clock(pl.Callback):
    """Seconds of every update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.begun = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop, when the GPU has."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


def layers_that_fit(config: Any) -> int:
    """Language layers whose states leave room for rows on this GPU; all on a CPU."""
    text = config.get_text_config()
    if not torch.cuda.is_available():
        return int(text.num_hidden_layers)
    room = (1 - ROOM_FOR_ROWS) * torch.cuda.get_device_properties(0).total_memory
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - layer * text.num_hidden_layers
    return int(max(1, min(text.num_hidden_layers, (room / BYTES_A_PARAMETER - rest) // layer)))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Figures of one shape."""
    config = model_config(options.model)
    if options.vision_layers:
        config.vision_config.depth = options.vision_layers
        config.vision_config.deepstack_visual_indexes = [0]
    config.get_text_config().num_hidden_layers = options.layers or layers_that_fit(config)
    with tempfile.TemporaryDirectory() as name:
        write(TinyCheckpoint(out=Path(name)))
        module, clock = BigModule(Path(name), config, options.row_tokens), Clock()
        lengths = [options.row_tokens // part for part in (2, 4, 8, 8)]  # one row, filled
        made = trajectories(module, [{"tokens": length, "images": 1} for length in lengths * options.rows])

        def build(step: int) -> Iteration:
            batch = Iteration(step, [])
            batch.groups = [Group(task=t.task, trajectories=[t]) for t in made]
            return batch

        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, train_dataloaders=StepLoader(build, options.steps + 2))
        return figures(module, clock.seconds[2:], [len(t.token_ids) for t in made], made)


def figures(module: BigModule, seconds: list[float], lengths: list[int], made: list[Any]) -> dict[str, float]:
    """Tokens a second, share of the peak, and memory."""
    assert module.policy is not None
    shape, tokens, median = shape_of(module.policy), sum(lengths), statistics.median(seconds)
    image_tokens = sum(t.token_ids.count(module.encoder.image_pad_id) for t in made)
    seen = sum(length**2 for length in lengths) / tokens  # of a token's sequence, on average over tokens
    flops = 3 * forward_flops(shape, tokens, seen, image_tokens)
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if on_gpu else "CPU"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    print(f"{name}: {shape.parameters / 1e9:.2f} B parameters, {shape.layers} layers", file=sys.stderr)
    found = {
        "gpu_update_tokens_per_s": tokens / median,
        "gpu_update_tflops": flops / median / 1e12,
        "gpu_update_parameters": float(shape.parameters),
        "gpu_update_layers": float(shape.layers),
    }
    if peak is not None:
        found["gpu_update_mfu"] = flops / median / 1e12 / peak
    if on_gpu:
        found["gpu_update_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B", help="folder with a config.json, or a published model")
    parser.add_argument("--layers", type=int, default=0, help="language layers; 0: as many as fit")
    parser.add_argument("--vision_layers", type=int, default=0, help="blocks of the vision tower; 0: the model's")
    parser.add_argument("--row_tokens", type=int, default=16384, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of an update")
    parser.add_argument("--steps", type=int, default=5, help="updates that count")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the bar is missed")
    options = parser.parse_args()
    found = measure(options)
    for name, value in found.items():
        print(f"{name:30} {value:16.4f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(options.check and found.get("gpu_update_mfu", 0.0) < BAR)


if __name__ == "__main__":
    sys.exit(main())
