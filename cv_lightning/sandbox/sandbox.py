"""The sandbox as the rest of the project sees it: an image and a snippet in, a `SandboxResult` out."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import logging
import mmap
import os
import signal
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from PIL import Image

from cv_lightning.images import content_hash, is_usable_size, to_rgb
from cv_lightning.sandbox import plan
from cv_lightning.sandbox.config import GENERAL_LAYERS, SandboxConfig
from cv_lightning.sandbox.effect import believed, effect_of
from cv_lightning.sandbox.pool import Job, Outcome, Pool
from cv_lightning.sandbox.wire import HEADER, MAGIC, MAX_TEXT, MAX_TRACE, STATUS_ERROR, STATUS_OK, Trace, WireError, clean_text, unpack_trace
from cv_lightning.types import Operation, SandboxError, SandboxResult, ToolStatus

log = logging.getLogger(__name__)
_SEALS = (1033, 1 | 2 | 4 | 8)
"""F_ADD_SEALS: seal, shrink, grow, write."""


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
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], SandboxResult] = OrderedDict()
        self._cached_bytes = 0
        self._counts = {"plan": 0, "process": 0, "cache": 0, "refused": 0}

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
            self._executor = ThreadPoolExecutor(2, thread_name_prefix="sandbox-read")
            atexit.register(self.close)
        try:
            pool.start()
            missing = [name for name in GENERAL_LAYERS if not self.layers.get(name, "").startswith("active")]
            log.info("sandbox layers: %s", ", ".join(f"{name}: {state}" for name, state in self.layers.items()))
            if missing and not self.config.allow_unsafe:
                raise SandboxError(
                    f"the sandbox lacks {', '.join(missing)} ({self.layers}); mend the host or set sandbox.allow_unsafe=true"
                )
            # With layers switched off for a measurement the hostile cases would really hit.
            cases = () if self.config.disabled_layers or missing else START_CASES
            failed = [case for case in run_cases(self, cases) if not case.ok]
            if failed and not self.config.allow_unsafe:
                raise SandboxError("the sandbox's self-test failed: " + "; ".join(f"{case.name}: {case.got}" for case in failed))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all children and fork servers; may be called twice, and again started after."""
        with self._lock:
            pool, self._pool = self._pool, None
            executor, self._executor = self._executor, None
        if pool is not None:
            pool.close()
            atexit.unregister(self.close)
        if executor is not None:
            executor.shutdown(wait=False)

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def layers(self) -> dict[str, str]:
        """State of every isolation layer: `active (..)`, `unavailable (why)` or `off`. Empty before `start`."""
        return dict(self._pool.report) if self._pool is not None else {}

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the start: jobs by tier, timeouts, resent and lost jobs, restarts; the present load."""
        counts: dict[str, float] = {f"{name}_tier" if name in ("plan", "process") else name: v for name, v in self._counts.items()}
        if self._pool is not None:
            counts.update(self._pool.counts)
            counts.update(self._pool.load)
        return counts

    # ---------------------------------------------------------------------------------------- running
    async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """Run a snippet on an image without blocking the event loop; cancelling the task kills the child.

        Args:
            image: any mode; model code gets it as RGB and cannot change it.
            code: Python with `image` in scope.
            owner: trajectory id; waiting jobs of different owners take turns.
        """
        early = self._without_child(image, code)
        if isinstance(early, SandboxResult):
            return early
        rgb, key = early
        pool, executor = self._running()
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(executor, self._submit, pool, rgb, code, owner)
        try:
            outcome = await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.future.cancel()
            raise
        return self._remember(key, await loop.run_in_executor(executor, self._finish, rgb, outcome))

    def run_sync(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """`run` for callers without an event loop; from any thread."""
        early = self._without_child(image, code)
        if isinstance(early, SandboxResult):
            return early
        rgb, key = early
        pool, _ = self._running()
        job = self._submit(pool, rgb, code, owner)
        try:
            outcome = job.future.result()
        except (CancelledError, KeyboardInterrupt):
            job.future.cancel()
            raise
        return self._remember(key, self._finish(rgb, outcome))

    def _running(self) -> tuple[Pool, ThreadPoolExecutor]:
        pool, executor = self._pool, self._executor
        if pool is None or executor is None:
            raise SandboxError("the sandbox was not started; call start() first, or use it in a with statement")
        if pool.pid != os.getpid():
            raise SandboxError("the sandbox was started before this process was forked; start one of its own here")
        return pool, executor

    def _without_child(self, image: Image.Image, code: str) -> SandboxResult | tuple[Image.Image, tuple[str, str] | None]:
        """The result if it needs no child (refused, cached, planned); else the input as RGB and its cache key."""
        refused = self._refusal(image, code)
        if refused is not None:
            self._counts["refused"] += 1
            return refused
        rgb = to_rgb(image)
        key = None
        if self.config.cache_size:
            key = content_hash(rgb), code
            with self._lock:
                found = self._cache.get(key)
                if found is not None:
                    self._cache.move_to_end(key)
                    self._counts["cache"] += 1
                    return _own_copy(replace(found, tier="cache"))
        if self.config.plan_tier and not self.config.reference_results:
            planned = plan.run(rgb, code, self.config)
            if planned is not None:
                self._counts["plan"] += 1
                return self._remember(key, planned)
        self._counts["process"] += 1
        return rgb, key

    def _refusal(self, image: Image.Image, code: str) -> SandboxResult | None:
        if not isinstance(code, str):
            return _refused("not_text", f"the code is {type(code).__name__}, not text; send Python source as a string")
        if len(code) > self.config.max_code_chars:
            return _refused("too_long", f"the code has {len(code)} characters, at most {self.config.max_code_chars}; send a shorter snippet")
        if "\0" in code:
            return _refused("not_text", "the code holds a null character; send plain Python source")
        if not isinstance(image, Image.Image):
            return _refused("no_image", f"there is no such image ({type(image).__name__}); use the index of an image that was shown")
        if not is_usable_size(*image.size):
            return _refused("bad_image", f"the image is {image.width}x{image.height} pixels and cannot be worked on; use another image_index")
        return None

    def _submit(self, pool: Pool, image: Image.Image, code: str, owner: str) -> Job:
        fd = _sealed_pixels(image)
        return pool.submit(owner=owner, code=code, size=image.size, seed=_seed(image, code), input_fd=fd)

    # ---------------------------------------------------------------------------------------- results
    def _finish(self, image: Image.Image, outcome: Outcome) -> SandboxResult:
        if outcome.output_fd < 0:
            return SandboxResult(status=ToolStatus.LOST, error="the sandbox failed", error_kind="lost", tier="process")
        try:
            result = self._read(image, outcome)
        except WireError as error:
            text = f"the code ended without a usable result ({clean_text(str(error), 80)}); put the new image into `result`"
            result = SandboxResult(status=ToolStatus.KILLED, error=text, error_kind="invalid_output")
        finally:
            os.close(outcome.output_fd)
        return replace(result, tier="process", elapsed_s=outcome.elapsed_s)

    def _read(self, image: Image.Image, outcome: Outcome) -> SandboxResult:
        """Check and decode what a child left; every byte of it is untrusted."""
        if outcome.late:
            limit = f"{self.config.timeout_s:g} s, {self.config.cpu_s} s of CPU time"
            return SandboxResult(status=ToolStatus.TIMEOUT, error_kind="timeout", error=f"TimeoutError: the code ran too long (limit {limit}); do less")
        if os.WIFSIGNALED(outcome.wait_status):
            name = signal.Signals(os.WTERMSIG(outcome.wait_status)).name
            return SandboxResult(status=ToolStatus.KILLED, error_kind=name, error=f"the code crashed its process ({name}) or broke a limit; try another way")
        if outcome.wait_status in (97 << 8, 98 << 8):
            return SandboxResult(status=ToolStatus.LOST, error="a child could not be sealed", error_kind="lost")
        total = os.fstat(outcome.output_fd).st_size
        if total < HEADER.size:
            return SandboxResult(status=ToolStatus.ERROR, error_kind="no_result", error="no result: the code ended its process; put the new image into `result`")
        magic, status, width, height, num_pixels, num_trace, num_text = HEADER.unpack(os.pread(outcome.output_fd, HEADER.size, 0))
        if magic != MAGIC:
            raise WireError("damaged output")
        if status == STATUS_ERROR and num_text <= MAX_TEXT and HEADER.size + num_text <= total:
            data = os.pread(outcome.output_fd, num_text, HEADER.size).decode("utf-8", "replace")
            kind, _, text = data.partition("\0")
            text = clean_text(text or kind, self.config.max_error_chars)
            return SandboxResult(status=ToolStatus.ERROR, error=text or "the code failed", error_kind=clean_text(kind, 40) or "error")
        sizes = is_usable_size(width, height) and width * height <= self.config.max_result_pixels and num_pixels == 3 * width * height
        if status != STATUS_OK or num_text or num_trace > MAX_TRACE or not sizes or total != HEADER.size + num_pixels + num_trace:
            raise WireError("impossible sizes")
        with mmap.mmap(outcome.output_fd, total, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
            trace = unpack_trace(mapped[HEADER.size + num_pixels :])
            with memoryview(mapped) as view, view[HEADER.size : HEADER.size + num_pixels] as pixels:
                result = Image.frombytes("RGB", (width, height), pixels)
        return self._explained(image, result, trace)

    def _explained(self, image: Image.Image, result: Image.Image, trace: Trace) -> SandboxResult:
        to_input = believed(trace.claims, image, result)
        operations = tuple(
            Operation(name=op.name, call=op.call, arguments=dict(op.arguments), input_size=op.input_size, output_size=op.output_size, used=op.used)
            for op in trace.operations
        )
        effect = effect_of(to_input, image.size, result.size)
        return SandboxResult(status=ToolStatus.OK, image=result, operations=operations, effect=effect)

    def _remember(self, key: tuple[str, str] | None, result: SandboxResult) -> SandboxResult:
        if key is None or result.status not in (ToolStatus.OK, ToolStatus.ERROR) or result.error_kind == "memory":
            return result
        kept = _own_copy(result)
        with self._lock:
            self._cached_bytes += _num_bytes(kept) - _num_bytes(self._cache.pop(key, None))
            self._cache[key] = kept
            while self._cache and (len(self._cache) > self.config.cache_size or self._cached_bytes > self.config.cache_mb * 1e6):
                self._cached_bytes -= _num_bytes(self._cache.popitem(last=False)[1])
        return result


def _refused(kind: str, text: str) -> SandboxResult:
    return SandboxResult(status=ToolStatus.REFUSED, error=text, error_kind=kind)


def _own_copy(result: SandboxResult) -> SandboxResult:
    return result if result.image is None else replace(result, image=result.image.copy())


def _num_bytes(result: SandboxResult | None) -> int:
    return 0 if result is None or result.image is None else 3 * result.image.width * result.image.height


def _sealed_pixels(image: Image.Image) -> int:
    """A memfd with the pixels of an RGB image that nobody can change any more."""
    import fcntl

    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    image.load()
    encoder = Image._getencoder("RGB", "raw", ("RGB",))
    encoder.setimage(image.im, (0, 0, *image.size))
    done = 0
    while not done:
        _, done, data = encoder.encode(1 << 18)
        os.write(fd, data)
    fcntl.fcntl(fd, *_SEALS)
    return fd


def _seed(image: Image.Image, code: str) -> bytes:
    """16 bytes that depend on the code and a sample of the picture."""
    digest = hashlib.blake2b(code.encode("utf-8", "replace"), digest_size=16)
    digest.update(str(image.size).encode())
    digest.update(image.resize((min(64, image.width), min(64, image.height)), Image.Resampling.NEAREST).tobytes())
    return digest.digest()


