"""`python -m cv_lightning sweep FILE`: run a W&B sweep file without a W&B account.

Each trial is the file's command in a process and a run folder of its own. What is finished is kept: the same command
goes on where it was stopped. Samplers and early stopping are Optuna's; its journal is what a sweep resumes from.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_lightning.commands.sweep_file import Scalar, SweepFile, fill_command, read_sweep
from cv_lightning.commands.sweep_result import FAILED, FINISHED, TrialRow, write_result
from cv_lightning.types import CVLightningError, DataError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

RUN_FOLDER = "trainer.default_root_dir"
FAIL_ALIKE = 5
"""So many failures of the first trials, with the same error, end a sweep."""
SEED_STEP = 100_003
"""Between the seeds of a sweep's calls, so that those of sweeps with neighbouring seeds differ."""
POLL_S = 1.0
"""A running trial's metrics are read this often, in seconds."""
STOP_S = 60.0
"""A stopped trial may take this long to close engine and sandbox before it is killed, in seconds."""


ASKED_S = 5.0
"""Seconds that a trial may take to end after the first signal."""
STOPPED_CODES = frozenset(128 + number for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM))
"""Exit codes of a trial that a signal has stopped: its last value is not its result, and the sweep is to end, too."""


class TrialStopped(KeyboardInterrupt):
    """A signal has stopped the sweep, or the trial that runs.

    Args:
        message: what was stopped.
        code: exit code for the sweep.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class TrialFailure(CVLightningError):
    """A trial's command failed; the sweep goes on."""


# ------------------------------------------------------------------------------------------------ one trial
def run_trial(trial: Trial, sweep: SweepFile, extra: Mapping[str, Scalar], folder: Path) -> float:
    """Run the file's command once.

    Args:
        trial: where the parameters come from, and where values of the metric go.
        sweep: the file.
        extra: further flags of every trial.
        folder: the trial's run folder; its output goes to `output.log` there.

    Returns:
        The metric's last value.

    Raises:
        TrialFailure: exit code other than 0, or no value of the metric.
        TrialStopped: by a signal.
        optuna.TrialPruned: stopped early.
    """
    import optuna

    suggested = {name: _suggest(trial, name, domain) for name, domain in sweep.parameters.items()}
    flags = {**suggested, **sweep.constants, RUN_FOLDER: str(folder), **extra}
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    try:
        with (folder / "output.log").open("w") as log, _process(fill_command(sweep.command, flags), log) as process:
            values: list[float] = []
            while (code := _wait(process, POLL_S)) is None:
                known, values = len(values), metric_values(folder, sweep.metric)
                if _falls_behind(trial, values, known):
                    raise optuna.TrialPruned
        known, values = len(values), metric_values(folder, sweep.metric)
        _falls_behind(trial, values, known)  # later trials are compared with these values
        if code in STOPPED_CODES:
            raise TrialStopped(f"{folder} was stopped by {signal.Signals(code - 128).name}", code)
        if code:
            raise TrialFailure(f"exit code {code}: {_said(folder / 'output.log')}")
        if not values:
            raise TrialFailure(f"no value of {sweep.metric} in {folder / 'metrics.csv'}")
    except TrialFailure as error:
        trial.set_user_attr("error", str(error))
        raise
    finally:
        trial.set_user_attr("seconds", round(time.perf_counter() - begun, 1))
    return values[-1]


def metric_values(folder: Path, name: str) -> list[float]:
    """Every value of a metric that a run has logged so far, in order."""
    from cv_lightning.evaluation.runs import read_curves

    path = folder / "metrics.csv"
    curves = read_curves(path) if path.is_file() else []
    return next((curve.values for curve in curves if curve.name == name), [])


def _suggest(trial: Trial, name: str, domain: BaseDistribution) -> Scalar:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, CategoricalDistribution):
        return trial.suggest_categorical(name, domain.choices)
    if isinstance(domain, IntDistribution):
        return trial.suggest_int(name, domain.low, domain.high)
    assert isinstance(domain, FloatDistribution)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)


def _falls_behind(trial: Trial, values: Sequence[float], known: int) -> bool:
    """Report the values after the first `known`; True if one of them is too bad to go on."""
    late = False
    for step, value in enumerate(values[known:], known + 1):
        trial.report(value, step)
        late |= trial.should_prune()
    return late


@contextmanager
def _process(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; whatever ends the block ends the group."""
    settings = {"WANDB_MODE": "offline", **os.environ}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=settings, process_group=0
        )
    except OSError as error:
        raise DataError(f"the sweep's command cannot be run: {error}; change `command` in the file") from error
    try:
        yield process
    finally:
        # The first one lets `fit` finish its iteration and save, which is not needed here; the second ends it at once.
        for number, seconds in ((signal.SIGINT, ASKED_S), (signal.SIGINT, STOP_S), (signal.SIGKILL, STOP_S)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                _wait(process, seconds)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _said(log: Path) -> str:
    """What a failed command said last: its last error message, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]+Error: ", line)]
    return ([*lines, *errors] or ["it printed nothing"])[-1][:300]


# ------------------------------------------------------------------------------------------------ all trials
def run_sweep(
    sweep: SweepFile,
    count: int,
    out: Path,
    extra: Mapping[str, Scalar],
    seed: int = 0,
    *,
    retry: bool = False,
) -> list[TrialRow]:
    """Run trials until there are `count`; those of an earlier call count, interrupted ones do not.

    Args:
        sweep: the file.
        count: trials in all.
        out: the sweep's folder; made if missing.
        extra: further flags of every trial.
        seed: of the sampler.
        retry: run trials that failed in an earlier call again, with the same parameters.

    Returns:
        All trials, failed ones too.

    Raises:
        DataError: the folder is in use, or holds another sweep.
        CVLightningError: the first trials all failed, and alike.
    """
    from optuna.samplers import GridSampler

    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        study = _open_study(sweep, out, extra)
        _requeue(study, out, failed=retry)
        # another seed for each call: the same would draw again what an earlier call has drawn
        study.sampler, study.pruner = _sampler(sweep, seed, len(study.trials)), _pruner(sweep)
        done = len(_counted(study))
        if isinstance(study.sampler, GridSampler):
            count = min(count, math.prod(map(len, _grid(sweep).values())))
        if done:
            _say(f"{done} trials were run before")

        def objective(trial: Trial) -> float:
            folder = out / f"trial-{trial.number:03d}"
            _say(f"trial {len(_counted(study)) + 1} of {count}: {folder}")
            return run_trial(trial, sweep, extra, folder)

        def show(study: Study, trial: FrozenTrial) -> None:
            _say(f"  {_row(out, trial).summary(sweep.metric)}")
            write_result(out, sweep, _rows(out, study))
            if fails_alike(_rows(out, study)):
                study.stop()

        if count > done:
            study.optimize(objective, n_trials=count - done, catch=TrialFailure, callbacks=[show])
        rows = _rows(out, study)
        write_result(out, sweep, rows)
        if count > done and fails_alike(rows):
            raise CVLightningError(
                f"the first {len(rows)} trials failed alike: {rows[0].error} ({rows[0].folder}/output.log). Mend that, "
                "and run the same command with --retry"
            )
        return rows


def fails_alike(rows: Sequence[TrialRow]) -> bool:
    """True if so many trials have failed with one error, and none has done anything else, that no further one will."""
    return len(rows) >= FAIL_ALIKE and all(row.state == FAILED and row.error == rows[0].error for row in rows)


def _open_study(sweep: SweepFile, out: Path, extra: Mapping[str, Scalar]) -> Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "journal.log"))),
        study_name="sweep",
        direction="maximize" if sweep.maximize else "minimize",
        load_if_exists=True,
    )
    definition = {"file": sweep.path.read_text(encoding="utf-8"), "set": dict(extra)}
    if study.user_attrs.get("definition", definition) != definition:
        raise DataError(f"{out} holds trials of another sweep file or of other --set flags: give another --out")
    study.set_user_attr("definition", definition)
    return study


def _sampler(sweep: SweepFile, seed: int, drawn: int) -> BaseSampler:
    from optuna.samplers import GridSampler, RandomSampler, TPESampler

    if sweep.method == "random":
        return RandomSampler(seed=seed + SEED_STEP * drawn)
    if sweep.method == "bayes":
        return TPESampler(seed=seed + SEED_STEP * drawn)

    class Grid(GridSampler):
        """Stops by the number of trials alone: Optuna's own would count failed ones as done, also those tried again."""

        def after_trial(self, *_: object, **__: object) -> None:
            pass

    return Grid(_grid(sweep), seed=seed)


def _grid(sweep: SweepFile) -> dict[str, Sequence[Scalar]]:
    """Values by flag."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    points: dict[str, Sequence[Scalar]] = {}
    for name, domain in sweep.parameters.items():
        if isinstance(domain, CategoricalDistribution):
            points[name] = domain.choices
        elif isinstance(domain, IntDistribution):
            points[name] = range(domain.low, domain.high + 1)
        elif isinstance(domain, FloatDistribution) and domain.step:
            steps = round((domain.high - domain.low) / domain.step)
            points[name] = [domain.low + index * domain.step for index in range(steps + 1)]
    return points


def _pruner(sweep: SweepFile) -> BasePruner:
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    if sweep.early_stop is None:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=sweep.early_stop.min_iter, reduction_factor=sweep.early_stop.eta)


def _requeue(study: Study, out: Path, *, failed: bool) -> None:
    """Give trials that Ctrl-C or a kill cut off another go with the same parameters; failed ones, too, where asked."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL)):
        if ("error" in trial.user_attrs and not failed) or _is_requeued(study, trial):
            continue
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
        study.set_user_attr(f"requeued-{trial.number}", True)
        shutil.rmtree(out / f"trial-{trial.number:03d}", ignore_errors=True)


def _is_requeued(study: Study, trial: FrozenTrial) -> bool:
    return f"requeued-{trial.number}" in study.user_attrs


def _counted(study: Study) -> list[FrozenTrial]:
    """Trials that ran to an end of their own, but for those that were given another go."""
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [
        trial
        for trial in ended
        if trial.state is not TrialState.FAIL or ("error" in trial.user_attrs and not _is_requeued(study, trial))
    ]


def _rows(out: Path, study: Study) -> list[TrialRow]:
    return [_row(out, trial) for trial in _counted(study)]


def _row(out: Path, trial: FrozenTrial) -> TrialRow:
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: FINISHED, TrialState.PRUNED: "stopped early"}
    last = trial.intermediate_values.get(max(trial.intermediate_values, default=0))
    return TrialRow(
        number=trial.number,
        state=states.get(trial.state, FAILED),
        value=trial.value if trial.state is TrialState.COMPLETE else last,
        parameters=trial.params,
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
        folder=str(out / f"trial-{trial.number:03d}"),
        error=str(trial.user_attrs.get("error", "")),
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second driver out of the folder."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another sweep is running there; give another --out") from error
        yield


# ------------------------------------------------------------------------------------------------ under W&B's agent
def agent_arguments(arguments: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """The command line that W&B's agent gave, as LightningCLI can take it.

    A resumed run may get `--_wandb={...}`, which is no flag of ours (wandb#4237); it is left out. Trials of one sweep
    must not share a run folder: each gets its own, unless the command names one.

    Args:
        arguments: without the program's name.
        settings: the environment; the agent sets WANDB_SWEEP_ID and WANDB_RUN_ID.
    """
    kept = [word for word in arguments if not word.startswith("--_wandb=")]
    sweep, run = settings.get("WANDB_SWEEP_ID"), settings.get("WANDB_RUN_ID")
    if not (sweep and run) or any(word.partition("=")[0] == f"--{RUN_FOLDER}" for word in kept):
        return kept
    return [*kept, f"--{RUN_FOLDER}=runs/sweeps/{sweep}/{run}"]


# ------------------------------------------------------------------------------------------------ command line
def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """While it lasts, what a scheduler sends ends the trial that runs, as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise TrialStopped(signal.Signals(number).name, 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flag(text: str) -> tuple[str, str]:
    name, equals, value = text.removeprefix("--").partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as data.init_args.num_iterations=20")
    return name, value


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cv_lightning sweep", description="Run a W&B sweep file without an account.")
    parser.add_argument("file", type=Path, help="in the form that `wandb sweep` takes: configs/sweeps/*.yaml")
    parser.add_argument("--count", type=int, help="trials in all, earlier ones included (default: the file's run_cap)")
    parser.add_argument("--out", type=Path, help="default runs/sweeps/NAME-OF-FILE")
    parser.add_argument(
        "--set", type=_flag, action="append", default=[], metavar="NAME=VALUE", help="a flag of every trial"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default 0)")
    parser.add_argument("--retry", action="store_true", help="run trials that failed earlier again")
    given = parser.parse_args(args)
    out: Path = given.out or Path("runs", "sweeps", given.file.stem)
    try:
        import optuna  # noqa: F401
    except ImportError:
        parser.error("sweeps need Optuna: pip install 'cv-lightning[sweep]'")
    try:
        sweep = read_sweep(given.file)
        count = sweep.run_cap if given.count is None else given.count
        if count is None or count < 1:
            parser.error(f"--count must be at least 1; {given.file} has no run_cap to take instead")
        with _stopped_by_signals():
            rows = run_sweep(sweep, count, out, dict(given.set), given.seed, retry=given.retry)
    except CVLightningError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        told = f" ({error})" if str(error) else ""
        _say(f"\nstopped{told}; the same command continues, with the interrupted trial first")
        return error.code if isinstance(error, TrialStopped) else 130
    from cv_lightning.commands.sweep_result import print_table

    print_table(sweep, rows)
    _say(f"\nplot: {out / 'sweep.png'}   figures: {out / 'sweep.json'}")
    return 0 if any(row.state == FINISHED for row in rows) else 1
