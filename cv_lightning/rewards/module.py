"""The reward module: scores answers while trajectories finish, then whole groups. The only part that keeps state."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from cv_lightning.rewards.answer import AnswerScore, is_copied, rule_score
from cv_lightning.rewards.config import RewardConfig
from cv_lightning.rewards.format import check_format, check_turns
from cv_lightning.rewards.geometry import Frame, best_iou, crop_credit, parse_box
from cv_lightning.rewards.markup import final_answer
from cv_lightning.rewards.process import CORRECT_ABOVE, GATE, Attempt, group_components
from cv_lightning.rewards.transforms import Use, expected_operations, net_use, ran_use, step_use
from cv_lightning.types import EndState, Group, JudgeError, RewardBreakdown, Task, Trajectory

if TYPE_CHECKING:
    from cv_lightning.rewards.judge import Judge


class RewardModule:
    """Scores trajectories.

    `score_answer` runs on one event loop while other trajectories still roll out; `score_group` runs on the caller's
    thread when the trajectories of a group are finished. A trajectory that infrastructure failed gets no reward.
    """

    def __init__(self, config: RewardConfig | None = None) -> None:
        """Args:
        config: weights and formulas; a judge in it is connected to on first use.
        """
        self.config = config or RewardConfig()
        self.judge: Judge | None = None
        self._verdicts: dict[int, tuple[Trajectory, AnswerScore]] = {}
        self._failures: deque[bool] = deque(maxlen=self.config.judge.failure_window if self.config.judge else 1)
        self._last_failure = ""
        if self.config.judge is not None:
            from cv_lightning.rewards.judge import Judge  # httpx and diskcache are not needed without a judge

            self.judge = Judge(self.config.judge)

    # ------------------------------------------------------------------ one answer
    async def score_answer(self, trajectory: Trajectory) -> None:
        """Score the answer of a finished trajectory: by rule, then by the judge if the rule says no.

        A judge that cannot answer makes the trajectory's end state `ERROR_JUDGE`; it is then never scored.
        """
        score = self._rule(trajectory)
        if self.judge is not None and score.value <= CORRECT_ABOVE and _is_judgeable(trajectory.task, score.answer):
            task = trajectory.task
            assert score.answer is not None
            try:
                value = await self.judge.verdict(task.question, task.ground_truth, score.answer, task.data_source)
            except JudgeError as error:
                trajectory.end_state, trajectory.error = EndState.ERROR_JUDGE, str(error)
                return
            if trajectory.end_state.is_error:
                return  # the rollout has given up waiting
            score = AnswerScore(value, score.answer, "judge")
        self._verdicts[id(trajectory)] = trajectory, score

    def _rule(self, trajectory: Trajectory) -> AnswerScore:
        answer = None
        if trajectory.end_state is EndState.ANSWERED and trajectory.turns:
            answer = final_answer(trajectory.turns[-1].text)
        task = trajectory.task
        return rule_score(answer, task.ground_truth, task.question, mathematics=self.config.mathematics)

    # ------------------------------------------------------------------ one group
    def score_group(self, group: Group) -> None:
        """Set `reward` of every trajectory: None after an error of the infrastructure, else the breakdown.

        The rule stage is applied to trajectories that `score_answer` has not seen. Group statistics are those of the
        scored trajectories.

        Raises:
            JudgeError: more than `judge.max_failed_frac` of the last verdicts failed.
        """
        expected, attempts, scored = wanted_operations(group.task), [], []
        for trajectory in group.trajectories:
            _, score = self._verdicts.pop(id(trajectory), (None, None))
            trajectory.reward = None
            self._count_verdict(trajectory, score)
            if trajectory.end_state.is_error:
                continue
            score = score if score is not None else self._rule(trajectory)
            scored.append((trajectory, score))
            attempts.append(self._attempt(trajectory, score, expected))
        for (trajectory, score), components in zip(
            scored, group_components(expected, attempts, self.config.rules), strict=True
        ):
            components |= {term.name: term.value(trajectory, score.value) for term in self.config.terms}
            trajectory.reward = RewardBreakdown(
                components=components,
                total=self.config.total(components),
                correct=score.value > CORRECT_ABOVE,
                answer=score.answer,
                scored_by=score.scored_by,
            )
        self._check_failures()

    def _attempt(self, trajectory: Trajectory, score: AnswerScore, expected: frozenset[str]) -> Attempt:
        use = self._use(trajectory, expected)
        texts = [turn.text for turn in trajectory.turns]
        by_turn = self.config.format_by == "turn"
        answered = trajectory.end_state is EndState.ANSWERED
        worth = self._crop_worth(trajectory.task, use)
        # a crop that misses is no crop: by labels alone it would be paid for exactness (hazard 25)
        missed = self.config.credit == "net" and "crop" in expected and worth < GATE
        return Attempt(
            score=score.value,
            used=use.labels - {"crop"} if missed else use.labels,
            crop_credit=worth,
            executions=trajectory.num_tool_calls,
            format=(check_turns(texts) if by_turn else check_format("".join(texts))) if answered else 0.0,
            turned=use.turned,
            ordered=use.ordered,
        )

    def _use(self, trajectory: Trajectory, expected: frozenset[str]) -> Use:
        match self.config.credit:
            case "net":
                return net_use(trajectory, expected)
            case "ran":
                in_source, by_code = self.config.crop_frame == "source", self.config.evidence == "code"
                return ran_use(trajectory, in_source=in_source, by_code=by_code)
            case "steps":
                return step_use(trajectory, expected)

    def _crop_worth(self, task: Task, use: Use) -> float:
        truth = parse_box(task.box)
        if truth is None or not use.boxes:
            return 0.0
        if self.config.crop_frame == "call":
            return best_iou(use.boxes, truth)
        frame = Frame(*task.images[0].size)
        return max(crop_credit(box, truth, frame, self.config.crop_credit) for box in use.boxes)

    def _count_verdict(self, trajectory: Trajectory, score: AnswerScore | None) -> None:
        if trajectory.end_state is EndState.ERROR_JUDGE:
            self._failures.append(True)
            self._last_failure = trajectory.error
        elif score is not None and score.scored_by == "judge":
            self._failures.append(False)

    def _check_failures(self) -> None:
        judge = self.config.judge
        if judge is None or len(self._failures) < max(1, judge.failure_window // 4):
            return
        share = fmean(self._failures)
        if share > judge.max_failed_frac:
            raise JudgeError(
                f"{share:.0%} of the last {len(self._failures)} verdicts failed, more than "
                f"reward.judge.max_failed_frac ({judge.max_failed_frac:.0%}) allows; the last: {self._last_failure}. "
                f"Is {judge.base_url} up and does it serve {judge.model!r}? `python -m cv_lightning judge` asks it once"
            )

    # ------------------------------------------------------------------ numbers
    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Means over the scored trajectories, components unweighted.

        Returns:
            `reward/<name>` for every component and `total`, `reward/answer_accuracy` before the gate, the same by data
            source (`reward_by_source/<source>/<name>`) and by required transform
            (`reward_by_transform/<transform>/<name>`, `none` for tasks that want nothing), `judge/<name>` with a
            judge.
        """
        found = _means("reward", (t for group in groups for t in group.trajectories))
        by_source: dict[str, list[Trajectory]] = {}
        by_transform: dict[str, list[Trajectory]] = {}
        for group in groups:
            by_source.setdefault(group.task.data_source, []).extend(group.trajectories)
            for name in group.task.required_transforms or ("none",):
                by_transform.setdefault(name, []).extend(group.trajectories)
        for source, trajectories in by_source.items():
            found |= _means(f"reward_by_source/{source}", trajectories)
        for name, trajectories in by_transform.items():
            found |= _means(f"reward_by_transform/{name}", trajectories)
        if self.judge is not None:
            found |= {f"judge/{name}": value for name, value in self.judge.metrics().items()}
        return found

    def close(self) -> None:
        """Forget open verdicts and close the judge's connections and cache."""
        self._verdicts.clear()
        if self.judge is not None:
            self.judge.close()


def wanted_operations(task: Task) -> frozenset[str]:
    """E of a task; a crop is wanted only where there is a ground-truth box to compare it with (hazard 21)."""
    expected = expected_operations(task.required_transforms)
    return expected if parse_box(task.box) is not None else expected - {"crop"}


def _is_judgeable(task: Task, answer: str | None) -> bool:
    return bool(answer) and not is_copied(answer or "", task.question)


def _means(prefix: str, trajectories: Iterable[Trajectory]) -> dict[str, float]:
    rewards = [t.reward for t in trajectories if t.reward is not None]
    if not rewards:
        return {}
    names = rewards[0].components
    means = {f"{prefix}/{name}": fmean(reward.components[name] for reward in rewards) for name in names}
    means[f"{prefix}/total"] = fmean(reward.total for reward in rewards)
    means[f"{prefix}/answer_accuracy"] = fmean(reward.correct for reward in rewards)
    return means
