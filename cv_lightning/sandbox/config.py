"""What a sandbox may use and what it must have."""

from __future__ import annotations

from dataclasses import dataclass

GENERAL_LAYERS = ("clean_exec", "no_new_privs", "rlimits", "pdeathsig", "seccomp", "files")
"""Layers without which no model code runs; `files` is Landlock, or a seccomp filter that denies open()."""

MAX_CODE_CHARS = 32_000
"""Longer code is not written by a model, and parsing it takes the caller's time."""


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Limits, sizes and switches of the sandbox."""

    num_zygotes: int = 0
    """Fork servers; 0: half the cores, between 1 and 8. Forking is serial within one."""
    max_in_flight: int = 0
    """Snippets that run at once; 0: twice the fork servers, or the cores if they are more."""
    max_in_flight_mb: float = 1024.0
    """Input pictures of the snippets that run at once, in MB; more wait."""
    max_queue: int = 16384
    """Snippets that may wait; one more is answered INFRASTRUCTURE_ERROR."""
    timeout_s: float = 5.0
    """Wall-clock limit of a snippet's running time in seconds; waiting does not count."""
    cpu_s: int = 2
    """CPU-time limit in whole seconds: the reproducible one, for wall-clock time depends on the load."""
    memory_mb: int = 1024
    """Memory a snippet may take on top of the libraries, in MB."""
    max_code_chars: int = 2048
    """Longer code is refused."""
    max_result_pixels: int = 16_000_000
    """Larger results are an error that tells the model to crop or resize."""
    max_error_chars: int = 600
    """Error texts for the model are cut to this."""
    plan_tier: bool = True
    """Run straight-line code of known operations with checked arguments without running model code."""
    plan_budget_ms: float = 3.0
    """Plans that are estimated to take longer, in ms, run in a warm worker, so that they do not stall the caller."""
    cache_size: int = 0
    """Results kept by (image, code), oldest dropped first; 0: none. Sound because runs are deterministic."""
    cache_mb: float = 256.0
    """Pixels that the cache may hold, in MB."""
    jobs_per_zygote: int = 20_000
    """A fork server is replaced after this many snippets."""
    grown_mb: float = 200.0
    """A fork server is replaced once it has grown by this much."""
    start_timeout_s: float = 60.0
    """How long a fork server may take to load its libraries, in seconds."""
    allow_unsafe: bool = False
    """Start although a required layer is missing."""
    reference_results: bool = False
    """Pick the result as the reference does (`img` before a rebound `image`), for comparison runs only."""
    disabled_layers: tuple[str, ...] = ()
    """Layers to leave out (landlock, seccomp, rlimits, uid), for measurements; needs allow_unsafe."""
    private_root: bool = True
    """Give the fork servers a root folder of their own where the host allows it, so that other paths do not exist."""
    namespaces: bool = False
    """Also try user, network and IPC namespaces; containers often deny them."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "cpu_s", "memory_mb", "max_code_chars", "max_result_pixels", "max_error_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sandbox.{name}={getattr(self, name)} must be greater than 0")
        if self.max_code_chars > MAX_CODE_CHARS:
            raise ValueError(f"sandbox.max_code_chars={self.max_code_chars}: at most {MAX_CODE_CHARS}")
        for name in ("num_zygotes", "max_in_flight", "cache_size", "max_queue", "jobs_per_zygote"):
            if getattr(self, name) < 0:
                raise ValueError(f"sandbox.{name}={getattr(self, name)} must not be negative")
        unknown = set(self.disabled_layers) - {"landlock", "seccomp", "rlimits", "uid"}
        if unknown:
            raise ValueError(
                f"sandbox.disabled_layers={sorted(unknown)}: only landlock, seccomp, rlimits, uid can be left out"
            )
