"""ModelAdapter: everything that is specific to one family of vision-language models."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from cv_lightning.images import ImageRule
from cv_lightning.models.adapters.sizes import TinySizes
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


LOGIT_BAN = -100.0
"""Added to the logits of banned ids, before temperature, by engines and trainer alike."""
LOGIT_CHUNK = 1024
"""Positions whose logits the trainer has in memory at once (`models.logprobs.packed_logprobs`)."""
Part = Literal["vision", "projector", "language", "experts"]
"""Part of the model: vision tower, its projection into the language model, language model, or experts of it."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs:
    """Model inputs of one image; compared by identity."""

    tensors: Mapping[str, torch.Tensor]
    """Arguments of the model's forward by name; those of several images are joined along the first dimension."""
    grid: tuple[int, int]
    """Rows and columns of the image's tokens."""

    @property
    def num_tokens(self) -> int:
        """Number of image tokens in the sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(slots=True, kw_only=True)
class PackedInputs:
    """Model inputs of a packed batch of `T` tokens."""

    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[1 + n, 1, T] Text positions, then the adapter's own. Text positions restart at 0 for every sequence; a sequence
    that shares the first n tokens of the one before it restarts at n."""
    images: tuple[ImageInputs, ...]
    """The distinct images, in main memory and shared by all batches of an iteration. Only the batch that is computed
    has a copy on its device, see `image_tensors`."""
    image_index: torch.Tensor | None
    """[images] Index of the distinct image that each image of the sequences is."""

    def image_tensors(self) -> dict[str, torch.Tensor]:
        """Inputs of all distinct images by name, copied to the batch's device at every call."""
        return {name: tensor.to(self.input_ids.device) for name, tensor in joined(self.images).items()}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Numbers of an architecture that memory and time depend on, besides its parameters."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Number of heads times their width."""
    key_width: int
    """Number of key-value heads times their width."""
    head_norm: bool
    """Queries and keys are normalised per head."""
    vocabulary: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_gated: bool
    """The vision blocks have RMS norms and a gated MLP, instead of layer norms and two matrices."""
    mergers: int
    """Number of projections from the vision tower into the language model."""
    patch: int
    """Side of a patch in pixels."""
    merge: int
    """Side of the square of patches that becomes one token."""
    active_fraction: float = 1.0
    """Fraction of the language model's parameters that compute a token; below 1 with experts."""


class ModelAdapter(ABC):
    """Everything the package knows about a family of models. Nothing outside this folder names a family.

    The checkpoint's `model_type` selects the adapter unless `policy.adapter` names another class. Attributes that need
    the checkpoint's processor exist once `bind` was called; the rest works without.
    """

    title: ClassVar[str] = ""
    """Name of the family for people."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """Values of `model_type` in config.json that select this family."""
    processor_class: ClassVar[str] = ""
    """Name of the processor's class, which selects the family of a folder without config.json."""

    # ------------------------------------------------------------------ special tokens and dialect
    end_of_turn: ClassVar[str]
    """Token that ends every message."""
    padding: ClassVar[str]
    image_token: ClassVar[str]
    """Token for an image: once in the text, once per image feature in the model's input."""
    vision_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that only images may add to a sequence; banned in sampling and in log-probabilities."""
    dialect: ClassVar[str] = "hermes"
    """How the family writes tool calls: a name of `dialects.DIALECTS`, or the import path of a `Dialect`."""

    # ------------------------------------------------------------------ parameters
    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers of the language model that get low-rank adapters by default."""
    lora_scope: ClassVar[str] = r".*\.language_model\..*\."
    """Regular expression of the part of a layer's name before its target."""

    # ------------------------------------------------------------------ kernels and engines
    liger_function: ClassVar[str] = ""
    """Function of `liger_kernel.transformers` that replaces operations of this family; empty: there is none."""
    liger_parts: ClassVar[Mapping[str, bool]] = {}
    """Its arguments: which of its parts run in this family."""
    unsaved_engine_buffers: ClassVar[tuple[str, ...]] = ()
    """Attributes of vLLM's model that are lists of zeroed tensors between steps; sleep mode drops them unsaved."""

    # ------------------------------------------------------------------ set by `bind`
    processor: ProcessorMixin
    image_rule: ImageRule
    """Size at which the model sees an image, and its number of tokens."""
    end_id: int
    """Id of `end_of_turn`."""
    image_id: int
    """Id of `image_token`."""
    vision_ids: tuple[int, ...]
    """Ids of the `vision_tokens` that the tokenizer has."""

    def bind(self, processor: ProcessorMixin) -> Self:
        """A copy of the adapter for the checkpoint of this processor.

        Raises:
            CheckpointError: The tokenizer lacks the family's special tokens.
        """
        bound = copy.copy(self)
        bound.processor = processor
        vocabulary = processor.tokenizer.get_vocab()
        missing = [token for token in (self.end_of_turn, self.image_token) if token not in vocabulary]
        if missing:
            raise CheckpointError(
                f"{processor.tokenizer.name_or_path}: the tokenizer has no {', '.join(missing)}; "
                f"not a model that {type(self).__name__} is for?"
            )
        bound.end_id, bound.image_id = vocabulary[self.end_of_turn], vocabulary[self.image_token]
        bound.vision_ids = tuple(vocabulary[token] for token in self.vision_tokens if token in vocabulary)
        bound.image_rule = bound.make_image_rule()
        return bound

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        found: PreTrainedTokenizerBase = self.processor.tokenizer
        return found

    def banned_ids(self, call_token: str = "") -> tuple[int, ...]:
        """Ids that must not be sampled.

        Args:
            call_token: Begins a tool call; also banned if it is a single token. Empty where a tool is offered.
        """
        call = self.tokenizer.get_vocab().get(call_token)
        return self.vision_ids if call is None else (*self.vision_ids, call)

    # ------------------------------------------------------------------ chat
    @abstractmethod
    def chat_template(self) -> str:
        """Jinja text of the chat template. It is append-only, and its generation prompt opens no thought."""

    @abstractmethod
    def messages_of(self, prompt: str) -> list[tuple[str, list[str]]]:
        """The inverse of the chat template.

        Args:
            prompt: Text of a prompt that the template has made, including its generation prompt.

        Returns:
            Role of each message, and its texts before, between and after its images.

        Raises:
            EngineError: The template has not made the text.
        """

    # ------------------------------------------------------------------ images
    @abstractmethod
    def make_image_rule(self) -> ImageRule:
        """The processor's rule for the size of images."""

    @abstractmethod
    def process_images(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Model inputs of images, by one call of the model's own processor.

        Args:
            images: At least one, resized by `image_rule`, so that the processor does not resize them.
        """

    def engine_arguments(self, max_images: int) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for requests of at most `max_images` images."""
        return {"limit_mm_per_prompt": {"image": max_images, "video": 0}}

    # ------------------------------------------------------------------ sequences
    def shares_prefix(self, config: PretrainedConfig) -> bool:
        """True if sequences of a packed batch may share a computed prefix, as our attention allows."""
        from cv_lightning.models.attention import NAME

        return getattr(config, "_attn_implementation", None) == NAME

    @abstractmethod
    def positions(self, is_image: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
        """Positions of one sequence.

        Args:
            is_image: [tokens] True at image tokens.
            images: Images in the order of their tokens.

        Returns:
            int64 [1 + n, tokens]: text positions, which count the tokens from 0, and n kinds of the model's own.

        Raises:
            DataError: An image's tokens are interrupted by text.
        """

    @abstractmethod
    def packed_hidden(self, model: PreTrainedModel, inputs: PackedInputs) -> torch.Tensor:
        """Last hidden states of a packed batch, [1, T, hidden]; each distinct image is encoded once.

        Args:
            model: The policy.
            inputs: The packed batch, on the model's device.
        """

    @abstractmethod
    def plain_inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, images: Sequence[ImageInputs]
    ) -> dict[str, torch.Tensor]:
        """Inputs of transformers' own forward and `generate` for a padded batch.

        Args:
            ids: [sequences, tokens] Token ids with expanded images.
            mask: [sequences, tokens] 1 at tokens, 0 at padding.
            images: Images of all sequences, in order.

        Returns:
            Tensors by argument name, on the device of `ids`.
        """

    # ------------------------------------------------------------------ parameters
    @abstractmethod
    def part_of(self, name: str) -> Part:
        """Part of the model that a parameter of this name belongs to."""

    def engine_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's tensors, (name, whole tensor), with the names and shapes that engines load."""
        yield from named_tensors

    @abstractmethod
    def architecture(self, config: PretrainedConfig) -> Architecture:
        """The numbers that `plan` reads."""

    # ------------------------------------------------------------------ tiny checkpoints
    tiny_patch_size: ClassVar[int]
    """Side of a patch in pixels, as in the published checkpoints."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """Further special tokens of a tiny checkpoint's tokenizer."""

    @abstractmethod
    def check_tiny(self, sizes: TinySizes) -> None:
        """Refuse sizes that the family does not support.

        Raises:
            ValueError: The message names the flag.
        """

    @abstractmethod
    def tiny_processor(
        self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ) -> ProcessorMixin:
        """The processor of a tiny checkpoint; its tokenizer gets the attributes that the processor reads."""

    @abstractmethod
    def tiny_model(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """A random-weight model of the real architecture; it draws from torch's global generator."""


def joined(images: Sequence[ImageInputs]) -> dict[str, torch.Tensor]:
    """Tensors of several images, concatenated along the first dimension; empty without images."""
    import torch

    names = images[0].tensors if images else ()
    return {name: torch.cat([image.tensors[name] for image in images]) for name in names}
