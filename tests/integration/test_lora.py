"""LoRA on the tiny model: the engine and the export get merged weights, and the base model is the reference."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from module_samples import PROMPT, SGD_LIKE, fit, groups, policy
from test_rollout_callback import AGENT, Batches

from cv_lightning.callbacks.export import export_policy
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.digits.modules import DigitSFTDataModule, DigitTaskDataModule
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.engines import EngineConfig
from cv_lightning.models.gather import gather_full_params
from cv_lightning.models.loading import PolicyConfig, load_policy
from cv_lightning.models.lora import FACTORS, LoraConfig, adapter_layers, adapters_off
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule
from cv_lightning.rewards import RewardModule
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.types import CheckpointError, Group, RewardBreakdown

LORA = LoraConfig(rank=4, alpha=8.0)


def with_lora(path: Path, lora: LoraConfig | None = LORA) -> PolicyConfig:
    return PolicyConfig(path=str(path), dtype="float32", lora=lora)


def logprobs(module: PolicyModule, model: torch.nn.Module) -> torch.Tensor:
    sequences = module.train_sequences([t for group in groups(module, 1) for t in group.trajectories])
    (packed,) = module.pack_micro_batches(sequences)
    with torch.no_grad():
        return module.logprobs(packed, model=model).logprobs  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_engine_and_export_get_merged_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def score(self: RewardModule, group: Group) -> None:
        for t in group.trajectories:
            t.reward = RewardBreakdown(components={}, total=float(t.sample))

    monkeypatch.setattr(RewardModule, "score_group", score)
    optimizer = OptimizerConfig(lr=3e-2, weight_decay=0.0, gradient_clip=0.0)
    module = GRPOModule(
        with_lora(tiny_checkpoint), optimizer, algorithm=AlgorithmConfig(kl=KLConfig(weight=0.01, estimator="k2"))
    )
    engine = EngineConfig(kind=kind, max_model_len=512, max_num_seqs=16, max_images=2)  # type: ignore[arg-type]
    batches = Batches()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[batches, RolloutCallback(agent=AGENT, engine=engine, num_samples=4)],
    )
    trainer.fit(module, datamodule=DigitTaskDataModule(tasks_per_iteration=2, num_iterations=2))
    first, second = batches.metrics
    assert module.policy is not None and module.reference is None, "no second model"
    moved = max(
        float(layer.get_delta_weight("default").abs().max()) for layer in adapter_layers(module.policy).values()
    )
    assert moved > 1e-2
    assert first["policy/mismatch_max"] < 1e-4 and second["policy/mismatch_max"] < 1e-4
    assert second["policy/kl_to_reference"] > 1e-4

    export_policy(module, tmp_path / "model", write=True)
    exported = load_policy(with_lora(tmp_path / "model", None))
    start = load_policy(with_lora(tiny_checkpoint, None))
    now = logprobs(module, module.policy)
    torch.testing.assert_close(logprobs(module, exported), now, atol=1e-4, rtol=1e-4)
    assert (logprobs(module, start) - now).abs().max() > 0.05
    with adapters_off(module.policy):
        torch.testing.assert_close(logprobs(module, module.policy), logprobs(module, start), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs(module, module.policy), now)


def test_only_adapters_are_trained_and_their_update_starts_at_zero(tiny_checkpoint: Path) -> None:
    model, plain = load_policy(with_lora(tiny_checkpoint)), load_policy(with_lora(tiny_checkpoint, None))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".language_model." in name and any(mark in name for mark in FACTORS) for name in trained)
    assert len(adapter_layers(model)) == 7 * model.config.text_config.num_hidden_layers
    whole, wanted = dict(gather_full_params(model)), dict(plain.named_parameters())
    assert whole.keys() == wanted.keys()
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
    with pytest.raises(CheckpointError, match=r"lora\.targets"):
        load_policy(with_lora(tiny_checkpoint, LoraConfig(targets=("no_such_layer",))))
    with pytest.raises(ValueError, match="rank"):
        LoraConfig(rank=0)


def test_sft_with_lora_lowers_its_loss_and_keeps_the_base_weights(tiny_checkpoint: Path) -> None:
    module = SFTModule(with_lora(tiny_checkpoint), OptimizerConfig(lr=2e-2, weight_decay=0.0), prompt=PROMPT)
    data = DigitSFTDataModule(digits=DigitsConfig(), num_steps=1, conversations_per_step=4, warm_up_share=0.0)
    batch = data.train_dataloader().build(0)
    losses: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            losses.append(float(trainer.callback_metrics["sft/loss"]))

    fit(module, lambda step: batch, 6, callbacks=[Watch()])
    data.teardown("fit")
    assert losses[-1] < losses[0] - 0.3
    assert module.policy is not None
    start = load_policy(policy(tiny_checkpoint))
    with adapters_off(module.policy):
        assert torch.equal(logprobs(module, module.policy), logprobs(module, start))


def test_another_reference_than_the_base_is_loaded(tiny_checkpoint: Path) -> None:
    algorithm = AlgorithmConfig(kl=KLConfig(weight=0.1))
    elsewhere = AlgorithmConfig(kl=KLConfig(weight=0.1, reference_path=str(tiny_checkpoint) + "/."))
    other = GRPOModule(with_lora(tiny_checkpoint), SGD_LIKE, algorithm=elsewhere)
    assert not other.is_own_reference
    assert GRPOModule(with_lora(tiny_checkpoint), SGD_LIKE, algorithm=algorithm).is_own_reference
    assert not GRPOModule(policy(tiny_checkpoint), SGD_LIKE, algorithm=algorithm).is_own_reference
