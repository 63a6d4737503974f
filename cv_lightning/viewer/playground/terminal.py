"""The playground in a terminal: prints turns as they happen, and saves images or draws them in blocks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.panel import Panel
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from cv_lightning.engines import SamplingConfig
from cv_lightning.images import decode_image
from cv_lightning.rewards.markup import THINK_CLOSE, THINK_OPEN
from cv_lightning.types import CVLightningError, ToolStatus
from cv_lightning.viewer.playground.examples import Example
from cv_lightning.viewer.playground.session import Exchange, Playground, Watch, WatchedTurn

HELP = """A question is asked about the current image. Ctrl-C stops an answer.
  :image FILE   another image        :edit [N]   edit the code of turn N (the last) and continue from its result
  :save         keep the trajectory  :example N  open an example and ask its question (without N: list them)
  :quit         (or Ctrl-D)"""
SHOWN_EXAMPLES = 2
"""Examples that are printed at the start."""
BLOCKS = 48
"""Width of an image drawn in blocks, in characters."""


def thought_of(text: str) -> str:
    """The thought of a turn, without tags."""
    return text.partition(THINK_CLOSE)[0].removeprefix(THINK_OPEN).strip() if THINK_CLOSE in text else ""


def result_line(turn: WatchedTurn) -> str:
    """The result of a turn's call in one line."""
    result = turn.result
    if result is None:
        return ""
    ran = ", ".join(operation.name for operation in result.operations) or "no image operation"
    took = f"{1000 * result.elapsed_s:.0f} ms"
    sizes = ", ".join(f"{made.width}x{made.height}" for made in result.made)
    if not sizes:
        return f"{result.status.value}: {result.error or 'text'} (ran: {ran}; {took})"
    return f"{sizes} pixels (ran: {ran}; {took})"


def blocks(image: Image.Image, width: int = BLOCKS) -> Text:
    """An image for terminals with 24-bit colour; each character shows two pixels, one above the other."""
    height = max(2, 2 * round(width * image.height / image.width / 2))
    colours = np.asarray(image.convert("RGB").resize((width, height))).tolist()
    text = Text()
    for upper, lower in zip(colours[::2], colours[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text


class Terminal:
    """Reads questions and commands from a keyboard, and prints the answers.

    `inline` also draws images in blocks, if the terminal has 24-bit colour.
    """

    def __init__(
        self,
        playground: Playground,
        sampling: SamplingConfig,
        inline: bool = False,
        console: Console | None = None,
        examples: Sequence[Example] = (),
    ) -> None:
        self.playground, self.sampling, self.examples = playground, sampling, examples
        self.console = console or Console()
        self.inline = inline and self.console.color_system == "truecolor"
        self.image: Image.Image | None = None
        self.last: Exchange | None = None
        self._lock = threading.Lock()
        self._shown: set[tuple[int, str]] = set()
        """Parts of the current exchange that are printed: number of the turn, and the part."""

    def open_image(self, path: Path) -> None:
        """Make a file the current image; ImageError if it is not one."""
        self.image = decode_image(path)
        self.console.print(Text(f"{path}: {self.image.width}x{self.image.height} pixels", style="dim"))

    def list_examples(self, most: int) -> None:
        """Print at most this many examples."""
        for number, example in enumerate(self.examples[:most], 1):
            self.console.print(f":example {number}   {example.name}: {example.question}", markup=False, style="dim")

    def ask(self, question: str) -> Exchange:
        """Ask about the current image, and print the answer; CVLightningError without an image."""
        if self.image is None:
            raise CVLightningError("there is no image yet; :image FILE opens one (or --image FILE at the start)")
        image = self.image
        return self._watch(lambda watch: self.playground.ask(image, question, self.sampling, watch))

    def _watch(self, start: Callable[[Watch], Exchange]) -> Exchange:
        running: list[Exchange] = []
        self._shown.clear()

        def watch(exchange: Exchange) -> None:
            running[:] = [exchange]
            with self._lock:  # called from the engine's and the sandbox's threads
                self._show(exchange)

        def stop() -> None:
            for exchange in running:
                exchange.stop()

        with _interrupts(stop):
            self.last = start(watch)
        return self.last

    # ------------------------------------------------------------------ output
    def _show(self, exchange: Exchange) -> None:
        """Print what has happened since the last call."""
        for number, turn in enumerate(exchange.turns):
            if self._is_new(number, "turn"):
                self._show_turn(number, turn)
            if turn.result is not None and self._is_new(number, "result"):
                is_ok = turn.result.status is ToolStatus.OK
                self.console.print(Text(f"  -> {result_line(turn)}", style="green" if is_ok else "red"))
                if turn.result.text:
                    self.console.print(Panel(Text(turn.result.text.rstrip("\n")), title="printed"))
                for image in turn.result.made:
                    self.console.print(Text(f"     {self.playground.image_file(image)}", style="dim"))
                    if self.inline:
                        self.console.print(blocks(image))
        if exchange.trajectory is not None and self._is_new(0, "end"):
            trajectory = exchange.trajectory
            tokens = sum(turn.num_tokens for turn in trajectory.turns)
            size = f"{tokens} tokens in {len(trajectory.turns)} turns, {trajectory.total_s:.1f} s"
            self.console.print(Text(f"{exchange.status}; {size}", style="dim"))

    def _is_new(self, number: int, part: str) -> bool:
        is_new = (number, part) not in self._shown
        self._shown.add((number, part))
        return is_new

    def _show_turn(self, number: int, turn: WatchedTurn) -> None:
        title = f"turn {number + 1}" + (" (your code)" if turn.edited else "")
        if thought := thought_of(turn.text):
            self.console.print(Text(thought, style="italic"))
        if turn.parsed.call is not None:
            code = Syntax(turn.parsed.call.code, "python", word_wrap=True, background_color="default")
            self.console.print(Panel(code, title=f"{title}: code on image {turn.parsed.call.image_index}"))
        elif turn.parsed.answer is not None:
            self.console.print(Panel(Text(turn.parsed.answer, style="bold"), title=f"{title}: answer"))
        else:
            error = (turn.parsed.error or "neither code nor an answer").partition(". Write")[0]
            self.console.print(Panel(Text(turn.text), title=f"{title}: {error}", style="yellow"))

    # ------------------------------------------------------------------ commands
    def loop(self) -> None:
        """Read questions and commands until the input ends."""
        self.console.print(Text(HELP, style="dim"))
        self.list_examples(SHOWN_EXAMPLES)
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
        elif command == ":example":
            self._example(rest.strip())
        elif command.startswith(":"):
            self.console.print(HELP, markup=False)
        elif line:
            self.ask(line)

    def _example(self, number: str) -> None:
        if not number:
            return self.list_examples(len(self.examples))
        if not number.isdecimal() or not 1 <= int(number) <= len(self.examples):
            raise CVLightningError(f"there is no example {number}; there are {len(self.examples)}, see :example")
        example = self.examples[int(number) - 1]
        self.image = example.load()
        self.console.print(Text(f"{example.name}: {example.question}", style="dim"))
        if self.inline:
            self.console.print(blocks(self.image))
        self.ask(example.question)

    def _finished(self) -> Exchange:
        if self.last is None:
            raise CVLightningError("nothing was asked yet")
        return self.last

    def _edit(self, number: str) -> None:
        exchange = self._finished()
        calls = {index: turn.parsed.call for index, turn in enumerate(exchange.turns) if turn.parsed.call is not None}
        index = int(number) - 1 if number.isdecimal() else max(calls, default=-1)
        if index not in calls:
            turns = ", ".join(str(at + 1) for at in calls) or "none"
            raise CVLightningError(f"turn {number or '?'} has no code; turns with code: {turns}")
        code = edit_text(calls[index].code)
        self._watch(lambda watch: self.playground.try_code(exchange, index, code, watch))


def edit_text(text: str) -> str:
    """Edit a text in $EDITOR (by default vi); CVLightningError if that cannot be run."""
    editor = shlex.split(os.environ.get("EDITOR", "vi"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "snippet.py")
        file.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*editor, str(file)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CVLightningError(f"{editor[0]} cannot edit ({error}); set EDITOR to an installed editor") from error
        return file.read_text(encoding="utf-8")


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Context manager in which the first Ctrl-C calls `stop`; the second one interrupts as usual."""

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
    """Ask once; returns exit code 0 if the question was answered, else 1."""
    exchange = terminal.ask(question)
    if save:
        print(f"saved in {terminal.playground.save(exchange)}", file=sys.stderr)
    return 0 if exchange.answer is not None else 1
