"""The data model: values that flow from data to agent, reward, loss and disk.

A question is a `Task`; everything that happened while one rollout answered it is a `Trajectory`; the trajectories of
one task form a `Group`; the work of one RL iteration is an `Iteration`. `trajectory/codec.py` stores these classes and
reads them. Images are Pillow images; one that was read from a store decodes its pixels when they are needed.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from PIL import Image

SCHEMA_VERSION = 2
"""Version of the stored lines of trajectories; a reader refuses lines of a newer version."""

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2) in pixels, half-open, x to the right and y down."""


# ------------------------------------------------------------------------------------------------ errors
class CVLightningError(Exception):
    """Base of every error that the package raises on purpose; the message says what to change."""


class DataError(CVLightningError):
    """A row, file or column cannot be used; the message names the file, the row and the key."""


class ImageError(DataError):
    """Bytes cannot be decoded as an image, or the image is outside the limits."""


class CheckpointError(CVLightningError):
    """A model folder or checkpoint lacks a part."""


class EngineError(CVLightningError):
    """The inference engine failed or was used wrongly."""


class SandboxError(CVLightningError):
    """The sandbox itself failed. A failure of the model's code is a `ToolResult` instead."""


class EndpointError(CVLightningError):
    """A served model gave no answer."""


class JudgeError(CVLightningError):
    """The judge could not give a verdict."""


class MismatchError(CVLightningError):
    """Engine and trainer disagree about the log-probabilities of the same tokens."""


# ------------------------------------------------------------------------------------------------ geometry
class Affine(NamedTuple):
    """Affine map of pixel coordinates: (x, y) -> (a x + b y + c, d x + e y + f).

    Coordinates are continuous: the left edge of the image is 0 and the right edge its width.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float


IDENTITY = Affine(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------ task
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a prompt; every `<image>` mark in `content` stands for the next image."""

    role: str
    """system, user, assistant or tool"""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question with a checkable answer."""

    id: str
    """Unique within a data set and stable between runs."""
    question: str
    """The bare question, without image marks."""
    images: tuple[Image.Image, ...]
    """The images at their original resolution, RGB."""
    ground_truth: str
    data_source: str = "unknown"
    """Data set, or kind of task, by which metrics are split."""
    required_transforms: tuple[str, ...] = ()
    """What was done to the image (rotate_90, flip_vertical, ...), plus `crop` where a crop is needed."""
    box: Box | None = None
    """Ground-truth box in pixels of `images[0]` as given."""
    messages: tuple[Message, ...] = ()
    """Prompt of the data set; empty for the agent's own prompt around `question`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further JSON values, stored. Read are `accepted_answers`, alternative right answers, and `needs_text`."""
    recorded_digest: str = field(default="", compare=False)
    """The digest that a store recorded; empty for a task that was not read from one."""

    @property
    def digest(self) -> str:
        """Hash of the task without its id and images: the same where the same is asked and expected."""
        if self.recorded_digest:
            return self.recorded_digest
        messages = [[message.role, message.content] for message in self.messages]
        expected = [self.ground_truth, self.data_source, self.required_transforms, self.box, self.metadata]
        text = json.dumps([self.question, messages, expected], sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()

    @property
    def accepted(self) -> list[str]:
        """Answers of which any is right, the ground truth first."""
        return list(dict.fromkeys([self.ground_truth, *self.metadata.get("accepted_answers", ())]))

    @property
    def needs_tool(self) -> bool:
        """True if a call has to undo what was done to the image, or to print the answer (metadata `needs_text`)."""
        return bool(self.required_transforms or self.metadata.get("needs_text"))

    @property
    def kind(self) -> str:
        """Kind of task, by which metrics are split: `metadata["kind"]`, else the data source."""
        return str(self.metadata.get("kind", self.data_source))


# ------------------------------------------------------------------------------------------------ tool
@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call of the policy, whose arguments fit the tool's schema."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """JSON values by name; arguments that the policy left out have their default."""

    @property
    def code(self) -> str:
        """The snippet of a call to the code tool; empty for other tools."""
        return str(self.arguments.get("code", ""))

    @property
    def image_index(self) -> int:
        """Index of the trajectory's image that the call works on; 0 is the task's first image."""
        index = self.arguments.get("image_index", 0)
        return index if isinstance(index, int) else 0

    @property
    def description(self) -> str:
        """The policy's description of the call; empty without one."""
        return str(self.arguments.get("description", ""))

    @property
    def text(self) -> str:
        """The call as text: its snippet, or for other tools the name and the arguments."""
        return self.code or f"{self.name}({json.dumps(self.arguments, ensure_ascii=False)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One image operation that ran, with the arguments that it received."""

    name: str
    """Label from the reward's vocabulary: rotate_90, flip_horizontal, crop, resize, contrast_up, ..."""
    call: str
    """Function that was called, to be read: `PIL.Image.rotate`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Evaluated arguments as JSON values (arrays and images as their shape)."""
    input_size: tuple[int, int] | None = None
    """(width, height) before."""
    output_size: tuple[int, int] | None = None
    """(width, height) after."""
    used: bool = True
    """False if its result did not reach the image that was returned."""


ERASED = "trace_erased"
"""Name of the operation that stands for operations which the model's code removed from its trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Net geometric transform from input to result, derived from pixels rather than from the code."""

    to_input: Affine | None
    """Maps coordinates of the result to coordinates of the input; None if the pixels prove no such map."""
    core: tuple[str, ...] = ()
    """Core operations that describe the net effect, sorted: crop, rotate_*, flip_*."""
    crop_box: Box | None = None
    """Part of the input that is visible in the result, in input pixels; None for the whole frame."""
    fidelity: float = 1.0
    """How well strokes and edges survived, in [0, 1]: lowest correlation of a block with the input's true view."""
    shown: Box | None = None
    """Part of the result, in its pixels, inside a plain border that hides a part of the input; None for all of it."""
    turned: tuple[str, ...] = ()
    """Turns and flips that the pixels suggest without proving a map; they count as unneeded turns, never as credit."""


class ToolStatus(StrEnum):
    """How a tool call ended."""

    OK = "ok"
    """The call succeeded; the code tool's snippet made an image or a text."""
    ERROR = "error"
    """The call failed because of the policy: its snippet raised an error, or made neither an image nor a text."""
    TIMEOUT = "timeout"
    """The call was killed at its deadline."""
    KILLED = "killed"
    """The call's process died of a signal or exceeded a resource limit."""
    REJECTED = "refused"
    """The call did not run: too long, not text, bad image index, unknown tool. Stored as `refused`."""
    INFRASTRUCTURE_ERROR = "lost"
    """The tool's host failed, not the call; the trajectory is masked and not scored. Stored as `lost`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolImage:
    """An image that a tool call made."""

    image: Image.Image
    """Full resolution, RGB."""
    parent: int
    """Index of the trajectory's image that it was made from."""
    to_source: Affine | None
    """Maps its coordinates to those of the source image; None if it is not known to be an affine image of it."""


class ImageTrace(NamedTuple):
    """How one of several images of a call came about: its net effect, and the numbers of its operations."""

    effect: Effect | None
    used: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """Result of a tool call."""

    status: ToolStatus = ToolStatus.OK
    text: str = ""
    """Text for the model, beside the images or before the error; of the code tool: what the snippet printed."""
    images: tuple[ToolImage, ...] = ()
    """Images for the model; only where `status` is OK. They are stored as the trajectory's images."""
    error: str = ""
    """Short text for the model: exception, line of the snippet, hint. Empty when OK."""
    error_kind: str = ""
    """Typed reason for metrics: `NameError`, `too_large`, `memory`, ... Empty when OK."""
    operations: tuple[Operation, ...] = ()
    """Operations that ran, in order."""
    effect: Effect | None = None
    """Net geometric effect on the last image; None without an image, or if nothing is proven about it."""
    traces: tuple[ImageTrace, ...] = ()
    """Of a call that made several images: one each, in their order. Empty for fewer images."""
    executor: str = ""
    """How the code tool ran: `plan` (checked operations), `process` (model code in a child) or `cache`."""
    elapsed_s: float = 0.0
    """Running time in seconds, without queueing."""

    @property
    def effects(self) -> tuple[Effect | None, ...]:
        """The net effect on each image; one for a call that made one image or none."""
        return tuple(trace.effect for trace in self.traces) or (self.effect,)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult(ToolResult):
    """Result of one snippet run on one image."""

    image: Image.Image | None = None
    """The last image that the snippet made, RGB; None where it failed, or made a text only."""
    earlier: tuple[Image.Image, ...] = ()
    """Images that it showed before the last, in order, RGB."""

    @property
    def made(self) -> tuple[Image.Image, ...]:
        """All images that it made, in order."""
        return () if self.image is None else (*self.earlier, self.image)


# ------------------------------------------------------------------------------------------------ trajectory
class EndState(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"
    NO_ANSWER = "no_answer"
    """The policy stopped with neither a tool call nor an answer."""
    MAX_TURNS = "max_turns"
    OVER_LENGTH = "over_length"
    """A turn hit its token cap, or the response its own."""
    PARSE_ERRORS = "parse_errors"
    """More malformed tool calls than the agent forgives."""
    MAX_IMAGES = "max_images"
    TRUNCATED = "stopped"
    """The rollout's deadline or early stop ended it. It has no outcome, so it is not scored. Stored as `stopped`."""
    ERROR_TASK = "error:task"
    """The prompt cannot be built: image marks and images differ in number, or an image cannot be shown."""
    ERROR_ENGINE = "error:engine"
    ERROR_SANDBOX = "error:sandbox"
    ERROR_JUDGE = "error:judge"
    """It answered, and the judge did not reply. A trajectory without an answer keeps its end state, unscored."""

    @property
    def is_error(self) -> bool:
        """True without an outcome: infrastructure failed, or the rollout was truncated. Masked and not scored."""
        return self.value.startswith("error:") or self is EndState.TRUNCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryImage:
    """One image of a trajectory, as the sandbox uses it and as the model saw it."""

    original: Image.Image
    """Full resolution, RGB; the sandbox works on it."""
    model_image: Image.Image
    """Resized once for the model; engine and trainer use it as it is. A store keeps its size."""
    source: int = 0
    """Index of the task's image that it was derived from."""
    parent: int | None = None
    """Index of the image it was made from; None for the task's own."""
    to_source: Affine | None = IDENTITY
    """Maps its coordinates to those of the source image; None if it is not an affine image of it."""


@dataclass(slots=True, kw_only=True)
class Turn:
    """One assistant turn and the tool's response."""

    text: str
    """Decoded completion, special tokens included, without `<|im_end|>`."""
    num_tokens: int
    """Number of sampled tokens."""
    tool_call: ToolCall | None = None
    parse_error: str | None = None
    """Why a tool call could not be parsed, as the model was told."""
    result: ToolResult | None = None
    image_index: int | None = None
    """Index in `Trajectory.images` of the first image that this turn's call made; None if it made none."""
    num_images: int = 1
    """Number of images that it made, if it made any."""
    response_text: str = ""
    """Text of the tool response that the model read."""
    generate_s: float = 0.0
    tool_s: float = 0.0

    @property
    def image_indices(self) -> range:
        """Indices in `Trajectory.images` of the images that this turn's call made."""
        return range(0) if self.image_index is None else range(self.image_index, self.image_index + self.num_images)


@dataclass(slots=True, kw_only=True)
class RewardBreakdown:
    """The reward's components by name and their weighted sum."""

    components: dict[str, float]
    """Unweighted components: accuracy, format, mandatory, necessity, exact, emerge, usage, spurious, ..."""
    total: float
    correct: bool = False
    """Answer score above 0.5."""
    answer: str | None = None
    """The extracted answer."""
    scored_by: str = "rule"
    """`rule` or `judge`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSummary:
    """Statistics of the engine's log-probabilities over the sampled tokens."""

    mean: float
    min: float
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSummary:
    """Counts and log-probabilities of a trajectory's tokens, which are stored where the tokens are not."""

    num_tokens: int
    """Whole sequence: prompt, images expanded, tool responses."""
    num_sampled_tokens: int
    logprob: LogprobSummary | None
    """None if no token was sampled or the engine gave no log-probabilities."""


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """Everything that happened in one rollout, and the only thing training reads.

    `token_ids`, `loss_mask` and `logprobs` have the same length: the whole sequence, prompt included,
    every image expanded to as many `<|image_pad|>` as it has features. They are empty where a store left them out.
    """

    task: Task
    sample: int
    """Index within the group, from 0."""
    token_ids: list[int]
    loss_mask: list[bool]
    """True for tokens that the policy sampled."""
    logprobs: list[float]
    """The engine's log-probability of each sampled token; 0.0 where the mask is False."""
    num_prompt_tokens: int
    images: list[TrajectoryImage] = field(default_factory=list)
    """Images in the order of their marks in `token_ids`."""
    turns: list[Turn] = field(default_factory=list)
    end_state: EndState = EndState.NO_ANSWER
    error: str = ""
    """Why it ended: the failure, or the limit that was hit; empty otherwise."""
    policy_version: int = 0
    """Version of the policy's weights that sampled it."""
    dialect: str = "hermes"  # how its tool calls are written; see docs/tools.md
    reward: RewardBreakdown | None = None
    """None if unscored; the trajectory is then masked out of its group."""
    advantage: float | None = None
    total_s: float = 0.0
    token_summary: TokenSummary | None = field(default=None, compare=False)
    """Summary that a store recorded; None for a trajectory that was not read from one. See `tokens`."""
    partial_score: Any = field(default=None, compare=False, repr=False)
    """What the reward module knows before the trajectory's group is complete; not stored."""

    @property
    def tokens(self) -> TokenSummary:
        """Counts and log-probabilities of the tokens."""
        if self.token_summary is not None:
            return self.token_summary
        sampled = [value for value, kept in zip(self.logprobs, self.loss_mask, strict=True) if kept]
        total = math.fsum(sampled)
        return TokenSummary(
            num_tokens=len(self.token_ids),
            num_sampled_tokens=len(sampled) or sum(turn.num_tokens for turn in self.turns),  # of a served model
            logprob=LogprobSummary(mean=total / len(sampled), min=min(sampled), sum=total) if sampled else None,
        )

    @property
    def answer(self) -> str | None:
        """The extracted answer; None where there is none or the trajectory is unscored."""
        return self.reward.answer if self.reward else None

    @property
    def response_text(self) -> str:
        """All assistant turns joined, without tool responses."""
        return "".join(turn.text for turn in self.turns)

    @property
    def num_tool_calls(self) -> int:
        """Number of calls that a tool received, failed ones included."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def operations(self) -> list[Operation]:
        """All operations that ran, in order."""
        return [op for turn in self.turns if turn.result for op in turn.result.operations]

    @property
    def last_image_seen(self) -> TrajectoryImage:
        """The last image that the model saw, on which it gave its answer."""
        return self.images[-1]


@dataclass(slots=True, kw_only=True)
class Group:
    """The trajectories of one task; advantages are computed over it."""

    task: Task
    trajectories: list[Trajectory]
    iteration: int = 0
    """RL iteration in which it was rolled out, from 1 as in the metrics; 0 in evaluations."""


class Iteration:
    """One Lightning batch: the tasks of one RL iteration and, once rolled out, their groups.

    It is a plain class because Lightning copies dataclasses, lists and mappings on their way to the device, and what a
    callback attaches to them would be lost (docs/decisions.md, "batches are plain objects").

    Args:
        index: Number of the iteration, from 0.
        tasks: The tasks of this rank.
        num_groups: Number of groups with different rewards that this rank trains on, for dynamic sampling, where
            `tasks` has more than that. None: roll out every task and train on all groups.
    """

    def __init__(self, index: int, tasks: list[Task], num_groups: int | None = None) -> None:
        self.index = index
        self.tasks = tasks
        self.num_groups = num_groups
        self.groups: list[Group] = []
