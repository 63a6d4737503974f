"""Mistakes of users: each is one error of at most three lines that names what to change, most before heavy imports."""

from __future__ import annotations

import inspect
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pandas as pd
import pytest
import yaml
from PIL import Image

from cv_lightning.__main__ import main
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.types import DataError

ROOT = Path(__file__).parents[2]
GRPO = ("fit", "--config", str(ROOT / "configs/quickstart/grpo.yaml"))
SFT = ("fit", "--config", str(ROOT / "configs/quickstart/sft.yaml"))
LOSS = "--model.init_args.algorithm.loss.init_args"
MAX_CPU_S = 1.0
"""Processor time of a mistake that needs no model, the start of Python included."""


class Mistake(NamedTuple):
    """A command line that cannot be right."""

    words: tuple[str, ...]
    """Words after the base command."""
    said: tuple[str, ...]
    """What the error must contain: the value or the reason, and the flag, key or file to change."""
    base: tuple[str, ...] = GRPO


def out_of_range(flag: str, value: str) -> Mistake:
    """A number outside its range: the error names the setting, the value and the flag."""
    return Mistake((f"--{flag}", value), (f"{flag} is ", "it must be ", f"Set --{flag}"))


EARLY = [
    out_of_range("rollout.num_samples", "-2"),
    out_of_range("rollout.num_samples", "0"),
    out_of_range("rollout.max_failed_frac", "1.5"),
    out_of_range("rollout.mismatch_tolerance", "nan"),
    out_of_range("rollout.agent.max_turns", "0"),
    out_of_range("rollout.agent.max_response_tokens", "-1"),
    out_of_range("rollout.agent.early_stop_fraction", "0"),
    out_of_range("rollout.agent.tool_deadline_s", "0"),
    out_of_range("rollout.sampling.temperature", "-1"),
    out_of_range("rollout.sampling.top_p", "1.5"),
    out_of_range("rollout.engine.gpu_memory_utilization", "90"),
    out_of_range("rollout.engine.max_model_len", "8"),
    out_of_range("rollout.engine.max_num_seqs", "0"),
    out_of_range("rollout.sandbox.timeout_s", "0"),
    out_of_range("rollout.sandbox.memory_mb", "-1"),
    out_of_range("rollout.sandbox.max_code_chars", "1000000"),
    out_of_range("rollout.reward.accuracy", "nan"),
    out_of_range("rollout.reward.usage", "-0.5"),
    out_of_range("rollout.store.share", "1.5"),
    out_of_range("checkpoint.every_minutes", "0"),
    out_of_range("checkpoint.keep", "0"),
    out_of_range("progress.every", "0"),
    out_of_range("watchdog.timeout_s", "-5"),
    out_of_range("data.init_args.num_iterations", "0"),
    out_of_range("data.init_args.tasks_per_iteration", "-4"),
    out_of_range("data.init_args.reader.num_threads", "-1"),
    out_of_range("model.init_args.optimizer.lr", "nan"),
    out_of_range("model.init_args.optimizer.weight_decay", "-1"),
    out_of_range("model.init_args.max_tokens_per_row", "0"),
    out_of_range("model.init_args.policy.lora.rank", "0"),
    out_of_range("model.init_args.algorithm.num_minibatches", "0"),
    out_of_range("model.init_args.algorithm.kl.weight", "-1"),
    out_of_range(f"{LOSS[2:]}.clip_low", "2"),
    Mistake(("--model.init_args.optimizer.betas", "[0.9, 1.0]"), ("optimizer.betas", "below 1")),
    Mistake(("--rollout.evaluations", "[{num_samples: 0}]"), ("rollout.evaluations", "num_samples is 0")),
    Mistake(("--rollout.num_samples", "many"), ("--rollout.num_samples", "many", "whole number")),
    Mistake(("--model.init_args.policy.dtype", "float15"), ("policy.dtype", "float15", "bfloat16")),
    Mistake(("--rollout.num_sample", "4"), ("rollout.num_sample", "rollout.num_samples")),
    Mistake(("--model.init_args.optimizer.learning_rate", "1"), ("learning_rate", "optimizer")),
    Mistake(("--config", "no_such.yaml"), ("no_such.yaml",)),
    Mistake(("--model", "{folder}"), ("--model {folder}", "--model.init_args.policy.path {folder}")),
    Mistake(("--model.init_args.policy.path", "runs/a/modle"), ("runs/a/modle: no such folder", "policy.path")),
    Mistake(("--ckpt_path", "runs/nowhere.ckpt"), ("--ckpt_path runs/nowhere.ckpt", "no such file")),
    Mistake(("--trainer.default_root_dir", "{file}/run"), ("--trainer.default_root_dir", "{file} is not a folder")),
    Mistake(("--trainer.default_root_dir", "{sft_run}"), ("run of SFTModule", "--trainer.default_root_dir")),
    Mistake(("--trainer.default_root_dir", "{sft_run}", "--ckpt_path", "last"), ("run of SFTModule", "GRPOModule")),
    Mistake(("--data.init_args.train_files", "[{table}]"), ("{table} is a table of tasks", "data build-sft"), SFT),
    Mistake(("--data.init_args.train_files", "[{json}]"), ("{json}", "conversations, which SFT reads", ".parquet")),
    Mistake(("--data.init_args.train_files", "[gone.parquet]"), ("no such file: gone.parquet", "train_files")),
    Mistake(("--data.init_args.eval_files", "[{folder}]"), ("{folder} is a folder; name its files", "eval_files")),
]  # fmt: skip
"""Mistakes that are found without a model, before anything heavy is imported."""
NO_GPU = Mistake(
    ("--config", str(ROOT / "configs/hardware/8gpu.yaml")),
    ("trainer.accelerator is gpu", "sees no GPU", "8gpu.yaml", "--trainer.accelerator cpu"),
)
HAS_GPU = any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "dxg", "kfd"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders that the mistakes name, by placeholder."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "table.parquet").touch()
    (folder / "sft.json").write_text("[]")
    (folder / "file").touch()
    (folder / "sft_run" / "checkpoints").mkdir(parents=True)
    stored = {"model": {"class_path": "cv_lightning.modules.sft.SFTModule"}}
    (folder / "sft_run" / "fit_config.yaml").write_text(yaml.safe_dump(stored))
    names = {"folder": "", "file": "file", "table": "table.parquet", "json": "sft.json", "sft_run": "sft_run"}
    return {name: str(folder / path) for name, path in names.items()}


def filled(text: str, places: dict[str, str]) -> str:
    """A text with the placeholders of `places` filled in; other braces stay."""
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def command(mistake: Mistake, places: dict[str, str]) -> list[str]:
    """The mistake's command line."""
    return [*mistake.base, *(filled(word, places) for word in mistake.words)]


def check_error(code: object, stderr: str, said: tuple[str, ...], places: dict[str, str]) -> None:
    """An error of at most three lines, without a traceback, that contains `said`."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("usage:")]
    assert code not in (0, None) and 1 <= len(lines) <= 3 and "Traceback" not in stderr, stderr
    for words in said:
        assert filled(words, places) in stderr, stderr


def run_here(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and stderr of a command in this process."""
    try:
        code: object = main(arguments)
    except SystemExit as stop:
        code = stop.code
    stderr = capsys.readouterr().err
    return (1, f"{stderr}{code}") if isinstance(code, str) else (code, stderr)


# ------------------------------------------------------------------------------------------------ before the imports
@pytest.mark.parametrize("mistake", EARLY, ids=lambda mistake: " ".join(mistake.words)[:70])
def test_mistake_is_an_error_before_heavy_imports(
    mistake: Mistake, places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv_lightning.cli", None)  # importing it would be too late
    code, stderr = run_here(command(mistake, places), capsys)
    check_error(code, stderr, mistake.said, places)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_hardware_file_for_gpus_on_a_machine_without(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = run_here(command(NO_GPU, {}), capsys)
    check_error(code, stderr, NO_GPU.said, {})


@pytest.mark.parametrize("mistake", [EARLY[0], EARLY[-4], EARLY[-6]], ids=lambda mistake: mistake.words[0])
def test_mistake_without_a_model_takes_less_than_a_second(mistake: Mistake, places: dict[str, str]) -> None:
    """Measured in processor time, because the wall clock depends on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-X", "importtime", "-m", "cv_lightning", *command(mistake, places)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    check_error(done.returncode, stderr, mistake.said, places)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_S


# ------------------------------------------------------------------------------------------------ of the whole recipe
WHOLE = [
    Mistake(
        ("--rollout.engine.max_model_len", "64"),
        ("max_model_len 64 is below rollout.agent.max_prompt_tokens 128", "Set --rollout.engine.max_model_len 384"),
    ),
    Mistake(("--rollout.sampling.temperature", "0"), ("rollout.sampling.temperature is 0", "Set --rollout.sampling")),
    Mistake(("--trainer.max_epochs", "2"), ("--trainer.max_epochs 2", "--data.init_args.num_iterations")),
    Mistake(("--rollout.agent.max_images", "99"), ("engine.max_images", "agent.max_images (99)")),
]
"""Mistakes in settings that do not fit together, which are found when the run is built, before a model is loaded."""


@pytest.mark.parametrize("mistake", WHOLE, ids=lambda mistake: " ".join(mistake.words))
def test_settings_that_do_not_fit_together_are_an_error_before_the_model(
    mistake: Mistake, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--trainer.default_root_dir", str(tmp_path), "--model.init_args.policy.path", str(tiny_checkpoint))
    code, stderr = run_here([*command(mistake, {}), *own], capsys)
    check_error(code, stderr, mistake.said, {})
    assert not list(tmp_path.iterdir())


def algorithm(**options: Any) -> Any:
    """The config of an algorithm, imported late."""
    from cv_lightning.rl.algorithm import AlgorithmConfig

    return AlgorithmConfig(**options)


def kl(**options: Any) -> Any:
    """The config of a KL penalty, imported late."""
    from cv_lightning.rl.kl import KLConfig

    return KLConfig(**options)


def digits(kind: str, **options: Any) -> Any:
    """A DataModule of the digits, imported late."""
    import cv_lightning.digits.modules as modules

    return getattr(modules, kind)(**options)


def engine(**options: Any) -> Any:
    """The config of an engine, imported late."""
    from cv_lightning.engines.base import EngineConfig

    return EngineConfig(**options)


def reward(**options: Any) -> Any:
    """The config of the reward, imported late."""
    from cv_lightning.rewards.config import RewardConfig

    return RewardConfig(**options)


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (engine, {"kind": "server"}, "engine.server"),
        (engine, {"tensor_parallel_size": 2, "kind": "transformers"}, "engine.tensor_parallel_size"),
        (algorithm, {"sequence_mask": (0.9, 1.1)}, "old_logprobs to trainer"),
        (algorithm, {"constant_length": 100}, "algorithm.constant_length is not read"),
        (kl, {"every": 2}, "algorithm.kl.every 2"),
        (reward, {"credit": "steps", "gate": True}, "reward.gate"),
        (reward, {"reasoning": 1.0}, "reward.credit 'steps'"),
        (
            digits,
            {"kind": "DigitTaskDataModule", "eval_files": ["a.parquet"], "test_tasks": {"small": 3}},
            "test_tasks: settings of the embedded digits, which data.init_args.eval_files",
        ),
        (
            digits,
            {"kind": "DigitSFTDataModule", "train_files": ["a.json"], "demonstrations": object()},
            "demonstrations: settings of the embedded digits, which data.init_args.train_files",
        ),
    ],
)
def test_contradictory_settings_are_an_error_with_the_key(build: Callable[..., Any], options: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(**options)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_every_number_of_a_setting_has_a_range() -> None:
    """A number without a range would be accepted at any value; seeds, and what has a check of its own, are free."""
    from cv_lightning.cli import CALLBACKS
    from cv_lightning.digits.modules import DigitSFTDataModule, DigitTaskDataModule
    from cv_lightning.loggers.wandb import WandbRun
    from cv_lightning.modules.grpo import GRPOModule
    from cv_lightning.modules.sft import SFTModule
    from cv_lightning.ranges import declared_ranges
    from cv_lightning.rl import losses
    from cv_lightning.strategies import CPUDeepSpeedStrategy, ZeroStrategy

    parts = [*CALLBACKS.values(), DigitTaskDataModule, DigitSFTDataModule, GRPOModule, SFTModule, WandbRun]
    parts += [ZeroStrategy, CPUDeepSpeedStrategy, losses.PPOClip, losses.GSPO, losses.CISPO, losses.DPPO]
    owners = {owner for kind in parts for owner in settings_owners(kind)}
    assert len(owners) > 35
    free = {"seed", "GRPOModule.__init__.temperature", "stage"}
    missing = set()
    for owner in owners:
        hints = {name: str(hint).partition(" ")[0] for name, hint in owner.__annotations__.items()}
        numbers = {name for name, hint in hints.items() if hint in ("int", "float")} - declared_ranges(owner).keys()
        missing |= {f"{owner.__qualname__}.{name}" for name in numbers - free}
    assert missing <= free


def settings_owners(kind: type) -> set[Any]:
    """The constructors of a class and its bases, and the config dataclasses among their arguments, nested ones too."""
    waiting: list[Any] = [
        vars(base)["__init__"]
        for base in kind.__mro__
        if base.__module__.startswith("cv_lightning") and "__init__" in vars(base)
    ]
    found: set[Any] = set()
    while waiting:
        owner = waiting.pop()
        if owner in found:
            continue
        found.add(owner)
        hints = list(get_type_hints(owner).values())
        while hints:
            hint = hints.pop()
            hints += get_args(hint)
            if inspect.isclass(hint) and is_dataclass(hint) and hint.__module__.startswith("cv_lightning"):
                waiting.append(hint)
    return found


# ------------------------------------------------------------------------------------------------ data
def sft_file(folder: Path, *names: str, **more: Any) -> Path:
    """A file of conversations, each with one call of a tool of the given name."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    items = []
    for name in names:
        call = json.dumps({"name": name, "arguments": {"code": "image = image.rotate(90)", "image_index": 0}})
        turns = [
            {"from": "human", "value": "<image>What is it?"},
            {"from": "gpt", "value": f"<tool_call>{call}</tool_call>"},
            {"from": "tool", "value": "done"},
            {"from": "gpt", "value": "<answer>3</answer>"},
        ]
        items.append({"conversations": turns, "images": ["a.png"], **more})
    (folder / "sft.json").write_text(json.dumps(items))
    return folder / "sft.json"


def test_calls_of_a_tool_that_the_agent_lacks_are_counted_and_an_error_if_all_are(tmp_path: Path) -> None:
    from cv_lightning.tools import CodeTool

    mixed = sft_file(tmp_path, "zoom_in", "code_image_tool", "zoom_in")
    files = ConversationFiles([mixed], ReaderConfig(), [CodeTool()])
    assert len(files) == 1 and [problem.kind for problem in files.problems.problems] == ["unknown tool"] * 2
    with pytest.raises(DataError) as caught:
        ConversationFiles([sft_file(tmp_path, "zoom_in")], ReaderConfig(), [CodeTool()])
    said = str(caught.value)
    assert "'zoom_in'" in said and "code_image_tool" in said and "rollout.agent.tools" in said
    assert len(said.splitlines()) <= 3


def test_sft_passes_the_tools_of_the_agent_to_its_files(tmp_path: Path) -> None:
    from cv_lightning.data.modules import SFTDataModule
    from cv_lightning.tools import CodeTool

    data = SFTDataModule(train_files=[str(sft_file(tmp_path, "zoom_in"))])
    module = type("Module", (), {"tools": (CodeTool(),)})()
    data.trainer = type("Trainer", (), {"lightning_module": module})()  # type: ignore[assignment]
    with pytest.raises(DataError, match="zoom_in"):
        data.training_conversations()


def test_keys_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ConversationFiles([sft_file(tmp_path, "code_image_tool", tools=[])], ReaderConfig())
    assert "sft.json: not read: tools; the tools are those of rollout.agent.tools" in caplog.text


def test_missing_image_says_where_relative_paths_start(tmp_path: Path) -> None:
    file = sft_file(tmp_path, "code_image_tool")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError) as caught:
        ConversationFiles([file], ReaderConfig())
    said = str(caught.value)
    assert f"a.png; relative paths start from {tmp_path}" in said and "data.init_args.reader.image_folder" in said
    assert len(said.splitlines()) <= 3


def test_files_of_the_other_kind_are_refused_by_the_readers(tmp_path: Path) -> None:
    table = tmp_path / "rl.parquet"
    pd.DataFrame({"images": []}).to_parquet(table)
    for read, path, said in (
        (ConversationFiles, table, "data build-sft"),
        (TaskFiles, sft_file(tmp_path, "code_image_tool"), "conversations, which SFT reads"),
    ):
        with pytest.raises(DataError) as caught:
            read([path], ReaderConfig())
        assert str(path) in str(caught.value) and said in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3


def test_rows_without_a_split_are_not_held_out(tmp_path: Path) -> None:
    """SFT rows have no split; beside RL files that have one, each would be a false alarm of leakage."""
    from cv_lightning.data.image_cells import load_image
    from cv_lightning.factory.check import check_files
    from cv_lightning.factory.check_facts import CheckConfig

    conversations = sft_file(tmp_path, "code_image_tool")
    assert load_image(tmp_path / "a.png", "image", decode=False).size == (64, 64)
    pixels = (tmp_path / "a.png").read_bytes()
    rows = [
        {
            "images": [{"bytes": pixels}],
            "prompt": [{"role": "user", "content": f"<image>What is it in {split}?"}],
            "reward_model": {"ground_truth": "3"},
            "extra_info": {"split": split},
        }
        for split in ("train", "train", "test")
    ]
    rows[2]["images"] = [{"bytes": _other_image(tmp_path)}]
    pd.DataFrame(rows).to_parquet(tmp_path / "rl.parquet")
    report = check_files([str(conversations), str(tmp_path / "rl.parquet")], CheckConfig())
    leakage = report["copies"]["leakage"]
    assert (leakage["held_out_by"], leakage["held_out_pictures"], leakage["exact"]) == ("extra_info.split", 1, 0)


def _other_image(folder: Path) -> bytes:
    image = Image.linear_gradient("L").convert("RGB")
    image.save(folder / "other.png")
    return (folder / "other.png").read_bytes()


# ------------------------------------------------------------------------------------------------ other verbs
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], ("fitt", "fit")),
        (["data", "check", "gone.parquet"], ("no such file: gone.parquet",)),
        (["data", "check", "{file}"], ("{file}", ".parquet", ".json")),
        (["report", "{folder}/no_run"], ("no_run",)),
        (["compare", "{folder}/no_run", "{folder}/none"], ("no_run",)),
        (["tiny", "{folder}/tiny", "--model.hidden_size", "100"], ("hidden_size 100", "--head_dim")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_in_a_verb_is_a_short_error(
    words: list[str], said: tuple[str, ...], places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run_here([filled(word, places) for word in words], capsys)
    check_error(code, stderr, said, places)
