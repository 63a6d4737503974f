"""The sandbox as the rest of the project uses it: an image and a snippet in, a `SandboxResult` out."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from cv_lightning.environment import FILE_ONLY
from cv_lightning.images import content_hash, is_usable_size, to_rgb
from cv_lightning.sandbox import plan
from cv_lightning.sandbox.config import GENERAL_LAYERS, SandboxConfig
from cv_lightning.sandbox.pool import ChildResult, Job, Pool
from cv_lightning.sandbox.reading import read_outcome
from cv_lightning.sandbox.wire import MAX_SHOWN, write_pixels
from cv_lightning.types import SandboxError, SandboxResult, ToolStatus

log = logging.getLogger(__name__)
F_ADD_SEALS, SEAL, SHRINK, GROW, FUTURE_WRITE = 1033, 1, 2, 4, 16
"""F_SEAL_WRITE is not used: it may fail with EBUSY while the kernel holds a page. FUTURE_WRITE is as good for a new
file, which no process has mapped."""

INVALID_CHARACTERS = re.compile("[\0\ud800-\udfff]")
"""Null characters and lone surrogates."""
SCIENCE_NAMES = ("skimage", "scipy", "matplotlib")
"""Code that names one of these runs on a server that has them loaded."""


Key = tuple[str, str, int]
"""Of a result in the cache: hash of the image, code, images that may be shown."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A snippet that a child has to run."""

    image: Image.Image
    """RGB."""
    code: str
    key: Key | None
    """Key in the cache, if there is one."""
    max_shown: int


class Sandbox:
    """Runs model-written code, one fresh sealed child per snippet; see docs/sandbox.md.

    Names and arguments of operations that do not move pixels are taken from the child, which can forge them; a map to
    the input is believed only where the pixels agree.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        if self.config.disabled_layers and not self.config.allow_unsafe:
            raise ValueError("sandbox.disabled_layers needs sandbox.allow_unsafe=true")
        self._pool: Pool | None = None
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(2, "sandbox")
        """Reads and proves results: of 16 megapixels each takes hundreds of megabytes meanwhile."""
        self._cache: OrderedDict[Key, SandboxResult] = OrderedDict()
        self._cached_bytes = 0
        self._counts = {"plan": 0, "process": 0, "cache": 0, "refused": 0}

    # ---------------------------------------------------------------------------------------- start and end
    def start(self) -> None:
        """Start the fork servers and test them; does nothing if they run.

        Raises:
            SandboxError: A required layer is missing or a test case was not contained, and `allow_unsafe` is off.
        """
        from cv_lightning.sandbox.cases import START_CASES, run_cases

        with self._lock:
            if self._pool is not None:
                return
            self._pool = pool = Pool(self.config)
            atexit.register(self.close)
        try:
            pool.start()
            missing = [name for name in GENERAL_LAYERS if not self.layers.get(name, "").startswith("active")]
            self._log_layers()
            if missing and not self.config.allow_unsafe:
                lacking = f"the sandbox lacks {', '.join(missing)} ({self.layers})"
                raise SandboxError(f"{lacking}; fix the host or set sandbox.allow_unsafe=true")
            # With layers switched off for a measurement the hostile cases would do real harm.
            cases = () if self.config.disabled_layers or missing else START_CASES
            failed = [f"{case.name}: {case.got}" for case in run_cases(self, cases) if not case.ok]
            if failed and not self.config.allow_unsafe:
                raise SandboxError(f"the sandbox's self-test failed: {'; '.join(failed)}")
        except BaseException:
            self.close()
            raise

    def _log_layers(self) -> None:
        """Log how many isolation layers are active and which are not; the run's log file also has their states."""
        states = self.layers
        others = [name for name, state in states.items() if not state.startswith("active")]
        said = f" (not active: {', '.join(others)})" if others else ""
        log.info("sandbox: %d of %d isolation layers active%s", len(states) - len(others), len(states), said)
        listed = ", ".join(f"{name}: {state}" for name, state in states.items())
        log.info("sandbox layers: %s", listed, extra={FILE_ONLY: True})

    def close(self) -> None:
        """End all children and fork servers. May be called twice; `start` works again afterwards."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
            atexit.unregister(self.close)

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def layers(self) -> dict[str, str]:
        """State of every isolation layer: `active (..)`, `unavailable (why)` or `off`. Empty before `start`."""
        return dict(self._pool.report) if self._pool else {}

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the start (snippets by executor, timeouts, resent and lost jobs, restarts), and the load."""
        pool = self._pool
        return {**self._counts, **pool.counts, **pool.load} if pool else dict(self._counts)

    def server_pids(self) -> list[int]:
        """Process ids of the fork servers."""
        return self._pool.server_pids if self._pool else []

    def child_pids(self) -> list[int]:
        """Process ids of the fork servers' children: those that run snippets, and idle spares."""
        pids: list[int] = []
        for server in self.server_pids():
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
        return pids

    # ---------------------------------------------------------------------------------------- running
    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """Run a snippet on an image without blocking the event loop; cancelling the task kills the child.

        Args:
            image: Any mode; model code gets it as RGB and cannot change it.
            code: Python with `image` in scope.
            owner: Trajectory id; waiting snippets of different owners take turns.
            max_shown: Images that the snippet may show, at most 16; what it prints is returned, too. 0: what it prints
                is thrown away, and it must make one image.

        Raises:
            SandboxError: The sandbox was not started, or is closed.
            ValueError: `max_shown` is not possible.
        """
        request = self._begin(image, code, max_shown)
        if isinstance(request, SandboxResult):
            return request
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(None, self._submit, self._started(), request, owner)
        try:
            job = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(lambda done: _abandon(done.result()))
            raise
        try:
            outcome = await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            _abandon(job)
            raise
        # Shielded, so that the output is closed even if this task is cancelled meanwhile.
        return await asyncio.shield(loop.run_in_executor(self._readers, self._finish, request, outcome))

    def run_sync(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """`run` for callers without an event loop; from any thread."""
        request = self._begin(image, code, max_shown)
        if isinstance(request, SandboxResult):
            return request
        job = self._submit(self._started(), request, owner)
        try:
            outcome = job.future.result()
        except (CancelledError, KeyboardInterrupt):
            _abandon(job)
            raise
        return self._finish(request, outcome)

    def _started(self) -> Pool:
        pool = self._pool
        if pool is None:
            raise SandboxError("the sandbox was not started; call start() first, or use it in a with statement")
        if pool.pid != os.getpid():
            raise SandboxError("the sandbox was started before this process was forked; start one of its own here")
        return pool

    def _begin(self, image: Image.Image, code: str, max_shown: int) -> SandboxResult | _Request:
        """The result if no child is needed (rejected, cached, a cheap plan); else what a child has to run."""
        if not 0 <= max_shown <= MAX_SHOWN:
            raise ValueError(f"max_shown {max_shown}: a snippet can show 0 to {MAX_SHOWN} images")
        max_shown = 0 if self.config.reference_results else max_shown
        rejected = _rejection(image, code, self.config.max_code_chars)
        if rejected is not None:
            self._count("refused")
            return rejected
        rgb = to_rgb(image)
        key = (content_hash(rgb), code, max_shown) if self.config.cache_size else None
        request = _Request(rgb, code, key, max_shown)
        cached = self._cached(request.key)
        if cached is not None:
            self._count("cache")
            return cached
        if self.config.plan_tier and not self.config.reference_results:
            planned = plan.run(rgb, code, self.config)  # a plan prints nothing and shows one image
            if planned is not None:
                self._count("plan")
                return self._remember(request.key, planned)
        return request

    def _submit(self, pool: Pool, request: _Request, owner: str) -> Job:
        image, code = request.image, request.code
        # Without Landlock a child cannot open a file, so everything that it imports must be loaded before.
        closed = "open denied" in pool.report.get("files", "")
        return pool.submit(
            owner=owner,
            size=image.size,
            seed=_seed(image, code),
            make_input=partial(sealed_pixels, image, code.encode()),
            science=closed or any(name in code for name in SCIENCE_NAMES),
            max_shown=request.max_shown,
        )

    def _finish(self, request: _Request, outcome: ChildResult) -> SandboxResult:
        result = read_outcome(request.image, outcome, self.config, request.max_shown)
        self._count("process")
        return self._remember(request.key, result)

    # ---------------------------------------------------------------------------------------- counters and cache
    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _cached(self, key: Key | None) -> SandboxResult | None:
        if key is None:
            return None
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                return None
            self._cache.move_to_end(key)
        return _own_copy(replace(found, executor="cache"))

    def _remember(self, key: Key | None, result: SandboxResult) -> SandboxResult:
        if key is None or result.status not in (ToolStatus.OK, ToolStatus.ERROR) or result.error_kind == "memory":
            return result
        kept = _own_copy(result)
        limit = self.config.cache_mb * 1e6
        with self._lock:
            self._cached_bytes += _num_bytes(kept) - _num_bytes(self._cache.pop(key, None))
            self._cache[key] = kept
            while self._cache and (len(self._cache) > self.config.cache_size or self._cached_bytes > limit):
                self._cached_bytes -= _num_bytes(self._cache.popitem(last=False)[1])
        return result


def _rejection(image: Image.Image, code: str, max_code_chars: int) -> SandboxResult | None:
    """Why a snippet is not run at all; None if it is."""
    if not isinstance(code, str):
        kind, text = "not_text", f"the code is {type(code).__name__}, not text; send Python source as a string"
    elif len(code) > max_code_chars:
        kind = "too_long"
        text = f"the code has {len(code)} characters, at most {max_code_chars}; send a shorter snippet"
    elif INVALID_CHARACTERS.search(code):
        kind, text = "not_text", "the code holds null characters or broken Unicode; send plain Python source"
    elif not isinstance(image, Image.Image):
        kind = "no_image"
        text = f"there is no such image ({type(image).__name__}); use the index of an image that was shown"
    elif not is_usable_size(*image.size):
        kind = "bad_image"
        text = f"the image is {image.width}x{image.height} pixels and cannot be worked on; use another image_index"
    else:
        return None
    return SandboxResult(status=ToolStatus.REJECTED, error=text, error_kind=kind)


def _abandon(job: Job) -> None:
    """Kill the child of a job that its caller has given up, or close what it left."""
    if not job.future.cancel() and job.future.exception() is None:
        job.future.result().close()


def _own_copy(result: SandboxResult) -> SandboxResult:
    earlier = tuple(image.copy() for image in result.earlier)
    return result if result.image is None else replace(result, image=result.image.copy(), earlier=earlier)


def _num_bytes(result: SandboxResult | None) -> int:
    return 0 if result is None else len(result.text) + sum(3 * image.width * image.height for image in result.made)


def sealed_pixels(image: Image.Image, code: bytes = b"") -> int:
    """A sealed memfd that holds the pixels of an RGB image, four bytes each, and then the code."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_pixels(fd, image, piece=1 << 18)
        os.write(fd, code)
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL | SHRINK | GROW | FUTURE_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seed(image: Image.Image, code: str) -> bytes:
    """16 bytes that depend on the code and a sample of the pixels."""
    digest = hashlib.blake2b(code.encode("utf-8", "replace"), digest_size=16)
    digest.update(str(image.size).encode())
    digest.update(image.resize((min(64, image.width), min(64, image.height)), Image.Resampling.NEAREST).tobytes())
    return digest.digest()
