"""Findings about a training run that does not learn, from the metrics that it logs.

The run itself and its report compute them with the same function. Most findings hold in every one of the last
iterations; those of `TRENDS` compare the start of a run with its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean, pvariance
from typing import Any

Row = Mapping[str, float]
"""Metrics of one iteration of GRPO or one step of SFT; a metric that has no value is NaN or absent."""
Settings = Mapping[str, Any]
"""Settings of the run by dotted name; may be empty."""

PATIENCE = 5
"""Consecutive iterations in which a condition has to hold."""
SHORT_RUN = 3
"""The same for a run that has ended after fewer iterations, in all of them."""
MIN_TRAJECTORIES = 100
"""Trajectories of those iterations, so that a few small groups of equal rewards are no finding."""
MIN_OF_RUN = 24
"""The same where the condition holds since the first iteration."""
ALL, ALMOST_ALL = 0.999, 0.95
SOLVED = 0.95
"""Accuracy from which on groups of equal rewards are a success."""
CLIPPED = 0.9
MANY_ERRORS = 0.5
"""Malformed calls per trajectory."""
MANY_CUT = 0.5
LOW_TEMPERATURE = 0.5
LOW_ACCURACY = 0.5
"""Accuracy up to which one that does not rise is reported where chance is not known."""
TREND_ROWS = 20
SIGMAS = 3.0
"""Standard errors that a difference between start and end has to exceed."""
AT_LEAST = 0.02
"""Difference of mean rewards or accuracies that counts."""

MODEL, ALGORITHM = "model.init_args", "model.init_args.algorithm"
FAILURES = {
    "rollout/end_error_task_frac": ("prompts could not be built", "`cv-lightning data check FILES` names the rows"),
    "rollout/end_error_engine_frac": ("the engine failed", "fit_log.txt in the run's folder has the errors"),
    "rollout/end_error_sandbox_frac": ("the tool's host failed", "see `cv-lightning sandbox --self-test`"),
    "rollout/end_error_judge_frac": ("the judge did not reply", "see `cv-lightning judge --check`"),
    "rollout/end_stopped_frac": ("the rollout's deadline came first", "raise {rollout.agent.deadline_s}"),
}
"""End states without a reward: what happened and what to do, by metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A reason why a run does not learn what it should, with the setting to change."""

    name: str
    first: int
    """Iteration from which on it holds."""
    last: int
    is_whole: bool
    """True if it holds since the run's first iteration."""
    blocks: bool
    """True if nothing is learned while it holds; False if the run may learn something else."""
    text: str
    """What is the case, with figures."""
    remedy: str
    """What to change."""

    @property
    def title(self) -> str:
        """The verdict on the run."""
        if not self.blocks:
            return "check this run"
        return "this run did not learn" if self.is_whole else f"this run stopped learning at iteration {self.first}"

    def warning(self) -> str:
        """The finding while the run continues."""
        start = "this run is not learning" if self.blocks else "check this run"
        return f"{start} (iterations {self.first} to {self.last}): {self.text}. {self.remedy}"

    def verdict(self) -> str:
        """The finding after the run."""
        return f"{self.title}: {self.text}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on one iteration's metrics."""

    name: str
    holds: Callable[[Row, Settings], bool]
    text: Callable[[Sequence[Row], Settings], str]
    """What is the case, from the iterations in which the condition holds."""
    remedy: Callable[[Sequence[Row], Settings], str]
    """What to change; `{key}` stands for the flag of a setting and its value."""
    blocks: bool = True
    patience: int = PATIENCE
    explains: tuple[str, ...] = ()
    """Findings that follow from this one and are left out beside it."""


def find(rows: Sequence[Row], settings: Settings | None = None, *, ended: bool = True) -> list[Finding]:
    """Findings that hold at the end of these rows: first those that block learning, causes before effects.

    Args:
        rows: Rows of training in order; rows of validations, which have no iteration, are skipped.
        settings: The run's settings by dotted name, for flags and their values.
        ended: The run has ended: shorter histories suffice, and trends are looked at.
    """
    settings = settings or {}
    trained = [row for row in rows if math.isfinite(row.get("iteration", math.nan))]
    found = [finding for rule in RULES if (finding := _apply(rule, trained, settings, ended))]
    explained = {rule.name: rule.explains for rule in RULES}
    for cause in list(found):
        effects = [finding for finding in found if finding.name in explained[cause.name]]
        if effects:
            blocks = cause.blocks or any(effect.blocks for effect in effects)
            found = [replace(cause, blocks=blocks) if f is cause else f for f in found if f not in effects]
    if ended:
        found += [finding for trend in TRENDS if (finding := trend(trained, settings))]
    return sorted(found, key=lambda finding: not finding.blocks)


def _apply(rule: Rule, rows: Sequence[Row], settings: Settings, ended: bool) -> Finding | None:
    holding = list(takewhile(lambda row: rule.holds(row, settings), reversed(rows)))[::-1]
    is_whole = len(holding) == len(rows)
    if not holding or len(holding) < (min(rule.patience, SHORT_RUN) if ended and is_whole else rule.patience):
        return None
    trajectories = sum(row.get("rollout/trajectories", math.inf) for row in holding)
    if trajectories < (MIN_OF_RUN if ended and is_whole else MIN_TRAJECTORIES):
        return None
    remedy = rule.remedy(holding, settings)
    return _finding(rule.name, holding, is_whole, rule.blocks, rule.text(holding, settings), remedy, settings)


def _finding(
    name: str, rows: Sequence[Row], is_whole: bool, blocks: bool, text: str, remedy: str, settings: Settings
) -> Finding:
    first, last = int(rows[0]["iteration"]), int(rows[-1]["iteration"])
    parts = remedy.replace("}", "{").split("{")
    named = "".join(_flag(part, settings) if number % 2 else part for number, part in enumerate(parts))
    return Finding(name=name, first=first, last=last, is_whole=is_whole, blocks=blocks, text=text, remedy=named)


def _flag(key: str, settings: Settings) -> str:
    """The flag of a setting, with its value where that is known."""
    value = settings.get(key)
    return f"--{key} (now {value})" if isinstance(value, int | float | str) else f"--{key}"


def _value(row: Row, name: str) -> float:
    return row.get(name, math.nan)


def _number(settings: Settings, key: str, default: float) -> float:
    """Value of a setting; the default where a stored config has none or something else."""
    value = settings.get(key)
    return value if isinstance(value, int | float) else default


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [value for row in rows if math.isfinite(value := _value(row, name))]
    return fmean(values) if values else math.nan


# ------------------------------------------------------------------------------------------------ conditions
def _nothing_scored(row: Row, settings: Settings) -> bool:
    return _value(row, "rollout/unscored_frac") >= ALL


def _failure(rows: Sequence[Row]) -> str:
    """Metric of the most frequent end state without a reward; empty if the trajectories ended well."""
    name = max(FAILURES, key=lambda name: _mean(rows, name) if math.isfinite(_mean(rows, name)) else 0.0)
    return name if _mean(rows, name) > 0 else ""


def _unscored_text(rows: Sequence[Row], settings: Settings) -> str:
    name = _failure(rows)
    why = f" ({FAILURES[name][0]}: {_mean(rows, name):.0%})" if name else " (the judge gave no verdict)"
    return f"no trajectory has a reward{why}"


def _unscored_remedy(rows: Sequence[Row], settings: Settings) -> str:
    advice = FAILURES[_failure(rows) or "rollout/end_error_judge_frac"][1]
    return advice[0].upper() + advice[1:]


def _cut(row: Row) -> bool:
    return _value(row, "rollout/end_over_length_frac") >= ALMOST_ALL


def _cut_remedy(rows: Sequence[Row], settings: Settings) -> str:
    """Names the limit that was reached, where lengths show which one it is."""
    longest = max(_value(row, "rollout/length_max") for row in rows)
    turn = _number(settings, "rollout.agent.max_turn_tokens", math.inf)
    if longest >= _number(settings, "rollout.engine.max_model_len", math.inf) - 2:
        return "Raise {rollout.engine.max_model_len}, which cut the longest ones"
    if _mean(rows, "rollout/sampled_tokens_mean") >= ALMOST_ALL * turn * _mean(rows, "rollout/turns_mean"):
        return "Raise {rollout.agent.max_turn_tokens}, or begin with SFT if the policy does not end its turns"
    return (
        "Raise {rollout.agent.max_turn_tokens} or {rollout.agent.max_response_tokens}, or begin with SFT if the policy "
        "does not end its turns"
    )


def _masked(row: Row, settings: Settings) -> bool:
    masked = _value(row, "rollout/masked_frac")
    return masked > 0 and masked + _value(row, "rollout/unscored_frac") >= ALL


def _masked_remedy(rows: Sequence[Row], settings: Settings) -> str:
    prefix = f"{ALGORITHM}.mask."
    switches = [name for name in settings if name.startswith(prefix) and settings[name] is True]
    named = " and ".join(f"--{name}" for name in switches) or f"--{prefix}over_length, over_turns and broken"
    return f"Set {named} to false, or raise the limits of rollout.agent that cut the trajectories"


def _no_tool_call(row: Row, settings: Settings) -> bool:
    return settings.get("rollout.agent.tool") is not False and _value(row, "rollout/tool_used_frac") == 0


def _tool_text(rows: Sequence[Row], settings: Settings) -> str:
    errors = _mean(rows, "rollout/parse_errors_mean")
    if errors >= MANY_ERRORS:
        return f"no call reached a tool, and a trajectory has {errors:.1f} malformed calls on average"
    return "no trajectory calls a tool, so tool use cannot be reinforced"


def _tool_remedy(rows: Sequence[Row], settings: Settings) -> str:
    return (
        "Begin with SFT on conversations with calls (`cv-lightning data build-sft`), or show the format in "
        "--rollout.agent.prompt; without a tool on purpose, set --rollout.agent.tool false"
    )


def _equal_rewards(row: Row, settings: Settings) -> bool:
    is_solved = _value(row, "reward/answer_accuracy") >= SOLVED
    return _value(row, "rollout/reward_variance_frac") == 0 and not is_solved


def _equal_text(rows: Sequence[Row], settings: Settings) -> str:
    reward, accuracy = _mean(rows, "reward/total"), _mean(rows, "reward/answer_accuracy")
    cut = _mean(rows, "rollout/end_over_length_frac")
    also = f"; {cut:.0%} of them were cut at a token limit" if cut >= MANY_CUT else ""
    return (
        "the rewards within every group are equal, so that no trajectory has an advantage (mean reward "
        f"{reward:.3g}, accuracy {accuracy:.3g}{also})"
    )


def _equal_remedy(rows: Sequence[Row], settings: Settings) -> str:
    if _number(settings, "rollout.sampling.temperature", 1.0) < LOW_TEMPERATURE:
        return "Raise {rollout.sampling.temperature} (1 is usual): all samples of a task are alike"
    return (
        "Begin with SFT or with tasks that the policy sometimes solves; more samples of a task help, too: "
        "{rollout.num_samples}"
    )


def _is_zero(row: Row, *names: str) -> bool:
    return any(_value(row, name) == 0 for name in names)


def _no_gradient(row: Row, settings: Settings) -> bool:
    """True if the gradient is 0 although the loss has something to learn from."""
    supervised = _value(row, "sft/loss") > 0 and _is_zero(row, "sft/grad_norm")
    trained = _value(row, "rollout/reward_variance_frac") > 0 and _value(row, "policy/trajectories") > 0
    return supervised or (trained and _is_zero(row, "policy/grad_norm"))


def _all_skipped(row: Row, settings: Settings) -> bool:
    steps = _number(settings, f"{ALGORITHM}.num_minibatches", 2)
    return _value(row, "sft/skipped_steps") >= 1 or _value(row, "policy/skipped_steps") >= ALL * steps


def _not_finite(row: Row, settings: Settings) -> bool:
    return any(name in row and not math.isfinite(row[name]) for name in ("sft/loss", "policy/loss"))


RULES = (
    Rule("nothing_scored", _nothing_scored, _unscored_text, _unscored_remedy, explains=("no_tool_call", "no_variance")),
    Rule(
        "prompts_too_long",
        lambda row, _: _cut(row) and _value(row, "rollout/sampled_tokens_mean") < 1,
        lambda rows, _: "every prompt is longer than its limit, and no token was sampled",
        lambda rows, _: (
            "Raise {rollout.agent.max_prompt_tokens} and {rollout.engine.max_model_len}, or lower "
            f"{{{MODEL}.policy.max_pixels}}"
        ),
        explains=("turns_cut", "no_tool_call", "no_variance"),
    ),
    Rule(
        "turns_cut",
        lambda row, _: _cut(row),
        lambda rows, _: (
            f"{_mean(rows, 'rollout/end_over_length_frac'):.0%} of the trajectories were cut at a token "
            f"limit, after {_mean(rows, 'rollout/sampled_tokens_mean'):.0f} sampled tokens on average"
        ),
        _cut_remedy,
        blocks=False,
        explains=("no_tool_call", "no_variance"),
    ),
    Rule(
        "all_masked",
        _masked,
        lambda rows, _: "every trajectory that has a reward is masked, so nothing enters the loss",
        _masked_remedy,
        explains=("no_variance",),
    ),
    Rule("no_tool_call", _no_tool_call, _tool_text, _tool_remedy, blocks=False),
    Rule("no_variance", _equal_rewards, _equal_text, _equal_remedy, explains=("no_gradient",)),
    Rule(
        "learning_rate_zero",
        lambda row, _: _is_zero(row, "policy/lr", "sft/lr"),
        lambda rows, _: "the learning rate is 0",
        lambda rows, _: f"Set {{{MODEL}.optimizer.total_steps}} to 0 or to the steps of the whole run",
    ),
    Rule(
        "nothing_supervised",
        lambda row, _: _is_zero(row, "sft/loss") and _is_zero(row, "sft/grad_norm"),
        lambda rows, _: "the loss is exactly 0: no token of the conversations is trained on",
        lambda rows, _: (
            "`cv-lightning data show FILE --row 0` marks the trained tokens; check the roles and masks of "
            "{data.init_args.train_files}"
        ),
    ),
    Rule(
        "no_gradient",
        _no_gradient,
        lambda rows, _: "the gradient norm is exactly 0",
        lambda rows, _: (
            f"Look at {{{MODEL}.policy.freeze_vision}} and {MODEL}.policy.lora: no trained weight affects the loss"
        ),
    ),
    Rule(
        "steps_skipped",
        _all_skipped,
        lambda rows, _: "every optimizer step was skipped, because its gradient norm was not finite or above the limit",
        lambda rows, _: (
            f"Lower {{{MODEL}.optimizer.lr}}, use bfloat16 or float32 as {{{MODEL}.policy.dtype}}, or "
            f"raise {{{MODEL}.optimizer.skip_norm_above}}"
        ),
        patience=2 * PATIENCE,
    ),
    Rule(
        "loss_not_finite",
        _not_finite,
        lambda rows, _: "the loss is not finite",
        lambda rows, _: f"Lower {{{MODEL}.optimizer.lr}}, or continue from the last good checkpoint",
    ),
    Rule(
        "all_clipped",
        lambda row, _: _value(row, "policy/clip_frac") >= CLIPPED,
        lambda rows, _: f"{_mean(rows, 'policy/clip_frac'):.0%} of the tokens are clipped and have no gradient",
        lambda rows, _: f"Lower {{{MODEL}.optimizer.lr}} or {{{ALGORITHM}.num_minibatches}}",
        blocks=False,
    ),
)
"""Causes before their effects."""


# ------------------------------------------------------------------------------------------------ trends
@dataclass(frozen=True, slots=True)
class Change:
    """Mean of a metric at the start and at the end of a run: over a fifth of its rows each."""

    start: float
    end: float
    error: float
    """Standard error of the difference."""

    @property
    def rose(self) -> bool:
        """True if the metric rose by more than chance explains."""
        return self.end - self.start > max(SIGMAS * self.error, 1e-12)


def change_of(rows: Sequence[Row], name: str) -> Change | None:
    """How a metric changed over the run; None for fewer than `TREND_ROWS` values."""
    values = [value for row in rows if math.isfinite(value := _value(row, name))]
    if len(values) < TREND_ROWS:
        return None
    size = max(PATIENCE, len(values) // 5)
    start, end = values[:size], values[-size:]
    error = math.sqrt((pvariance(start) + pvariance(end)) / (size - 1))
    return Change(fmean(start), fmean(end), error)


def _reward_alone(rows: Sequence[Row], settings: Settings) -> Finding | None:
    """The reward rises while accuracy stays at chance or, where chance is not known, low and where it was."""
    reward, accuracy = change_of(rows, "reward/total"), change_of(rows, "reward/answer_accuracy")
    if reward is None or accuracy is None or not reward.rose or reward.end - reward.start < AT_LEAST:
        return None
    if accuracy.end - accuracy.start > max(AT_LEAST, accuracy.error):
        return None
    margin = max(AT_LEAST, accuracy.error)
    chance = change_of(rows, "rollout/chance_accuracy")
    if accuracy.end > (LOW_ACCURACY if chance is None else chance.end + margin):
        return None
    compared = "" if chance is None else f"; giving another question's answer would reach {chance.end:.2f}"
    text = (
        f"the reward rose from {reward.start:.2f} to {reward.end:.2f}, but accuracy did not ({accuracy.start:.2f} to "
        f"{accuracy.end:.2f}{compared}): the policy earns reward without answering better"
    )
    remedy = "Give {rollout.reward.accuracy} more weight, and look at trajectories of high reward in the report"
    return _finding("reward_without_accuracy", rows, True, False, text, remedy, settings)


def _loss_rose(rows: Sequence[Row], settings: Settings) -> Finding | None:
    loss = change_of(rows, "sft/loss")
    if loss is None or not loss.rose:
        return None
    text = f"the loss rose from {loss.start:.3g} to {loss.end:.3g} (means of the first and the last fifth)"
    remedy = f"Lower {{{MODEL}.optimizer.lr}}, or check that the files begin with the same kind of rows as they end"
    return _finding("loss_rose", rows, True, False, text, remedy, settings)


TRENDS = (_reward_alone, _loss_rose)
