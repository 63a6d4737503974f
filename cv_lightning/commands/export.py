"""`python -m cv_lightning export`: a checkpoint as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cv_lightning.command_line import read_command_line
from cv_lightning.files import describe_disk_error
from cv_lightning.types import CheckpointError, CVLightningError

if TYPE_CHECKING:
    from cv_lightning.models.loading import PolicyConfig

CONFIG_NAME = "fit_config.yaml"
"""What every run's folder holds: its resolved config."""
PARENTS = 2
"""Folders above a checkpoint in which the run's config is looked for."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Exit code 0: written and checked; 2: a message says what to change, and nothing was written."""

    ckpt: Path
    """A .ckpt file, a DeepSpeed folder, or a run's folder, whose newest checkpoint is taken. A checkpoint is a pickle,
    which may run code: export your own."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    run_config: Path | None = None
    """The run's fit_config.yaml; by default the one above the checkpoint."""
    base: str | None = None
    """Folder that the run began with, for the model's config and processor; by default what the config says."""
    lora: Literal["merged", "separate"] = "merged"
    """Adapters: added to the weights, or alone, as a peft folder on top of the base model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default the trained policy's."""
    max_shard_gb: float = 5.0
    """A weight file is closed before it gets larger, in GB."""
    verify: bool = True
    """Load the folder back and compare logits. Takes the model's size in memory, twice one after the other."""
    overwrite: bool = False
    """Replace `out` if it exists."""

    def __post_init__(self) -> None:
        if not self.max_shard_gb > 0:
            raise ValueError(f"--max_shard_gb {self.max_shard_gb} must be above 0")
        if self.out.exists() and not self.overwrite and any(self.out.iterdir() if self.out.is_dir() else [1]):
            raise ValueError(f"--out {self.out} exists; give another folder, or --overwrite true")


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    try:
        request = read_command_line(ExportRequest, args, as_positional=False, prog="cv_lightning export")
        print(export(request))
    except (ValueError, CVLightningError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        if not (said := _disk_said(error)):
            raise
        print(f"error: --out cannot be written: {said}", file=sys.stderr)
        return 2
    return 0


def _disk_said(error: Exception) -> str:
    """What a disk said; empty for another error. safetensors wraps the system's words in an error of its own."""
    if type(error).__name__ == "SafetensorError" and "os error" in str(error).casefold():
        return str(error)
    return describe_disk_error(error)


def export(request: ExportRequest) -> str:
    """Write the folder, and check it before it takes its place.

    Returns:
        What was done, in one line.

    Raises:
        CheckpointError: not a checkpoint, damaged, of another model, without a config, or the check failed.
    """
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    from cv_lightning.callbacks.export import CheckpointExport
    from cv_lightning.checkpoints.reader import CheckpointReader, find_stored
    from cv_lightning.models.export import atomic_folder

    path = find_stored(request.ckpt)
    file = request.run_config or find_config(path)
    policy = read_policy(file, request)
    job = CheckpointExport(
        CheckpointReader(path), policy, file.parent, lora=request.lora, shard_bytes=int(request.max_shard_gb * 1e9)
    )
    with atomic_folder(request.out) as folder:
        size = job.write(folder)
        checked = f"logits agree to {job.verify(folder):.0e}" if request.verify else "not checked (--verify false)"
    return f"{request.out}: {size / 1e9:.2f} GB in {policy.dtype} from {path}; {checked}"


def find_config(checkpoint: Path) -> Path:
    """The config of the run that a checkpoint is of.

    Raises:
        CheckpointError: there is none above it.
    """
    for folder in list(checkpoint.absolute().parents)[:PARENTS]:
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise CheckpointError(
        f"--ckpt {checkpoint}: there is no {CONFIG_NAME} above it to say which model it is of; "
        "give it with --run_config"
    )


def read_policy(file: Path, request: ExportRequest) -> PolicyConfig:
    """The policy as the run's config describes it, with what the command line changes.

    Raises:
        CheckpointError: the config is missing, or is none of a run.
    """
    import jsonargparse
    import yaml

    from cv_lightning.models.loading import PolicyConfig

    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        given = dict(config["model"]["init_args"]["policy"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"--run_config {file}: no config of a run, such as fit_config.yaml in its folder ({error!r})"
        ) from error
    given |= {"path": request.base or given["path"], "dtype": request.dtype or given["dtype"]}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicyConfig)
    try:
        policy = parser.instantiate(parser.parse_object({"policy": given})).policy
    except jsonargparse.ArgumentError as error:
        raise CheckpointError(f"--run_config {file}: model.policy cannot be read ({error})") from error
    assert isinstance(policy, PolicyConfig)
    if Path(policy.path).is_absolute() and not Path(policy.path).is_dir():
        raise CheckpointError(
            f"--run_config {file}: the run began with {policy.path}, which is not there (any more); give a "
            "folder of the same model with --base"
        )
    return policy
