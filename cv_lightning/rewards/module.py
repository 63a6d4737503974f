"""The reward module scores answers while trajectories finish, then whole groups."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from cv_lightning.dialects import dialect_named
from cv_lightning.images import area
from cv_lightning.rewards.answer import AnswerScore, is_copied, rule_score
from cv_lightning.rewards.config import RewardConfig
from cv_lightning.rewards.format import check_format, check_turns
from cv_lightning.rewards.geometry import Frame, crop_credit
from cv_lightning.rewards.markup import final_answer
from cv_lightning.rewards.process import CORRECT_ABOVE, GATE, ToolUse, group_components
from cv_lightning.rewards.symbolic import SymbolicComparer
from cv_lightning.rewards.terms import AnsweredGroup, RewardTerm
from cv_lightning.rewards.transforms import ToolCredit, expected_operations, net_credit, ran_credit, step_credit
from cv_lightning.types import EndState, Group, JudgeError, RewardBreakdown, Task, Trajectory

if TYPE_CHECKING:
    from cv_lightning.rewards.judge.client import Judge

TermValues = Sequence[Mapping[str, float | None]]
"""Values of the user's own terms by name, for every trajectory of a group (empty where infrastructure failed).

None: the judge did not reply."""
MIN_FAILED = 5
"""Failed verdicts below which a run continues whatever their fraction: one failure among the first may be chance."""


class _PartialScore(NamedTuple):
    """What is known of a trajectory before its group is complete; lies in `Trajectory.partial_score`."""

    score: AnswerScore
    tool_use: ToolUse


class RewardModule:
    """Scores trajectories.

    `score_answer` runs on one event loop while other trajectories still roll out; `score_group` runs on the caller's
    thread when the trajectories of a group are finished. A trajectory that infrastructure failed gets no reward.
    """

    def __init__(self, config: RewardConfig | None = None) -> None:
        """Prepare everything that the config asks for. The judge is connected on first use.

        Args:
            config: Weights and formulas.

        Raises:
            ValueError: A judge's prompt is missing, or the package for `mathematics`.
        """
        self.config = config or RewardConfig()
        self.judge: Judge | None = None
        self._failures: deque[bool] = deque(maxlen=self.config.judge.failure_window if self.config.judge else 1)
        """Whether each of the last verdicts failed."""
        self._last_failure = ""
        if self.config.judge is not None:
            from cv_lightning.rewards.judge.client import Judge  # openai and diskcache are not needed without a judge

            self.judge = Judge(self.config.judge)
        self._symbolic = SymbolicComparer() if self.config.mathematics else None
        self._symbolic_thread = ThreadPoolExecutor(1, thread_name_prefix="symbolic")

    # ------------------------------------------------------------------ one answer
    async def score_answer(self, trajectory: Trajectory) -> None:
        """Score a finished trajectory as far as it can be without its group, while others still roll out.

        By rule, then by the judge if the rule says no. When the judge fails, the trajectory's end state becomes
        `ERROR_JUDGE`, and it is never scored.
        """
        if self._symbolic is None:
            score = self._rule(trajectory)
        else:  # formulas may take seconds, too long for the event loop
            score = await asyncio.get_running_loop().run_in_executor(self._symbolic_thread, self._rule, trajectory)
        task = trajectory.task
        tool_use = self._tool_use(trajectory)
        is_wrong = bool(score.answer) and score.value <= CORRECT_ABOVE
        if self.judge is not None and is_wrong and not is_copied(score.answer or "", task.question):
            try:
                truth = "; or: ".join(task.accepted)
                value = await self.judge.verdict(task.question, truth, score.answer or "", task.data_source)
            except JudgeError as error:
                trajectory.end_state, trajectory.error = EndState.ERROR_JUDGE, str(error)
                return
            if trajectory.end_state.is_error:  # the rollout has stopped waiting for it
                return
            score = AnswerScore(value, score.answer, "judge")
        trajectory.partial_score = _PartialScore(score, tool_use)

    def _rule(self, trajectory: Trajectory) -> AnswerScore:
        answer = None
        if trajectory.end_state is EndState.ANSWERED and trajectory.turns:
            answer = final_answer(trajectory.turns[-1].text, dialect_named(trajectory.dialect))
        task = trajectory.task
        return rule_score(answer, task.accepted, task.question, symbolic=self._symbolic)

    def _by_rule(self, trajectory: Trajectory) -> _PartialScore:
        return _PartialScore(self._rule(trajectory), self._tool_use(trajectory))

    # ------------------------------------------------------------------ one group
    @property
    def waits_for_terms(self) -> bool:
        """True if a term of the user's own looks at whole groups; then `ask_terms` comes before `score_group`."""
        return any(term.looks_at_group for term in self.config.terms)

    async def ask_terms(self, group: Group) -> TermValues:
        """Values of the user's own terms for a finished group, for `score_group`.

        Runs on the event loop on which `score_answer` ran.

        Raises:
            ValueError: A term gives another number of values than there are trajectories.
        """
        members = [trajectory for trajectory in group.trajectories if not trajectory.end_state.is_error]
        scores = tuple((t.partial_score.score if t.partial_score else self._rule(t)).value for t in members)
        view = AnsweredGroup(task=group.task, trajectories=tuple(members), scores=scores, judge=self.judge)
        columns = await asyncio.gather(*(_values(term, view) for term in self.config.terms))
        names = [term.name for term in self.config.terms]
        rows = iter(
            [{name: column[at] for name, column in zip(names, columns, strict=True)} for at in range(len(members))]
        )
        return [{} if trajectory.end_state.is_error else next(rows) for trajectory in group.trajectories]

    def no_terms(self, group: Group) -> TermValues:
        """The values of `ask_terms` if no term replied in time."""
        missing = {term.name: None for term in self.config.terms}
        return [{} if trajectory.end_state.is_error else missing for trajectory in group.trajectories]

    def score_group(self, group: Group, terms: TermValues | None = None) -> None:
        """Set `reward` of every trajectory: None after an error of the infrastructure or the judge, else the breakdown.

        Trajectories that `score_answer` has not seen are scored by rule. Unscored ones do not count in the group's
        statistics.

        Args:
            group: Its trajectories are finished.
            terms: The result of `ask_terms`; needed where a term looks at whole groups.

        Raises:
            JudgeError: More than `judge.max_failed_frac` of the last verdicts failed, and at least `MIN_FAILED`.
            ValueError: A component of the user's own is not a finite number, or `terms` is missing.
        """
        if terms is None and self.waits_for_terms:
            raise ValueError("reward.terms: a term looks at whole groups; await ask_terms(group) and give its result")
        expected = wanted_operations(group.task)
        scored: list[tuple[Trajectory, _PartialScore, Mapping[str, float | None] | None]] = []
        values = repeat(None, len(group.trajectories)) if terms is None else terms
        for trajectory, own in zip(group.trajectories, values, strict=True):
            failure = trajectory.error if trajectory.end_state is EndState.ERROR_JUDGE else None
            if missing := [name for name, value in (own or {}).items() if value is None]:
                failure = f"the judge did not reply to reward.terms {', '.join(missing)}"
                if trajectory.end_state is EndState.ANSWERED:
                    trajectory.end_state, trajectory.error = EndState.ERROR_JUDGE, failure
            partial: _PartialScore | None = trajectory.partial_score
            trajectory.reward = trajectory.partial_score = None
            if failure is not None:
                self._failures.append(True)
                self._last_failure = failure
            elif partial is not None and partial.score.scored_by == "judge":
                self._failures.append(False)
            if failure is None and not trajectory.end_state.is_error:
                scored.append((trajectory, partial or self._by_rule(trajectory), own))
        uses = [replace(partial.tool_use, score=partial.score.value) for _, partial, _ in scored]
        found = group_components(expected, uses, self.config.recipe)
        for (trajectory, (score, _), own), components in zip(scored, found, strict=True):
            components |= self._further(trajectory, score.value, own)
            trajectory.reward = RewardBreakdown(
                components=components,
                total=self.config.total(components),
                correct=score.value > CORRECT_ABOVE,
                answer=score.answer,
                scored_by=score.scored_by,
            )
        if sum(self._failures) >= MIN_FAILED:
            self.check_verdicts(self._failures)

    def _tool_use(self, trajectory: Trajectory) -> ToolUse:
        """What a finished trajectory did, without the score of its answer."""
        expected = wanted_operations(trajectory.task)
        match self.config.credit:
            case "net":
                use = net_credit(trajectory, expected)
            case "steps":
                use = step_credit(trajectory, expected)
            case "ran":
                use = ran_credit(trajectory, in_source=False)
        texts = [turn.text for turn in trajectory.turns]
        dialect = dialect_named(trajectory.dialect)
        by_turn = self.config.recipe.format_by == "turn"
        check = check_turns(texts, dialect) if by_turn else check_format("".join(texts), dialect)
        answered = trajectory.end_state is EndState.ANSWERED
        crop_score = self._crop_score(trajectory.task, use)
        # a crop that misses does not count as a crop: by labels alone it would be paid for exactness
        missed = "crop" in expected and crop_score < GATE
        return ToolUse(
            used=use.labels - {"crop"} if missed and self.config.credit == "net" else use.labels,
            crop_score=crop_score,
            executions=trajectory.num_tool_calls,
            format=check if answered else 0.0,
            turned=use.turned,
            ordered=use.ordered if use.ordered is None else use.ordered and not missed,
        )

    def _further(
        self, trajectory: Trajectory, score: float, own: Mapping[str, float | None] | None
    ) -> dict[str, float]:
        """Components of the user's own: values of `ask_terms`, or without them those of each term's `value`."""
        found = {name: value for name, value in (own or {}).items() if value is not None}
        if own is None:
            found = {term.name: float(term.value(trajectory, score)) for term in self.config.terms}
        for name, value in found.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"reward.terms: {name!r} gives {value} for task {trajectory.task.id!r}; it must be finite"
                )
        return found

    def _crop_score(self, task: Task, credit: ToolCredit) -> float:
        truth = task.box
        if truth is None or not credit.boxes:
            return 0.0
        frame = Frame(*task.images[0].size)  # not used by IoU: with `credit: ran` the boxes are in other frames
        return max(crop_credit(box, truth, frame, self.config.recipe.crop_credit) for box in credit.boxes)

    @property
    def verdicts(self) -> list[bool]:
        """Whether each of the last verdicts failed, in their order."""
        return list(self._failures)

    def check_verdicts(self, failures: Sequence[bool]) -> None:
        """Stop the run when too many verdicts failed.

        Args:
            failures: Whether each verdict failed, of this rank or of all.

        Raises:
            JudgeError: More than `judge.max_failed_frac` of them.
        """
        judge = self.config.judge
        if judge is None or not failures:
            return
        fraction = fmean(failures)
        if fraction > judge.max_failed_frac:
            last = self._last_failure or "on another rank"
            raise JudgeError(
                f"{fraction:.0%} of the last {len(failures)} verdicts failed, more than "
                f"reward.judge.max_failed_frac ({judge.max_failed_frac:.0%}) allows; the last: {last}. "
                f"Is {judge.base_url} up and does it serve {judge.model!r}? `cv-lightning judge` asks it once"
            )

    def judge_metrics(self) -> dict[str, float]:
        """`judge/<name>`, counted since the last call; empty without a judge."""
        return {f"judge/{name}": value for name, value in self.judge.metrics().items()} if self.judge else {}

    def close(self) -> None:
        """Close the judge's connections and cache, end the process for formulas."""
        self._symbolic_thread.shutdown(wait=True, cancel_futures=True)
        if self._symbolic is not None:
            self._symbolic.close()
        if self.judge is not None:
            self.judge.close()


async def _values(term: RewardTerm, group: AnsweredGroup) -> list[float | None]:
    try:
        found = [None if value is None else float(value) for value in await term.values(group)]
    except JudgeError:
        return [None] * len(group.trajectories)
    if len(found) != len(group.trajectories):
        raise ValueError(
            f"reward.terms: {term.name!r} gives {len(found)} values for {len(group.trajectories)} trajectories"
        )
    return found


def wanted_operations(task: Task) -> frozenset[str]:
    """The operations that a task wants; a crop only where there is a ground-truth box to compare it with."""
    expected = expected_operations(task.required_transforms)
    return expected if task.box is not None and area(task.box) > 0 else expected - {"crop"}
