"""The packed update beside a bare loop over the same rows and beside what `plan` says of its memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_update
import lightning.pytorch as pl
import torch
from results import Line, Verdict
from update import trajectories

from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.modules import StepLoader
from cv_lightning.models.attention import attention_kernel_name
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.shapes import model_config
from cv_lightning.planner.footprint import Sharding, activation_bytes, shape_of, states
from cv_lightning.types import Group, Iteration

STEPS, WARM_UP = 4, 2
OVER_BARE, OVER_PLAN = 0.8, 1.1
"""Least speed over the bare loop, most memory over the plan's."""


class BareLoop(pl.Callback):
    """Times the same rows without anything of ours around the model, when the updates are done."""

    def __init__(self, made: list[Any]) -> None:
        self.made, self.seconds = made, 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forward, backward and optimizer step; medians."""
        batches = [b.to(pl_module.device) for b in pl_module.pack_micro_batches(pl_module.train_sequences(self.made))]
        optimizer = torch.optim.AdamW(pl_module.policy.parameters(), lr=1e-6)
        optimizer.state = trainer.optimizers[0].state  # the memory is taken once
        seconds = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            for batch in batches:
                packed_logprobs(
                    pl_module.policy, batch, banned_ids=pl_module.adapter.vision_ids
                ).logprobs.mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        self.seconds = statistics.median(seconds)


def update_figures(options: argparse.Namespace) -> Iterator[Line]:
    """Tokens/s, share of the peak, memory; each beside its bar."""
    config, row_tokens = model_config(options.model), 16384
    if options.cpu:
        row_tokens = 128
        text, vision = config.get_text_config(), config.vision_config
        text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 256, 512, 2, 1
        text.vocab_size, vision.depth, vision.hidden_size, vision.intermediate_size = 2048, 2, 128, 256
        vision.num_heads, vision.out_hidden_size, vision.deepstack_visual_indexes = 2, 256, [0]
        config.image_token_id, config.video_token_id = 2001, 2002
        config.vision_start_token_id, config.vision_end_token_id = 2003, 2004
    text = config.get_text_config()
    text.num_hidden_layers = 2 if options.cpu else gpu_update.layers_that_fit(config)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with tempfile.TemporaryDirectory() as name:
        write(TinyCheckpoint(out=Path(name)))
        module, clock = gpu_update.BigModule(Path(name), config, row_tokens), gpu_update.Clock()
        lengths = [row_tokens // part for part in (2, 4, 8, 8)] * 2
        made = trajectories(module, [{"tokens": length, "images": 1} for length in lengths])
        bare = BareLoop(made)
        fit(module, made, [clock, bare])
    found = gpu_update.figures(module, clock.seconds[WARM_UP:], lengths, made)
    yield from judged(options, module, found, bare.seconds, made, row_tokens)


def fit(module: Any, made: list[Any], callbacks: list[pl.Callback]) -> None:
    """Updates on the same trajectories."""

    def build(step: int) -> Iteration:
        batch = Iteration(step, [])
        batch.groups = [Group(task=t.task, trajectories=[t]) for t in made]
        return batch

    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=StepLoader(build, STEPS + WARM_UP))


def judged(
    options: argparse.Namespace, module: Any, found: dict[str, float], bare: float, made: list[Any], row_tokens: int
) -> Iterator[Line]:
    """Every figure beside what it is compared with."""
    tokens = sum(len(t.token_ids) for t in made)
    speed = found["gpu_update_tokens_per_s"]
    kernel = f"{found['gpu_update_layers']:.0f} layers, attention by {attention_kernel_name()}"
    yield Line(check="tokens/s", verdict="measured", value=f"{speed:.0f}", detail=kernel)
    over = speed * bare / tokens
    yield Line(check="speed over a bare loop", verdict=bar(options, over >= OVER_BARE), value=f"{over:.2f}",
               detail="not judged at tiny size" if options.cpu else f">= {OVER_BARE}")  # fmt: skip
    if options.cpu:
        yield Line(check="MFU", verdict="skip", detail="a CPU has no stated peak")
        yield Line(check="peak memory", verdict="skip", detail="torch counts peak memory on GPUs only")
    elif "gpu_update_mfu" in found:
        mfu = found["gpu_update_mfu"]
        yield Line(check="MFU", verdict="pass" if mfu >= gpu_update.BAR else "fail", value=f"{mfu:.2f}",
                   detail=f">= {gpu_update.BAR}")  # fmt: skip
    else:
        yield Line(check="MFU", verdict="skip", detail=f"the peak of {torch.cuda.get_device_name(0)} is not known")
    shape = shape_of(module.policy)
    held = states(shape, Sharding(), has_reference=False)
    image_tokens = sum(t.token_ids.count(module.encoder.image_pad_id) for t in made) * row_tokens // tokens
    planned = held["weights"] + held["gradients"] + held["optimizer"]
    planned += max(activation_bytes(shape, row_tokens, image_tokens, True), 2 * shape.trained * shape.trained_bytes)
    measured = found.get("gpu_update_peak_gb")
    if measured is None:
        yield Line(
            check="the plan's memory",
            verdict="measured",
            value=f"{planned / 1e9:.3f} GB",
            detail="nothing to compare with",
        )
        return
    ratio = measured / (planned / 1e9)
    yield Line(check="peak memory over the plan's", verdict=bar(options, ratio <= OVER_PLAN), value=f"{ratio:.2f}",
               detail=f"{measured:.1f} of {planned / 1e9:.1f} GB, <= {OVER_PLAN}")  # fmt: skip


def bar(options: argparse.Namespace, met: bool) -> Verdict:
    """The verdict of a figure that has a bar on GPUs."""
    return "measured" if options.cpu else "pass" if met else "fail"
