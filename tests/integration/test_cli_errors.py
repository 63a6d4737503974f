"""What the command line says to input that cannot be: the file, row or key, and what to do; nothing heavy is built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import pytest
import yaml

from cv_lightning.callbacks.checkpoint import CheckpointCallback
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.cli import ConfigOnly, CVLightningCLI, main
from cv_lightning.digits.scenes import DigitsConfig, digit_task

ZERO = "{class_path: cv_lightning.strategies.CPUDeepSpeedStrategy}"
DTYPE = "--model.init_args.policy.dtype"
CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that a refused command printed."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    text = captured.out + captured.err + (stopped.value.code if isinstance(stopped.value.code, str) else "")
    assert stopped.value.code not in (0, None)
    assert "Traceback" not in text and len(text) < 3000
    return text


def grpo(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    """A `fit` command that must not get as far as training."""
    return [
        "fit",
        "--config",
        str(CONFIGS / "grpo.yaml"),
        "--trainer.default_root_dir",
        str(folder),
        "--model.init_args.policy.path",
        str(checkpoint),
        *more,
    ]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--data.init_args.num_iteration", "3", "num_iteration"),
        ("--model.init_args.optimizer.learning_rate", "1", "learning_rate"),
        ("--rollout.agent.max_turn", "1", "max_turn"),
        ("--trainer.max_epoch", "1", "max_epoch"),
    ],
)
def test_an_unknown_key_is_named(
    flag: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(grpo(tmp_path, tmp_path, flag, value), capsys)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--model.init_args.algorithm.loss.init_args.clip_low", "2", "clip_low"),
        ("--data.init_args.test_tasks", '{"sideways": 3}', "sideways"),
        ("--rollout.agent.max_turns", "0", "max_turns"),
        ("--model.init_args.optimizer.lr", "-1", "lr"),
    ],
)
def test_invalid_value_is_named_with_its_flag(
    flag: str, value: str, said: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(grpo(tiny_checkpoint, tmp_path, flag, value), capsys)


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochz": 3}}))
    assert "max_epochz" in refused(grpo(tmp_path, tmp_path, "--config", str(tmp_path / "more.yaml")), capsys)


def test_a_checkpoint_path_that_does_not_exist(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(grpo(tiny_checkpoint, tmp_path, "--ckpt_path", "runs/nowhere.ckpt"), capsys)
    assert "--ckpt_path runs/nowhere.ckpt" in text and "no such file" in text


def test_a_model_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/no_model: no such folder" in refused(grpo(Path("runs/no_model"), tmp_path), capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.max_epochs", "2"], "--data.init_args.num_iterations"),
        (["--data.init_args.eval_files", "[runs/nowhere.parquet]"], "no such file: runs/nowhere.parquet"),
        (["--data.init_args.train_files", "[configs]"], "configs is a folder; name its files"),
        (["--rollout.engine.max_model_len", "5000"], "more than the 4096 positions of"),
        (["--trainer.accelerator", "gpu"], "this process sees no GPU"),
        (["--trainer.precision", "bf16-mixed"], "--trainer.precision bf16-mixed: the type of weights"),
        (["--trainer.precision", "bf16-true", f"{DTYPE}=bfloat16"], "Leave --trainer.precision out"),
        ([f"{DTYPE}=float16"], "--model.init_args.policy.dtype float16: gradients in float16 need a scaled loss"),
        (
            [
                f"{DTYPE}=bfloat16",
                f"--trainer.strategy={ZERO}",
                "--trainer.precision=16-true",
            ],
            "--trainer.precision 16-true",
        ),
    ],
)
def test_what_would_fail_later_fails_before_an_engine_is_loaded(
    flags: list[str],
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RolloutCallback, "setup", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.chdir(CONFIGS.parents[1])
    assert said in refused(grpo(tiny_checkpoint, tmp_path, *flags), capsys)


def test_ranks_that_cannot_share_are_refused_before_there_are_any(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.devices", "3", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    text = refused(grpo(tiny_checkpoint, tmp_path, *flags), capsys)
    assert "--data.init_args.tasks_per_iteration 16 cannot be divided by 3 ranks" in text


def built(arguments: list[str]) -> pl.Trainer:
    """The trainer of a `fit` that stops before it fits."""

    class Built(CVLightningCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            self.before_fit()

    return main(arguments, Built).trainer


KEEP_7 = {"class_path": "cv_lightning.callbacks.checkpoint.CheckpointCallback", "init_args": {"keep": 7}}


def old_config(folder: Path, name: str) -> list[str]:
    """A second config that names a single callback in the list, as configs of earlier versions did."""
    (folder / name).write_text(yaml.safe_dump({"trainer": {"callbacks": [KEEP_7]}}))
    return ["--config", str(folder / name)]


def test_config_of_an_earlier_version_is_refused_with_its_new_keys(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(grpo(tiny_checkpoint, tmp_path, *old_config(tmp_path, "more.yaml")), capsys)
    assert "trainer.callbacks.CheckpointCallback is now checkpoint" in text and "more.yaml` rewrites" in text


def test_config_that_an_earlier_version_stored_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer = built(grpo(tiny_checkpoint, tmp_path, *old_config(tmp_path, "fit_config.yaml")))
    checkpoints = [c for c in trainer.callbacks if isinstance(c, CheckpointCallback)]  # type: ignore[attr-defined]
    assert [c.keep for c in checkpoints] == [7]
    assert any(isinstance(c, RolloutCallback) for c in trainer.callbacks)  # type: ignore[attr-defined]


def test_flag_of_an_earlier_version_is_refused_with_the_new_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"--trainer.callbacks.init_args.num_samples is now --rollout.num_samples"):
        main(grpo(tiny_checkpoint, tmp_path, "--trainer.callbacks.init_args.num_samples", "4"))


def test_single_callback_in_the_list_is_refused_with_its_key(tiny_checkpoint: Path, tmp_path: Path) -> None:
    listed = f"--trainer.callbacks+={KEEP_7['class_path']}"
    with pytest.raises(SystemExit, match="CheckpointCallback, whose settings are under `checkpoint`"):
        built(grpo(tiny_checkpoint, tmp_path, listed))


def test_temperature_of_the_loss_is_that_of_sampling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = grpo(tiny_checkpoint, tmp_path, "--rollout.sampling.temperature", "0.7")
    assert main(command, ConfigOnly).config["fit"].model.init_args.temperature == 0.7


def test_sft_has_the_prompt_and_the_tools_of_the_agent(capsys: pytest.CaptureFixture[str]) -> None:
    tools = "[{class_path: cv_lightning.tools.CodeTool}]"
    command = ["fit", "--config", str(CONFIGS / "sft.yaml"), "--rollout.agent.tools", tools]
    module = main(command, ConfigOnly).config["fit"].model.init_args
    assert module.prompt.tool_ok == "<image>Look at the result."
    assert [tool.class_path.rpartition(".")[2] for tool in module.tools] == ["CodeTool"]
    assert "--rollout.agent.prompt" in refused([*command, "--model.init_args.prompt", "null"], capsys)


def test_evaluation_without_tasks_names_the_missing_setting(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = grpo(tiny_checkpoint, tmp_path)
    assert "--data.init_args.val_tasks" in refused(["validate", *command[1:]], capsys)


def test_validation_interval_beyond_the_run_validates_at_its_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--trainer.val_check_interval", "20", "--data.init_args.num_iterations", "3"]
    assert built(grpo(tiny_checkpoint, tmp_path, *flags)).val_check_interval == 3


@pytest.mark.parametrize(
    ("path", "said"),
    [("out/sft/model", "no such folder"), ("mine", "no such folder here, and as a name on the hub")],
)
def test_mistyped_folder_is_not_looked_up_on_the_hub(
    path: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", from_pretrained)
    text = refused(grpo(Path(path), tmp_path), capsys)
    assert f"policy.path {path}" in text and said in text


def test_a_model_folder_without_a_processor(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    text = refused(grpo(tmp_path / "bare", tmp_path), capsys)
    assert "bare" in text and "no processor" in text and "copy it from the base model" in text


def rows(count: int) -> pd.DataFrame:
    """Rows of an RL file as CodeVision publishes them."""
    made = []
    for index in range(count):
        task = digit_task(DigitsConfig(), "train", index, "small")
        assert task.box is not None
        buffer = _png(task.images[0])
        made.append(
            {
                "data_source": "digits",
                "prompt": [{"role": "user", "content": f"<image>{task.question}"}],
                "images": [{"bytes": buffer}],
                "reward_model": {"ground_truth": task.ground_truth},
                "extra_info": {"index": index, "transform": ["crop"], "bbox": list(task.box)},
            }
        )
    return pd.DataFrame(made)


def _png(image: object) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # type: ignore[attr-defined]
    return buffer.getvalue()


def spoil(frame: pd.DataFrame) -> dict[str, int]:
    """One row of each kind that cannot be used; returns its index by reason."""
    frame.at[0, "images"] = [{"bytes": b"no picture"}]
    frame.at[1, "prompt"] = [{"role": "user", "content": "no mark"}]
    frame.at[2, "extra_info"] = {"index": 2, "transform": ["rotate_sideways"], "bbox": None}
    frame.at[3, "extra_info"] = {"index": 3, "transform": ["crop"], "bbox": [0.0, 0.0, 9999.0, 9999.0]}
    return {"image": 0, "mark": 1, "rotate_sideways": 2, "box": 3}


def test_all_rows_bad_stops_with_each_reason(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = rows(4)
    reasons = spoil(frame)
    frame.to_parquet(tmp_path / "bad.parquet")
    files = json.dumps([str(tmp_path / "bad.parquet")])
    command = grpo(tiny_checkpoint, tmp_path, "--data.init_args.train_files", files)
    command += ["--rollout.engine.kind", "transformers"]
    text = refused(command, capsys)
    assert "bad.parquet" in text
    for reason in reasons:
        assert reason in text


def test_a_missing_column_is_named(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(2).drop(columns=["prompt"]).to_parquet(tmp_path / "cut.parquet")
    files = json.dumps([str(tmp_path / "cut.parquet")])
    command = grpo(tiny_checkpoint, tmp_path, "--data.init_args.train_files", files)
    command += ["--rollout.engine.kind", "transformers"]
    text = refused(command, capsys)
    assert "cut.parquet" in text and "prompt" in text


def test_bad_rows_are_skipped_counted_and_listed(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = rows(12)
    reasons = spoil(frame)
    frame.to_parquet(tmp_path / "some.parquet")
    command = grpo(
        tiny_checkpoint,
        tmp_path / "run",
        "--data.init_args.train_files",
        json.dumps([str(tmp_path / "some.parquet")]),
        "--data.init_args.num_iterations",
        "1",
        "--data.init_args.tasks_per_iteration",
        "2",
        "--rollout.engine.kind",
        "transformers",
        "--rollout.num_samples",
        "2",
        "--rollout.store.share",
        "1.0",
    )
    with caplog.at_level("WARNING"):
        main(command)
    said = caplog.text
    for reason, index in reasons.items():
        assert any(f"row {index} skipped" in line and reason in line for line in said.splitlines()), said
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments", [["fit", "--help"], ["fit", "--config", "grpo.yaml", "--print_config"]], ids=" ".join
)
def test_help_loads_no_engine(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom cv_lightning.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('LOADED', sorted({'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=CONFIGS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("LOADED []")
    assert "num_iterations" in done.stdout or "--config" in done.stdout


def test_validation_within_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    main(
        [
            *grpo(tiny_checkpoint, tmp_path),
            *["--data.init_args.num_iterations", "2", "--data.init_args.tasks_per_iteration", "2"],
            *["--data.init_args.val_tasks", '{"upright": 1, "small": 2}'],
            *["--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "null"],
            *["--rollout.num_samples", "2"],
            *["--rollout.engine.kind", "transformers"],
        ]
    )
    for iteration in (1, 2):
        folder = tmp_path / "eval" / f"iteration{iteration:06d}_greedy"
        assert json.loads((folder / "metrics.json").read_text())["num_trajectories"] == 3
        assert sum(len(p.read_text().splitlines()) for p in folder.glob("trajectories/*.jsonl")) == 3


def test_a_device_list_that_cannot_work_is_refused_before_anything_loads(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for accelerator, devices, said in (("cpu", "[2,3]", "--trainer.devices 2"), ("gpu", "[99]", "this process sees")):
        arguments = ["--trainer.devices", devices, "--trainer.accelerator", accelerator]
        text = refused(grpo(tiny_checkpoint, tmp_path / "run", *arguments), capsys)
        assert said in text and f"--trainer.devices {json.loads(devices)}" in text
    assert not (tmp_path / "run").exists()
