"""Exported checkpoints load in transformers, peft and vLLM and compute the same as the run's policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from engine_samples import Policy, request_of
from export_samples import assert_same_weights, fit_in_process, fit_two_ranks, weights
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import cv_lightning.callbacks.export as exporting
from cv_lightning.commands.export import main
from cv_lightning.engines import EngineConfig, build_engine, vllm_imports
from cv_lightning.models.adapters import adapter_for
from cv_lightning.models.export import atomic_folder
from cv_lightning.models.loading import PolicyConfig, load_policy
from cv_lightning.models.verify import folder_logits, probe

BF16 = "--model.init_args.policy.dtype=bfloat16"
LORA = [f"--model.init_args.{name}" for name in ("policy.lora.rank=4", "policy.lora.alpha=8", "optimizer.lr=0.01")]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_in_process(tiny_checkpoint, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def lora_run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_in_process(tiny_checkpoint, tmp_path_factory.mktemp("lora"), *LORA)


def checkpoint_of(run: Path) -> Path:
    (found,) = run.glob("checkpoints/*.ckpt")
    return found


def exported(source: Path, out: Path, *more: str) -> Path:
    assert main(["--ckpt", str(source), "--out", str(out), *more]) == 0
    return out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is written
def test_export_of_a_run_holds_the_weights_that_training_ended_with(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(run, tmp_path / "out")
    assert "logits agree" in capsys.readouterr().out
    assert_same_weights(out, run / "model")  # written by ExportCallback from the module in memory
    before = weights(tiny_checkpoint)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(out).items())
    inputs = probe(out)
    assert torch.equal(folder_logits(out, "float32", "", inputs), folder_logits(run / "model", "float32", "", inputs))


@pytest.mark.filterwarnings("ignore:model.policy.dtype bfloat16")
def test_bf16_export_has_the_bits_of_the_trained_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = fit_in_process(tiny_checkpoint, tmp_path / "run", BF16)
    out = exported(run, tmp_path / "out")
    assert_same_weights(out, run / "model")
    trained = torch.load(checkpoint_of(run), weights_only=True)["state_dict"]
    start, found = (
        load_policy(PolicyConfig(path=str(folder), dtype="bfloat16")).state_dict() for folder in (tiny_checkpoint, out)
    )
    assert {f"policy.{name}" for name in found} == trained.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, trained[f"policy.{name}"]), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in found.items()), "training has moved them"


def test_an_exported_folder_has_processor_template_generation_config_and_card(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "greedy").mkdir(parents=True, exist_ok=True)
    figure = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8}
    (run / "eval" / "greedy" / "metrics.json").write_text(json.dumps({"num_tasks": 8, "accuracy": figure}))
    out = exported(checkpoint_of(run), tmp_path / "out", "--verify", "false")
    assert AutoProcessor.from_pretrained(out).chat_template == adapter_for("qwen3_vl").chat_template()
    assert GenerationConfig.from_pretrained(out).eos_token_id is not None
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "| greedy | accuracy | 0.250 | [0.125, 0.500] | 8 |" in card
    assert "sft/loss" in card and "num_steps: 2" in card and checkpoint_of(run).name in card


def test_a_large_export_is_cut_into_shards_that_transformers_joins(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", "--max_shard_gb", "0.002")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 0.0021e9
    assert_same_weights(out, run / "model")


def test_every_exported_weight_has_the_requested_dtype(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.skipif(not vllm_imports(), reason="needs vLLM")
def test_an_exported_model_has_the_same_logprobs_in_vllm_and_transformers(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out")
    policy = Policy.load(out)
    config = EngineConfig(kind="vllm", max_model_len=512, max_num_seqs=4, max_images=4)
    engine = build_engine(config, str(out), dtype="float32", seed=0, model=None, adapter=policy.adapter)
    try:
        dialogue = policy.dialogue([(96, 96), (64, 96)])
        engine.add_request(request_of(dialogue, policy.banned))
        done = []
        while engine.has_unfinished():
            done += engine.step()
        (completion,) = done
        difference = policy.logprobs(dialogue, completion) - torch.tensor(completion.logprobs)
        assert len(completion.token_ids) == 12 and difference.abs().max() < 1e-4
    finally:
        engine.close()


def test_an_export_of_qwen2_5_vl_has_published_names_and_a_tied_head(
    tiny_qwen25: Path, run: Path, tmp_path: Path
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_qwen25, dtype=torch.float32)
    state = {f"policy.{name}": 1.5 * tensor for name, tensor in model.state_dict().items()}
    assert "policy.lm_head.weight" in state
    torch.save({"state_dict": state}, tmp_path / "made.ckpt")
    config = yaml.safe_load((run / "fit_config.yaml").read_text())
    config["model"]["init_args"]["policy"]["path"] = str(tiny_qwen25)
    (tmp_path / "fit_config.yaml").write_text(yaml.safe_dump(config))
    found, before = weights(exported(tmp_path / "made.ckpt", tmp_path / "out")), weights(tiny_qwen25)
    assert found.keys() == before.keys() and "lm_head.weight" not in found
    assert all(torch.equal(found[name], 1.5 * before[name]) for name in found)


# ---------------------------------------------------------------------------------------------- adapters
def test_exported_adapters_are_merged(lora_run: Path, tmp_path: Path) -> None:
    assert_same_weights(exported(lora_run, tmp_path / "out"), lora_run / "model")


def test_exported_adapters_alone_work_on_top_of_the_base_model(
    lora_run: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = exported(lora_run, tmp_path / "out", "--lora", "separate")
    assert {path.name for path in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
    inputs = probe(out)
    merged = folder_logits(lora_run / "model", "float32", "", inputs)
    plain = folder_logits(tiny_checkpoint, "float32", "", inputs)
    adapted = folder_logits(out, "float32", str(tiny_checkpoint), inputs)
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------- DeepSpeed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_joins_the_shards_of_a_deepspeed_folder(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    run = fit_two_ranks(tiny_checkpoint, tmp_path / "run", f"--model.init_args.policy.dtype={dtype}")
    folder = checkpoint_of(run)
    assert folder.is_dir() and len(list(folder.glob("checkpoint/*_optim_states.pt"))) == 2
    assert_same_weights(exported(folder, tmp_path / "out"), run / "model")
    assert {str(tensor.dtype) for tensor in weights(run / "model").values()} == {f"torch.{dtype}"}


# ---------------------------------------------------------------------------------------------- refused
def test_an_export_that_fails_its_check_leaves_no_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporting.folder_logits
    monkeypatch.setattr(exporting, "folder_logits", lambda *given: honest(*given) * 1.001)
    text = refused(["--ckpt", str(run), "--out", str(tmp_path / "out")], capsys)
    assert "other logits than the checkpoint" in text and not list(tmp_path.iterdir())


def test_an_export_replaces_a_folder_only_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_export_refuses_what_is_not_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "text.ckpt").write_text("no zip")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    shutil.copy(run / "fit_config.yaml", tmp_path)
    assert "no such file" in refused(["--ckpt", str(tmp_path / "none.ckpt"), *out], capsys)
    assert "cut short" in refused(["--ckpt", str(tmp_path / "text.ckpt"), *out], capsys)
    assert "no state_dict" in refused(["--ckpt", str(tmp_path / "other.ckpt"), *out], capsys)
    assert "no checkpoint in" in refused(["--ckpt", str(tmp_path), *out], capsys)
    assert "Hugging Face folder already" in refused(["--ckpt", str(run / "model"), *out], capsys)
    assert "holds no adapters" in refused(["--ckpt", str(run), *out, "--lora", "separate"], capsys)
    assert not (tmp_path / "out").exists()


def test_export_names_the_flag_for_a_missing_input(
    run: Path, tiny_qwen25: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, out = tmp_path / "a" / "b" / "c" / "alone.ckpt", ["--out", str(tmp_path / "out")]
    alone.parent.mkdir(parents=True)
    shutil.copy(checkpoint_of(run), alone)
    assert "give it with --run_config" in refused(["--ckpt", str(alone), *out], capsys)
    elsewhere = ["--ckpt", str(alone), "--out", str(tmp_path / "found"), "--verify", "false"]
    assert main([*elsewhere, "--run_config", str(run / "fit_config.yaml")]) == 0
    with pytest.raises(SystemExit):  # --config holds options of export itself, and a run's config has none
        main([*elsewhere, "--overwrite", "true", "--config", str(run / "fit_config.yaml")])
    text = refused(["--ckpt", str(run), *out, "--base", str(tiny_qwen25)], capsys)
    assert "does not fit the qwen2_5_vl" in text and "--base" in text
    config = yaml.safe_load((run / "fit_config.yaml").read_text())
    config["model"]["init_args"]["policy"]["path"] = str(tmp_path / "gone")
    (alone.parent / "fit_config.yaml").write_text(yaml.safe_dump(config))
    assert "give a folder of the same model with --base" in refused(["--ckpt", str(alone), *out], capsys)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    assert "--overwrite" in refused(["--ckpt", str(run), *out], capsys)
