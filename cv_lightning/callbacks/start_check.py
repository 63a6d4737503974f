"""Start-up check of SFT: the packed forward against transformers' own, before anything is learned.

The check finds wrong positions, images in the wrong order and attention that crosses sequences. GRPO has a stricter
check against its engine (`rollout/mismatch.py`); both also check the models' buffers (`modules/base.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.modules import DemonstrationBatch
from cv_lightning.distributed import gather_lists
from cv_lightning.models.packing import TrainSequence, pack_sequences
from cv_lightning.models.reference_forward import plain_logprobs
from cv_lightning.modules.sft import SFTModule
from cv_lightning.ranges import NonNegativeFloat, check_ranges
from cv_lightning.rollout.mismatch import exceeds
from cv_lightning.types import MismatchError

logger = logging.getLogger(__name__)
FORWARD_MEAN = 0.06
"""Largest accepted mean |difference| in 16 bits; engine and trainer, with other kernels, may differ more."""
NUM_CHECKED = 2
"""Conversations of each rank that are compared."""


class StartReport(NamedTuple):
    """Differences of log-probabilities over all ranks."""

    from_plain: torch.Tensor
    """Ours minus transformers', for one conversation of each rank. Shape [tokens]."""
    from_alone: torch.Tensor
    """Packed minus alone, for `NUM_CHECKED` conversations of each rank. Shape [tokens]."""


class SFTStartCheck(pl.Callback):
    """Compares log-probabilities of the first batch: packed, alone, and by transformers' own forward.

    Args:
        tolerance: Largest accepted difference in float32; 0 turns the check off. In 16 bits `mismatch.exceeds` uses
            mean and quantile instead.
    """

    def __init__(self, tolerance: NonNegativeFloat = 1e-4) -> None:
        check_ranges(SFTStartCheck.__init__, "start_check", locals())
        self.tolerance = tolerance
        self.done = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the first batch; MismatchError if the forwards differ by more than rounding explains."""
        if self.done or not self.tolerance or not isinstance(batch, DemonstrationBatch):
            return
        assert isinstance(pl_module, SFTModule)
        with isolate_rng():  # a resumed run makes this check again, an uninterrupted one does not
            report = check_start(pl_module, batch.conversations, self.tolerance)
        self.done = True
        if trainer.is_global_zero and report is not None:
            message = "start-up check: log-probabilities differ by at most %.1e from transformers' own, %.1e by packing"
            logger.info(message, *(float(part.abs().max()) for part in report))


@torch.no_grad()
def check_start(module: SFTModule, conversations: Sequence[Conversation], tolerance: float) -> StartReport | None:
    """Compare forwards on the shortest conversations with images, those with several images first.

    Args:
        module: The module as it will train.
        conversations: This rank's conversations, if it has any.
        tolerance: See `SFTStartCheck`.

    Returns:
        The same on all ranks, which must all call this; None where no rank has a conversation with an image.

    Raises:
        MismatchError: A difference is larger than rounding explains.
    """
    chosen = _choose(module, conversations)
    parts = gather_lists([_differences(module, chosen)])
    report = StartReport(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if not len(report.from_plain):
        logger.warning("start-up check: no conversation of the first batch has an image, so nothing was compared")
        return None
    for differences, what in ((report.from_plain, "transformers' own forward"), (report.from_alone, "itself alone")):
        if exceeds(differences, module.policy_config.dtype, tolerance, FORWARD_MEAN):
            size = differences.abs()
            raise MismatchError(
                f"a packed conversation has other log-probabilities than {what}: |difference| max "
                f"{float(size.max()):.2e}, mean {float(size.mean()):.2e} over {len(size)} tokens (tolerance "
                f"{tolerance:.0e} in float32). Positions, the order of images or attention are wrong: is this the "
                "transformers version that pyproject.toml pins? start_check.tolerance 0 switches the "
                "check off; training would learn from wrong inputs"
            )
    return report


def _choose(module: SFTModule, conversations: Sequence[Conversation]) -> list[tuple[Conversation, TrainSequence]]:
    """Conversations to compare: those with several images first, then the shortest."""
    with_images = [conversation for conversation in conversations if conversation.task.images]
    sequences = module.conversation_sequences(with_images)
    pairs = [pair for pair in zip(with_images, sequences, strict=True) if any(pair[1].loss_mask)]
    pairs.sort(key=lambda pair: (len(pair[1].vision) < 2, len(pair[1].token_ids)))
    return pairs[:NUM_CHECKED]


def _differences(
    module: SFTModule, chosen: Sequence[tuple[Conversation, TrainSequence]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours minus transformers', and packed minus alone. Both [tokens], empty without a conversation.

    A rank without enough conversations adds dummies, because every forward is a collective under ZeRO-3.
    """
    policy, adapter = module.policy, module.adapter
    assert policy is not None
    dummy, dummy_image = module.dummy_sequence()
    sequences = [sequence for _, sequence in chosen] + [dummy] * (NUM_CHECKED - len(chosen))
    packed = pack_sequences(sequences, policy.config, adapter)
    together = module.logprobs(packed).logprobs.cpu()
    alone = [
        module.logprobs(pack_sequences([sequence], policy.config, adapter)).logprobs.cpu() for sequence in sequences
    ]
    images = [dummy_image]
    if chosen:  # taken from the conversation, so that the sequence's order of images is checked, too
        conversation = chosen[0][0]
        shown = [image for turn in conversation.turns for image in turn.images]
        images = [module.encoder.model_image(image) for image in (*conversation.task.images, *shown)]
    first = sequences[0]
    plain = plain_logprobs(policy, adapter, first.token_ids, first.loss_mask, images, adapter.vision_ids).cpu()
    by_sequence = [together[packed.sequence_index.cpu() == number] for number in range(len(sequences))]
    return by_sequence[0] - plain, torch.cat([a - b for a, b in zip(by_sequence, alone, strict=True)])
