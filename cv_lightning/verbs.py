"""The verbs of the command line in one table: what runs them, their help, positional arguments and other names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

PROGRAM = "cv-lightning"
NONE: Mapping[str, Any] = MappingProxyType({})


class Verb(NamedTuple):
    """One command, or a group of sub-verbs."""

    target: str
    """`module:function`, called with the list of arguments; an int that it returns is the exit code. Empty for a
    group."""
    help: str
    """One line."""
    job: str = ""
    """Heading under which the list of verbs shows it; empty: the list leaves it out."""
    positional: Mapping[str, str] = NONE
    """Flags whose values need no flag, in this order, with their names in the help: `report RUN` is `report --run RUN`.
    A flag that takes a list comes last and takes all that is left."""
    short: Mapping[str, str] = NONE
    """Other spellings of flags: `-o` for `--output`."""
    shown: tuple[str, ...] = ()
    """Nested settings that the short help lists too."""
    also: tuple[str, ...] = ()
    """Other names of the verb."""
    lightning: bool = False
    """LightningCLI's own subcommand: the verb is part of its arguments."""
    verbs: Mapping[str, Verb] = NONE
    """Sub-verbs."""

    def load(self) -> Callable[[list[str] | None], Any]:
        """Import the function."""
        module, name = self.target.split(":")
        function: Callable[[list[str] | None], Any] = getattr(importlib.import_module(module), name)
        return function


TRAIN, EVALUATE, LOOK, DATA, MACHINE = "train", "evaluate", "look at runs and models", "data", "machine and settings"
COMMANDS = "cv_lightning.commands"
VERBS: Mapping[str, Verb] = {
    "fit": Verb(
        "cv_lightning.cli:main", "train: SFT or GRPO, as the config says", TRAIN, also=("train",), lightning=True
    ),
    "plan": Verb(f"{COMMANDS}.plan:main", "estimate memory and time of a training, and whether it fits", TRAIN),
    "export": Verb(
        f"{COMMANDS}.export:main",
        "write a checkpoint as a Hugging Face folder",
        TRAIN,
        {"ckpt": "RUN"},
    ),
    "quickstart": Verb(
        "cv_lightning.digits.quickstart:main", "train and test a tiny model on handwritten digits", TRAIN
    ),
    "sweep": Verb(f"{COMMANDS}.sweep:main", "run a W&B sweep file without an account", TRAIN, {"file": "FILE"}),
    "ablations": Verb(
        "cv_lightning.digits.ablations:main", "train the quickstart without parts of reward and recipe", TRAIN
    ),
    "tiny": Verb(
        f"{COMMANDS}.tiny:main",
        "write a tiny checkpoint with random weights, for trying things out",
        TRAIN,
        {"out": "FOLDER"},
        {"--family": "--model.family", "--seed": "--model.seed"},
        ("model.family", "model.seed"),
    ),
    "test": Verb(
        "cv_lightning.cli:main",
        "evaluate on the held-out tasks and store the trajectories",
        EVALUATE,
        also=("eval", "evaluate"),
        lightning=True,
    ),
    "validate": Verb("cv_lightning.cli:main", "evaluate on the validation tasks", EVALUATE, lightning=True),
    "compare": Verb(
        f"{COMMANDS}.compare:main", "compare two evaluations question by question", EVALUATE, {"a": "A", "b": "B"}
    ),
    "rescore": Verb(
        f"{COMMANDS}.rescore:main",
        "apply another reward recipe to stored trajectories",
        EVALUATE,
        {"run": "STORE"},
        shown=("reward",),
    ),
    "judge": Verb(
        f"{COMMANDS}.judge:main",
        "ask the judge for one verdict, or check its endpoint",
        EVALUATE,
        shown=("judge.base_url", "judge.model", "judge.api_key_env"),
    ),
    "report": Verb(f"{COMMANDS}.report:main", "write the page that shows what a run did", LOOK, {"run": "RUN"}),
    "view": Verb(f"{COMMANDS}.view_run:main", "show a run in the browser while it continues", LOOK, {"run": "RUN"}),
    "chat": Verb(
        f"{COMMANDS}.chat:main",
        "ask a model about an image, in the terminal or a browser",
        LOOK,
        {"model": "MODEL", "image": "IMAGE"},
        shown=("sampling.temperature", "sampling.seed", "agent.max_turns", "engine.kind"),
    ),
    "trajectories": Verb(
        "",
        "work with stored trajectories",
        LOOK,
        verbs={
            "export": Verb(
                f"{COMMANDS}.trajectories:main",
                "write stored trajectories as Parquet",
                positional={"run": "RUN"},
            )
        },
    ),
    "data": Verb(
        "",
        "check, show, build and corrupt data sets",
        DATA,
        verbs={
            "check": Verb(
                f"{COMMANDS}.data_check:main",
                "report what files hold and whether they will train",
                positional={"files": "FILES"},
            ),
            "show": Verb(
                f"{COMMANDS}.data_show:main",
                "print one conversation with its tokens, mask and images",
                positional={"file": "FILE"},
            ),
            "build-sft": Verb(
                f"{COMMANDS}.data_build:build_sft",
                "make SFT conversations from a table of VQA",
                positional={"files": "FILES"},
                shown=("teacher.base_url", "teacher.model", "teacher.api_key_env"),
            ),
            "build-rl": Verb(
                f"{COMMANDS}.data_build:build_rl",
                "make RL tasks from a table of VQA",
                positional={"files": "FILES"},
            ),
            "corrupt": Verb(
                f"{COMMANDS}.data_build:corrupt",
                "turn and corrupt a benchmark, boxes mapped along",
                positional={"files": "FILES"},
                shown=("suite.orientations", "suite.corruptions", "suite.severities", "suite.mode"),
            ),
            "export": Verb(
                f"{COMMANDS}.data_export:main",
                "write the embedded digits as RL Parquet or SFT JSON",
                positional={"out": "OUT"},
            ),
        },
    ),
    "doctor": Verb(f"{COMMANDS}.doctor:main", "show what works on this machine, and what would add the rest", MACHINE),
    "settings": Verb(
        f"{COMMANDS}.settings:main", "search the settings of fit, validate and test", MACHINE, {"words": "WORD"}
    ),
    "sandbox": Verb(
        f"{COMMANDS}.sandbox:main", "test the sandbox, or run one snippet in it", MACHINE, short={"-o": "--output"}
    ),
    "configs": Verb(
        "",
        "work with the configs of the package",
        MACHINE,
        verbs={
            "list": Verb(f"{COMMANDS}.configs:list_main", "names of the packaged configs, and what each one is"),
            "copy": Verb(
                f"{COMMANDS}.configs:copy_main", "copy a packaged config, to change it", positional={"name": "NAME"}
            ),
        },
    ),
    "config": Verb(
        "",
        "work with config files",
        MACHINE,
        verbs={
            "migrate": Verb(
                f"{COMMANDS}.config:main", "rewrite a config of an earlier version", positional={"file": "FILE"}
            )
        },
    ),
    "quickstart-summary": Verb(
        "cv_lightning.digits.summary:main",
        "summarise a quickstart run",
        positional={"run": "RUN"},
    ),
}
HINTS = {
    "bench": "`cv-lightning test --config configs/eval/NAME.yaml` runs a benchmark",
    "check": "`cv-lightning data check FILES` checks data, `cv-lightning doctor` this machine",
    "convert": "`cv-lightning export RUN --out FOLDER` writes a Hugging Face folder",
    "demo": "`cv-lightning quickstart` trains a tiny model, `cv-lightning chat MODEL --web` asks one in a browser",
    "finetune": "`cv-lightning fit --config FILE` trains",
    "generate": "`cv-lightning chat MODEL IMAGE` answers one question, `cv-lightning test` a data set",
    "grpo": "`cv-lightning fit --config configs/grpo/qwen3_vl_8b.yaml` trains with GRPO",
    "infer": "`cv-lightning chat MODEL IMAGE` answers one question, `cv-lightning test` a data set",
    "info": "`cv-lightning doctor` shows what works on this machine",
    "init": "`cv-lightning quickstart` trains a first model",
    "log": "`cv-lightning view RUN` shows a run while it continues",
    "merge": "`cv-lightning export RUN --out FOLDER` merges LoRA adapters into the weights",
    "predict": "`cv-lightning test` stores every trajectory, `cv-lightning trajectories export RUN` writes a table",
    "resume": "the `fit` command of the run with `--ckpt_path last` resumes it",
    "rl": "`cv-lightning fit --config configs/grpo/qwen3_vl_8b.yaml` trains with GRPO",
    "run": "`cv-lightning fit --config FILE` trains, `cv-lightning chat MODEL IMAGE` asks a model",
    "score": "`cv-lightning rescore STORE --reward FILE --out NEW` scores stored trajectories again",
    "serve": "`cv-lightning chat MODEL --web` serves a page on this machine; for an API, `vllm serve FOLDER` takes the "
    "folder that `cv-lightning export` writes",
    "sft": "`cv-lightning fit --config configs/sft/qwen3_vl_8b.yaml` trains with SFT",
    "show": "`cv-lightning report RUN` shows a run, `cv-lightning data show FILE` one row of a data set",
    "version": "`cv-lightning --version` prints the version",
}
"""Words that people try first and that are no verbs, and what to use instead."""
HINTS |= {
    "benchmark": HINTS["bench"],
    "fine-tune": HINTS["finetune"],
    "inference": HINTS["infer"],
    "logs": HINTS["log"],
    "playground": HINTS["demo"],
    "ask": HINTS["infer"],
    "tune": HINTS["finetune"],
}


def find(name: str) -> Verb:
    """The verb of a name such as `report` or `data check`."""
    verb, _, sub = name.partition(" ")
    return VERBS[verb].verbs[sub] if sub else VERBS[verb]


def commands() -> Iterator[tuple[str, Verb]]:
    """Every command with its full name, sub-verbs in place of their groups."""
    for name, verb in VERBS.items():
        if verb.verbs:
            yield from ((f"{name} {sub}", found) for sub, found in verb.verbs.items())
        else:
            yield name, verb
