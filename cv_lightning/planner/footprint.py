"""What training and sampling take: memory from shapes, seconds from floating-point operations and bandwidth.

Formulas count what PyTorch keeps (activations: what autograd saves of one packed row; tests compare them with that).
Times are estimates: of a good implementation at a stated share of the hardware's peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cv_lightning.models.adapters import Architecture, ModelAdapter, adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAM_MOMENTS, FLOAT32 = 2, 4
LOGIT_COPIES = 3
"""Float32 copies of a chunk's logits that are alive at once: the logits, their gradient, and the softmax between."""
LOGIT_CHUNK = 1024
"""Positions whose logits are in memory at once (`model.logprobs`)."""
GATHERED_ELEMENTS = 1_000_000_000
"""Elements of whole parameters that ZeRO-3 holds at most for the layers it is about to run: DeepSpeed's default."""
STEP_ELEMENTS = 1_000_000_000
"""Elements whose gradients ZeRO-3 has in float32 at once while it steps: DeepSpeed's default."""


@dataclass(frozen=True, kw_only=True)
class Shape(Architecture):
    """A model in numbers."""

    parameters: int
    """Of the whole model, adapters included."""
    trained: int
    trained_bytes: int
    """Of one trained parameter."""
    dtype_bytes: int
    """Of one parameter or activation."""
    vision_parameters: int
    vision_trained: bool
    """True: autograd saves the vision tower's activations."""
    looked_up: int
    """Parameters of the word embeddings where they are no output head as well: no product is taken with them."""

    @property
    def key_value_bytes(self) -> int:
        """Key-value cache of one token."""
        return 2 * self.layers * self.key_width * self.dtype_bytes

    @property
    def patches_per_token(self) -> int:
        """Of an image token."""
        return self.merge**2


def shape_of(model: PreTrainedModel, adapter: ModelAdapter | None = None) -> Shape:
    """Count a model, which may be on the meta device; what requires no gradient is not trained.

    Args:
        model: The policy.
        adapter: Of its family; None: found by its model type.
    """
    adapter = adapter or adapter_for(model.config.model_type)
    architecture = adapter.architecture(model.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tower = [p for name, p in model.named_parameters() if adapter.part_of(name) in ("vision", "projector")]
    embeddings = next(iter(model.get_input_embeddings().parameters()))
    return Shape(
        **vars(architecture),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        trained_bytes=max((parameter.element_size() for parameter in trained), default=0),
        dtype_bytes=embeddings.element_size(),
        vision_parameters=sum(parameter.numel() for parameter in tower),
        vision_trained=any(parameter.requires_grad for parameter in tower),
        looked_up=0 if model.config.tie_word_embeddings else architecture.vocabulary * architecture.hidden,
    )


# ------------------------------------------------------------------------------------------------ activations
def norm_bytes(width: int, dtype_bytes: int) -> int:
    """Saved by an RMS norm of one token: its input in float32, the normalised input, and the result."""
    return width * (FLOAT32 + 2 * dtype_bytes)


def layer_bytes(shape: Shape) -> int:
    """Saved for the backward pass by one layer of the language model, per token."""
    b, queries, keys = shape.dtype_bytes, shape.query_width, shape.key_width
    norms = 2 * norm_bytes(shape.hidden, b)
    head_norms = (queries + keys) * (FLOAT32 + b) if shape.head_norm else 0
    attention = b * (queries + 2 * keys) + 2 * b * queries  # queries, keys, values; result as heads and as rows
    gated = 4 * b * shape.intermediate  # gate, its activation, the other factor, their product
    return norms + head_norms + attention + gated


def vision_block_bytes(shape: Shape) -> int:
    """Saved for the backward pass by one block of the vision tower, per patch."""
    b, width = shape.dtype_bytes, shape.vision_hidden
    norms = 2 * (norm_bytes(width, b) if shape.vision_gated else 2 * b * width)
    mlp = (4 if shape.vision_gated else 2) * b * shape.vision_intermediate
    return norms + 6 * b * width + mlp  # queries, keys and values, two of them turned; the result in both its forms


def activation_bytes(shape: Shape, tokens: int, image_tokens: int, checkpointing: bool) -> float:
    """Of one packed row, at the peak.

    Args:
        shape: of the model.
        tokens: of the row.
        image_tokens: those of them that are images'.
        checkpointing: only the inputs of layers are kept, and one layer at a time is run again.
    """
    b, patches = shape.dtype_bytes, image_tokens * shape.patches_per_token
    layer, block = tokens * layer_bytes(shape), patches * vision_block_bytes(shape)
    depth = shape.vision_depth if shape.vision_trained else 0
    merged = shape.mergers * 5 * b * shape.vision_hidden * patches * shape.vision_trained
    if checkpointing:
        kept = b * (shape.layers * tokens * shape.hidden + depth * patches * shape.vision_hidden)
        kept += max(layer, block if depth else 0)
    else:
        kept = shape.layers * layer + depth * block
    ends = tokens * (norm_bytes(shape.hidden, b) + b * shape.hidden)  # embeddings, last norm
    return kept + merged + ends + logit_bytes(shape, tokens)


def logit_bytes(shape: Shape, tokens: int) -> float:
    """Of the loss: logits exist for one chunk at a time."""
    return min(tokens, LOGIT_CHUNK) * shape.vocabulary * (shape.dtype_bytes + LOGIT_COPIES * FLOAT32)


# ------------------------------------------------------------------------------------------------ states
@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How many ranks share what."""

    ranks: int = 1
    zero_stage: Literal[0, 2, 3] = 0
    """0: every rank has everything; 2: gradients and optimizer states are shared out, 3: parameters, too."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_elements: int = 200_000_000
    """Gradient elements that are reduced at once, two buckets of them."""
    gradient_accumulation: Literal["float32", "policy"] = "float32"
    """Type of the sum over micro-batches under ZeRO; elsewhere it is the parameters'."""
    gradient_communication: Literal["policy", "float32"] = "policy"


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on one GPU that last through training, and what its share takes in the host's memory."""

    weights: float
    reference: float
    gradients: float
    optimizer: float
    """Moments, and float32 copies of 16-bit weights under DeepSpeed."""
    buffers: float
    """ZeRO's: whole parameters for the layers that run, buckets, float32 gradients while it steps."""
    host: float


def states(shape: Shape, sharding: Sharding, has_reference: bool) -> States:
    """What training holds.

    Args:
        shape: of the policy.
        sharding: over ranks.
        has_reference: a frozen copy of the policy is loaded beside it.
    """
    whole = shape.parameters * shape.dtype_bytes
    zero, ranks = sharding.zero_stage, sharding.ranks
    share = ranks if zero else 1
    weights = whole / (ranks if zero == 3 else 1)
    copies = FLOAT32 if zero and shape.trained_bytes < FLOAT32 else 0
    element = FLOAT32 if zero else shape.trained_bytes
    optimizer = shape.trained * (ADAM_MOMENTS * element + copies) / share
    in_float32 = zero and sharding.gradient_accumulation == "float32"
    gradients = shape.trained * (FLOAT32 if in_float32 else shape.trained_bytes) / share
    buffers = 0.0
    if zero:
        bucket = min(sharding.bucket_elements, shape.trained)
        buffers += 2 * bucket * shape.trained_bytes
        if sharding.gradient_communication == "float32" and shape.trained_bytes < FLOAT32:
            buffers += bucket * FLOAT32  # the bucket again, as it is sent
    if zero == 3:
        buffers += min(GATHERED_ELEMENTS, shape.parameters) * shape.dtype_bytes
        buffers += min(STEP_ELEMENTS, shape.trained / ranks) * copies
    host = (optimizer if sharding.offload_optimizer else 0) + (weights if sharding.offload_parameters else 0)
    return States(
        weights=0.0 if sharding.offload_parameters else weights,
        reference=0.0 if sharding.offload_parameters else weights * has_reference,
        gradients=0.0 if sharding.offload_optimizer else gradients,
        optimizer=0.0 if sharding.offload_optimizer else optimizer,
        buffers=buffers,
        host=host + weights * has_reference * sharding.offload_parameters,
    )


# ------------------------------------------------------------------------------------------------ time
def forward_flops(shape: Shape, tokens: float, length: float, image_tokens: float) -> float:
    """Of `tokens` tokens in sequences of `length`, images included: two a parameter, and causal attention."""
    language = shape.active_fraction * (shape.parameters - shape.vision_parameters - shape.looked_up)
    attention = 2 * shape.layers * shape.query_width * length  # half of the full matrix, twice: scores and values
    return tokens * (2 * language + attention) + 2 * shape.vision_parameters * image_tokens * shape.patches_per_token


def training_flops(shape: Shape, forward: float, checkpointing: bool) -> float:
    """Of forward and backward: three forwards, with recomputation four; adapters save the weights' gradients."""
    backward = 2.0 if shape.trained > shape.parameters / 2 else 1.0
    return forward * (1 + backward + checkpointing)
