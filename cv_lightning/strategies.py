"""DeepSpeed ZeRO for a policy, on GPUs and on CPU ranks.

The strategies support the modules' manual optimisation. Lightning's `DeepSpeedStrategy` would neither clip gradients
nor keep the reference policy out of checkpoints, and its `zero.Init` leaves adapters without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from cv_lightning.modules.base import PolicyModule
from cv_lightning.ranges import NonNegativeInt, PositiveFloat, PositiveInt, check_ranges
from cv_lightning.types import CVLightningError

PRECISIONS: dict[str, Literal["32-true", "bf16-true", "16-true"]] = {
    "float32": "32-true",
    "bfloat16": "bf16-true",
    "float16": "16-true",
}
"""Lightning's name for each `policy.dtype`."""


@contextmanager
def unchanged_tensors() -> Iterator[None]:
    """Context manager: `deepspeed.zero.Init` shards parameters without changing the results of torch's constructors.

    By default it casts every floating-point tensor to the parameters' type and builds it on the GPU. This would round
    the tables that a model computes in float32, such as rotary frequencies, and so give wrong positions.
    """
    import deepspeed

    original = deepspeed.zero.Init
    deepspeed.zero.Init = partial(original, tensor_overrides=[])  # transformers looks the name up at each call
    try:
        yield
    finally:
        deepspeed.zero.Init = original


class AsLoaded(DeepSpeedPrecision):
    """Precision plugin that leaves the module as it was loaded.

    Lightning's plugin also casts buffers, and rotary frequencies in 16 bits give wrong positions in long sequences.
    """

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return the module unchanged."""
        return module

    def tensor_init_context(self) -> nullcontext[None]:
        """Context manager that keeps torch's default type."""
        return nullcontext()


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO on GPUs: optimizer states and gradients are sharded (stage 2), and also parameters (stage 3).

    The parameters' type is `policy.dtype`; in 16 bits DeepSpeed steps on float32 copies. Gradients are clipped to
    `optimizer.gradient_clip`. Hugging Face checkpoints are sharded while they are loaded.

    Args:
        stage: What is sharded: 2 or 3.
        offload_optimizer: Keep optimizer states and float32 copies in the host's memory, and step there.
        offload_parameters: Also keep the shards of parameters there; stage 3 only.
        bucket_elements: Number of gradient elements that are reduced at once.
        persistent_below: Parameters with fewer elements are not sharded; stage 3 only.
        gradient_accumulation: Type in which the gradients of micro-batches are added up: `float32`, or `policy` for the
            parameters' type, which in 16 bits saves 2 bytes per trained parameter over the ranks and is off by about
            1 % after 48 micro-batches.
        gradient_communication: Type in which ranks average gradients: `policy` for the parameters' type, or `float32`,
            which needs twice the bandwidth of 16 bits and avoids an error of about 0.1 %.
        timeout_s: Seconds after which a collective that some rank does not join is an error. Ranks wait in a collective
            for the longest rollout.
    """

    clips_manual_steps = True
    """Manual optimisation gets its gradients clipped and its micro-batches accumulated."""
    overlaps_communication = True
    """Reduce gradients during the backward pass."""

    def __init__(
        self,
        stage: Literal[2, 3] = 3,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket_elements: PositiveInt = 200_000_000,
        persistent_below: NonNegativeInt = 100_000,
        gradient_accumulation: Literal["float32", "policy"] = "float32",
        gradient_communication: Literal["policy", "float32"] = "policy",
        timeout_s: PositiveFloat = 7200.0,
    ) -> None:
        check_ranges(ZeroStrategy.__init__, "trainer.strategy.init_args", locals())
        if stage not in (2, 3):
            raise ValueError(f"--trainer.strategy.stage {stage}: 2 or 3; without sharding use trainer.strategy ddp")
        if offload_parameters and stage != 3:
            raise ValueError("--trainer.strategy.offload_parameters needs --trainer.strategy.stage 3")
        self.offload_optimizer = offload_optimizer
        self.gradient_accumulation = gradient_accumulation
        self.gradient_communication = gradient_communication
        zero: dict[str, Any] = {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": self.overlaps_communication,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": persistent_below,
        }
        offloaded = {"offload_optimizer": offload_optimizer, "offload_param": offload_parameters}
        zero |= {name: {"device": "cpu", "pin_memory": True} for name, on in offloaded.items() if on}
        config: dict[str, Any] = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on a CPU without a compiled extension
            "train_micro_batch_size_per_gpu": 1,  # not used, but otherwise Lightning would build the loaders early
        }
        super().__init__(config=config, timeout=timedelta(seconds=timeout_s))

    @property
    def policy_module(self) -> PolicyModule:
        """The trained module."""
        module = self.lightning_module
        if not isinstance(module, PolicyModule):
            raise TypeError(f"{type(self).__name__} works with a PolicyModule, not with {type(module).__name__}")
        return module

    def _format_config(self) -> None:
        """Add the module's settings to DeepSpeed's config."""
        module = self.policy_module
        assert isinstance(self.config, dict)
        if module.optimizer_config.skip_norm_above is not None:
            raise CVLightningError("model.optimizer.skip_norm_above is not supported under DeepSpeed; leave it out")
        precision = PRECISIONS[module.policy_config.dtype]
        given = self.precision_plugin.precision
        if given not in ("32-true", precision):
            raise CVLightningError(
                f"trainer.precision {given} contradicts model.policy.dtype {module.policy_config.dtype}: leave it out"
            )
        self.precision_plugin = AsLoaded(precision)
        self.config["gradient_clipping"] = module.optimizer_config.gradient_clip
        if precision == "bf16-true":  # by default DeepSpeed takes a bfloat16 step with a non-finite gradient
            self.config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if self.gradient_accumulation == "float32":
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.gradient_communication == "float32":
            self.config["communication_data_type"] = "fp32"
        super()._format_config()

    # ------------------------------------------------------------------ loading
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Context manager: transformers shards a model while loading it, so that no rank ever holds all of it.

        DeepSpeed's own context would shard all other parameters when they are created, before they have values. This
        one ends after loading, because an engine that is built inside it would be sharded, too.
        """
        self._init_config_if_needed()
        if not self.zero_stage_3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig(self.config)  # transformers holds a weak reference
        with unchanged_tensors():
            yield
        del alive
        for buffer in self.policy_module.buffers():  # DeepSpeed does not move a sharded module
            if buffer.device.type != self.root_device.type:
                buffer.data = buffer.data.to(self.root_device)

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write each rank's shard, without the submodules that do not belong in a checkpoint."""
        with self.policy_module.checkpoint_view():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read each rank's shard."""
        with self.policy_module.checkpoint_view():
            return super().load_checkpoint(checkpoint_path, weights_only)


class CPUDeepSpeedStrategy(ZeroStrategy):
    """ZeRO on CPU ranks, which communicate through gloo. Lightning's strategy accepts CUDA only.

    Args:
        stage: What is sharded: 2 or 3.
        persistent_below: Parameters with fewer elements are not sharded; stage 3 only.
        gradient_accumulation: See `ZeroStrategy`.
        gradient_communication: See `ZeroStrategy`.
        timeout_s: See `ZeroStrategy`.
    """

    overlaps_communication = False

    def __init__(
        self,
        stage: Literal[2, 3] = 3,
        persistent_below: NonNegativeInt = 0,
        gradient_accumulation: Literal["float32", "policy"] = "float32",
        gradient_communication: Literal["policy", "float32"] = "policy",
        timeout_s: PositiveFloat = 7200.0,
    ) -> None:
        super().__init__(
            stage,
            bucket_elements=50_000_000,
            persistent_below=persistent_below,
            gradient_accumulation=gradient_accumulation,
            gradient_communication=gradient_communication,
            timeout_s=timeout_s,
        )

    def setup_environment(self) -> None:
        """Set up the ranks without requiring a GPU."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the process group."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The CPU, with the index that DeepSpeed requires."""
        return torch.device("cpu", 0)
