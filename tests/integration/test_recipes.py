"""Every shipped config loads: parsed as a user would give it, and built with a tiny model in the real one's place."""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.cli import CALLBACKS, ConfigOnly, CVLightningCLI
from cv_lightning.cli import main as run_cli
from cv_lightning.engines import EngineConfig
from cv_lightning.models.adapters import adapter_for
from cv_lightning.models.loading import PolicyConfig, load_policy, load_processor
from cv_lightning.models.lora import LoraConfig
from cv_lightning.models.shapes import RELEASED, empty_policy, model_config
from cv_lightning.rewards import RewardConfig
from cv_lightning.strategies import ZeroStrategy
from cv_lightning.types import CheckpointError, Task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALL = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
RECIPES = [f"{stage}/{model}.yaml" for stage in ("sft", "grpo") for model in ("qwen3_vl_8b", "qwen2_5_vl_7b")]
HARDWARE = [name for name in ALL if name.startswith("hardware/")]
PARAMETERS = {"qwen3_vl_8b": 8.77e9, "qwen2_5_vl_7b": 8.29e9}
SMALL = {"Qwen3-VL-4B": 4.44e9, "Qwen3-VL-2B": 2.128e9}
"""Parameters of the models that the configs for own data are for."""
PARTS = {"agent": AgentConfig, "engine": EngineConfig, "prompt": PromptConfig, "reward": RewardConfig}
PARTS["ablations"] = RewardConfig
"""What the first word of a part's file name, or its folder, says that it is."""
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
THINKING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
"""As the stock templates of Thinking models end: the thought is opened for the model."""


class BuildOnly(CVLightningCLI):
    """Builds model, data and trainer, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@cache
def load(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def kind_of(name: str) -> str:
    """`whole`: fit or test take it as it is; `overlay`: on top of another; `sweep`; else a part's name."""
    keys = set(load(name))
    if "parameters" in keys and "command" in keys:
        return "sweep"
    if keys <= {"seed_everything", "trainer", "model", "data", "ckpt_path", *CALLBACKS}:
        return "whole" if {"model", "data"} <= keys and "class_path" in load(name)["model"] else "overlay"
    part = name.split("/")[0] if name.split("/")[0] in PARTS else Path(name).stem.split("_")[0]
    assert part in PARTS, f"{name}: neither a config of fit or test, nor a part that this test knows; name it in PARTS"
    return part


def of_kind(*kinds: str) -> list[str]:
    return [name for name in ALL if kind_of(name) in kinds]


def configs(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--config", str(CONFIGS / name))]


def read(*names: str) -> dict[str, Any]:
    """The resolved config, as fit reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = run_cli(["fit", *configs(*names)], ConfigOnly)
    assert isinstance(cli, ConfigOnly)
    return cli.as_dict()


def build(arguments: list[str], tiny: Path) -> BuildOnly:
    policy = f"--model.init_args.policy.path={tiny}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = run_cli(["fit", *arguments, *ON_CPU, policy], BuildOnly)
    assert isinstance(cli, BuildOnly)
    return cli


def base_of(overlay: str) -> str:
    """A config that an overlay can stand on."""
    if overlay.startswith("own/"):
        return "own/grpo.yaml"
    if overlay.startswith("quickstart/measure_"):
        base = overlay.removeprefix("quickstart/measure_")
        return f"quickstart/{'grpo.yaml' if base == 'images.yaml' else base}"
    return "sft/qwen3_vl_8b.yaml" if overlay.startswith("sft/") else "grpo/qwen3_vl_8b.yaml"


# ---------------------------------------------------------------------------------------------- every file
@pytest.mark.parametrize("name", of_kind("whole", "overlay"))
def test_every_config_of_the_recipes_and_the_rest_is_built(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    names = [name] if kind_of(name) == "whole" else [base_of(name), name]
    logger = [] if name.startswith("logger/") else ["--trainer.logger=false"]
    cli = build([*configs(*names), *logger], tiny_checkpoint)
    given = load(name).get("model", {}).get("class_path")
    assert given is None or type(cli.model).__name__ == given.rsplit(".", 1)[1]
    assert cli.model.policy is None, "weights are loaded in configure_model only"
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {kind for key, kind in CALLBACKS.items() if key in load(name)} <= kinds


@pytest.mark.parametrize("name", of_kind(*PARTS))
def test_parts_of_recipes_equal_their_files(name: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=PARTS[kind_of(name)])
    built = parser.instantiate(parser.parse_args(["--part", str(CONFIGS / name)])).part
    given = load(name)
    assert given and all(hasattr(built, key) for key in given)


@pytest.mark.parametrize("name", of_kind("sweep"))
def test_every_sweep_changes_settings_that_its_recipe_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    sweep = load(name)
    file = sweep["command"][sweep["command"].index("--config") + 1]
    settings = []
    for key, values in sweep["parameters"].items():
        value = values.get("value", values.get("min", values.get("values", [None])[0]))
        settings.append(f"--{key}={value}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_cli(["fit", "--config", file, *settings], ConfigOnly)


# ---------------------------------------------------------------------------------------------- the real models
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_real_models_have_their_parameters(name: str) -> None:
    model = Path(name).stem
    policy = PolicyConfig(**load(name)["model"]["init_args"]["policy"])
    empty = empty_policy(policy)
    total = sum(parameter.numel() for parameter in empty.parameters())
    assert total == pytest.approx(PARAMETERS[model], rel=1e-3)
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}
    assert all(parameter.is_meta for parameter in empty.parameters())
    frozen = {name for name, parameter in empty.named_parameters() if not parameter.requires_grad}
    tower = {name for name, _ in empty.named_parameters() if ".visual." in name}
    assert frozen == (tower if name.startswith("sft/") else set())


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("model", list(PARAMETERS))
def test_lora_recipes_train_only_adapters(stage: str, model: str) -> None:
    given = read(f"{stage}/{model}.yaml", f"{stage}/lora.yaml", "hardware/1gpu_lora.yaml")["model"]["init_args"]
    lora = LoraConfig(**given["policy"].pop("lora"))
    empty = empty_policy(PolicyConfig(**given["policy"], lora=lora))
    trained = {name: p for name, p in empty.named_parameters() if p.requires_grad}
    text = empty.config.get_text_config()
    layers = {name for name in trained if name.endswith("lora_A.default.weight")}
    assert len(layers) == 7 * text.num_hidden_layers and len(trained) == 2 * len(layers)
    assert given["optimizer"]["lr"] == pytest.approx(
        10 * load(f"{stage}/{model}.yaml")["model"]["init_args"]["optimizer"]["lr"]
    )


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if "qwen3" in name])
def test_recipes_work_with_every_hardware_file(recipe: str, hardware: str) -> None:
    alone, both, given = load(recipe), read(recipe, hardware), load(hardware)["trainer"]
    assert both["trainer"]["devices"] == given["devices"] and both["trainer"]["accelerator"] == given["accelerator"]
    assert both["export"] == alone["export"]
    assert set(alone.get("rollout", {})) <= set(both["rollout"])
    assert both["model"]["init_args"]["policy"]["path"] == alone["model"]["init_args"]["policy"]["path"]
    if isinstance(given.get("strategy"), str):
        assert both["trainer"]["strategy"] == given["strategy"]
    elif "strategy" in given:
        module, kind = given["strategy"]["class_path"].rsplit(".", 1)
        strategy = getattr(importlib.import_module(module), kind)(**given["strategy"]["init_args"])
        assert isinstance(strategy, ZeroStrategy) and both["trainer"]["strategy"]["init_args"]["stage"] == 3


def test_grpo_recipes_train_as_many_tokens_as_the_agent_may_sample() -> None:
    for name in RECIPES[2:]:
        config = load(name)
        given, rollout = config["model"]["init_args"], config["rollout"]
        agent, engine = rollout["agent"], rollout["engine"]
        longest = agent["max_prompt_tokens"] + agent["max_response_tokens"]
        assert longest == engine["max_model_len"] == given["max_tokens_per_row"] == 32768
        assert agent["max_images"] == engine["max_images"] == 1 + agent["max_turns"]
        assert given["policy"]["path"] == str(
            Path(load(name.replace("grpo", "sft"))["trainer"]["default_root_dir"], "model")
        )


def test_a_recipe_model_is_found_by_its_name_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    for path in ("Qwen/Qwen3-VL-8B-Instruct", "runs/qwen3_vl_8b/sft/model"):
        assert model_config(path).text_config.num_hidden_layers == 36
    assert model_config("/data/Qwen2.5-VL-7B-Instruct").vision_config.depth == 32
    with pytest.raises(CheckpointError, match=r"download at least the model's config\.json"):
        model_config("Qwen/Qwen4-VL")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model type llama"):
        model_config(str(tmp_path))
    for name, count in SMALL.items():
        small = empty_policy(PolicyConfig(path=f"Qwen/{name}-Instruct"))
        assert sum(parameter.numel() for parameter in small.parameters()) == pytest.approx(count, rel=1e-3)
    assert len(RELEASED) == len(PARAMETERS) + len(SMALL)


# ---------------------------------------------------------------------------------------------- own data
def test_configs_for_own_data_agree_on_what_the_stages_share() -> None:
    sft, grpo, test = (read(f"own/{name}.yaml") for name in ("sft", "grpo", "eval"))
    assert sft["model"]["init_args"]["policy"] == grpo["model"]["init_args"]["policy"]
    for key in ("agent", "reward"):
        assert test["rollout"][key] == grpo["rollout"][key]
    assert test["rollout"]["engine"]["max_model_len"] == grpo["rollout"]["engine"]["max_model_len"]
    policies = [config["model"]["init_args"]["policy"] for config in (grpo, test)]
    assert len({policy["max_pixels"] for policy in policies}) == 1
    agent, engine = grpo["rollout"]["agent"], grpo["rollout"]["engine"]
    assert agent["max_prompt_tokens"] + agent["max_response_tokens"] == engine["max_model_len"]
    assert engine["max_model_len"] <= grpo["model"]["init_args"]["max_tokens_per_row"]
    assert grpo["rollout"]["reward"]["judge"] is None and agent["prompt"]["system"] == "default"
    factor = (
        sft["model"]["init_args"]["optimizer"]["lr"] / load("sft/lora.yaml")["model"]["init_args"]["optimizer"]["lr"]
    )
    assert factor == pytest.approx(1)
    assert (
        grpo["model"]["init_args"]["optimizer"]["lr"] == load("grpo/lora.yaml")["model"]["init_args"]["optimizer"]["lr"]
    )


# ---------------------------------------------------------------------------------------------- Thinking models
def test_prompts_of_thinking_models_do_not_open_the_thought(tiny_checkpoint: Path, tmp_path: Path) -> None:
    processor = load_processor(str(tiny_checkpoint))
    processor.chat_template = processor.tokenizer.chat_template = THINKING
    processor.save_pretrained(tmp_path)
    stock = load_processor(str(tmp_path))
    message = [{"role": "user", "content": "?"}]
    assert stock.apply_chat_template(message, add_generation_prompt=True).endswith("<think>\n")
    encoder = DialogueEncoder(adapter_for("qwen3_vl").bind(stock))
    task = Task(id="t", question="?", images=(), ground_truth="1")
    dialogue = encoder.start(task, [], PromptConfig())
    follow_up = encoder.tool_ids([{"type": "text", "text": "Look."}])
    for ids in (dialogue.token_ids, follow_up):
        assert stock.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert encoder.adapter.chat_template() != THINKING


def test_lora_recipes_keep_adapters_in_float32(tiny_checkpoint: Path) -> None:
    model = load_policy(PolicyConfig(path=str(tiny_checkpoint), dtype="bfloat16", lora=LoraConfig(rank=2)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
