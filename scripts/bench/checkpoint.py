"""Measures a checkpoint of a 0.5 B model against writing the same bytes.

    python scripts/bench/checkpoint.py --json FILE [--folder DIR]

A random Qwen3-VL in bfloat16 and its AdamW moments, 3 GB together. The checkpoint is what a run saves: everything
collected, written beside its name, on disk, renamed, the oldest removed. The floor writes the same tensors' memory to a
file that is on disk when the clock stops. Both take turns in one run; medians of wall-clock, and of the process's CPU
seconds (`_cpu`), which a busy machine hardly disturbs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from cv_lightning.callbacks.checkpoint import CheckpointCallback  # noqa: E402
from cv_lightning.checkpoints.folder import last_checkpoint  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.data.modules import StepLoader  # noqa: E402
from cv_lightning.models.loading import PolicyConfig  # noqa: E402
from cv_lightning.modules.sft import SFTModule  # noqa: E402

BAR = 1.3


class HalfBillion(SFTModule):
    """A random model of 0.5 B parameters with an optimizer that has moments, without the hours that learning takes."""

    def configure_model(self) -> None:
        """The tiny model's architecture, wider and deeper."""
        super().configure_model()
        config = self.policy.config
        config.text_config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 30})
        config.text_config.update({"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64})
        config.vision_config.out_hidden_size = 1024
        config._attn_implementation = "eager"
        torch.set_default_dtype(torch.bfloat16)
        self.policy = type(self.policy)(config)
        torch.set_default_dtype(torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The moments of a first step along nothing."""
        optimizer = self.single_optimizer.optimizer
        for parameter in self.policy.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}


class Measure(pl.Callback):
    """Takes turns at the end of the only batch; notes (wall-clock, CPU) seconds."""

    def __init__(self, saver: CheckpointCallback, repeats: int) -> None:
        self.saver = saver
        self.repeats = repeats
        self.seconds: dict[str, list[tuple[float, float]]] = {"checkpoint": [], "write": []}
        self.num_bytes = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """All turns."""
        folder = Path(trainer.default_root_dir)
        for turn in range(self.repeats + 1):
            module.iteration = turn + 1
            seconds = {
                "write": timed(lambda: self._write(module, folder / "floor.bin")),
                "checkpoint": timed(lambda: self.saver.save(trainer, module)),
            }
            (folder / "floor.bin").unlink()
            print(" ".join(f"{name} {wall:.2f} s ({cpu:.2f} CPU)" for name, (wall, cpu) in seconds.items()), flush=True)
            for name, figures in seconds.items():
                self.seconds[name] += [figures] if turn else []  # the first round warms up
        size = last_checkpoint(folder).stat().st_size
        assert abs(size / self.num_bytes - 1) < 0.01, (size, self.num_bytes)

    def _write(self, module: pl.LightningModule, path: Path) -> None:
        states = module.single_optimizer.optimizer.state.values()
        tensors = [*module.parameters(), *(v for state in states for v in state.values() if torch.is_tensor(v))]
        arrays = [tensor.detach().view(-1).view(torch.uint8).numpy() for tensor in tensors]
        self.num_bytes = sum(array.nbytes for array in arrays)
        with path.open("wb", buffering=0) as file:
            for array in arrays:
                file.write(array.data)
            os.fsync(file.fileno())


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Figures by name."""
    write(TinyCheckpoint(out=folder / "model"))
    saver = CheckpointCallback(every_minutes=1e9, keep=1)
    turns = Measure(saver, repeats)
    module = HalfBillion(PolicyConfig(path=str(folder / "model"), dtype="bfloat16"))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[turns, saver],
    )
    trainer.fit(module, train_dataloaders=StepLoader(lambda step: object(), 1))
    (checkpoint, checkpoint_cpu), (floor, floor_cpu) = (
        [statistics.median(kind) for kind in zip(*turns.seconds[name], strict=True)] for name in ("checkpoint", "write")
    )
    return {
        "checkpoint_over_write": checkpoint / floor,
        "checkpoint_over_write_cpu": checkpoint_cpu / floor_cpu,
        "checkpoint_s": checkpoint,
        "checkpoint_write_s": floor,
        "checkpoint_gb": turns.num_bytes / 1e9,
        "checkpoint_parameters": float(sum(p.numel() for p in module.parameters())),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        figures = measure(Path(folder), given.repeats)
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}")
    print(f"bar: checkpoint_over_write <= {BAR}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    return int(figures["checkpoint_over_write"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
