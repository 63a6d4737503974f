"""`cv-lightning sweep FILE`: run a W&B sweep file without a W&B account.

Each trial runs the file's command in its own run folder. Optuna draws the parameters, stops trials and keeps a journal.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cv_lightning.command_line import run_verb
from cv_lightning.packaged import require_config
from cv_lightning.renames import new_metric
from cv_lightning.types import DataError

if TYPE_CHECKING:
    from optuna import Study, Trial

NEEDED = ["method", "metric", "parameters", "command"]
KNOWN = [*NEEDED, "early_terminate", "run_cap", "program", "name", "description", "project", "entity"]
MAX_FIRST_FAILURES = 3


def read_sweep(path: Path) -> dict[str, Any]:
    """Read a sweep file; its `parameters` become `searched` (Optuna's distributions) and `constants`, both by flag.

    Raises:
        DataError: It has a key that only `wandb sweep` supports; names the key.
    """
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(sweep, dict) or not all(map(sweep.get, NEEDED)) or "${args}" not in sweep["command"]:
        raise DataError(f"{path}: a sweep file needs {', '.join(NEEDED)}, and ${{args}} in the command")
    domains = {name: _domain(spec) for name, spec in sweep["parameters"].items()}
    refused = [key for key in sweep if key not in KNOWN]
    refused += [] if sweep["method"] in ("random", "bayes") else [f"method: {sweep['method']}"]
    refused += [f"metric.{key}" for key in sweep["metric"] if key not in ("name", "goal")]
    for key, value in (sweep.get("early_terminate") or {}).items():
        refused += [] if key in ("min_iter", "eta") or (key, value) == ("type", "hyperband") else [f"{key}: {value}"]
    refused += [f"parameters.{name}" for name, domain in domains.items() if domain is None]
    if (name := sweep["metric"].get("name", "")) != new_metric(name):
        raise DataError(f"{path}: the metric {name} is called {new_metric(name)} now; change metric.name")
    if refused:
        raise DataError(
            f"{path}: `{refused[0]}` is not supported without W&B: run `wandb sweep {path}`. Supported parameters are "
            "flat flags with `value`, `values` (lists as text) or `min` and `max` (uniform, log_uniform_values)"
        )
    constants = {name: domain["value"] for name, domain in domains.items() if isinstance(domain, dict)}
    searched = {name: domain for name, domain in domains.items() if name not in constants}
    return {**sweep, "path": path, "searched": searched, "constants": constants}


def _domain(spec: Any) -> Any:
    """Optuna's distribution of one parameter; a constant as it stands; None if it is not supported."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind = spec.get("distribution") if isinstance(spec, dict) else None
    match {key: spec[key] for key in spec if key != "distribution"}:
        case {"value": bool() | int() | float() | str() | None, **rest} if not rest and not kind:
            return spec
        case {"values": [_, *_] as values, **rest} if not rest and kind in (None, "categorical"):
            plain = all(value is None or isinstance(value, bool | int | float | str) for value in values)
            return CategoricalDistribution(values) if plain else None
        case {"min": int() as low, "max": int() as high, **rest} if not rest and not kind:
            return IntDistribution(low, high)
        case {"min": low, "max": high, **rest} if not rest and kind in (None, "uniform", "log_uniform_values"):
            return FloatDistribution(float(low), float(high), log=kind == "log_uniform_values")
    return None


def fill_command(command: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """The command of one trial as W&B's agent runs it, with the flags in place of `${args}`."""
    macros = {"${env}": [], "${interpreter}": [sys.executable], "${args}": [f"--{k}={v}" for k, v in flags.items()]}
    return [filled for word in command for filled in macros.get(word, [word])]


def _run_trial(trial: Trial, metric: str, command: Sequence[str], folder: Path) -> float | None:
    """Run one trial's command; the metric's last value, or None if it was stopped early. DataError: it failed."""
    from cv_lightning.evaluation.runs import read_curves

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("w") as log:
        settings = {"WANDB_MODE": "offline", **os.environ}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, process_group=0)
    values: list[float] = []
    try:
        while True:
            code = process.poll()
            curves = read_curves(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else []
            known, values = len(values), next((curve.values for curve in curves if curve.name == metric), [])
            for step, value in enumerate(values[known:], known + 1):
                trial.report(value, step)
                if code is None and trial.should_prune():
                    return None
            if code is not None:
                break
            time.sleep(0.5)
    finally:
        for number, seconds in ((signal.SIGINT, 5), (signal.SIGINT, 60), (signal.SIGKILL, 60)):  # fit ends on the 2nd
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
    if code - 128 in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        raise SystemExit(code)  # the sweep stops, too; it resumes with this trial
    if code or not values:
        said = (folder / "output.log").read_text(errors="replace").strip().split("\n")[-1].strip()
        raise DataError(f"exit code {code}: {said[:300]}" if code else f"no value of {metric} in metrics.csv")
    return values[-1]


def _open_study(sweep: Mapping[str, Any], extra: Mapping[str, str], out: Path) -> Study:
    """The folder's study, new or resumed: interrupted and failed trials of an earlier call are queued again."""
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / "journal.log")))
    goal = sweep["metric"].get("goal", "minimize")
    study = optuna.create_study(storage=storage, study_name="sweep", direction=goal, load_if_exists=True)
    definition = {"file": sweep["path"].read_text(encoding="utf-8"), "set": dict(extra)}
    if study.user_attrs.get("definition", definition) != definition:
        raise DataError(f"{out} holds trials of another sweep file or of other --set flags: give another --out")
    study.set_user_attr("definition", definition)
    stop, halving = sweep.get("early_terminate"), optuna.pruners.SuccessiveHalvingPruner
    study.pruner = halving(stop.get("min_iter", 1), stop.get("eta", 3)) if stop else optuna.pruners.NopPruner()
    sampler = optuna.samplers.RandomSampler if sweep["method"] == "random" else optuna.samplers.TPESampler
    study.sampler = sampler(seed=len(study.trials))  # reproducible; each call draws new values
    retried = {trial.user_attrs.get("retries") for trial in study.trials}
    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.number not in retried:
            study.enqueue_trial(trial.params, user_attrs={"retries": trial.number})
    return study


def _run_trials(study: Study, sweep: Mapping[str, Any], count: int, extra: Mapping[str, str], out: Path) -> None:
    """Run trials until `count` have ended, those of earlier calls included; failed ones of those do not count."""
    from optuna.trial import TrialState

    done = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    for number in range(done + 1, count + 1):
        trial = study.ask(sweep["searched"])
        folder = out / f"trial-{trial.number:03d}"
        print(f"trial {number} of {count}: {folder}", flush=True)
        flags = {**trial.params, **sweep["constants"], "trainer.default_root_dir": folder, **extra}
        try:
            value = _run_trial(trial, sweep["metric"]["name"], fill_command(sweep["command"], flags), folder)
        except DataError as error:
            study.tell(trial, state=TrialState.FAIL)
            print(f"  failed: {error} ({folder}/output.log)", flush=True)
            if number >= MAX_FIRST_FAILURES and all(other.state is TrialState.FAIL for other in study.trials):
                raise DataError(f"the first {number} trials failed; the last: {error}") from error
        else:
            study.tell(trial, value, TrialState.PRUNED if value is None else TrialState.COMPLETE)
            print("  stopped early" if value is None else f"  {sweep['metric']['name']} {value:.4g}", flush=True)


def sweep(file: Path, count: int | None = None, out: Path | None = None, set: list[str] | None = None) -> None:
    """Run a W&B sweep file without an account. The same command resumes a sweep that was stopped.

    Args:
        file: Sweep file of `wandb sweep`, or a packaged one: sweeps/reward_weights.
        count: Number of trials, earlier ones included; by default the file's run_cap.
        out: Folder; by default runs/sweeps/NAME-OF-FILE.
        set: NAME=VALUE, a flag of every trial; may be repeated.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    file = require_config(file)
    given, extra = read_sweep(file), dict(flag.split("=", 1) for flag in set or ())
    out = out or Path("runs/sweeps", file.stem)
    if (count := given.get("run_cap") if count is None else count) is None or count < 1:
        raise DataError(f"--count must be at least 1; {file} has no run_cap to take instead")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another sweep is running there; give another --out") from error
        study = _open_study(given, extra, out)
        try:
            _run_trials(study, given, count, extra, out)
        finally:
            table = study.trials_dataframe(("number", "value", "params", "state", "duration"))
            table.to_csv(out / "sweep.csv", index=False)
    print(table.sort_values("value", ascending=study.direction.name == "MINIMIZE").to_string(index=False))


main = partial(run_verb, sweep, name="sweep")
