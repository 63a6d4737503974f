"""The playground in a browser (NiceGUI): upload an image, ask, watch, stop, edit code and run it again, save.

It is for one user on one machine: the page is served on 127.0.0.1 only, and one question is answered at a time. Text
of the model is shown as text, never as HTML.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from nicegui import app, events, ui
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cv_lightning import __version__
from cv_lightning.engines import SamplingConfig
from cv_lightning.images import decode_image
from cv_lightning.trajectory.store import encode_image
from cv_lightning.types import CVLightningError, ToolStatus
from cv_lightning.viewer.pages import colours
from cv_lightning.viewer.playground.examples import Example, thumbnail_of
from cv_lightning.viewer.playground.session import Exchange, Playground, Watch, WatchedTurn
from cv_lightning.viewer.playground.terminal import result_line, thought_of

HOST = "127.0.0.1"
MAX_SHOWN_PX = 1024
"""Longest side of an image on the page; model and sandbox get the image in full size."""
MAX_UPLOAD_BYTES = 50_000_000
REFRESH_S = 0.15
EXAMPLE_PX = 72
PRIMARY = "#0b5cad"
LOOK = """
body { background: var(--paper); color: var(--ink); }
.q-layout .top { background: var(--card); color: var(--ink); border-bottom: 1px solid var(--line); box-shadow: none; }
.q-footer.top { border-top: 1px solid var(--line); border-bottom: 0; }
.brand { font-weight: 700; }
.soft { color: var(--soft); }
.q-card { background: var(--card); color: var(--ink); border: 1px solid var(--line); box-shadow: var(--shadow); }
.q-btn--outline { color: var(--accent) !important; }
.example { border: 1px solid var(--line); border-radius: 8px; color: var(--ink) !important; }
.example .q-img__image { image-rendering: pixelated; }
"""
"""Header, cards and footer in the colours of all pages, on top of NiceGUI's own style."""


def data_uri(image: Image.Image) -> str:
    """An image as a data URL for the page, scaled down if it is large."""
    shown = image.copy()
    shown.thumbnail((MAX_SHOWN_PX, MAX_SHOWN_PX))
    return "data:image/png;base64," + base64.b64encode(encode_image(shown)).decode()


class ChatPage:
    """The page of one browser tab. `engine` is the one thread that steps the engine."""

    def __init__(
        self,
        playground: Playground,
        sampling: SamplingConfig,
        engine: ThreadPoolExecutor,
        image: Image.Image | None,
        examples: Sequence[Example] = (),
    ) -> None:
        self.playground, self.sampling, self.engine = playground, sampling, engine
        self.image, self.examples = image, examples
        self.exchange: Exchange | None = None
        self.busy = False
        self.results: dict[int, ui.column] = {}
        """Places of the results that are not drawn yet, by turn."""
        ui.page_title("cv_lightning playground")
        ui.colors(primary=PRIMARY)
        ui.dark_mode(None)  # as the browser prefers
        ui.add_css(colours() + LOOK)
        with ui.header().classes("items-baseline top"):
            ui.label("cv_lightning playground").classes("brand")
            ui.label(playground.model).classes("text-caption soft")
        with ui.row().classes("w-full items-start"):
            with ui.column().classes("w-80"):
                self._build_form()
            with ui.column().classes("grow min-w-64"):
                self.status = ui.label("Upload an image or choose an example, and ask about it.").props("role=status")
                self.turns = ui.column().classes("w-full")
        with ui.footer().classes("top"):
            ui.label(f"Made by cv_lightning {__version__}. Served on this machine only.").classes("text-caption soft")
        ui.timer(REFRESH_S, self.refresh)
        self.show_image()

    def _build_form(self) -> None:
        ui.upload(
            label="Image", auto_upload=True, max_files=1, max_file_size=MAX_UPLOAD_BYTES, on_upload=self.take_upload
        ).props("accept=image/*").classes("w-full")
        self.preview = ui.image().props('alt="the image that is asked about"').classes("w-full border")
        self.size = ui.label().classes("text-caption")
        self.question = ui.textarea("Question").props("autogrow").classes("w-full")
        self.temperature = ui.number("Temperature", value=self.sampling.temperature, min=0, step=0.1)
        with ui.row():
            self.ask_button = ui.button("Ask", on_click=self.ask)
            self.stop_button = ui.button("Stop", on_click=self.stop).props("outline")
            self.save_button = ui.button("Save", on_click=self.save).props("outline")
        if self.examples:
            ui.label("Examples").classes("text-subtitle2")
            with ui.row().classes("gap-2"):
                for example in self.examples:
                    self._build_example(example)

    def _build_example(self, example: Example) -> None:
        """A button with the example's image, name and question."""
        image = thumbnail_of(example, EXAMPLE_PX)
        if image is None:
            return
        with (
            ui.button(on_click=partial(self.use_example, example), color=None)
            .props("flat no-caps dense")
            .classes("example")
        ):
            with ui.column().classes("items-center gap-1"):
                ui.image(data_uri(image)).props('alt="" fit=contain').style(
                    f"width: {EXAMPLE_PX}px; height: {EXAMPLE_PX}px"
                )
                ui.label(example.name).classes("text-caption")
            ui.tooltip(example.question)

    # ------------------------------------------------------------------ what the user does
    async def take_upload(self, event: events.UploadEventArguments) -> None:
        """Use an uploaded image."""
        try:
            self.image = decode_image(await event.file.read())
        except CVLightningError as error:
            ui.notify(f"{event.file.name}: {error}", type="negative")
        event.sender.reset()  # type: ignore[attr-defined]  # ready for the next one
        self.show_image()

    def use_example(self, example: Example) -> None:
        """Take the image and the question of an example."""
        self.image = example.load()
        self.question.set_value(example.question)
        self.show_image()

    def show_image(self) -> None:
        """Show the image that is asked about."""
        self.preview.set_visibility(self.image is not None)
        if self.image is not None:
            self.preview.set_source(data_uri(self.image))
            self.size.set_text(f"{self.image.width}x{self.image.height} pixels")

    async def ask(self) -> None:
        """Ask the question about the image."""
        question = self.question.value.strip()
        if self.image is None or not question:
            ui.notify("Give an image and a question first.", type="warning")
            return
        sampling = replace(self.sampling, temperature=float(self.temperature.value or 0))
        await self._run(partial(self.playground.ask, self.image, question, sampling))

    async def try_code(self, index: int, editor: ui.codemirror) -> None:
        """Run a turn's edited code, and let the model continue from its result."""
        if self.exchange is not None:
            await self._run(partial(self.playground.try_code, self.exchange, index, editor.value or ""))

    async def _run(self, start: Callable[[Watch], Exchange]) -> None:
        def watch(exchange: Exchange) -> None:
            self.exchange = exchange  # the timer draws what is new

        self.busy, self.exchange = True, None
        self.turns.clear()
        self.results.clear()
        try:
            await asyncio.get_running_loop().run_in_executor(self.engine, start, watch)
        except CVLightningError as error:
            ui.notify(str(error), type="negative")
        finally:
            self.busy = False

    def stop(self) -> None:
        """End the answer after the engine's next step."""
        if self.exchange is not None:
            self.exchange.stop()

    def save(self) -> None:
        """Save the trajectory in the store."""
        if self.exchange is not None:
            ui.notify(f"saved in {self.playground.save(self.exchange)}")

    # ------------------------------------------------------------------ what is shown
    def refresh(self) -> None:
        """Draw what has happened since the last call."""
        ended = self.exchange is not None and self.exchange.trajectory is not None and not self.busy
        self.ask_button.set_enabled(not self.busy)
        self.stop_button.set_enabled(self.busy)
        self.save_button.set_enabled(ended)
        if self.exchange is None:
            return
        self.status.set_text(self.exchange.status)
        for index, turn in enumerate(self.exchange.turns):
            if index >= len(self.turns.default_slot.children):
                with self.turns:
                    self._draw_turn(index, turn)
            if turn.result is not None and index in self.results:
                with self.results.pop(index):
                    self._draw_result(index, turn)

    def _draw_turn(self, index: int, turn: WatchedTurn) -> None:
        call, answer = turn.parsed.call, turn.parsed.answer
        what = f"code on image {call.image_index}" if call else "answer" if answer is not None else "neither"
        with ui.card().classes("w-full"):
            ui.label(f"Turn {index + 1}: {what}{' (your code)' if turn.edited else ''}").classes("text-subtitle2")
            if thought := thought_of(turn.text):
                ui.label(thought).classes("italic whitespace-pre-wrap")
            if call is not None:
                editor = ui.codemirror(call.code, language="Python", line_wrapping=True).classes("w-full h-auto")
                button = ui.button("Run this code instead", on_click=partial(self.try_code, index, editor))
                button.props("outline dense").bind_enabled_from(self, "busy", backward=lambda busy: not busy)
                self.results[index] = ui.column()
            elif answer is not None:
                ui.label(answer).classes("text-h5 whitespace-pre-wrap answer")
            else:
                ui.label(turn.text).classes("whitespace-pre-wrap")
                ui.label(turn.parsed.error or "").classes("text-negative whitespace-pre-wrap")

    def _draw_result(self, index: int, turn: WatchedTurn) -> None:
        assert turn.result is not None
        is_ok = turn.result.status is ToolStatus.OK
        ui.label(result_line(turn)).classes("text-positive" if is_ok else "text-negative")
        if turn.result.text:
            ui.label(turn.result.text).classes("printed whitespace-pre-wrap font-mono")
        for image in turn.result.made:
            width = min(image.width, 384)
            shown = ui.image(data_uri(image)).props(f'alt="what the code of turn {index + 1} made" fit=contain')
            shown.classes("result border").style(f"width: {max(width, 96)}px; image-rendering: pixelated")


# ------------------------------------------------------------------------------------------------ server
def check_port(port: int) -> None:
    """Check that a port is free, before a model is loaded; CVLightningError if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise CVLightningError(
                f"--port {port} on {HOST} cannot be used ({error.strerror}); give another"
            ) from error


def serve(
    playground: Playground,
    sampling: SamplingConfig,
    port: int,
    image: Path | None = None,
    examples: Sequence[Example] = (),
) -> None:
    """Serve the page on a port of 127.0.0.1 until Ctrl-C, with a first image and examples if they are given."""
    first = decode_image(image) if image is not None else None
    logging.getLogger("nicegui").setLevel(logging.WARNING)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # against DNS rebinding
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine") as engine:
        print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
        ui.run(
            lambda: ChatPage(playground, sampling, engine, first, examples),
            host=HOST,
            port=port,
            title="cv_lightning playground",
            show=False,
            reload=False,
            show_welcome_message=False,
        )
