"""Measures SFT against TRL's SFTTrainer: the same conversations, images, loss tokens, optimizer and order.

    python scripts/bench/sft_vs_trl.py --json FILE

Two mixes of multi-turn conversations with images on the tiny Qwen3-VL: demonstrations of the digits task, and the
length mix of `lengths.json`. A step is 32 conversations. TRL, which cannot pack rows with images, runs at the best of
its batch sizes 1, 4, 8, 16 and 32 with as much gradient accumulation as that takes, without gradient checkpointing.
Both sides start from conversations in memory. The trainers take turns, medians over rounds; the losses of the first
20 steps must agree. TRL comes in an environment of its own, `.venv-trl`, which is made at the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import torch  # noqa: E402
from peer import Referee, Round, against_trl, best_batch  # noqa: E402
from PIL import Image  # noqa: E402

from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder  # noqa: E402
from cv_lightning.agent.prompt import PromptConfig  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.data.conversations import Conversation, DemoTurn  # noqa: E402
from cv_lightning.data.modules import DemonstrationBatch, StepLoader  # noqa: E402
from cv_lightning.digits.modules import DigitSFTDataModule  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter  # noqa: E402
from cv_lightning.modules.base import OptimizerConfig  # noqa: E402
from cv_lightning.modules.sft import SFTModule, encode_conversation  # noqa: E402
from cv_lightning.types import Task  # noqa: E402

Mix = Literal["digits", "lengths"]
MIXES: tuple[Mix, ...] = ("digits", "lengths")
BARS = {"digits": 1.1, "lengths": 1.5}
BATCH, CYCLE = 32, 3
"""Conversations of a step, and the steps after which the same ones come again."""
TRL_BATCHES = (1, 4, 8, 16, 32)
ROW_TOKENS = {"digits": 2048, "lengths": 1024}
STEPS_A_ROUND = {"digits": 4, "lengths": 2}
STEPS_TO_AGREE = 20
LEARNING_RATE = 5e-4
MANY_STEPS = 100_000


# ------------------------------------------------------------------------------------------------ the same data
def conversations(mix: Mix, encoder: DialogueEncoder) -> list[list[Conversation]]:
    """The conversations of every step of the cycle; the same in every process."""
    if mix == "digits":
        data = DigitSFTDataModule(num_steps=CYCLE, conversations_per_step=BATCH, warm_up_share=0.0)
        try:
            return [batch.conversations for batch in data.train_dataloader()]
        finally:
            data.teardown("fit")
    shapes = json.loads((Path(__file__).parent / "lengths.json").read_text())
    made = [_of_length(shapes[n % len(shapes)], random.Random(n), encoder, n) for n in range(BATCH * CYCLE)]
    return [made[first : first + BATCH] for first in range(0, len(made), BATCH)]


def _of_length(shape: dict[str, int], rng: random.Random, encoder: DialogueEncoder, number: int) -> Conversation:
    """A conversation with so many images and, to within a few, so many tokens; two thirds of its text is learned."""
    images = tuple(
        encoder.model_image(Image.frombytes("RGB", (96, 96), rng.randbytes(96 * 96 * 3)))
        for _ in range(shape["images"])
    )
    room = shape["tokens"] - sum(encoder.num_image_tokens(image.size) for image in images)

    def words(tokens: int) -> str:
        text = ""
        while len(encoder.assistant_ids(text)) < tokens:
            text += " " + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6)))
        return text

    task = Task(id=str(number), question=words(room // 3), images=images, ground_truth="")
    return Conversation(task=task, turns=(DemoTurn(text=words(room - room // 3)),))


def prompt_of(mix: Mix) -> PromptConfig:
    """Few words around the digits; around the long conversations none, so that their lengths are the mix's."""
    return PromptConfig(system="none", state_size=mix == "digits")


# ------------------------------------------------------------------------------------------------ ours
def train_ours(folder: str, mix: Mix) -> None:
    """Our trainer, under a referee."""
    import lightning.pytorch as pl

    class Report(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            referee.ready()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            metrics = trainer.callback_metrics
            referee.step(float(metrics["sft/loss"]), float(metrics["sft/tokens"]))

    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.0)
    policy = PolicyConfig(path=folder, dtype="float32")
    module = SFTModule(policy, optimizer, ROW_TOKENS[mix], prompt=prompt_of(mix))
    steps = conversations(mix, module.encoder)
    referee = Referee(STEPS_A_ROUND[mix])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Report()],
    )
    trainer.fit(module, StepLoader(lambda n: DemonstrationBatch(n, steps[n % CYCLE]), MANY_STEPS))


# ------------------------------------------------------------------------------------------------ TRL
def train_trl(folder: str, mix: Mix, batch_size: int) -> None:
    """TRL's trainer on the same tokens, under a referee."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    adapter = load_adapter(PolicyConfig(path=folder))
    processor, encoder = adapter.processor, DialogueEncoder(adapter)
    steps = conversations(mix, encoder)
    dialogues = [encode_conversation(encoder, c, prompt_of(mix)) for step in steps for c in step]
    rows = [_row_of(dialogue, encoder) for dialogue in dialogues]
    referee = Referee(STEPS_A_ROUND[mix])

    class Collator(DataCollatorForVisionLanguageModeling):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            masks = [example.pop("mask") for example in examples]
            batch = super().torch_call(examples)
            for labels, mask in zip(batch["labels"], masks, strict=True):
                labels[: len(mask)][~torch.tensor(mask)] = -100
            return batch

    class Report(TrainerCallback):
        done = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            referee.ready()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None and "loss" in logs:
                self.done += 1
                first = (self.done - 1) % CYCLE * BATCH
                tokens = sum(len(dialogue.token_ids) for dialogue in dialogues[first : first + BATCH])
                referee.step(float(logs["loss"]), float(tokens))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    table = datasets.Dataset.from_dict({"number": list(range(len(rows)))})
    table.set_transform(lambda given: {key: [rows[n][key] for n in given["number"]] for key in rows[0]})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=BATCH // batch_size,
            max_steps=MANY_STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = InOrder(
            model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            args=arguments,
            train_dataset=table,
            data_collator=Collator(processor),
            processing_class=processor,
            callbacks=[Report()],
        )
        _check_tokens(Collator(processor), rows, dialogues)
        trainer.train()


def _row_of(dialogue: Dialogue, encoder: DialogueEncoder) -> dict[str, Any]:
    text = encoder.tokenizer.decode(dialogue.engine_ids, skip_special_tokens=False)
    return {"text": text, "images": dialogue.images, "mask": dialogue.loss_mask}


def _check_tokens(collator: Any, rows: list[dict[str, Any]], dialogues: list[Dialogue]) -> None:
    """Both sides train on exactly the same tokens."""
    for row, dialogue in zip(rows, dialogues, strict=True):
        batch = collator.torch_call([dict(row)])
        assert batch["input_ids"][0].tolist() == dialogue.token_ids, "TRL's tokens differ from ours"
        assert int((batch["labels"] != -100).sum()) == sum(dialogue.loss_mask)


# ------------------------------------------------------------------------------------------------ the comparison
def speed(rounds: list[Round]) -> float:
    """Tokens a second, the median of rounds."""
    return statistics.median(done.tokens / done.seconds for done in rounds)


def compare(mix: Mix, folder: Path, rounds: int) -> dict[str, float]:
    """Figures of one mix.

    Raises:
        AssertionError: the losses of the two sides part.
    """
    options: dict[str, Any] = {"folder": str(folder), "mix": mix}
    best = best_batch(__file__, options, TRL_BATCHES, lambda found: -speed(found))
    rounds = max(rounds, STEPS_TO_AGREE // STEPS_A_ROUND[mix])
    ours, trl = against_trl(__file__, options, best, rounds, warm_up=0)
    losses = [[loss for done in side for loss in done.losses][:STEPS_TO_AGREE] for side in (ours, trl)]
    moved = losses[0][0] - losses[0][-1]
    gap = abs(losses[0][-1] - losses[1][-1])
    assert gap < 0.05 * moved, f"{mix}: losses part, ours {losses[0]}, TRL {losses[1]}"
    name = "sft_over_trl" if mix == "digits" else "sft_over_trl_lengths"
    return {
        name: speed(ours[1:]) / speed(trl[1:]),
        f"{name}_ours_tokens_per_s": speed(ours[1:]),
        f"{name}_trl_tokens_per_s": speed(trl[1:]),
        f"{name}_trl_batch": float(best),
        f"{name}_ours_loss": losses[0][-1],
        f"{name}_trl_loss": losses[1][-1],
        f"{name}_first_loss": losses[0][0],
    }


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    if sys.argv[1:2] == ["--worker"]:
        trainer = {"ours": train_ours, "trl": train_trl}[sys.argv[2]]
        trainer(**json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--mix", choices=MIXES, action="append", help="one mix only")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each side")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    missed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(TinyCheckpoint(out=folder))
        for mix in options.mix or MIXES:
            figures |= (made := compare(mix, folder, options.rounds))
            missed |= next(iter(made.values())) < BARS[mix]
    figures["threads"] = float(torch.get_num_threads())
    for key, value in figures.items():
        print(f"{key:42} {value:12.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
