"""Two trainers in processes of their own that take turns: for comparisons with TRL.

Each trains in a loop of its own making and tells the referee of every finished step. A round is a number of steps
that one trainer takes while the other waits, so that both meet the same neighbours on a shared machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRL = "trl==1.16.0"
SOCKET = "BENCH_SOCKET"


class WorkerFailed(RuntimeError):
    """A trainer's process ended early; the message is the end of its output."""


def trl_python() -> Path:
    """Interpreter of an environment with TRL, made where it is missing.

    It adds TRL and what only TRL needs to the packages of this environment, so that torch and transformers are the
    same ones on both sides.
    """
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not (done.is_file() and done.read_text() == TRL):
        print(f"installing {TRL} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "host.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", TRL]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{made.stderr}")
        done.write_text(TRL)
    return python


@dataclass(frozen=True)
class Round:
    """What a trainer did in one round."""

    seconds: float
    losses: list[float]
    tokens: float
    """Tokens that it processed."""
    parts: dict[str, float]
    """Seconds of the last step's parts, where the trainer tells."""


class Referee:
    """A trainer's side: call `step` after every step; it returns when the next one may begin."""

    def __init__(self, steps_a_round: int) -> None:
        self.steps_a_round = steps_a_round
        self.connection = Client(os.environ[SOCKET], family="AF_UNIX")
        self.losses: list[float] = []
        self.tokens = 0.0
        self.begun = 0.0

    def ready(self) -> None:
        """Wait for the first round."""
        self._wait()

    def step(self, loss: float, tokens: float = 0.0, parts: dict[str, float] | None = None) -> None:
        """One more step is done."""
        self.losses.append(loss)
        self.tokens += tokens
        if len(self.losses) == self.steps_a_round:
            self.connection.send(Round(time.perf_counter() - self.begun, self.losses, self.tokens, parts or {}))
            self.losses, self.tokens = [], 0.0
            self._wait()

    def _wait(self) -> None:
        try:
            self.connection.recv()
        except EOFError:
            os._exit(0)  # the comparison is over; the trainer's own way out would take long
        self.begun = time.perf_counter()


class Worker:
    """The other side: a trainer's process, started at once, that works while a round is asked of it."""

    def __init__(self, python: Path | str, script: str, name: str, options: dict[str, Any]) -> None:
        """Start `script --worker name options` with an interpreter."""
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        address = f"{self.folder.name}/socket"
        self.log = Path(self.folder.name, "log")
        listener = Listener(address, family="AF_UNIX")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), script, "--worker", name, json.dumps(options)],
                env=os.environ | {SOCKET: address, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.connection = self._accept(listener)

    def _accept(self, listener: Listener) -> Connection:
        listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
        while True:
            try:
                return listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    raise self._failure() from None

    def round(self) -> Round:
        """Let it work for one round.

        Raises:
            WorkerFailed: its process has ended.
        """
        try:
            self.connection.send("go")
            found: Round = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.wait()
            raise self._failure() from error
        return found

    def _failure(self) -> WorkerFailed:
        tail = self.log.read_text().strip().splitlines()[-12:]
        return WorkerFailed(f"{self.name} ended ({self.process.returncode}):\n" + "\n".join(tail))

    def close(self) -> None:
        """End it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def take_turns(workers: Sequence[Worker], rounds: int, warm_up: int = 1) -> list[list[Round]]:
    """Rounds of every worker, one worker at a time; those of the warm-up are left out."""
    found: list[list[Round]] = [[] for _ in workers]
    for number in range(warm_up + rounds):
        for worker, mine in zip(workers, found, strict=True):
            done = worker.round()
            if number >= warm_up:
                mine.append(done)
    return found


def best_batch(script: str, options: dict[str, Any], sizes: Sequence[int], cost: Callable[[list[Round]], float]) -> int:
    """TRL's best batch size: the one of the lowest cost over two rounds; all are said on the terminal."""
    found: dict[int, float] = {}
    for size in sizes:
        worker = Worker(trl_python(), script, "trl", options | {"batch_size": size})
        try:
            rounds = take_turns([worker], 2)[0]
        finally:
            worker.close()
        found[size] = cost(rounds)
        taken = " ".join(f"{done.seconds:.2f}" for done in rounds)
        print(f"{options}: TRL, batches of {size}: rounds of {taken} s", file=sys.stderr)
    return min(found, key=found.__getitem__)


def against_trl(
    script: str, options: dict[str, Any], batch_size: int, rounds: int, warm_up: int
) -> tuple[list[Round], list[Round]]:
    """Rounds of ours and of TRL's trainer, taking turns."""
    workers = [
        Worker(sys.executable, script, "ours", options),
        Worker(trl_python(), script, "trl", options | {"batch_size": batch_size}),
    ]
    try:
        ours, trl = take_turns(workers, rounds, warm_up)
    finally:
        for worker in workers:
            worker.close()
    return ours, trl
