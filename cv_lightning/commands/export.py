"""`cv-lightning export`: a checkpoint as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cv_lightning.command_line import run_verb
from cv_lightning.files import describe_disk_error
from cv_lightning.hub import check_upload, upload_folder
from cv_lightning.ranges import PositiveFloat, check_ranges
from cv_lightning.types import CheckpointError, DataError

if TYPE_CHECKING:
    from cv_lightning.models.loading import PolicyConfig

CONFIG_NAME = "fit_config.yaml"
"""A run's resolved config."""
PARENTS = 3
"""Number of folders, that of the checkpoint included, that are searched for the run's config."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """An export. Exit code 0: written and checked; 2: an error, and nothing was written."""

    ckpt: Path
    """A .ckpt file, a DeepSpeed folder, or a run's folder, whose newest checkpoint is taken. Export only checkpoints
    that you trust: loading a pickle may run code."""
    out: Path
    """Folder to write, completely or not at all."""
    run_config: Path | None = None
    """The run's fit_config.yaml; by default the one above the checkpoint."""
    base: str | None = None
    """Folder that the run began with, for the model's config and processor; by default what the config says."""
    lora: Literal["merged", "separate"] = "merged"
    """LoRA adapters: added to the weights, or alone, as a peft folder on top of the base model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default the trained policy's."""
    max_shard_gb: PositiveFloat = 5.0
    """A weight file is closed before it gets larger, in GB."""
    verify: bool = True
    """Load the folder and compare its logits with those of the checkpoint. Takes the model's size in memory."""
    overwrite: bool = False
    """Replace `out` if it exists."""
    push_to_hub: str | None = None
    """Also upload the folder to this repository of the Hugging Face Hub, OWNER/NAME, which is made if it does not
    exist. The token is that of `hf auth login` or HF_TOKEN."""
    private: bool = False
    """Make that repository private, if it is new."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.ckpt.exists():
            raise ValueError(f"--ckpt {self.ckpt}: no such file or folder")
        if self.out.exists() and not self.overwrite and any(self.out.iterdir() if self.out.is_dir() else [1]):
            raise ValueError(f"--out {self.out} exists; give another folder, or --overwrite")
        if self.private and self.push_to_hub is None:
            raise ValueError("--private belongs to --push_to_hub OWNER/NAME; without it nothing is uploaded")


def _export(request: ExportRequest) -> None:
    if request.push_to_hub is not None:
        check_upload(request.push_to_hub)  # before minutes of work
    try:
        print(export(request))
    except Exception as error:
        said = describe_disk_error(error)
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).casefold():
            said = str(error)  # safetensors has an error class of its own
        if not said:
            raise
        raise DataError(f"--out cannot be written: {said}") from error
    if request.push_to_hub is not None:
        print(f"uploaded to {upload_folder(request.out, request.push_to_hub, private=request.private)}")


def export(request: ExportRequest) -> str:
    """Write the folder, and check it before it takes its place.

    Returns:
        What was done, in one line.

    Raises:
        CheckpointError: Not a checkpoint, damaged, of another model, without a config, or the check failed.
    """
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    from cv_lightning.callbacks.export import CheckpointExport
    from cv_lightning.checkpoints.reader import CheckpointReader, find_stored
    from cv_lightning.models.export import atomic_folder

    path = find_stored(request.ckpt)
    file = request.run_config or find_run_config(path)
    if file is None:
        raise CheckpointError(
            f"--ckpt {path}: no folder above it has a {CONFIG_NAME} that names its model; give it with --run_config"
        )
    policy = read_policy(file, request)
    job = CheckpointExport(
        CheckpointReader(path), policy, file.parent, lora=request.lora, shard_bytes=int(request.max_shard_gb * 1e9)
    )
    with atomic_folder(request.out) as folder:
        size = job.write(folder)
        checked = f"logits agree to {job.verify(folder):.0e}" if request.verify else "not checked (--verify false)"
    return f"{request.out}: {size / 1e9:.2f} GB in {policy.dtype} from {path}; {checked}"


def find_run_config(path: Path) -> Path | None:
    """The config of the run that a checkpoint or model folder belongs to; None: it belongs to none."""
    folders = [path, *path.absolute().parents][:PARENTS]
    return next((folder / CONFIG_NAME for folder in folders if (folder / CONFIG_NAME).is_file()), None)


def read_run_config(file: Path) -> dict[str, Any]:
    """A run's config under the names of today.

    Raises:
        CheckpointError: It cannot be read, or is not a run's.
    """
    import yaml

    from cv_lightning.renames import migrate_config

    try:
        config, _ = migrate_config(yaml.safe_load(file.read_text(encoding="utf-8")))
        config["model"]["init_args"]["policy"]["path"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not a config of a run, such as {CONFIG_NAME} in its folder ({error!r})"
        ) from error
    return config


def read_policy(file: Path, request: ExportRequest) -> PolicyConfig:
    """The policy of the run's config, with the options of the command line.

    Raises:
        CheckpointError: The config is missing, or is not a run's.
    """
    import jsonargparse

    from cv_lightning.models.loading import PolicyConfig

    given = read_run_config(file)["model"]["init_args"]["policy"]
    given |= {"path": request.base or given["path"], "dtype": request.dtype or given["dtype"]}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicyConfig)
    try:
        policy: PolicyConfig = parser.instantiate(parser.parse_object({"policy": given})).policy
    except jsonargparse.ArgumentError as error:
        raise CheckpointError(f"--run_config {file}: model.policy cannot be read ({error})") from error
    if Path(policy.path).is_absolute() and not Path(policy.path).is_dir():
        raise CheckpointError(
            f"--run_config {file}: the run began with {policy.path}, which does not exist; give a folder of the same "
            "model with --base"
        )
    return policy


main = partial(run_verb, ExportRequest, name="export", run=_export)
