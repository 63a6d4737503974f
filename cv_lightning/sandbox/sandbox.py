"""The sandbox as the rest of the project sees it: an image and a snippet in, a `SandboxResult` out."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from PIL import Image

from cv_lightning.images import content_hash, is_usable_size, to_rgb
from cv_lightning.sandbox import plan
from cv_lightning.sandbox.config import GENERAL_LAYERS, SandboxConfig
from cv_lightning.sandbox.pool import ChildResult, Job, Pool
from cv_lightning.sandbox.reading import read_outcome
from cv_lightning.sandbox.wire import FLAG_PLAN, FLAG_REFERENCE
from cv_lightning.types import SandboxError, SandboxResult, ToolStatus

log = logging.getLogger(__name__)
F_ADD_SEALS, SEAL, SHRINK, GROW, FUTURE_WRITE = 1033, 1, 2, 4, 16
"""Not F_SEAL_WRITE, which waits until nothing in the kernel holds a page and may fail with EBUSY: as nobody has mapped
the new file, no future writing is no writing at all."""
MAX_WORKER_MS = 500.0
"""Plans that are estimated to take longer run in a child, whose CPU time is limited."""

SCIENCE_NAMES = ("skimage", "scipy", "matplotlib")
"""Code that names one of these runs on a server that has them loaded."""


@dataclass(slots=True)
class _Run:
    """A snippet that needs another process."""

    image: Image.Image
    """RGB."""
    code: str
    key: tuple[str, str] | None
    """In the cache, if there is one."""
    as_plan: bool
    """Goes to a warm worker; cleared if that cannot execute it."""


class Sandbox:
    """Runs what a model wrote, one fresh sealed child per snippet; see docs/sandbox.md.

    What remains trusted: labels and arguments of operations that leave geometry alone are the child's word (it can
    forge them); the map to the input is believed only where the pixels agree.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        if self.config.disabled_layers and not self.config.allow_unsafe:
            raise ValueError("sandbox.disabled_layers needs sandbox.allow_unsafe=true")
        self._pool: Pool | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None
        """Results are read and proven beside the queue, so that a large one holds up no snippet."""
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], SandboxResult] = OrderedDict()
        self._cached_bytes = 0
        self._counts = {"plan": 0, "plan_worker": 0, "process": 0, "cache": 0, "refused": 0}

    # ---------------------------------------------------------------------------------------- life
    def start(self) -> None:
        """Start the fork servers and test them; does nothing if they run.

        Raises:
            SandboxError: a required layer is missing or a test case was not contained, and `allow_unsafe` is off.
        """
        from cv_lightning.sandbox.selftest import START_CASES, run_cases

        with self._lock:
            if self._pool is not None:
                return
            pool = Pool(self.config)
            self._pool = pool
            self._executor = ThreadPoolExecutor(2, thread_name_prefix="sandbox-submit")
            self._readers = ThreadPoolExecutor(2, thread_name_prefix="sandbox-read")
            atexit.register(self.close)
        try:
            pool.start()
            missing = [name for name in GENERAL_LAYERS if not self.layers.get(name, "").startswith("active")]
            log.info("sandbox layers: %s", ", ".join(f"{name}: {state}" for name, state in self.layers.items()))
            if missing and not self.config.allow_unsafe:
                lacking = f"the sandbox lacks {', '.join(missing)} ({self.layers})"
                raise SandboxError(f"{lacking}; mend the host or set sandbox.allow_unsafe=true")
            # With layers switched off for a measurement the hostile cases would really hit.
            cases = () if self.config.disabled_layers or missing else START_CASES
            failed = [case for case in run_cases(self, cases) if not case.ok]
            if failed and not self.config.allow_unsafe:
                raise SandboxError(
                    "the sandbox's self-test failed: " + "; ".join(f"{case.name}: {case.got}" for case in failed)
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all children and fork servers; may be called twice, and again started after."""
        with self._lock:
            pool, self._pool = self._pool, None
            executor, self._executor = self._executor, None
            readers, self._readers = self._readers, None
        if pool is not None:
            pool.close()
            atexit.unregister(self.close)
        for threads in (executor, readers):
            if threads is not None:
                threads.shutdown(wait=False)

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layers(self) -> dict[str, str]:
        """State of every isolation layer: `active (..)`, `unavailable (why)` or `off`. Empty before `start`."""
        return dict(self._pool.report) if self._pool is not None else {}

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the start: jobs by tier, timeouts, resent and lost jobs, restarts; the present load."""
        tiers = ("plan", "process")
        counts: dict[str, float] = {f"{name}_tier" if name in tiers else name: v for name, v in self._counts.items()}
        if self._pool is not None:
            counts.update(self._pool.counts)
            counts.update(self._pool.load)
        return counts

    def server_pids(self) -> list[int]:
        """Processes of the fork servers."""
        return self._pool.server_pids if self._pool is not None else []

    def child_pids(self) -> list[int]:
        """Processes under the fork servers: children that run snippets, idle spares, warm workers."""
        pids: list[int] = []
        for server in self.server_pids():
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
        return pids

    # ---------------------------------------------------------------------------------------- running
    async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """Run a snippet on an image without blocking the event loop; cancelling the task kills the child.

        Args:
            image: any mode; model code gets it as RGB and cannot change it.
            code: Python with `image` in scope.
            owner: trajectory id; waiting jobs of different owners take turns.

        Raises:
            SandboxError: the sandbox was not started, or is closed.
        """
        begun = self._begin(image, code)
        if isinstance(begun, SandboxResult):
            return begun
        pool, executor, readers = self._running()
        loop = asyncio.get_running_loop()
        while True:
            submitted = loop.run_in_executor(executor, self._submit, pool, begun, owner)
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
            # Shielded, so that the output is closed even if nobody waits any more.
            result = await asyncio.shield(loop.run_in_executor(readers, self._finish, begun, outcome))
            if result is not None:
                return result

    def run_sync(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """`run` for callers without an event loop; from any thread."""
        begun = self._begin(image, code)
        if isinstance(begun, SandboxResult):
            return begun
        pool, _, _ = self._running()
        while True:
            job = self._submit(pool, begun, owner)
            try:
                outcome = job.future.result()
            except (CancelledError, KeyboardInterrupt):
                _abandon(job)
                raise
            result = self._finish(begun, outcome)
            if result is not None:
                return result

    def _running(self) -> tuple[Pool, ThreadPoolExecutor, ThreadPoolExecutor]:
        pool, executor, readers = self._pool, self._executor, self._readers
        if pool is None or executor is None or readers is None:
            raise SandboxError("the sandbox was not started; call start() first, or use it in a with statement")
        if pool.pid != os.getpid():
            raise SandboxError("the sandbox was started before this process was forked; start one of its own here")
        return pool, executor, readers

    def _begin(self, image: Image.Image, code: str) -> SandboxResult | _Run:
        """The result if it needs no other process (refused, cached, a cheap plan); else what is to be run."""
        refused = self._refusal(image, code)
        if refused is not None:
            self._count("refused")
            return refused
        rgb = to_rgb(image)
        key = (content_hash(rgb), code) if self.config.cache_size else None
        found = self._recall(key)
        if found is not None:
            self._count("cache")
            return found
        as_plan = False
        if self.config.plan_tier and not self.config.reference_results:
            planned = plan.run(rgb, code, self.config)
            if planned is not None:
                self._count("plan")
                return self._remember(key, planned)
            prepared = plan.prepare(code, rgb.size)
            # A plan that was cheap enough has just failed: the child tells the model why.
            as_plan = prepared is not None and self.config.plan_budget_ms < prepared.cost_ms <= MAX_WORKER_MS
        return _Run(rgb, code, key, as_plan)

    def _submit(self, pool: Pool, run: _Run, owner: str) -> Job:
        flags = FLAG_PLAN * run.as_plan | FLAG_REFERENCE * self.config.reference_results
        # Without Landlock a child cannot open a file, so that what it imports must be loaded.
        closed = "open denied" in pool.report.get("files", "")
        science = not run.as_plan and (closed or any(name in run.code for name in SCIENCE_NAMES))
        return pool.submit(
            owner=owner,
            size=run.image.size,
            seed=_seed(run.image, run.code),
            make_input=partial(sealed_pixels, run.image, run.code.encode()),
            flags=flags,
            science=science,
        )

    def _finish(self, run: _Run, outcome: ChildResult) -> SandboxResult | None:
        """The result of a job; None if a worker could not execute its plan, so that a child has to run it."""
        result = read_outcome(run.image, outcome, self.config, is_plan=run.as_plan)
        if run.as_plan and result.status not in (ToolStatus.OK, ToolStatus.INFRASTRUCTURE_ERROR):
            run.as_plan = False
            return None
        self._count("plan_worker" if run.as_plan else "process")
        return self._remember(run.key, result)

    def _refusal(self, image: Image.Image, code: str) -> SandboxResult | None:
        if not isinstance(code, str):
            return _refused("not_text", f"the code is {type(code).__name__}, not text; send Python source as a string")
        if len(code) > self.config.max_code_chars:
            return _refused(
                "too_long",
                f"the code has {len(code)} characters, at most {self.config.max_code_chars}; send a shorter snippet",
            )
        if "\0" in code or not _is_unicode(code):
            return _refused("not_text", "the code holds null characters or broken Unicode; send plain Python source")
        if not isinstance(image, Image.Image):
            return _refused(
                "no_image", f"there is no such image ({type(image).__name__}); use the index of an image that was shown"
            )
        if not is_usable_size(*image.size):
            return _refused(
                "bad_image",
                f"the image is {image.width}x{image.height} pixels and cannot be worked on; use another image_index",
            )
        return None

    # ---------------------------------------------------------------------------------------- keeping
    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _recall(self, key: tuple[str, str] | None) -> SandboxResult | None:
        if key is None:
            return None
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                return None
            self._cache.move_to_end(key)
        return _own_copy(replace(found, tier="cache"))

    def _remember(self, key: tuple[str, str] | None, result: SandboxResult) -> SandboxResult:
        if key is None or result.status not in (ToolStatus.OK, ToolStatus.ERROR) or result.error_kind == "memory":
            return result
        kept = _own_copy(result)
        with self._lock:
            self._cached_bytes += _num_bytes(kept) - _num_bytes(self._cache.pop(key, None))
            self._cache[key] = kept
            while self._cache and (
                len(self._cache) > self.config.cache_size or self._cached_bytes > self.config.cache_mb * 1e6
            ):
                self._cached_bytes -= _num_bytes(self._cache.popitem(last=False)[1])
        return result


def _abandon(job: Job) -> None:
    """Nobody waits for a job any more: kill its child, or close what it left."""
    if not job.future.cancel() and job.future.exception() is None:
        job.future.result().close()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def _refused(kind: str, text: str) -> SandboxResult:
    return SandboxResult(status=ToolStatus.REJECTED, error=text, error_kind=kind)


def _own_copy(result: SandboxResult) -> SandboxResult:
    return result if result.image is None else replace(result, image=result.image.copy())


def _num_bytes(result: SandboxResult | None) -> int:
    return 0 if result is None or result.image is None else 3 * result.image.width * result.image.height


def sealed_pixels(image: Image.Image, code: bytes = b"") -> int:
    """A memfd with the pixels of an RGB image, four bytes each, and then the code; nobody can change it any more."""
    image.load()
    encoder = Image._getencoder("RGB", "raw", ("RGBX",))
    encoder.setimage(image.im, (0, 0, *image.size))
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        failed = encoder.encode_to_file(fd, 1 << 18)
        if failed < 0:
            raise SandboxError(f"the input of {image.width}x{image.height} pixels could not be copied ({failed})")
        os.write(fd, code)
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL | SHRINK | GROW | FUTURE_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seed(image: Image.Image, code: str) -> bytes:
    """16 bytes that depend on the code and a sample of the picture."""
    digest = hashlib.blake2b(code.encode("utf-8", "replace"), digest_size=16)
    digest.update(str(image.size).encode())
    digest.update(image.resize((min(64, image.width), min(64, image.height)), Image.Resampling.NEAREST).tobytes())
    return digest.digest()
