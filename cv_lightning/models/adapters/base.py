"""ModelAdapter: everything that is particular to a family of vision-language models, in one class."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
Part = Literal["vision", "projector", "language", "experts"]
"""What a parameter belongs to: vision tower, its projection into the language model, language model, or its experts."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs:
    """One image as the model takes it; compared by identity."""

    tensors: Mapping[str, torch.Tensor]
    """By the name that the model's forward gives them; images are joined along the first dimension."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""

    @property
    def num_tokens(self) -> int:
        """Image tokens in the sequence."""
        return self.grid[0] * self.grid[1]


@dataclass(slots=True, kw_only=True)
class PackedInputs:
    """What the model reads of one packed row of `T` tokens."""

    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[rows, 1, T]: text positions, then those of the adapter. Text positions restart at 0 for every sequence; one that
    shares the first n tokens of the sequence before it restarts at n."""
    images: tuple[ImageInputs, ...]
    """The distinct images, in main memory: all rows of an iteration share them with the cache that made them, and only
    the row that is computed has a copy, see `image_tensors`"""
    image_index: torch.Tensor | None
    """[images]: which of the distinct images each shown image is"""

    def image_tensors(self) -> dict[str, torch.Tensor]:
        """Inputs of all distinct images by name, on the batch's device; made again at every call."""
        return {name: tensor.to(self.input_ids.device) for name, tensor in joined(self.images).items()}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers of an architecture that memory and time depend on, besides its parameters."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Heads times their width."""
    key_width: int
    """Key-value heads times their width."""
    head_norm: bool
    """Queries and keys are normalised by head."""
    vocabulary: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_gated: bool
    """The vision tower's blocks have RMS norms and a gated MLP, not layer norms and two matrices."""
    mergers: int
    """Projections from the vision tower into the language model."""
    merge: int
    """Patches a side that become one token."""
    active_fraction: float = 1.0
    """Fraction of the language model's parameters that compute a token; below 1 with experts."""


class ModelAdapter(ABC):
    """What the package has to know about a family of models. Nothing outside this folder names a family.

    `policy.adapter` takes the class path of another one; by default the checkpoint's `model_type` decides. Attributes
    that need the checkpoint's processor are there once `bind` was called; the rest works without.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """Values of `model_type` in config.json that mean this family."""
    processor_class: ClassVar[str] = ""
    """Class of its processor, which tells the family of a folder without config.json."""

    # ------------------------------------------------------------------ special tokens and dialect
    end_of_turn: ClassVar[str]
    """Ends every message."""
    padding: ClassVar[str]
    image_token: ClassVar[str]
    """Stands once for an image in the text, and once for each of its features in what the model computes."""
    vision_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that only images may put into a sequence; banned in sampling and in log-probabilities."""
    tool_call_token: ClassVar[str] = "<tool_call>"
    """Begins a tool call where it is a token of its own; banned where there is no tool."""

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
    """Linear layers of the language model that adapters are put into by default."""
    lora_scope: ClassVar[str] = r".*\.language_model\..*\."
    """Regular expression of what stands before a target's name."""

    # ------------------------------------------------------------------ kernels and engines
    liger_function: ClassVar[str] = ""
    """The function of `liger_kernel.transformers` that replaces operations of this family; empty: there is none."""
    liger_parts: ClassVar[Mapping[str, bool]] = {}
    """Arguments of it: which of its parts run in this family."""
    unsaved_engine_buffers: ClassVar[tuple[str, ...]] = ()
    """Attributes of vLLM's model, lists of tensors that hold zeros between steps, which sleeping drops unsaved."""

    # ------------------------------------------------------------------ set by `bind`
    processor: ProcessorMixin
    image_rule: ImageRule
    """How large the model sees an image, and how many tokens that takes."""
    end_id: int
    """Id of `end_of_turn`."""
    image_id: int
    """Id of `image_token`."""
    vision_ids: tuple[int, ...]
    """Ids of those `vision_tokens` that the tokenizer has."""

    def bind(self, processor: ProcessorMixin) -> Self:
        """A copy for the checkpoint whose processor this is.

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
        """The processor's."""
        found: PreTrainedTokenizerBase = self.processor.tokenizer
        return found

    def banned_ids(self, tool: bool) -> tuple[int, ...]:
        """Ids that must not be sampled.

        Args:
            tool: Whether the tool is offered; where it is not, no call can begin.
        """
        call = None if tool else self.tokenizer.get_vocab().get(self.tool_call_token)
        return self.vision_ids if call is None else (*self.vision_ids, call)

    # ------------------------------------------------------------------ chat
    @abstractmethod
    def chat_template(self) -> str:
        """Jinja text of the chat template: append-only, and its generation prompt opens nothing."""

    @abstractmethod
    def messages_of(self, prompt: str) -> list[tuple[str, list[str]]]:
        """The template's inverse.

        Args:
            prompt: Text of a prompt that the template has made, its generation prompt included.

        Returns:
            (role, text before, between and after its images) of each message.

        Raises:
            EngineError: It is no such text.
        """

    # ------------------------------------------------------------------ images
    @abstractmethod
    def make_image_rule(self) -> ImageRule:
        """The processor's rule for the size of images."""

    @abstractmethod
    def process_images(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Images as the model takes them, by one call of its own processor.

        Args:
            images: As `image_rule` sizes them, so that the processor's resize does nothing; at least one.
        """

    def engine_arguments(self, max_images: int) -> dict[str, Any]:
        """Arguments of `vllm.LLM` about images.

        Args:
            max_images: Most images in one request.
        """
        return {"limit_mm_per_prompt": {"image": max_images, "video": 0}}

    # ------------------------------------------------------------------ sequences
    def shares_prefix(self, config: PretrainedConfig) -> bool:
        """True if sequences of a packed row may share a computed beginning: with our attention."""
        from cv_lightning.models.attention import NAME

        return getattr(config, "_attn_implementation", None) == NAME

    @abstractmethod
    def positions(self, is_image: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
        """Positions of one sequence.

        Args:
            is_image: [tokens]: True at image tokens.
            images: In the order of their tokens.

        Returns:
            [rows, tokens], long. The first row counts the tokens from 0; further ones are the model's own.

        Raises:
            DataError: An image's tokens are interrupted by text.
        """

    @abstractmethod
    def packed_hidden(self, model: PreTrainedModel, inputs: PackedInputs) -> torch.Tensor:
        """Last hidden states of a packed row, [1, T, hidden]. An image that several sequences show is encoded once.

        Args:
            model: The policy.
            inputs: On the model's device.
        """

    @abstractmethod
    def plain_inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, images: Sequence[ImageInputs]
    ) -> dict[str, torch.Tensor]:
        """Inputs of transformers' own forward and `generate` for a padded batch.

        Args:
            ids: [sequences, tokens], images expanded.
            mask: [sequences, tokens]: 1 at tokens, 0 at padding.
            images: Of all sequences, in their order.

        Returns:
            Tensors on the device of `ids`.
        """

    # ------------------------------------------------------------------ parameters
    @abstractmethod
    def part_of(self, name: str) -> Part:
        """What a parameter of this name in the model belongs to."""

    def engine_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's tensors under the names and in the shapes that engines load. The input is exhausted.

        Args:
            named_tensors: (name in the model, whole tensor), one after the other.
        """
        yield from named_tensors

    @abstractmethod
    def architecture(self, config: PretrainedConfig) -> Architecture:
        """The numbers that a plan is made from."""

    # ------------------------------------------------------------------ tiny checkpoints
    tiny_patch_size: ClassVar[int]
    """Side in pixels of a patch of a tiny checkpoint, as in the published ones."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """Further special tokens of a tiny checkpoint's tokenizer."""

    @abstractmethod
    def check_tiny(self, sizes: TinySizes) -> None:
        """Refuse sizes that the family cannot have.

        Raises:
            ValueError: Names the flag.
        """

    def name_tiny_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give a tiny checkpoint's tokenizer the attributes that the family's processor reads."""
        tokenizer.image_token = self.image_token

    @abstractmethod
    def tiny_processor(
        self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ) -> ProcessorMixin:
        """The processor of a tiny checkpoint."""

    @abstractmethod
    def tiny_model(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """A random-weight model of the real architecture, drawn from torch's global generator."""


def read_template(file: Path) -> str:
    """Text of a chat template beside an adapter."""
    return file.read_text(encoding="utf-8").rstrip("\n")


def joined(images: Sequence[ImageInputs]) -> dict[str, torch.Tensor]:
    """Tensors of several images, one after the other along the first dimension; empty without images."""
    import torch

    names = images[0].tensors if images else ()
    return {name: torch.cat([image.tensors[name] for image in images]) for name in names}
