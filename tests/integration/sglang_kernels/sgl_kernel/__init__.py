"""Stand-in for SGLang's compiled kernels, which have no CPU build on the package index.

SGLang imports them by name when it starts, and calls none on the path of these tests (attention is torch's, sampling is
PyTorch's). Every name exists here, and every call says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def _absent(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"sgl_kernel.{name}: these are not compiled kernels; see tests/integration/sglang_kernels"
        )

    return kernel


class _Operators(ModuleType):
    """`torch.ops.sgl_kernel`; SGLang asks by `hasattr` for operators of other devices, which do not exist."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__") or not name.endswith("_cpu"):
            raise AttributeError(name)
        return _absent(name)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(name)


torch.ops.sgl_kernel = _Operators("sgl_kernel")
