"""Measures a GRPO iteration against TRL's GRPOTrainer: same model, prompts, generations, tokens and reward.

    python scripts/bench/grpo_vs_trl.py --json FILE

16 digit tasks x 8 trajectories on the tiny Qwen3-VL, one optimizer step. Single turn: 48 sampled tokens. With a tool:
24 tokens, the image turned by the tool, 24 tokens more. The policy is random, so both sides are told that a first
turn calls the tool and how long turns are; what they decode, run and learn is real. Our tool is the sandbox, TRL's a
function in its process. TRL runs at the best of its batch sizes, with the generation back end of transformers; its
vLLM back end is tried, too, and what stops it on this machine is said. The trainers take turns, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from cv_lightning.environment import prepare_environment  # noqa: E402
from cv_lightning.models.adapters import ModelAdapter  # noqa: E402

prepare_environment()

import torch  # noqa: E402
from peer import Referee, Round, Worker, WorkerFailed, against_trl, best_batch, take_turns, trl_python  # noqa: E402
from PIL import Image  # noqa: E402

from cv_lightning.agent.config import AgentConfig  # noqa: E402
from cv_lightning.agent.dialogue import DialogueEncoder  # noqa: E402
from cv_lightning.agent.prompt import PromptConfig, task_messages  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.data.modules import StepLoader  # noqa: E402
from cv_lightning.digits.modules import DigitTaskDataModule  # noqa: E402
from cv_lightning.digits.tiny import MARKUP_TOKENS  # noqa: E402
from cv_lightning.engines import Completion, Engine, EngineConfig, Request  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter  # noqa: E402
from cv_lightning.rewards.config import RewardConfig  # noqa: E402
from cv_lightning.rewards.terms import RewardTerm  # noqa: E402
from cv_lightning.types import Iteration, Task, Trajectory  # noqa: E402

TASKS, SAMPLES = 16, 8
TURN_TOKENS = {False: 48, True: 24}
"""Sampled tokens of a turn, without and with the tool."""
TRL_BATCHES = (16, 32, 128)
LEARNING_RATE = 1e-5
BARS = {"grpo_over_trl": 1.3, "grpo_tools_over_trl": 1.5}
CALL = '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90)"}}\n</tool_call>'
ANSWER = "<answer>1</answer>"
MANY_STEPS = 100_000
PARTS = ("rollout", "sync", "update")
PROMPT = PromptConfig(system="none")


# ------------------------------------------------------------------------------------------------ the same work
def tasks_of(step: int) -> list[Task]:
    """The tasks of an iteration; the same in every process."""
    data = DigitTaskDataModule(num_iterations=MANY_STEPS, tasks_per_iteration=TASKS)
    loader = data.train_dataloader()
    assert isinstance(loader, StepLoader)
    return list(loader.build(step).tasks)


def reward_of(ids: Sequence[int]) -> float:
    """A reward that differs within every group."""
    return float(sum(ids) % 7)


def never_sampled(adapter: ModelAdapter) -> list[int]:
    """Vision tokens, markup, and whatever would end a turn."""
    tokenizer = adapter.tokenizer
    markup = [tokenizer.convert_tokens_to_ids(token) for token in MARKUP_TOKENS]
    return sorted({*adapter.vision_ids, *markup, adapter.end_id, tokenizer.pad_token_id, tokenizer.eos_token_id})


# ------------------------------------------------------------------------------------------------ ours
class PlannedIds(list[int]):
    """Sampled ids with the text that they are taken for."""

    text: str


class PlannedEncoder(DialogueEncoder):
    """Reads planned ids as their text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The planned text, else the real one."""
        return ids.text if isinstance(ids, PlannedIds) else super().decode(ids)


@dataclass
class PlannedEngine:
    """The real engine; a first turn is taken for a call where the tool is on, every other one for an answer."""

    engine: Engine
    tool: bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> list[Completion]:
        """Advance, and say what the turns that finished mean."""
        return [self._planned(done) for done in self.engine.step()]

    def add_request(self, request: Request) -> None:
        """Queue a turn and remember which one it is."""
        self.turns[request.id] = len(request.images)
        self.engine.add_request(request)

    def __post_init__(self) -> None:
        self.turns: dict[str, int] = {}

    def _planned(self, done: Completion) -> Completion:
        ids = PlannedIds(done.token_ids)
        ids.text = CALL if self.tool and self.turns.pop(done.id) == 1 else ANSWER
        return replace(done, token_ids=ids, stopped=True)


class IdsReward(RewardTerm):
    """`reward_of` the sampled ids."""

    def value(self, trajectory: Trajectory, score: float) -> float:
        """Reward of one trajectory."""
        return reward_of([i for i, learned in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if learned])


def train_ours(folder: str, tool: bool) -> None:
    """Our trainer, under a referee."""
    import lightning.pytorch as pl

    from cv_lightning.callbacks.rollout import RolloutCallback
    from cv_lightning.modules.base import OptimizerConfig
    from cv_lightning.modules.grpo import GRPOModule
    from cv_lightning.rl.algorithm import AlgorithmConfig

    referee = Referee(1)

    class Planned(RolloutCallback):
        def _build_engine(self, module: Any) -> Any:
            return PlannedEngine(super()._build_engine(module), tool)

    class Report(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            referee.ready()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            made = [t for group in batch.groups for t in group.trajectories]
            expected = TURN_TOKENS[tool] * (2 if tool else 1)
            assert {sum(t.loss_mask) for t in made} == {expected}, [t.error for t in made]
            metrics = trainer.callback_metrics
            parts = {name: float(metrics[f"time/{name}_s"]) for name in PARTS}
            referee.step(float(metrics["policy/loss"]), float(sum(len(t.token_ids) for t in made)), parts)

    torch.manual_seed(0)
    module = GRPOModule(
        PolicyConfig(path=folder, dtype="float32"),
        OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.0),
        max_tokens_per_row=2048,
        algorithm=AlgorithmConfig(num_minibatches=1),
    )
    module.adapter.vision_ids = tuple(never_sampled(module.adapter))
    module.encoder = PlannedEncoder(module.adapter)
    nothing = dict.fromkeys(("accuracy", "format", "mandatory", "exact", "usage", "spurious"), 0.0)
    rollout = Planned(
        agent=AgentConfig(max_turn_tokens=TURN_TOKENS[tool], max_turns=2, prompt=PROMPT),
        engine=EngineConfig(kind="vllm", max_model_len=512, max_num_seqs=TASKS * SAMPLES),
        reward=RewardConfig(terms=[IdsReward("ids", 1.0)], **nothing),
        num_samples=SAMPLES,
        mismatch_tolerance=0.0,
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=out,
            callbacks=[Report(), rollout],
        )
        trainer.fit(module, StepLoader(lambda n: Iteration(n, tasks_of(n)), MANY_STEPS))


# ------------------------------------------------------------------------------------------------ TRL
def code_image_tool(code: str) -> list[dict[str, Any]]:
    """Turn the image.

    Args:
        code: what to run.
    """
    image = Image.new("RGB", (64, 64), (90, 90, 90)).rotate(90, expand=True)
    return [{"type": "image", "image": image}, {"type": "text", "text": "Image 1 is 64x64 pixels."}]


def train_trl(folder: str, tool: bool, batch_size: int, vllm: bool = False) -> None:
    """TRL's trainer on the same prompts, under a referee."""
    import datasets
    import trl.trainer.grpo_trainer as library
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    adapter = load_adapter(PolicyConfig(path=folder))
    processor = adapter.processor
    processor.chat_template = processor.tokenizer.chat_template = adapter.chat_template()
    banned = never_sampled(adapter)
    referee = Referee(1)
    prompts = [messages_of(task, adapter) for step in range(4) for task in tasks_of(step)]
    if tool:
        _plan_calls(library)
        processor.tokenizer.response_template = {}  # what it reads turns by; never looked into

    class Report(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            referee.ready()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None and "completions/mean_length" in logs:
                expected = TURN_TOKENS[tool] * (2 if tool else 1)
                assert logs["completions/mean_length"] == expected, logs
                referee.step(float(logs.get("loss", 0.0)))

    table = datasets.Dataset.from_dict({"number": list(range(len(prompts)))})
    table.set_transform(lambda given: {"prompt": [prompts[n] for n in given["number"]]})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=TASKS * SAMPLES // batch_size,
            num_generations=SAMPLES,
            max_completion_length=512 if tool else TURN_TOKENS[tool],
            max_tool_calling_iterations=1,
            generation_kwargs={"min_new_tokens": TURN_TOKENS[tool], "suppress_tokens": banned},
            max_steps=MANY_STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            use_vllm=vllm,
            vllm_mode="colocate",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
            args=arguments,
            train_dataset=table,
            processing_class=processor,
            tools=[code_image_tool] if tool else None,
            callbacks=[Report()],
        )
        if not vllm:
            trainer.generation_config.max_new_tokens = TURN_TOKENS[tool]  # of a turn, not of the whole completion
        trainer.train()


def messages_of(task: Task, adapter: ModelAdapter) -> list[dict[str, Any]]:
    """The prompt of a task as TRL takes it, with its images in it; tokens are ours, checked."""
    encoder, processor = DialogueEncoder(adapter), adapter.processor
    views = [encoder.model_image(image) for image in task.images]
    sizes = [(full.size, seen.size) for full, seen in zip(task.images, views, strict=True)]
    messages = task_messages(task, sizes, PROMPT)
    waiting = iter(views)
    for message in messages:
        message["content"] = [
            part | ({"image": next(waiting)} if part["type"] == "image" else {}) for part in message["content"]
        ]
    ids = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids["input_ids"][0] == encoder.start(task, views, PROMPT).token_ids
    return messages


def _plan_calls(library: Any) -> None:
    """TRL takes a first turn for a call, too; a prompt that holds a tool's image is at its second."""
    call = {"type": "function", "function": {"name": "code_image_tool", "arguments": {"code": "turn"}}}

    def parse(tokenizer: Any, ids: list[int], prefix: list[int], tools: Any = None) -> dict[str, Any]:
        start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        found: dict[str, Any] = {"role": "assistant", "content": ""}
        return found if list(prefix).count(start) > 1 else found | {"tool_calls": [call]}

    library.parse_response = parse
    library.supports_tool_calling = lambda _: True  # our template leaves calls in the text
    library.add_response_schema = lambda processing: processing
    library.is_chat_template_prefix_preserving = lambda _: True  # it appends only


# ------------------------------------------------------------------------------------------------ the comparison
def seconds(rounds: list[Round]) -> float:
    """Of an iteration, the median of rounds."""
    return statistics.median(done.seconds for done in rounds)


def compare(tool: bool, folder: Path, rounds: int, batches: Sequence[int]) -> dict[str, float]:
    """Figures with or without the tool."""
    options: dict[str, Any] = {"folder": str(folder), "tool": tool}
    best = best_batch(__file__, options, batches, seconds)
    ours, trl = against_trl(__file__, options, best, rounds, warm_up=2)
    name = "grpo_tools_over_trl" if tool else "grpo_over_trl"
    return {
        name: seconds(trl) / seconds(ours),
        f"{name}_ours_s": seconds(ours),
        f"{name}_trl_s": seconds(trl),
        f"{name}_trl_batch": float(best),
        **{f"{name}_ours_{part}_s": statistics.median(done.parts[part] for done in ours) for part in PARTS},
    }


def try_vllm(folder: Path) -> float:
    """Seconds of TRL's iteration with its colocated vLLM; -1, and the reason on the terminal, where it stops."""
    worker = None
    try:
        options = {"folder": str(folder), "tool": False, "batch_size": TRL_BATCHES[0], "vllm": True}
        worker = Worker(trl_python(), __file__, "trl", options)
        return seconds(take_turns([worker], 3)[0])
    except WorkerFailed as error:
        print(f"TRL's vLLM back end stops here: {error}", file=sys.stderr)
        return -1.0
    finally:
        if worker is not None:
            worker.close()


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    if sys.argv[1:2] == ["--worker"]:
        trainer = {"ours": train_ours, "trl": train_trl}[sys.argv[2]]
        trainer(**json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", choices=("single", "tool"), help="one of the two settings")
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each side")
    parser.add_argument("--trl_batch", type=int, action="append", help="TRL's batch sizes to choose from")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(TinyCheckpoint(out=folder))
        for tool in (False, True):
            if options.only in (None, "tool" if tool else "single"):
                figures |= compare(tool, folder, options.rounds, options.trl_batch or TRL_BATCHES)
        if options.only is None:
            figures["grpo_trl_vllm_s"] = try_vllm(folder)
    figures["threads"] = float(torch.get_num_threads())
    for key, value in figures.items():
        print(f"{key:42} {value:12.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and any(figures.get(key, bar) < bar for key, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
