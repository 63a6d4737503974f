"""The live report: serves the report of a run to a browser while the run continues.

The server listens on the loopback address and serves only the page and the images of the run's stores.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image

from cv_lightning.evaluation.runs import Run, load_run
from cv_lightning.images import decode_image
from cv_lightning.trajectory.store import IMAGES
from cv_lightning.types import CVLightningError, DataError
from cv_lightning.viewer.content import RunSections
from cv_lightning.viewer.pages import environment, render
from cv_lightning.viewer.report import Report, ReportConfig, StoreCache, file_state

PORT = 8765
TRIED_PORTS = 20
IDLE_PER_BUILD = 9
"""Idle time after a build, in build times: reading a growing run takes at most a tenth of one core."""
SHOWN_FILES = ("trajectories/*.jsonl", "metrics.csv", "*.json", "*config.yaml")
IMAGE_PATH = re.compile(rf"(?P<store>.*?)/?{IMAGES}/(?P<file>[0-9a-f]{{8,128}}\.(?P<kind>png|webp))")
IMAGE_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
HOSTS = ("127.0.0.1", "localhost")


class RenderedReport(NamedTuple):
    """The report of one state of a run."""

    state: str
    html: bytes
    data: bytes
    """JSON for an open page."""
    stores: frozenset[str]
    """Paths of the stores below the run's folder."""


class LiveReport:
    """A run's report, built again whenever its files have changed; the run's folder may still be empty."""

    def __init__(
        self, folder: Path, config: ReportConfig, sections_of: Callable[[Run], RunSections] = RunSections
    ) -> None:
        self.folder = folder
        self.config = config
        self.sections_of = sections_of
        self._cache = StoreCache()
        self._lock = threading.Lock()
        self._page: RenderedReport | None = None
        self._rest_until = 0.0

    def page(self) -> RenderedReport:
        """The page, built at most as often as `IDLE_PER_BUILD` allows; DataError while there is no run."""
        with self._lock:
            begun = time.monotonic()
            if self._page is None or begun > self._rest_until:
                state = self._state()
                if self._page is None or self._page.state != state:
                    self._page = self._build(state)
                self._rest_until = time.monotonic() + IDLE_PER_BUILD * (time.monotonic() - begun)
            return self._page

    def _state(self) -> str:
        found = (path for pattern in SHOWN_FILES for path in self.folder.glob(f"**/{pattern}"))
        files = [path for path in found if not path.name.startswith(".")]  # the owner's heartbeat changes no page
        return hashlib.sha256(repr(file_state(files)).encode()).hexdigest()[:16]

    def _build(self, state: str) -> RenderedReport:
        run = load_run(self.folder)
        page = self.folder / "index.html"
        report = Report(run, self.config, page, self.sections_of(run), self._cache, is_live=True)
        report.data["state"] = state
        return RenderedReport(
            state=state,
            html=report.html().encode("utf-8", "backslashreplace"),
            data=json.dumps(report.data, ensure_ascii=False).encode("utf-8", "backslashreplace"),
            stores=frozenset(store.name for store in run.stores),
        )

    def image(self, path: str, size: str | None) -> tuple[bytes, str]:
        """Bytes and media type of an image of the run's stores, scaled down to `WIDTHxHEIGHT` if given.

        Raises:
            FileNotFoundError: The unquoted URL path is not that of an image.
            DataError: The file is damaged.
        """
        match = IMAGE_PATH.fullmatch(path.removeprefix("/"))
        if match is None or (match["store"] or ".") not in self.page().stores:
            raise FileNotFoundError(path)
        file = self.folder / match["store"] / IMAGES / match["file"]
        target = IMAGE_SIZE.fullmatch(size or "")
        if target is None:
            return file.read_bytes(), f"image/{match['kind']}"
        if not file.is_file():
            raise FileNotFoundError(path)
        image = decode_image(file)
        width, height = (max(1, min(int(side), own)) for side, own in zip(target.groups(), image.size, strict=True))
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
        return buffer.getvalue(), "image/png"


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the page, its data and the run's images."""

    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer one request."""
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
            # Another site's page, whose name was pointed to this machine, must not read the run.
            return self._answer(HTTPStatus.FORBIDDEN, b"only for this machine", "text/plain")
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        report = self.server.report
        try:
            if url.path == "/":
                self._answer(HTTPStatus.OK, report.page().html, "text/html; charset=utf-8")
            elif url.path == "/data.json":
                page = report.page()
                if query.get("have") == [page.state]:
                    return self._answer(HTTPStatus.NO_CONTENT, b"", "application/json")
                self._answer(HTTPStatus.OK, page.data, "application/json")
            else:
                data, kind = report.image(unquote(url.path), query.get("size", [None])[0])
                self._answer(HTTPStatus.OK, data, kind, keep="max-age=31536000, immutable")
        except FileNotFoundError:
            self._answer(HTTPStatus.NOT_FOUND, b"not here", "text/plain")
        except CVLightningError as error:
            self._answer(HTTPStatus.OK, _waiting(error), "text/html; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, keep: str = "no-store") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", keep)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def _waiting(error: CVLightningError) -> bytes:
    """A page that reloads until there is a run, and shows the error until then."""
    page = environment().get_template("waiting.html.jinja")
    return render(page, kind="live report", title="No run yet", reason=str(error)).encode("utf-8", "backslashreplace")


class ReportServer(ThreadingHTTPServer):
    """Server of one run on the loopback address; OSError if the port is in use, port 0 takes any free one."""

    daemon_threads = True

    def __init__(self, report: LiveReport, port: int) -> None:
        self.report = report
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Report all errors but a closed connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def open_server(report: LiveReport, port: int) -> ReportServer:
    """Open a server on a port or on one of the next ones; DataError if none is free."""
    for number in range(port, min(port + TRIED_PORTS, 65536)):
        try:
            return ReportServer(report, number)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise DataError(f"--port {port}: it and the ports behind it are in use; give another, or 0 for any free one")


def serve_report(report: LiveReport, port: int, open_browser: Callable[[str], object] | None = None) -> None:
    """Serve a run until Ctrl-C on a port or on the next free one; `open_browser` gets the address."""
    server = open_server(report, port)
    address = f"http://127.0.0.1:{server.server_port}/"
    if port not in (0, server.server_port):
        print(f"port {port} is in use, took {server.server_port}", file=sys.stderr)
    print(f"{address}  ({report.folder}; Ctrl-C stops it)", flush=True)
    if open_browser is not None:
        open_browser(address)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
