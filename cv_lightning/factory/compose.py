"""Composition of one conversation: it is planned, written turn by turn, run in the sandbox, and checked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from cv_lightning.agent.prompt import IMAGE_MARK
from cv_lightning.data.conversations import DemoTurn
from cv_lightning.data.rows import RowError
from cv_lightning.data.writers import tool_entry
from cv_lightning.factory.conversation_checks import (
    Facts,
    Geometry,
    Played,
    Player,
    Problem,
    answer_problems,
    problems_of,
    within,
)
from cv_lightning.factory.plans import (
    RETURNS,
    ConversationPlan,
    Kind,
    PlanConfig,
    PlannedTurn,
    given_image,
    make_plan,
    with_text,
)
from cv_lightning.factory.teacher import CropFrame, EarlierMessage, Teacher, TurnRequest
from cv_lightning.factory.vqa_table import VqaRow
from cv_lightning.rewards.geometry import source_extent
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.rewards.transforms import ORIENTATION, expected_operations
from cv_lightning.tools import DEFAULT_TOOLS, CodeRunner, CodeTool, Tool
from cv_lightning.types import EndpointError, JudgeError, SandboxError, ToolStatus, TrajectoryImage

Verdict = Callable[[str, str, str, str], Awaitable[float]]
"""Judge, called with question, ground truth, answer and data source; above 0.5 the answer is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A row and the kind of conversation to make of it."""

    number: int
    row: VqaRow
    kind: Kind


@dataclass(slots=True, kw_only=True)
class Composition:
    """The conversation made of a candidate, or the problem with it."""

    number: int
    id: str
    kind: str
    problem: Problem | None = None
    """Reason why it is not kept; None if it is."""
    facts: Facts | None = None
    turns: list[DemoTurn] = field(default_factory=list)
    steps: tuple[PlannedTurn, ...] = ()
    """The plan of each turn."""
    images: list[Image.Image] = field(default_factory=list)
    """Images in the order of the conversation."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    """Turns that were written again."""
    judged: bool = False
    """The judge accepted a final answer that the rules refused."""


@dataclass(frozen=True, kw_only=True)
class Composer:
    """Makes conversations with a teacher, a sandbox and perhaps a judge; the caller closes them."""

    teacher: Teacher
    sandbox: CodeRunner
    plan: PlanConfig
    frame: CropFrame
    seed: int
    tools: Sequence[Tool] = DEFAULT_TOOLS
    verdict: Verdict | None = None

    async def compose(self, candidate: Candidate) -> Composition:
        """Make a conversation of a candidate; failures are recorded as its problem."""
        outcome = Composition(number=candidate.number, id=candidate.row.id, kind=candidate.kind)
        rng = random.Random(f"{self.seed}/{candidate.number}/{candidate.row.id}")
        plan = make_plan(candidate.row, candidate.kind, self.plan, rng)
        if tool := next((tool for tool in self.tools if isinstance(tool, CodeTool) and tool.text), None):
            plan = with_text(plan, self.plan, tool.max_images, rng)
        try:
            image = await asyncio.to_thread(given_image, candidate.row, plan.applied)
            await self._converse(candidate, plan, image, outcome)
        except (RowError, EndpointError, JudgeError, SandboxError) as error:
            kind = "sandbox" if isinstance(error, SandboxError) else "endpoint"
            outcome.problem = Problem(error.kind if isinstance(error, RowError) else kind, str(error))
        return outcome

    async def _converse(
        self, candidate: Candidate, plan: ConversationPlan, image: Image.Image, outcome: Composition
    ) -> None:
        facts = facts_of(candidate, plan)
        player = Player([image], self.sandbox, str(candidate.number), self.tools, self.frame)
        messages: list[EarlierMessage] = []
        for number, step in enumerate(plan.steps):
            request = TurnRequest(
                row=candidate.row,
                plan=plan,
                number=number,
                images=[each.original for each in player.images],
                messages=tuple(messages),
                frame=self.frame,
                seed=f"{self.seed}/{candidate.number}",
            )
            refusal = await self._turn(request, facts, player, outcome)
            if refusal:
                outcome.problem = Problem(f"turn refused: {step.action}", refusal)
                return
            messages += _messages(player.demonstrated(player.turns[-1]))
        facts = replace(facts, judged=outcome.judged)
        found = problems_of(facts, player.turns, player.images)
        outcome.problem = found[0] if found else None
        outcome.facts, outcome.steps = facts, tuple(plan.steps)
        outcome.turns = [player.demonstrated(turn) for turn in player.turns]
        outcome.images = [each.original for each in player.images]

    async def _turn(self, request: TurnRequest, facts: Facts, player: Player, outcome: Composition) -> str:
        """Have a turn written until it follows its step; the reason why the last attempt did not, or an empty text."""
        refusal = ""
        for attempt in range(self.teacher.tries):
            written = await self.teacher.write(replace(request, refusal=refusal))
            outcome.prompt_tokens += written.prompt_tokens
            outcome.completion_tokens += written.completion_tokens
            outcome.retries += attempt > 0
            turn, images = await player.look(written.text.strip())
            if turn.result is not None and turn.result.status is ToolStatus.INFRASTRUCTURE_ERROR:
                raise SandboxError(turn.result.error)
            refusal = refusal_of(request.step, turn, images, facts, player)
            if not refusal and request.step.action == "answer":
                refusal = await self._answer_refusal(facts, turn.parsed.answer or "", outcome)
            if not refusal:
                player.keep(turn, images)
                return ""
        return refusal

    async def _answer_refusal(self, facts: Facts, answer: str, outcome: Composition) -> str:
        """The reason why an answer is refused, by the rules and then by the judge; empty if it is right."""
        if not answer_problems(facts, answer):
            return ""
        if self.verdict is not None and answer:
            value = await self.verdict(facts.question, facts.answer, answer, facts.data_source)
            outcome.judged = value > CORRECT_ABOVE
        return "" if outcome.judged else f"the answer {answer!r} is not right; it is {facts.answer!r}"


def facts_of(candidate: Candidate, plan: ConversationPlan) -> Facts:
    """The claims of a plan's conversation."""
    row = candidate.row
    return Facts(
        id=row.id,
        kind=plan.kind,
        question=row.question,
        answer=row.answer,
        applied=plan.applied,
        box=plan.box,
        needs_crop=plan.needs_crop,
        fault=next((step.fault for step in plan.steps if step.fault is not None), None),
        data_source=row.data_source,
    )


def _messages(turn: DemoTurn) -> list[EarlierMessage]:
    """A turn and the tool's response to it, as the teacher sees them."""
    messages = [EarlierMessage(role="assistant", text=turn.text)]
    if turn.is_answered:
        text = "\n".join(filter(None, ((turn.said or "").rstrip("\n"), turn.error and f"Error: {turn.error}")))
        messages.append(EarlierMessage(role="tool", text=text, images=turn.images))
    return messages


# ------------------------------------------------------------------------------------------------ one step
def refusal_of(step: PlannedTurn, turn: Played, images: Sequence[TrajectoryImage], facts: Facts, player: Player) -> str:
    """The reason why a turn does not follow its step, written for the teacher; empty if it does.

    Args:
        step: Step of the plan.
        turn: The played turn.
        images: The images that its call made.
        facts: Claims of the conversation.
        player: Player with the turns before.
    """
    if step.action == "answer":
        return "" if turn.parsed.answer is not None else "this turn must end with <answer>...</answer> and call nothing"
    call, result = turn.parsed.call, turn.result
    if call is None or result is None or turn.parsed.num_calls != 1:
        return turn.parsed.error or "this turn must make exactly one tool call and give no answer"
    if call.image_index != step.image_index:
        return f"the call must work on image {step.image_index}, not {call.image_index}"
    if step.fault == "exception":
        return "" if result.status is ToolStatus.ERROR else "the code of this turn must raise an exception; it ran"
    if result.status is not ToolStatus.OK:
        return f"the call failed: {result.error}"
    if not images or (step.returns == "pair" and len(images) < 2) or (step.returns == "text" and not result.text):
        return f"the call must return {RETURNS[step.returns]}"
    image, geometry = images[-1], Geometry(facts, player.turns, [*player.images, *images])
    if step.fault == "wrong_turn":
        return "" if geometry.left_turned(turn) else "this call must turn the image and leave it not upright"
    if step.fault == "missed_crop":
        return "" if geometry.misses(turn) else "this crop must miss what the question is about"
    core = turn.operations
    if step.action == "turn":
        wanted = set(expected_operations([step.undoes]))
        return "" if core & ORIENTATION == wanted else f"the call must do {', '.join(wanted)}; it did {sorted(core)}"
    return _crop_refusal(core, image, facts, player, geometry)


def _crop_refusal(core: set[str], image: TrajectoryImage, facts: Facts, player: Player, geometry: Geometry) -> str:
    extent = source_extent(image, geometry.frame)
    if "crop" not in core or extent is None:
        return f"the call must crop; it did {', '.join(sorted(core)) or 'nothing'}"
    assert image.parent is not None
    before = source_extent(player.images[image.parent], geometry.frame)
    if facts.box is not None and not within(facts.box, extent):
        return "the crop cuts off part of what the question is about; it must hold all of it"
    return "" if before is not None and within(extent, before) else "the crop must lie within the image before"


# ------------------------------------------------------------------------------------------------ SFT item
def item_of(outcome: Composition, names: list[str], system: str | None, learn_faults: bool = True) -> dict[str, Any]:
    """The entry of an SFT file; its `build` key holds the claims, which `verify_file` checks.

    Args:
        outcome: A kept conversation.
        names: Paths of its images, relative to the file.
        system: System message; None: the trainer adds the agent's own.
        learn_faults: False marks turns with a deliberate error with `loss: false`.
    """
    assert outcome.facts is not None
    speakers: list[dict[str, Any]] = [{"from": "human", "value": IMAGE_MARK + outcome.facts.question}]
    for turn, step in zip(outcome.turns, outcome.steps, strict=True):
        mark = {} if learn_faults or step.fault is None else {"loss": False}
        speakers.append({"from": "gpt", "value": turn.text, **mark})
        if turn.is_answered:
            speakers.append(tool_entry(turn))
    item: dict[str, Any] = {"conversations": speakers, "images": names, "build": asdict(outcome.facts)}
    return item if system is None else {**item, "system": system}
