"""fit, validate and test through LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import cv_lightning.data.modules
import cv_lightning.modules  # noqa: F401  (bare class names in YAML resolve among imported subclasses)
from cv_lightning.callbacks.checkpoint import CheckpointCallback, check_fits
from cv_lightning.callbacks.export import ExportCallback
from cv_lightning.callbacks.owner import RunOwner
from cv_lightning.callbacks.progress import RunProgress
from cv_lightning.callbacks.record import RunRecord, continue_wandb_run
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.callbacks.signals import StopOnSignal, exit_codes
from cv_lightning.callbacks.start_check import SFTStartCheck
from cv_lightning.callbacks.summary import RunSummary
from cv_lightning.callbacks.wandb import WandbTrajectories
from cv_lightning.callbacks.watchdog import Watchdog
from cv_lightning.checkpoints.damage import damage
from cv_lightning.checkpoints.folder import FOLDER, checkpoints, is_of, last_checkpoint, refuse_used
from cv_lightning.checkpoints.recipe import check_recipe, settings_of
from cv_lightning.command_line import ShortErrors
from cv_lightning.devices import Gpus, use_named_devices
from cv_lightning.environment import check_launch, is_quiet, is_verbose, set_up_logging
from cv_lightning.files import describe_disk_error
from cv_lightning.hub import pin_files
from cv_lightning.loggers import run_loggers
from cv_lightning.loggers.wandb import WandbRun
from cv_lightning.modules.base import PolicyModule
from cv_lightning.preflight import check_evaluation, check_fit
from cv_lightning.renames import STORED, migrate_config
from cv_lightning.settings_check import check_command
from cv_lightning.types import CVLightningError
from cv_lightning.verbs import PROGRAM

LOG = logging.getLogger(__name__)
DEFAULT_FOLDER = "runs/default"
TAKE_OVER = (
    "Use a run folder although its record names an owner that seems to be alive, as one on another host does for a "
    "minute after its death. If it does live, it stops."
)


class ShortErrorParser(ShortErrors, LightningArgumentParser):
    """A parser with short errors and without abbreviations, which knows the old names in stored configs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def parse_string(self, content: str, path: str | os.PathLike[str] = "", *args: Any, **kwargs: Any) -> Any:
        """Parse a config. A stored one may have old names."""
        try:
            loaded = yaml.safe_load(content)
        except yaml.YAMLError:
            loaded = None  # the parser's own error names the place
        if isinstance(loaded, dict) and Path(path).name in STORED:
            migrated, changes = migrate_config(loaded)
            content = yaml.safe_dump(migrated, sort_keys=False) if changes else content
        return super().parse_string(content, path, *args, **kwargs)


CALLBACKS: dict[str, type[Callback]] = {
    "watchdog": Watchdog,
    "start_check": SFTStartCheck,
    "progress": RunProgress,
    "rollout": RolloutCallback,
    "export": ExportCallback,
    "checkpoint": CheckpointCallback,
}
"""Callbacks that a run has exactly once, by their key in a config, in the order of their calls."""
SWITCHES = {"progress": "enable_progress_bar", "checkpoint": "enable_checkpointing"}
"""Lightning's own switches of two of them."""
LINKS = {
    "rollout.sampling.temperature": "model.init_args.temperature",
    "rollout.agent.prompt": "model.init_args.prompt",
    "rollout.agent.tools": "model.init_args.tools",
    "rollout.agent.dialect": "model.init_args.dialect",
}
"""Settings of rollouts that a module needs too; a module without the argument is left alone."""
PARTS = {"module": "model", "data": "data"}
"""Keys of the parts of a recipe."""


class CVLightningCLI(LightningCLI):
    """LightningCLI with our defaults: a run folder with metrics and checkpoints, progress bar, run record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._take_over = False
        """The flag; not part of the stored config, with which a later run would take over again."""
        self._settings: dict[str, Any] = {}
        """Settings of the recipe by dotted name."""
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's without `predict`, as `test` stores trajectories."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our keys, links between them, and defaults."""
        parser.add_argument("--take_over", type=bool, default=False, help=TAKE_OVER)
        for key, kind in CALLBACKS.items():
            parser.add_class_arguments(kind, key, sub_configs=True)
        for source, target in LINKS.items():
            parser.link_arguments(source, target)
        parser.set_defaults(
            {
                "export.folder": None,
                "trainer.default_root_dir": DEFAULT_FOLDER,
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the metrics file and the callbacks that have keys of their own."""
        config = self._get(self.config_init, "trainer", default={})
        kwargs["logger"] = run_loggers(config.get("logger"), config["default_root_dir"], self.subcommand or "fit")
        loggers = kwargs["logger"] if isinstance(kwargs["logger"], list) else []
        given = list(config.get("callbacks") or [])
        own = {key: self._get(self.config_init, key) for key in CALLBACKS if _is_wanted(key, config, given)}
        if isinstance(own.get("checkpoint"), CheckpointCallback):
            own["checkpoint"].settings = self._settings
        first = [own.pop("watchdog", None), RunOwner(self._take_over), StopOnSignal(), own.pop("start_check", None)]
        wandb = [WandbTrajectories(logger) for logger in loggers if isinstance(logger, WandbRun)]
        kwargs["callbacks"] = [*filter(None, first), *given, *own.values(), *wandb, RunSummary()]
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a value that one of them refuses is an error without a traceback.

        Raises:
            CVLightningError: The constructor's error; JSONARGPARSE_DEBUG=true shows the traceback.
        """
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException, CVLightningError) as error:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, CVLightningError):
                cause = cause.__cause__
            raise CVLightningError(str(cause)) from error

    def _parse_ckpt_path(self) -> None:
        """Skip Lightning's search for hyper-parameters, which would read the whole checkpoint; ours hold none."""

    def before_instantiate_classes(self) -> None:
        """Check the launch of the ranks and find the checkpoint, before anything is built.

        Raises:
            CVLightningError: The ranks would not meet; there is no undamaged checkpoint; or the checkpoint or the run
                folder belongs to another run.
        """
        subcommand = self.config[self.subcommand]
        trainer = subcommand.trainer
        self._take_over, subcommand["take_over"] = bool(subcommand["take_over"]), False
        try:
            check_launch(trainer.devices, trainer.num_nodes)
            trainer.devices = use_named_devices(trainer.devices, trainer.accelerator, Gpus.here())
        except ValueError as error:
            raise CVLightningError(str(error)) from error
        run = Path(trainer.default_root_dir)
        path = find_checkpoint(subcommand.get("ckpt_path"), run)
        subcommand["ckpt_path"] = path
        if self.subcommand == "test":
            subcommand["verbose"] = False  # Lightning's table of the metrics; the evaluator prints its own
        if arguments := (subcommand.get("data") or {}).get("init_args"):
            pin_files(arguments, run, resumes=self.subcommand != "fit" or is_of(path, run))
        self._settings = settings_of(self.as_dict())
        if self.subcommand == "fit" and path is not None and Path(path).exists():
            classes = {part: self._settings[f"{name}.class_path"].rpartition(".")[2] for part, name in PARTS.items()}
            check_recipe(Path(path), classes, self._settings)
        if self.subcommand != "fit" or trainer.enable_checkpointing is False:
            return
        if is_of(path, run):
            continue_wandb_run(run)
        else:
            refuse_used(run)

    def before_fit(self) -> None:
        """Refuse a checkpoint that this strategy or number of ranks cannot load, and what would fail later."""
        self._check(check_fit)

    def before_validate(self) -> None:
        """Run the same checks for `validate`."""
        self._check(partial(check_evaluation, stage="validate"))

    def before_test(self) -> None:
        """Run the same checks for `test`."""
        self._check(partial(check_evaluation, stage="test"))

    def _check(self, check: Callable[[Trainer, Any, Any], None]) -> None:
        if path := self.config[self.subcommand].ckpt_path:
            check_fits(Path(path), self.trainer)
        check(self.trainer, self.model, self.datamodule)

    def as_dict(self) -> dict[str, Any]:
        """The resolved config, defaults included."""
        plain: dict[str, Any] = yaml.safe_load(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False)
        )
        return plain


class ConfigOnly(CVLightningCLI):
    """Parses the command line as fit does, and builds and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Check nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _set_seed(self) -> None:
        """Keep the state of the random generators."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _is_wanted(key: str, trainer: Mapping[str, Any], given: Sequence[Callback]) -> bool:
    """True if the callback of a key takes part in the run.

    Args:
        key: One of `CALLBACKS`.
        trainer: Arguments of the trainer.
        given: Its callbacks; one of a class derived from ours replaces ours.

    Raises:
        CVLightningError: Ours is among them.
    """
    kind = CALLBACKS[key]
    if any(type(callback) is kind for callback in given):
        raise CVLightningError(f"trainer.callbacks names {kind.__name__}, whose settings are under `{key}`")
    return trainer.get(SWITCHES.get(key, "")) is not False and not any(isinstance(c, kind) for c in given)


def find_checkpoint(given: str | None, run: Path) -> str | None:
    """The checkpoint that `--ckpt_path` names.

    Args:
        given: A path; `last`: the run's newest; `auto`: the same, or None where there is none.
        run: The run's folder.

    Raises:
        CVLightningError: The checkpoint does not exist, or is damaged.
    """
    if given is None or given in ("best", "hpc", "registry"):
        return given
    if given in ("last", "auto"):
        found = last_checkpoint(run)
        if found is None and checkpoints(run / FOLDER):
            raise CVLightningError(
                f"--ckpt_path {given}: every checkpoint in {run / FOLDER} is damaged, see above; remove them to "
                "start from the beginning"
            )
        if found is None and given == "last":
            raise CVLightningError(
                f"--ckpt_path last: there is no checkpoint in {run / FOLDER}; leave it out to start from the "
                "beginning, or name the run's folder with --trainer.default_root_dir"
            )
        return None if found is None else str(found)
    if not Path(given).exists():
        raise CVLightningError(
            f"--ckpt_path {given}: no such file or folder; give a checkpoint of this run, last, or leave it out"
        )
    if reason := damage(Path(given)):
        raise CVLightningError(
            f"--ckpt_path {given} is damaged: {reason}. Give another one; `last` takes the newest that is whole"
        )
    return given


def main(
    args: ArgsType = None,
    cli_class: type[CVLightningCLI] = CVLightningCLI,
    parser_class: type[ShortErrorParser] = ShortErrorParser,
) -> CVLightningCLI:
    """Run one of fit, validate, test.

    Args:
        args: The command line without the program's name; `sys.argv[1:]` by default.
        cli_class: Class that runs it, such as `ConfigOnly`.
        parser_class: Class that parses it; `plan`, which takes the options of fit, has its own.
    """
    _quiet_libraries()
    try:
        if args is None or isinstance(args, list):
            words = sys.argv[1:] if args is None else args
            if words and (said := check_command(words[0], words[1:])):
                raise CVLightningError(said)
            if any(word in ("-h", "--help") or word.endswith(".help") for word in words):
                set_parsing_settings(docstring_parse_attribute_docstrings=True)  # slow, and read by the help alone
        with exit_codes():
            return cli_class(
                model_class=PolicyModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=RunRecord,
                save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
                seed_everything_default=0,
                parser_class=parser_class,
                parser_kwargs={"prog": PROGRAM},
                args=args,
            )
    except (CVLightningError, OSError) as error:
        if not (said := describe_disk_error(error) if isinstance(error, OSError) else str(error)):
            raise
        sys.exit(f"error: {said}")


UNHELPFUL = (
    "litlogger",
    "litmodels",
    "TPU available",
    "GPU available",
    "`Trainer.fit` stopped",
    "Seed set to",
    "Restoring states from",
    "initializing deepspeed distributed",
)
"""Parts of Lightning's messages that are not shown; the run record names the devices."""


def _quiet_libraries() -> None:
    """Silence messages and warnings of libraries that a user cannot act on, except with --verbose."""
    set_up_logging()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # they write to stderr only; ours also write the log file
        logging.getLogger(name).propagate = True
    if is_quiet():
        transformers.utils.logging.disable_progress_bar()
    if is_verbose():
        return
    for name in ("httpx2", "openai", "matplotlib", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed", "pytorch.strategies.deepspeed"):
        logger = logging.getLogger(f"lightning.{name}")
        logger.addFilter(lambda record: not any(part in str(record.msg) for part in UNHELPFUL))
    for pattern in (
        ".*does not have many workers.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*logging directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        "Total length of `list` across ranks is zero.*",  # no validation was asked for
        r"`?torch\.distributed\.(reduce_op|all_gather_into_tensor|nn\.functional\.all_gather)`? is deprecated.*",
        "It is recommended to use `self.log.*",  # figures are summed over ranks before they are logged
        "Found .* module.s. in eval mode at the start of training.*",  # the reference policy
    ):
        warnings.filterwarnings("ignore", pattern)
