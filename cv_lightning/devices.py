"""GPUs of a run: policy and engine both use those that `trainer.devices` names."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

APPLIED = "CVL_VISIBLE_DEVICES"
"""Environment variable with the device list that set CUDA_VISIBLE_DEVICES, for ranks started by this process."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that this process sees."""

    count: int
    in_use: bool
    """CUDA is initialised, so that changing the visible GPUs would have no effect."""

    @classmethod
    def here(cls) -> Gpus:
        """The GPUs of this machine; counting them does not initialise CUDA."""
        import torch

        return cls(torch.cuda.device_count(), torch.cuda.is_initialized())


def use_named_devices(
    devices: int | list[int] | str,
    accelerator: str,
    gpus: Gpus,
    environment: MutableMapping[str, str] = os.environ,
) -> int | list[int] | str:
    """Make the GPUs of a device list the only ones that this process sees.

    Lightning would put the policy on the named GPUs, but vLLM uses the first visible GPU or that of the local rank. If
    only the named GPUs are visible, both are the same.

    Args:
        devices: `trainer.devices`.
        accelerator: `trainer.accelerator`.
        gpus: GPUs that this process sees.
        environment: Environment of this process; `CUDA_VISIBLE_DEVICES` is set in it.

    Returns:
        The new value of `trainer.devices`: the number of named GPUs if a list was given.

    Raises:
        ValueError: The list cannot work; the message names the flag to change.
    """
    named = _parsed(devices)
    where = f"--trainer.devices {devices}"
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus.count > 0)
    if on_gpu and not gpus.count:
        raise ValueError(
            f"--trainer.accelerator {accelerator} with {where}: this process sees no GPU ({VISIBLE} and the installed "
            "torch decide that; `doctor` shows torch). Set --trainer.accelerator cpu, or take auto"
        )
    if isinstance(named, int):
        if on_gpu and named > gpus.count:
            raise ValueError(f"{where}: this process sees {gpus.count} GPU(s); name at most that many")
        return devices
    if not on_gpu:
        reason = "this machine has none" if accelerator == "auto" else f"--trainer.accelerator is {accelerator}"
        raise ValueError(
            f"{where} names GPUs, but {reason}: give a number of processes, --trainer.devices {len(named)}"
        )
    if not named:
        raise ValueError(f"{where} names no GPU: give their numbers, such as '[0,1]', or how many")
    if len(set(named)) < len(named):
        raise ValueError(f"{where} names a GPU twice: every rank needs one of its own")
    if environment.get(APPLIED) == _applied(named, environment):
        return len(named)  # the parent process has done it
    wrong = [index for index in named if not 0 <= index < gpus.count]
    if wrong:
        seen = f"{gpus.count} GPU(s), numbered from 0"
        raise ValueError(f"{where}: there is no GPU {wrong[0]}; this process sees {seen} ({VISIBLE} chooses them)")
    if named == list(range(len(named))):
        return len(named)
    names = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    wanted = ",".join(names[index] if names else str(index) for index in named)
    if gpus.in_use:
        raise ValueError(
            f"{where}: CUDA is already initialised in this process, so that policy and engine would be on different "
            f"GPUs. Set {VISIBLE}={wanted} before Python starts, and --trainer.devices {len(named)}"
        )
    environment[VISIBLE] = wanted
    environment[APPLIED] = _applied(named, environment)
    return len(named)


def _applied(named: list[int], environment: MutableMapping[str, str]) -> str:
    return f"{','.join(map(str, named))} as {environment.get(VISIBLE, '')}"


def _parsed(devices: int | list[int] | str) -> list[int] | int:
    """The GPU numbers of a device list, or a number of devices, which is 0 for `auto` and -1.

    Raises:
        ValueError: It is neither.
    """
    text = ",".join(map(str, devices)) if isinstance(devices, list) else str(devices).strip()
    try:
        if isinstance(devices, list) or "," in text or text.startswith("["):
            return [int(part) for part in text.strip("[] ").split(",") if part.strip()]
        count = 0 if text in ("auto", "-1") else int(text)
    except ValueError as error:
        raise ValueError(
            f"--trainer.devices {devices}: give numbers of GPUs, such as '[0,1]', how many GPUs, or auto"
        ) from error
    if count < 0 or text == "0":
        raise ValueError(f"--trainer.devices {devices}: give at least one device, a list such as '[0,1]', or auto")
    return count
