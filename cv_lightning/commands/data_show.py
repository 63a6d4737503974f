"""`cv-lightning data show FILE`: one conversation as the model reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.command_line import run_verb
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.early import local_folder_error
from cv_lightning.ranges import NonNegativeInt, PositiveInt, check_ranges
from cv_lightning.tools import DEFAULT_TOOLS
from cv_lightning.types import DataError, Task

if TYPE_CHECKING:
    from PIL import Image

    from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
    from cv_lightning.data.conversations import Conversation

DIGITS = "digits"
TRAINED, CONTEXT, IMAGE = "bold green", "default", "magenta"


@dataclass(frozen=True, kw_only=True)
class ShowData:
    """Print one conversation with its tokens, loss mask and images.

    Tokens that are trained on are green, or between `{+` and `+}` where there are no colours. RL rows have only a
    prompt. Exit code 0: shown; 2: error.
    """

    file: str
    """.json or .jsonl of conversations (SFT), .parquet of tasks (RL), or `digits` for an embedded demonstration."""
    processor: str
    """Model folder with tokenizer and image processor."""
    row: NonNegativeInt = 0
    """Index of the row or scene, from 0."""
    tokens: bool = False
    """List the tokens one by one: position, id, text, whether it is trained on."""
    tool: bool = True
    """Show the prompt of RL rows with the tool, or the one without."""
    min_pixels: PositiveInt | None = None
    """Smallest image that the model sees, as in policy.min_pixels; null: as the processor says."""
    max_pixels: PositiveInt | None = None
    """Largest image that the model sees, as in policy.max_pixels; null: as the processor says."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Texts of the prompt, as in rollout.agent.prompt."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Settings for reading files, as in data.reader."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """Settings of the scenes."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if wrong := local_folder_error(self.processor):
            raise ValueError(f"--processor {self.processor}: {wrong}")


class TokenSpan(NamedTuple):
    """Consecutive tokens that are shown together."""

    text: str
    """Text; a placeholder for an image."""
    num_tokens: int
    trained: bool
    is_image: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownDialogue:
    """A tokenised row."""

    title: str
    dialogue: Dialogue
    originals: Sequence[Image.Image]
    """The images at their original size, in order."""


def load(config: ShowData) -> ShownDialogue:
    """Read and tokenise the row.

    Raises:
        DataError: The file or row does not exist, or cannot be used.
        CheckpointError: The model folder does not exist.
    """
    from cv_lightning.agent.dialogue import DialogueEncoder
    from cv_lightning.data.readers import TaskFiles
    from cv_lightning.data.sft_json import ConversationFiles
    from cv_lightning.models.loading import PolicyConfig, load_adapter

    policy = PolicyConfig(path=config.processor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    encoder = DialogueEncoder(load_adapter(policy))
    if config.file == DIGITS:
        return _conversation(_demonstration(config), encoder, config)
    suffix = Path(config.file).suffix
    if suffix not in (".json", ".jsonl", ".parquet"):
        raise DataError(f"{config.file}: a .json, .jsonl or .parquet file is wanted, or {DIGITS}")
    is_task = suffix == ".parquet"
    rows = TaskFiles([config.file], config.reader) if is_task else ConversationFiles([config.file], config.reader)
    if config.row >= rows.num_rows:
        raise DataError(f"--row {config.row}: {config.file} has {rows.num_rows} rows, counted from 0")
    try:
        row = rows.read(config.row)
    except RowError as error:
        raise DataError(f"{config.file}, row {config.row} is skipped in training: {error}") from error
    return _task(row, encoder, config) if isinstance(row, Task) else _conversation(row, encoder, config)


def _demonstration(config: ShowData) -> Conversation:
    from cv_lightning.digits.demonstrations import DemonstrationConfig
    from cv_lightning.digits.sources import DigitDemonstrations
    from cv_lightning.sandbox import Sandbox, SandboxConfig

    with Sandbox(SandboxConfig()) as sandbox:
        source = DigitDemonstrations(config.digits, DemonstrationConfig(tool_share=1.0), sandbox.run_sync)
        return source.batch(config.row, 1)[0]


def _task(task: Task, encoder: DialogueEncoder, config: ShowData) -> ShownDialogue:
    images = [encoder.model_image(image) for image in task.images]
    title = f"task {task.id}, answer {task.ground_truth!r}"
    dialogue = encoder.start(task, images, config.prompt, DEFAULT_TOOLS if config.tool else ())
    return ShownDialogue(title=title, dialogue=dialogue, originals=task.images)


def _conversation(conversation: Conversation, encoder: DialogueEncoder, config: ShowData) -> ShownDialogue:
    from cv_lightning.modules.sft import encode_conversation

    made = [image for turn in conversation.turns for image in turn.images]
    return ShownDialogue(
        title=f"conversation {conversation.task.id}, {len(conversation.turns)} turns",
        dialogue=encode_conversation(encoder, conversation, config.prompt),
        originals=[*conversation.task.images, *made],
    )


def pieces(dialogue: Dialogue) -> Iterator[TokenSpan]:
    """Split a dialogue into spans of the same mask; each image is a span of its own."""
    encoder = dialogue.encoder
    pad, number = encoder.image_pad_id, 0

    def kind(at: int) -> tuple[bool, bool]:
        return dialogue.token_ids[at] == pad, dialogue.loss_mask[at]

    for (is_image, trained), run in groupby(range(len(dialogue.token_ids)), key=kind):
        ids = [dialogue.token_ids[at] for at in run]
        if not is_image:
            text = str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            yield TokenSpan(text, len(ids), trained, False)
            continue
        yield TokenSpan(f"[image {number}: {len(ids)} tokens]", len(ids), trained, True)
        number += 1


def print_shown(shown: ShownDialogue, console: Console) -> None:
    """Print title, images and the whole text."""
    dialogue = shown.dialogue
    console.print(shown.title, style="bold", highlight=False)
    length, trained = len(dialogue.token_ids), sum(dialogue.loss_mask)
    table = Table("image", "size", "the model sees", "tokens")
    for number, (original, seen) in enumerate(zip(shown.originals, dialogue.images, strict=True)):
        sizes = (f"{image.width}x{image.height}" for image in (original, seen))
        table.add_row(str(number), *sizes, str(dialogue.encoder.num_image_tokens(seen.size)))
    console.print(table)
    console.print(f"{length} tokens, {trained} of them trained on", highlight=False)
    console.print()
    text = Text()
    for piece in pieces(dialogue):
        style = IMAGE if piece.is_image else TRAINED if piece.trained else CONTEXT
        marked = piece.trained and not console.color_system
        text.append("{+" + piece.text + "+}" if marked else piece.text, style=style)
    console.print(text, soft_wrap=True)


def print_tokens(dialogue: Dialogue, console: Console) -> None:
    """Print one line per token; the tokens of an image are one line."""
    table = Table("position", "id", "text", "trained")
    position = 0
    for piece in pieces(dialogue):
        ids = dialogue.token_ids[position : position + piece.num_tokens]
        if piece.is_image:
            table.add_row(f"{position}-{position + len(ids) - 1}", str(ids[0]), piece.text, "")
        else:
            for offset, token in enumerate(ids):
                text = repr(dialogue.encoder.tokenizer.decode([token], skip_special_tokens=False))
                style = TRAINED if piece.trained else None
                table.add_row(
                    str(position + offset), str(token), Text(text), "yes" if piece.trained else "", style=style
                )
        position += piece.num_tokens
    console.print(table)


def show(config: ShowData) -> None:
    """Print a row."""
    shown, console = load(config), Console()
    print_shown(shown, console)
    if config.tokens:
        print_tokens(shown.dialogue, console)


main = partial(run_verb, ShowData, name="data show", run=show)
