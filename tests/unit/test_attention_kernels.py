"""Choice of the attention kernel for packed batches, its documented arguments, and detection of a wrong kernel."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cv_lightning.commands import doctor
from cv_lightning.models import attention
from cv_lightning.models.attention import kernel_error, torch_varlen, variable_length_kernel

varlen = pytest.importorskip("torch.nn.attention.varlen")


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, *_: int,
    causal: bool, top_left: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Plain attention per sequence; the causal mask ends at the last key, or with `top_left` at the diagonal."""
    out = []
    for (a, b), (c, d) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        groups = query.shape[1] // key.shape[1]
        q = query[a:b].transpose(0, 1)
        k, v = (x[c:d].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        offset = 0 if top_left else (d - c) - (b - a)
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(offset) if causal else None
        out.append(F.scaled_dot_product_attention(q, k, v, seen).transpose(0, 1))
    return torch.cat(out)


def stand_in(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """CPU version of `varlen_attn` by its documentation; it allows grouped queries only with `enable_gqa`."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size in ((-1, 0), (-1, -1))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max(b - a for a, b in pairwise(cu_seq_q.tolist()))
    assert max_k == max(b - a for a, b in pairwise(cu_seq_k.tolist()))
    return reference(query, key, value, cu_seq_q, cu_seq_k, causal=window_size == (-1, 0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    variable_length_kernel.cache_clear()
    yield
    variable_length_kernel.cache_clear()


def test_torch_varlen_attn_has_the_expected_signature() -> None:
    parameters = inspect.signature(varlen.varlen_attn).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    defaults = {name: parameters[name].default for name in ("scale", "window_size", "enable_gqa")}
    assert defaults == {"scale": None, "window_size": (-1, -1), "enable_gqa": False}


def test_torch_varlen_attn_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    assert kernel_error(torch_varlen, torch.device("cpu"), torch.float32) < 1e-5
    assert kernel_error(torch_varlen, torch.device("cpu")) < attention.PROBE_TOLERANCE


def test_a_causal_mask_that_ends_at_the_diagonal_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, a query after a shared prompt would not attend to the end of the prompt."""

    def other(*tensors: Any, window_size: tuple[int, int] = (-1, -1), **_: Any) -> Any:
        return reference(*tensors, causal=window_size == (-1, 0), top_left=True)

    monkeypatch.setattr(varlen, "varlen_attn", other)
    assert kernel_error(torch_varlen, torch.device("cpu")) > 10 * attention.PROBE_TOLERANCE


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *installed: str, capability: tuple[int, int] = (9, 0)) -> None:
    real = attention.importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(
        attention.importlib.util,
        "find_spec",
        lambda name: name in installed or None if name == "flash_attn" else real(name),
    )


@pytest.mark.parametrize(
    ("error", "capability", "expected"),
    [(0.004, (9, 0), "varlen_attn"), (0.5, (9, 0), "SDPA"), (float("nan"), (9, 0), "SDPA"), (0.004, (7, 5), "SDPA")],
)
def test_torch_varlen_attn_is_used_if_it_agrees_with_sdpa(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: float, capability: tuple[int, int],
    expected: str,
) -> None:  # fmt: skip
    pretend_gpu(monkeypatch, capability=capability)
    monkeypatch.setattr(attention, "kernel_error", lambda *_: error)
    with caplog.at_level(logging.WARNING):
        assert expected in attention.attention_kernel_name()
    assert ("differs from SDPA" in caplog.text) == (expected == "SDPA" and capability >= attention.MIN_CAPABILITY)


def test_a_kernel_that_does_not_run_is_replaced_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> float:
        raise NotImplementedError("aten::_flash_attention_forward")

    pretend_gpu(monkeypatch)
    monkeypatch.setattr(attention, "kernel_error", fails)
    with caplog.at_level(logging.WARNING):
        assert variable_length_kernel() is None
    assert "_flash_attention_forward" in caplog.text


def test_the_gpu_kernel_gets_keys_that_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel supports grouped queries, so keys and values are not repeated for every query head."""
    seen: list[tuple[int, ...]] = []

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def kernel(query: torch.Tensor, key: torch.Tensor, *rest: Any, **_: Any) -> torch.Tensor:
        seen.append(tuple(key.shape))
        return query

    found = attention.VariableLengthKernel("stand-in", kernel)
    monkeypatch.setattr(attention, "variable_length_kernel", lambda: found)
    q = torch.randn(1, 4, 6, 8, dtype=torch.bfloat16).as_subclass(OnGpu)
    k = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16).as_subclass(OnGpu)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    out, _ = attention.packed_attention(torch.nn.Module(), q, k, k, None, position_ids=positions)
    assert seen == [(8, 2, 8)] and out.shape == (1, 6, 4, 8), "four keys of the first piece, two shared and two own"
    attention.packed_attention(torch.nn.Module(), q, k, k, None, dropout=0.1, position_ids=positions)
    assert len(seen) == 1, "dropout is not among the kernel's arguments"


def test_doctor_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SDPA" in doctor.check_attention(on_gpu=False, timeout_s=1).detail
    monkeypatch.setattr(
        doctor, "import_probe", lambda probe, _: doctor.Check(name=probe.name, status="ok", detail="packed SDPA")
    )
    slow = doctor.check_attention(on_gpu=True, timeout_s=1)
    assert (slow.status, slow.fix) == ("absent", "pip install --no-build-isolation flash-attn")


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
def test_torch_varlen_attn_equals_sdpa_on_this_gpu() -> None:
    """Outputs and gradients, with shared prefixes, grouped queries and the head widths of the released models."""
    assert kernel_error(torch_varlen, torch.device("cuda")) <= attention.PROBE_TOLERANCE


@pytest.mark.gpu
def test_flash_attention_equals_sdpa_on_this_gpu() -> None:
    flash_attn = pytest.importorskip("flash_attn")
    assert kernel_error(flash_attn.flash_attn_varlen_func, torch.device("cuda")) <= attention.PROBE_TOLERANCE
