"""Sweep files in the form that `wandb sweep` takes, read for the local driver; what it cannot do is refused by name.

Format: https://docs.wandb.ai/models/sweeps/sweep-config-keys. Parameters are flat dotted names, as LightningCLI takes
them; nested ones would reach it as one dictionary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from cv_lightning.types import DataError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Method = Literal["grid", "random", "bayes"]
Scalar = bool | int | float | str | None

REQUIRED = ("method", "metric", "parameters", "command")
KNOWN = (*REQUIRED, "early_terminate", "run_cap", "program", "name", "description", "project", "entity")
"""Top-level keys; the last five only tell W&B what things are called."""
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
}
"""What is supported of W&B's distributions, and the keys of each; `q` defaults to 1."""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Asynchronous successive halving, which is what W&B's `hyperband` does."""

    min_iter: int
    """Logged values of the metric before a trial is compared for the first time."""
    eta: int = 3
    """A trial goes on if it is in the best 1/eta at min_iter, min_iter * eta, ..."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a sweep file says."""

    path: Path
    method: Method
    metric: str
    """Column of a trial's metrics.csv; its last value counts, as in W&B's summary."""
    maximize: bool
    parameters: dict[str, BaseDistribution]
    """Searched, by flag."""
    constants: dict[str, Scalar]
    """The same for every trial, by flag."""
    command: tuple[str, ...]
    """With W&B's `${...}` macros."""
    early_stop: EarlyStop | None = None
    run_cap: int | None = None
    """Number of trials where the command line gives none."""


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        DataError: it cannot be read, or asks for what the local driver does not do; names file and key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: a sweep file is a mapping with the keys {', '.join(REQUIRED)}")
    if missing := [key for key in REQUIRED if not data.get(key)]:
        raise DataError(f"{path}: no `{missing[0]}`; the local driver needs {', '.join(REQUIRED)}")
    if unknown := sorted(map(str, set(data) - set(KNOWN))):
        raise DataError(f"{path}: `{unknown[0]}` is not supported by the local driver; run the file with `wandb sweep`")
    if data["method"] not in ("grid", "random", "bayes"):
        raise DataError(f"{path}: method {data['method']!r} must be grid, random or bayes")
    metric, maximize = _metric(path, data["metric"])
    parameters, constants = _parameters(path, data["parameters"], grid=data["method"] == "grid")
    return SweepFile(
        path=path,
        method=cast(Method, data["method"]),
        metric=metric,
        maximize=maximize,
        parameters=parameters,
        constants=constants,
        command=_command(path, data["command"]),
        early_stop=_early_stop(path, data["early_terminate"]) if data.get("early_terminate") else None,
        run_cap=_run_cap(path, data.get("run_cap")),
    )


def fill_command(command: Sequence[str], flags: Mapping[str, Scalar]) -> list[str]:
    """The command of one trial, as W&B's agent would run it.

    Args:
        command: of the file.
        flags: values by flag, in order; they stand where `${args}` does.
    """
    filled: list[str] = []
    for word in command:
        if word == "${args}":
            filled += [f"--{name}={value}" for name, value in flags.items()]
        elif word == "${interpreter}":
            filled.append(sys.executable)
        elif word != "${env}":  # /usr/bin/env finds the interpreter, which is known here
            filled.append(word)
    return filled


# ------------------------------------------------------------------------------------------------ parts
def _metric(path: Path, given: Any) -> tuple[str, bool]:
    """Name, and whether more is better."""
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise DataError(f"{path}: metric needs a name, a column of metrics.csv: {{name: rollout/accuracy, goal: ...}}")
    if unknown := sorted(set(given) - {"name", "goal"}):
        raise DataError(f"{path}: metric.{unknown[0]} is not supported by the local driver; leave it out")
    goal = given.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise DataError(f"{path}: metric.goal {goal!r} must be minimize or maximize")
    return given["name"], goal == "maximize"


def _command(path: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or "${args}" not in given:
        raise DataError(f"{path}: command must be a list with ${{args}} after the subcommand, where the flags belong")
    words = tuple(map(str, given))
    known = ("${args}", "${interpreter}", "${env}")
    if odd := [word for word in words if word.startswith("${") and word not in known]:
        raise DataError(f"{path}: command holds {odd[0]}; the local driver knows {', '.join(known)}")
    return words


def _early_stop(path: Path, given: Any) -> EarlyStop:
    settings = dict(given) if isinstance(given, dict) else {}
    where = f"{path}: early_terminate"
    if settings.pop("type", None) != "hyperband":
        raise DataError(f"{where}.type must be hyperband")
    eta = settings.pop("eta", 3)
    if not isinstance(eta, int) or eta < 2:
        raise DataError(f"{where}.eta {eta!r}: the local driver wants a whole number of at least 2")
    first = settings.pop("min_iter", None)
    if first is None and {"max_iter", "s"} <= set(settings):
        first = max(1, round(settings.pop("max_iter") / eta ** settings.pop("s")))
    if not isinstance(first, int) or first < 1:
        raise DataError(f"{where} needs min_iter (at least 1), or max_iter and s")
    if settings:
        raise DataError(f"{where}.{min(settings)} is not supported by the local driver; leave it out")
    return EarlyStop(min_iter=first, eta=eta)


def _run_cap(path: Path, given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or given < 1):
        raise DataError(f"{path}: run_cap {given!r} must be a whole number of at least 1")
    return given


def _parameters(path: Path, given: Any, grid: bool) -> tuple[dict[str, BaseDistribution], dict[str, Scalar]]:
    """What is searched, and what is constant."""
    if not isinstance(given, dict):
        raise DataError(f"{path}: parameters must be a mapping of flags, such as model.init_args.optimizer.lr")
    searched: dict[str, BaseDistribution] = {}
    constants: dict[str, Scalar] = {}
    for name, settings in given.items():
        where = f"{path}: parameters.{name}"
        kind = _kind(where, settings)
        if kind == "constant":
            constants[name] = _scalar(where, settings["value"])
        elif grid and kind in ("uniform", "log_uniform_values"):
            raise DataError(f"{where}: a grid needs values, or whole numbers from min to max; {kind} has no steps")
        else:
            searched[name] = _distribution(where, kind, settings)
    if not searched:
        raise DataError(f"{path}: nothing to search; give a parameter `values`, or `min` and `max`")
    return searched, constants


def _kind(where: str, settings: Any) -> str:
    """Name of the distribution, inferred as W&B does where it is not given."""
    if not isinstance(settings, dict):
        raise DataError(f"{where} must be a mapping: {{values: [...]}}, {{min: ..., max: ...}} or {{value: ...}}")
    if "parameters" in settings:
        raise DataError(f"{where} is nested; write its flags flat, {where.rpartition('.')[2]}.NAME: {{...}}")
    kind = settings.get("distribution")
    if kind is None:
        whole = all(isinstance(settings.get(key), int) for key in ("min", "max"))
        bounds = "int_uniform" if whole else "uniform"
        kind = "constant" if "value" in settings else "categorical" if "values" in settings else bounds
    if kind not in DISTRIBUTIONS:
        raise DataError(f"{where}.distribution {kind!r}: the local driver knows {', '.join(DISTRIBUTIONS)}")
    keys = DISTRIBUTIONS[kind]
    if missing := [key for key in keys if key not in settings and key != "q"]:
        raise DataError(f"{where}: {kind} needs `{missing[0]}`")
    if unknown := sorted(set(settings) - {*keys, "distribution"}):
        raise DataError(f"{where}.{unknown[0]} is not supported by the local driver for {kind}")
    return str(kind)


def _distribution(where: str, kind: str, settings: Mapping[str, Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if kind == "categorical":
        if not isinstance(settings["values"], list) or not settings["values"]:
            raise DataError(f"{where}.values must be a list of at least one value")
        return CategoricalDistribution([_scalar(where, value) for value in settings["values"]])
    low, high = settings["min"], settings["max"]
    try:
        if kind == "int_uniform":
            return IntDistribution(low, high)
        return FloatDistribution(
            float(low),
            float(high),
            log=kind == "log_uniform_values",
            step=float(settings.get("q", 1)) if kind == "q_uniform" else None,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: min {low!r} and max {high!r} are no range for {kind} ({error})") from error


def _scalar(where: str, value: Any) -> Scalar:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise DataError(f"{where}: {value!r} is no single value; write a list or a mapping as text, '[0.9, 0.98]'")
    return value
