"""Memory and floating-point operations of a model, from its shapes.

Activations are what autograd saves of one packed row; tests compare the formulas with what PyTorch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cv_lightning.models.adapters import Architecture, ModelAdapter, adapter_for
from cv_lightning.models.adapters.base import LOGIT_CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAM_MOMENTS, FLOAT32 = 2, 4
LOGIT_COPIES = 3
"""Float32 copies of a chunk's logits that are alive at once: the logits, their gradient, and the softmax between."""
STEP_COPIES = 2
"""Temporary tensors of an optimizer step, each as large as the parameters that are stepped at once."""
ZERO3_ELEMENTS = 1_000_000_000
"""DeepSpeed's default for two limits of ZeRO-3: elements of gathered parameters, and elements stepped at once."""


@dataclass(frozen=True, kw_only=True)
class Shape(Architecture):
    """Sizes of a model."""

    parameters: int
    """Number of parameters, adapters included."""
    trained: int
    """Number of trained parameters."""
    trained_bytes: int
    """Bytes of one trained parameter."""
    dtype_bytes: int
    """Bytes of one parameter or activation."""
    vision_parameters: int
    vision_trained: bool
    """True: autograd saves the vision tower's activations."""
    looked_up: int
    """Parameters of the word embeddings unless they are the output head as well: they take part in no product."""


def shape_of(model: PreTrainedModel, adapter: ModelAdapter | None = None) -> Shape:
    """Sizes of a model, which may be on the meta device; without `adapter` the model type selects it."""
    adapter = adapter or adapter_for(model.config.model_type)
    architecture = adapter.architecture(model.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    tower = [p for name, p in model.named_parameters() if adapter.part_of(name) in ("vision", "projector")]
    embeddings = next(iter(model.get_input_embeddings().parameters()))
    return Shape(
        **vars(architecture),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        trained_bytes=max((p.element_size() for p in trained), default=0),
        dtype_bytes=embeddings.element_size(),
        vision_parameters=sum(p.numel() for p in tower),
        vision_trained=any(p.requires_grad for p in tower),
        looked_up=0 if model.config.tie_word_embeddings else architecture.vocabulary * architecture.hidden,
    )


# ------------------------------------------------------------------------------------------------ activations
def norm_bytes(width: int, dtype_bytes: int) -> int:
    """Bytes saved by an RMS norm of one token: its input in float32, the normalised input, and the result."""
    return width * (FLOAT32 + 2 * dtype_bytes)


def layer_bytes(shape: Shape) -> int:
    """Bytes that one layer of the language model saves for the backward pass, per token."""
    b, queries, keys = shape.dtype_bytes, shape.query_width, shape.key_width
    norms = 2 * norm_bytes(shape.hidden, b)
    head_norms = (queries + keys) * (FLOAT32 + b) if shape.head_norm else 0
    attention = b * (queries + 2 * keys) + 2 * b * queries  # queries, keys, values; result as heads and as rows
    gated = 4 * b * shape.intermediate  # gate, its activation, the other factor, their product
    return norms + head_norms + attention + gated


def vision_block_bytes(shape: Shape) -> int:
    """Bytes that one block of the vision tower saves for the backward pass, per patch."""
    b, width = shape.dtype_bytes, shape.vision_hidden
    norms = 2 * (norm_bytes(width, b) if shape.vision_gated else 2 * b * width)
    mlp = (4 if shape.vision_gated else 2) * b * shape.vision_intermediate
    return norms + 6 * b * width + mlp  # queries, keys and values, two of them rotated; the result in both its forms


def activation_bytes(shape: Shape, tokens: int, image_tokens: int, checkpointing: bool) -> float:
    """Largest memory in bytes of the activations of a packed row, `image_tokens` of whose `tokens` are of images.

    With `checkpointing` only the inputs of layers are kept, and one layer at a time is run again.
    """
    b, patches = shape.dtype_bytes, image_tokens * shape.merge**2
    layer, block = tokens * layer_bytes(shape), patches * vision_block_bytes(shape)
    depth = shape.vision_depth if shape.vision_trained else 0
    merged = shape.mergers * 5 * b * shape.vision_hidden * patches * shape.vision_trained
    if checkpointing:
        kept = b * (shape.layers * tokens * shape.hidden + depth * patches * shape.vision_hidden)
        kept += max(layer, block if depth else 0)
    else:
        kept = shape.layers * layer + depth * block
    ends = tokens * (norm_bytes(shape.hidden, b) + b * shape.hidden)  # embeddings, last norm
    logits = min(tokens, LOGIT_CHUNK) * shape.vocabulary * (b + LOGIT_COPIES * FLOAT32)
    return kept + merged + ends + logits


# ------------------------------------------------------------------------------------------------ states
@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How ranks share the training states; fields besides the first two are settings of `ZeroStrategy`."""

    ranks: int = 1
    zero_stage: Literal[0, 2, 3] = 0
    """0: every rank has everything; 2: gradients and optimizer states are sharded; 3: parameters as well."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_elements: int = 200_000_000
    gradient_accumulation: Literal["float32", "policy"] = "float32"
    gradient_communication: Literal["policy", "float32"] = "policy"


def states(shape: Shape, sharding: Sharding, has_reference: bool) -> dict[str, float]:
    """Bytes that training holds on one GPU from step to step; `host`: what this GPU's part takes in main memory.

    `optimizer` is the moments and, under DeepSpeed, float32 copies of 16-bit weights; `buffers` are ZeRO's. With
    `has_reference` a frozen copy of the policy is loaded beside it.
    """
    zero, ranks = sharding.zero_stage, sharding.ranks
    parts = ranks if zero else 1
    weights = shape.parameters * shape.dtype_bytes / (ranks if zero == 3 else 1)
    is_16_bit = shape.trained_bytes < FLOAT32
    copies = FLOAT32 if zero and is_16_bit else 0
    optimizer = shape.trained * (ADAM_MOMENTS * (FLOAT32 if zero else shape.trained_bytes) + copies) / parts
    in_float32 = zero and sharding.gradient_accumulation == "float32"
    gradients = shape.trained * (FLOAT32 if in_float32 else shape.trained_bytes) / parts
    bucket = min(sharding.bucket_elements, shape.trained)
    buffers = 2.0 * bucket * shape.trained_bytes if zero else 0.0
    if zero and sharding.gradient_communication == "float32" and is_16_bit:
        buffers += bucket * FLOAT32  # the bucket again, as it is sent
    if zero == 3:
        buffers += min(ZERO3_ELEMENTS, shape.parameters) * shape.dtype_bytes
        buffers += min(ZERO3_ELEMENTS, shape.trained / ranks) * copies
    keeps_weights, keeps_optimizer = not sharding.offload_parameters, not sharding.offload_optimizer
    return {
        "weights": weights * keeps_weights,
        "reference": weights * has_reference * keeps_weights,
        "gradients": gradients * keeps_optimizer,
        "optimizer": optimizer * keeps_optimizer,
        "buffers": buffers,
        "host": optimizer * (not keeps_optimizer) + weights * (1 + has_reference) * (not keeps_weights),
    }


def step_bytes(shape: Shape, sharding: Sharding) -> float:
    """Bytes of the temporary tensors of PyTorch's AdamW on a GPU, when no activations are alive."""
    if sharding.offload_optimizer:
        return 0.0
    if not sharding.zero_stage:
        return STEP_COPIES * shape.trained * shape.trained_bytes
    return STEP_COPIES * FLOAT32 * min(ZERO3_ELEMENTS, shape.trained / sharding.ranks)


def forward_flops(shape: Shape, tokens: float, length: float, image_tokens: float) -> float:
    """Operations of a forward pass over `tokens` tokens in sequences of `length`, with causal attention."""
    language = shape.active_fraction * (shape.parameters - shape.vision_parameters - shape.looked_up)
    attention = 2 * shape.layers * shape.query_width * length  # half of the full matrix, twice: scores and values
    return tokens * (2 * language + attention) + 2 * shape.vision_parameters * image_tokens * shape.merge**2
