"""The playground in a terminal: turns are printed as they happen, pictures saved and named, or drawn in blocks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from cv_lightning.engines import SamplingConfig
from cv_lightning.images import decode_image
from cv_lightning.rewards.markup import THINK_CLOSE, THINK_OPEN
from cv_lightning.types import CVLightningError
from cv_lightning.viewer.playground.session import Exchange, Playground, WatchedTurn

HELP = """A question is asked about the current picture. Ctrl-C stops an answer.
  :image FILE   another picture        :edit [N]   edit the code of turn N (the last) and go on from its result
  :save         keep the trajectory    :quit       (or Ctrl-D)"""
BLOCKS = 48
"""Width of a picture drawn in blocks, in characters."""


def thought_of(text: str) -> str:
    """What a turn thought, without tags."""
    return text.partition(THINK_CLOSE)[0].removeprefix(THINK_OPEN).strip() if THINK_CLOSE in text else ""


def result_line(turn: WatchedTurn) -> str:
    """What came of a turn's call, in one line."""
    result = turn.result
    if result is None:
        return ""
    ran = ", ".join(operation.name for operation in result.operations) or "no image operation"
    took = f"{1000 * result.elapsed_s:.0f} ms"
    if result.image is None:
        return f"{result.status.value}: {result.error} (ran: {ran}; {took})"
    return f"{result.image.width}x{result.image.height} pixels (ran: {ran}; {took})"


def blocks(image: Image.Image, width: int = BLOCKS) -> Text:
    """A picture for terminals with 24-bit colour: half a character a pixel."""
    height = max(2, 2 * round(width * image.height / image.width / 2))
    small = image.convert("RGB").resize((width, height))
    text = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (_colour(small, column, row + half) for half in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _colour(image: Image.Image, column: int, row: int) -> str:
    pixel = image.getpixel((column, row))
    assert isinstance(pixel, tuple)
    return "rgb({},{},{})".format(*pixel)


class Printer:
    """Prints what is new of an exchange; called from the engine's and the sandbox's threads."""

    def __init__(self, console: Console, playground: Playground, inline: bool) -> None:
        """Print to a console.

        Args:
            console: where to.
            playground: saves the pictures.
            inline: draw pictures in the terminal, too, if it has 24-bit colour.
        """
        self.console, self.playground, self.inline = console, playground, inline
        self.lock = threading.Lock()
        self.shown: set[tuple[int, str]] = set()

    def __call__(self, exchange: Exchange) -> None:
        """Print what has happened since the last call."""
        with self.lock:
            for number, turn in enumerate(exchange.turns):
                if self._first(number, "turn"):
                    self._turn(number, turn)
                if turn.result is not None and self._first(number, "result"):
                    self.console.print(Text(f"  -> {result_line(turn)}", style="green" if turn.result.image else "red"))
                    if turn.result.image is not None:
                        self.picture(turn.result.image)
            if exchange.trajectory is not None and self._first(0, "end"):
                trajectory = exchange.trajectory
                tokens = sum(turn.num_tokens for turn in trajectory.turns)
                size = f"{tokens} tokens in {len(trajectory.turns)} turns, {trajectory.total_s:.1f} s"
                self.console.print(Text(f"{exchange.status}; {size}", style="dim"))

    def _first(self, number: int, what: str) -> bool:
        known = (number, what) in self.shown
        self.shown.add((number, what))
        return not known

    def _turn(self, number: int, turn: WatchedTurn) -> None:
        title = f"turn {number + 1}" + (" (your code)" if turn.edited else "")
        if thought := thought_of(turn.text):
            self.console.print(Text(thought, style="italic"))
        if turn.parsed.call is not None:
            code = Syntax(turn.parsed.call.code, "python", word_wrap=True, background_color="default")
            self.console.print(Panel(code, title=f"{title}: code on image {turn.parsed.call.image_index}"))
        elif turn.parsed.answer is not None:
            self.console.print(Panel(Text(turn.parsed.answer, style="bold"), title=f"{title}: answer"))
        else:
            said = turn.parsed.error or "neither code nor an answer"
            self.console.print(Panel(Text(turn.text), title=f"{title}: {said.partition('. Write')[0]}", style="yellow"))

    def picture(self, image: Image.Image) -> None:
        """Say where a picture was saved, and draw it if asked to."""
        self.console.print(Text(f"     {self.playground.image_file(image)}", style="dim"))
        if self.inline and self.console.color_system == "truecolor":
            self.console.print(blocks(image))


class Terminal:
    """Questions from a keyboard."""

    def __init__(
        self, playground: Playground, sampling: SamplingConfig, inline: bool = False, console: Console | None = None
    ) -> None:
        """Talk over a console.

        Args:
            playground: answers.
            sampling: of every question.
            inline: draw pictures in blocks.
            console: by default the terminal.
        """
        self.playground, self.sampling, self.inline = playground, sampling, inline
        self.console = console or Console()
        self.image: Image.Image | None = None
        self.last: Exchange | None = None

    def open_image(self, path: Path) -> None:
        """Make a file the current picture.

        Raises:
            ImageError: it is none.
        """
        self.image = decode_image(path)
        self.console.print(Text(f"{path}: {self.image.width}x{self.image.height} pixels", style="dim"))

    def ask(self, question: str) -> Exchange:
        """Ask about the current picture, and print what happens.

        Raises:
            CVLightningError: there is no picture, or the engine failed.
        """
        if self.image is None:
            raise CVLightningError("there is no picture yet; :image FILE opens one (or --image FILE at the start)")
        image = self.image
        return self._watch(lambda watch: self.playground.ask(image, question, self.sampling, watch))

    def _watch(self, start: Callable[[Callable[[Exchange], None]], Exchange]) -> Exchange:
        printer = Printer(self.console, self.playground, self.inline)
        running: list[Exchange] = []

        def watch(exchange: Exchange) -> None:
            running[:] = [exchange]
            printer(exchange)

        def stop() -> None:
            for exchange in running:
                exchange.stop()

        with _interrupts(stop):
            self.last = start(watch)
        return self.last

    def loop(self) -> None:
        """Read questions and commands until the input ends."""
        self.console.print(Text(HELP, style="dim"))
        while True:
            try:
                line = self.console.input("[bold]question> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line in (":quit", ":q"):
                return
            try:
                self._do(line)
            except (CVLightningError, ValueError) as error:
                self.console.print(Text(str(error), style="red"))

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == ":image":
            self.open_image(Path(rest.strip()).expanduser())
        elif command == ":save":
            self.console.print(f"saved in {self.playground.save(self._finished())}", markup=False)
        elif command == ":edit":
            self._edit(rest.strip())
        elif command.startswith(":"):
            self.console.print(HELP, markup=False)
        elif line:
            self.ask(line)

    def _finished(self) -> Exchange:
        if self.last is None:
            raise CVLightningError("nothing was asked yet")
        return self.last

    def _edit(self, number: str) -> None:
        exchange = self._finished()
        with_code = [index for index, turn in enumerate(exchange.turns) if turn.parsed.call is not None]
        index = int(number) - 1 if number.isdecimal() else with_code[-1] if with_code else -1
        if index not in with_code:
            turns = ", ".join(str(at + 1) for at in with_code) or "none"
            raise CVLightningError(f"turn {number or '?'} has no code; turns with code: {turns}")
        call = exchange.turns[index].parsed.call
        assert call is not None
        code = edit_text(call.code)
        self._watch(lambda watch: self.playground.try_code(exchange, index, code, watch))


def edit_text(text: str) -> str:
    """Open a text in $EDITOR (vi) and read it back.

    Raises:
        CVLightningError: the editor cannot be run.
    """
    editor = shlex.split(os.environ.get("EDITOR", "vi"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "snippet.py")
        file.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*editor, str(file)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CVLightningError(f"{editor[0]} cannot edit ({error}); set EDITOR to one that is here") from error
        return file.read_text(encoding="utf-8")


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C stops the answer at its next token; the second one interrupts as usual."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def one_question(terminal: Terminal, question: str, save: bool) -> int:
    """Ask once; the exit code is 0 if it was answered."""
    exchange = terminal.ask(question)
    if save:
        print(f"saved in {terminal.playground.save(exchange)}", file=sys.stderr)
    return 0 if exchange.answer is not None else 1
