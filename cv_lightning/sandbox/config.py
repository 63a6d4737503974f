"""Configuration of the sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cv_lightning.ranges import Limit, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_ranges

GENERAL_LAYERS = ("clean_exec", "no_new_privs", "rlimits", "pdeathsig", "seccomp", "files")
"""Layers without which no model code runs; `files` is Landlock, or a seccomp filter that denies open()."""

MAX_CODE_CHARS = 32_000
"""Upper bound of `max_code_chars`: parsing longer code takes the caller too long."""


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Limits, sizes and switches of the sandbox."""

    num_zygotes: NonNegativeInt = 0
    """Fork servers; 0: half the cores, between 1 and 8. Forking is serial within one."""
    max_in_flight: NonNegativeInt = 0
    """Snippets that run at once; 0: twice the number of fork servers, or of cores if that is more."""
    max_in_flight_mb: Limit = 1024.0
    """Total size in MB of the input images of snippets that run at once; more wait."""
    max_queue: NonNegativeInt = 16384
    """Snippets that may wait; further ones end as INFRASTRUCTURE_ERROR."""
    timeout_s: PositiveFloat = 5.0
    """Wall-clock limit of a snippet's running time in seconds; waiting does not count."""
    cpu_s: PositiveInt = 2
    """CPU-time limit in whole seconds. It is reproducible, while wall-clock time depends on the load."""
    memory_mb: PositiveInt = 1024
    """Memory a snippet may take on top of the libraries, in MB."""
    max_code_chars: Annotated[int, Range(at_least=1, at_most=MAX_CODE_CHARS)] = 2048
    """Longer code is rejected."""
    max_result_pixels: PositiveInt = 16_000_000
    """Larger results are an error that tells the model to crop or resize."""
    max_error_chars: PositiveInt = 600
    """Error texts for the model are cut to this length."""
    max_text_bytes: PositiveInt = 65536
    """Bytes that are kept of what a snippet prints: half from its beginning and half from its end."""
    plan_tier: bool = True
    """Run straight-line code of known operations with checked arguments without running model code."""
    plan_budget_ms: NonNegativeFloat = 3.0
    """Plans that are estimated to take longer, in ms, run in a child, so that they do not stall the caller."""
    cache_size: NonNegativeInt = 0
    """Results kept by (image, code), oldest dropped first; 0: none. It changes no result: runs are deterministic."""
    cache_mb: NonNegativeFloat = 256.0
    """Size limit of the cache in MB of pixels."""
    jobs_per_zygote: NonNegativeInt = 20_000
    """A fork server is replaced after this many snippets."""
    grown_mb: PositiveFloat = 200.0
    """A fork server is replaced once its memory has grown by this many MB."""
    start_timeout_s: PositiveFloat = 60.0
    """Time limit for a fork server to load its libraries, in seconds."""
    allow_unsafe: bool = False
    """Start although a required layer is missing."""
    reference_results: bool = False
    """Pick the result as the released code does (`img` before a reassigned `image`; one image, no text), for comparison
    runs only."""
    disabled_layers: tuple[str, ...] = ()
    """Layers to switch off (landlock, seccomp, rlimits, uid), for measurements; needs allow_unsafe."""
    private_root: bool = True
    """Give the fork servers a root folder of their own where the host allows it: other paths do not exist in it."""
    namespaces: bool = False
    """Also use user, network and IPC namespaces where the host allows them; containers often do not."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.sandbox")
        unknown = set(self.disabled_layers) - {"landlock", "seccomp", "rlimits", "uid"}
        if unknown:
            raise ValueError(
                f"sandbox.disabled_layers={sorted(unknown)}: only landlock, seccomp, rlimits, uid can be left out"
            )
