"""The plan: figures by hand for the released models, activations and operations as PyTorch counts them, warnings."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from cv_lightning.commands.plan import main
from cv_lightning.models.attention import NAME, use_attention
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import PackedBatch, TrainSequence, pack_sequences
from cv_lightning.models.patches import use_linear_patches
from cv_lightning.planner.budget import GRAPHS_GB, SECONDS_PER_PIXEL, Assumptions, Plan, make_plan
from cv_lightning.planner.footprint import forward_flops, layer_bytes, shape_of, vision_block_bytes
from cv_lightning.planner.run import RunFacts, read_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROW = "--model.init_args.max_tokens_per_row"


def configs(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]


# ---------------------------------------------------------------------------------------------- figures by hand
def test_plan_of_the_8b_recipe_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*configs("grpo/qwen3_vl_8b", "hardware/8gpu"), "--strict", "--json", str(file)]) == 0
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    parameters = 8.767e9
    assert found["weights"] == found["reference"] == pytest.approx(2 * parameters / 8, rel=1e-3)
    assert found["gradients"] == pytest.approx(4 * parameters / 8, rel=1e-3)  # summed up in float32
    assert found["optimizer"] == pytest.approx(12 * parameters / 8, rel=1e-3)  # float32 copy and two moments
    assert found["engine_weights"] == pytest.approx(2 * parameters, rel=1e-3)
    assert found["engine_cache"] == pytest.approx(0.55 * 80e9 - 2 * parameters - 3e9, rel=1e-3)
    lasting = 4e9 + sum(found[name] for name in ("weights", "reference", "gradients", "optimizer", "buffers"))
    assert found["training_peak"] == pytest.approx(lasting + found["activations"], rel=1e-6)  # the engine sleeps
    assert found["rollout_peak"] == pytest.approx(lasting + 0.55 * 80e9, rel=1e-6)
    # Layer inputs alone are 36 x 32,768 x 4,096 x 2 bytes; with a layer, the tower and the logits it is not four times.
    assert 9.66e9 < found["activations"] < 4 * 9.66e9
    assert "warning: the key-value cache holds 19 trajectories" in said
    assert "144 KiB a token" in said and f"{int(found['engine_cache'] // (147456 * 8192))} of 8192 tokens" in said
    # A third of the peak of 989 TFLOP/s; 64 trajectories of 8,192 tokens a GPU, four forwards and the reference's.
    flops = 64 * 8192 * (2 * (parameters - 151936 * 4096) + 2 * 36 * 4096 * 8192)
    assert found["update_s"] == pytest.approx(5 * flops / (0.35 * 989e12), rel=0.1)


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (("sft/qwen3_vl_8b", "hardware/8gpu"), []),
        (("grpo/qwen2_5_vl_7b", "hardware/8gpu"), []),
        (
            ("sft/qwen3_vl_8b", "sft/lora", "hardware/1gpu_lora"),
            ["--gpu=rtx4090", "--model.init_args.policy.path=Qwen3-VL-4B-Instruct", f"{ROW}=4096"],
        ),
        (("sft/qwen3_vl_8b", "sft/lora", "hardware/1gpu_lora"), ["--gpu=l40s"]),
        (("grpo/qwen3_vl_8b", "grpo/lora", "hardware/1gpu_lora"), ["--gpu=h100"]),
        (("own/grpo",), ["--gpu=rtx4090"]),
        (("own/grpo",), ["--gpu=l40s", "--model.init_args.policy.path=Qwen/Qwen3-VL-4B-Instruct"]),
        (("own/grpo",), ["--gpu=h100", "--model.init_args.policy.path=Qwen/Qwen3-VL-4B-Instruct"]),
        (("own/sft",), ["--gpu=rtx4090"]),
        (("own/sft",), ["--gpu=rtx4090", "--model.init_args.policy.path=Qwen/Qwen3-VL-4B-Instruct"]),
    ],
)
def test_recipes_fit_their_hardware(
    names: tuple[str, ...], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*configs(*names), *more, "--strict"])
    assert code == 0, capsys.readouterr().out


def test_plan_counts_the_types_in_which_gradients_are_summed_and_sent() -> None:
    recipe, setting = configs("sft/qwen3_vl_8b", "hardware/8gpu"), "--trainer.strategy.init_args.gradient_"
    usual, short, sent = (
        make_plan(read_run([*recipe, *more]), Assumptions()).figures
        for more in ([], [f"{setting}accumulation=policy"], [f"{setting}communication=float32"])
    )
    assert usual["gradients"] == 2 * short["gradients"] and usual["buffers"] == short["buffers"]
    assert sent["gradients"] == usual["gradients"] and sent["buffers"] - usual["buffers"] == 4 * 200_000_000


# ---------------------------------------------------------------------------------------------- warnings
def test_plan_warns_of_a_run_that_cannot_fit_and_the_setting_it_names_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = configs("grpo/qwen3_vl_8b", "hardware/8gpu")
    awake = "--rollout.engine.sleep=never"
    assert main([*recipe, awake]) == 0, "a plan that does not fit is an error only with --strict"
    assert main([*recipe, awake, "--strict"]) == 1
    text = capsys.readouterr().out
    assert "WARNING: does not fit: training takes" in text and "engine.sleep always" in text
    assert main([*recipe, "--gpu=a100-40", "--strict"]) == 1
    assert "offload_optimizer" in capsys.readouterr().out


def test_plan_warns_of_a_cache_without_room_for_one_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    little = "--rollout.engine.gpu_memory_utilization=0.28"
    assert main([*configs("grpo/qwen3_vl_8b", "hardware/8gpu"), little, "--strict"]) == 1
    assert "raise engine.gpu_memory_utilization, or lower max_model_len" in capsys.readouterr().out


def test_plan_warns_of_a_cache_for_fewer_trajectories_than_are_decoded_at_once() -> None:
    run, given = recipe_run(), Assumptions()
    (line,) = make_plan(run, given).hints
    assert "holds 19 trajectories of 8192 tokens at once, 64 are to run" in line and "max_num_seqs to about 19" in line
    assert run.engine is not None
    assert make_plan(replace(run, engine=replace(run.engine, max_num_seqs=19)), given).hints == []


@cache
def recipe_run() -> RunFacts:
    """The 8B recipe on eight GPUs, parsed once."""
    return read_run(configs("grpo/qwen3_vl_8b", "hardware/8gpu"))


def plan_with(**engine: object) -> Plan:
    """Its plan with other settings of the engine."""
    run = recipe_run()
    assert run.engine is not None
    return make_plan(replace(run, engine=replace(run.engine, **engine)), Assumptions())  # type: ignore[arg-type]


def test_plan_counts_what_a_sleeping_engine_keeps_in_main_memory() -> None:
    found = plan_with()
    assert found.engine is not None and found.engine.sleeps
    settings: list[dict[str, object]] = [
        {},
        {"sleep_level": 2},
        {"sleep_level": 2, "enforce_eager": True},
        {"sleep_level": 2, "processor_cache_gb": 1.0},
        {"sleep": "never"},
    ]
    usual, level_2, eager, small_cache, awake = (plan_with(**given).figures["host"] for given in settings)
    assert usual - level_2 == pytest.approx(2 * 8 * found.engine.weights), "pinned copies, rounded up"
    assert level_2 - eager == pytest.approx(2 * 8 * GRAPHS_GB * 1e9)
    assert eager == awake == pytest.approx(8 * 4e9), "processed images"
    assert small_cache == pytest.approx(level_2 - 8 * 3e9)


def test_plan_counts_the_temporary_tensors_of_an_optimizer_step() -> None:
    run = recipe_run()
    offloaded = replace(run, sharding=replace(run.sharding, offload_optimizer=True))
    assert make_plan(offloaded, Assumptions()).figures["step_work"] == 0
    brief = replace(run, tokens_per_row=4096, allowed_tokens=4096)
    for facts, larger in ((run, "activations"), (brief, "step_work")):
        found = make_plan(facts, Assumptions()).figures
        assert found["step_work"] == 8e9
        kept = sum(found[name] for name in ("weights", "reference", "gradients", "optimizer", "buffers", "overhead"))
        assert found["training_peak"] == kept + found[larger] == kept + max(found["activations"], found["step_work"])


def test_plan_takes_the_size_of_image_tokens_from_the_family() -> None:
    shapes = {name: read_run(configs(name, "hardware/8gpu")).shape for name in SIDES}
    assert {name: shape.patch * shape.merge for name, shape in shapes.items()} == SIDES


SIDES = {"grpo/qwen3_vl_8b": 32, "grpo/qwen2_5_vl_7b": 28}


def test_plan_counts_image_processing_where_it_is_not_hidden() -> None:
    shown, hidden = (plan_with(background_rendering=choice).seconds["rollout"] for choice in ("never", "auto"))
    assert shown - hidden == pytest.approx(64 * 8192 * 0.5 * 32**2 * SECONDS_PER_PIXEL)


@pytest.mark.parametrize(
    "flag, value, named",
    [("--config", "nowhere.yaml", "nowhere"), ("--trainer.bogus", "3", "trainer.bogus"), ("--gpu", "bogus", "--gpu")],
)
def test_a_wrong_word_is_one_short_error(flag: str, value: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([*configs("grpo/qwen3_vl_8b"), flag, value])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr().err
    assert code == 2 and named in said and said.count("error: ") == 1
    assert "cv-lightning fit" not in said and len(said) < 600


def test_plan_refuses_what_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = configs("sft/qwen3_vl_8b", "hardware/8gpu")
    assert main([*recipe, "--model.init_args.policy.path=some/model"]) == 2
    assert "download at least the model's config.json" in capsys.readouterr().err
    assert main([*recipe, "--mfu=1.5"]) == 2
    assert "--mfu 1.5" in capsys.readouterr().err


def test_plan_counts_every_trajectory_that_is_longer_than_a_row() -> None:
    recipe = configs("grpo/qwen3_vl_8b", "hardware/8gpu")
    whole, short = (make_plan(read_run([*recipe, f"{ROW}={tokens}"]), Assumptions()) for tokens in (32768, 4096))
    assert short.figures["activations"] == whole.figures["activations"]
    capped = [f"--rollout.agent.max_{part}_tokens=2048" for part in ("prompt", "response")]
    shorter = make_plan(read_run([*recipe, f"{ROW}=4096", *capped]), Assumptions())
    assert shorter.figures["activations"] < whole.figures["activations"] / 5


# ---------------------------------------------------------------------------------------------- what PyTorch counts
def model_of(folder: Path, dtype: torch.dtype, layers: int, blocks: int, checkpointing: bool) -> PreTrainedModel:
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    config.text_config.num_hidden_layers, config.vision_config.depth = layers, blocks
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:1] * layers
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [1]
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype).train()
    use_attention(model, NAME)
    use_linear_patches(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch_of(folder: Path, model: PreTrainedModel, text: int, images: int) -> PackedBatch:
    """Three rows without a common start, of equally many tokens of text and images of 3x3 tokens."""
    adapter = load_adapter(PolicyConfig(path=str(folder)))
    pad, side = adapter.image_id, 3 * adapter.image_rule.factor
    rows = []
    for row in range(3):
        ids, vision = [5 + row] * text, []
        for image in range(images):
            vision += adapter.process_images([Image.new("RGB", (side, side), (row, image, 0))])
            ids += [pad] * 9 + [7]
        learned = [1 <= position < 10 for position in range(len(ids))]
        rows.append(TrainSequence(token_ids=ids, loss_mask=learned, vision=vision))
    return pack_sequences(rows, model.config, adapter)


def saved_bytes(model: PreTrainedModel, batch: PackedBatch) -> int:
    """Of all storages that autograd keeps, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed_logprobs(model, batch, entropy="value").logprobs.sum()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_counts_the_activations_that_autograd_saves(
    family: str, dtype: torch.dtype, checkpointing: bool, tiny_checkpoint: Path, tiny_qwen25: Path
) -> None:
    folder = tiny_checkpoint if family == "qwen3_vl" else tiny_qwen25

    def saved(layers: int, blocks: int, text: int, images: int) -> tuple[int, PackedBatch]:
        model = model_of(folder, dtype, layers, blocks, checkpointing)
        batch = batch_of(folder, model, text, images)
        return saved_bytes(model, batch), batch

    shape = shape_of(model_of(folder, dtype, 2, 2, checkpointing))
    base, batch = saved(2, 2, 200, 3)
    deep, wide = saved(4, 2, 200, 3)[0], saved(2, 4, 200, 3)[0]
    pixels = batch.image_tensors()["pixel_values"]
    tokens, patches = batch.input_ids.numel(), len(pixels)
    a_layer = shape.dtype_bytes * shape.hidden if checkpointing else layer_bytes(shape)
    a_block = shape.dtype_bytes * shape.vision_hidden if checkpointing else vision_block_bytes(shape)
    assert (deep - base) / 2 == pytest.approx(tokens * a_layer, rel=0.05)
    assert (wide - base) / 2 == pytest.approx(patches * a_block, rel=0.05)


def test_plan_counts_the_operations_that_run(tiny_checkpoint: Path) -> None:
    model = model_of(tiny_checkpoint, torch.float32, 2, 2, False)
    use_attention(model, "sdpa")
    # The counter knows matrix products, not the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.model.language_model(inputs_embeds=torch.zeros(1, 512, model.config.text_config.hidden_size))
    shape = shape_of(model)
    head = 2 * 512 * shape.vocabulary * shape.hidden
    # PyTorch counts the full square of scores, the plan the causal half.
    square = 2 * shape.layers * shape.query_width * 512 * 512
    assert counter.get_total_flops() == pytest.approx(forward_flops(shape, 512, 512, 0) - head + square, rel=0.01)
