"""`python -m cv_lightning VERB`: the dispatcher, which imports what a verb needs once the verb is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from cv_lightning.command_line import Verb, find_verb

VERBS = {
    "fit": Verb("cv_lightning.cli:main", "train: SFT or GRPO, as the config says", lightning=True),
    "validate": Verb("cv_lightning.cli:main", "evaluate on the validation tasks", lightning=True),
    "test": Verb("cv_lightning.cli:main", "evaluate on the held-out tasks and store the trajectories", lightning=True),
    "doctor": Verb("cv_lightning.commands.doctor:main", "show what works on this machine, and what would add the rest"),
    "sandbox": Verb("cv_lightning.commands.sandbox:main", "test the sandbox, or run one snippet in it"),
    "judge": Verb("cv_lightning.commands.judge:main", "ask the judge for one verdict, or check its endpoint"),
    "plan": Verb("cv_lightning.commands.plan:main", "estimate memory and time of a run, and whether it fits"),
    "export": Verb("cv_lightning.commands.export:main", "write a checkpoint as a Hugging Face folder"),
    "rescore": Verb("cv_lightning.commands.rescore:main", "apply another reward recipe to stored trajectories"),
    "report": Verb("cv_lightning.commands.report:main", "write the page that shows what a run did"),
    "view": Verb("cv_lightning.commands.view_run:main", "show a run in the browser while it continues"),
    "trajectories": Verb("cv_lightning.commands.trajectories:main", "export stored trajectories to Parquet"),
    "quickstart": Verb("cv_lightning.digits.quickstart:main", "train and test a tiny model on handwritten digits"),
    "compare": Verb("cv_lightning.commands.compare:main", "compare two evaluations question by question"),
    "ablations": Verb("cv_lightning.digits.ablations:main", "train the quickstart without parts of reward and recipe"),
    "config": Verb("cv_lightning.commands.config:main", "rewrite a config of an earlier version"),
    "configs": Verb("cv_lightning.commands.configs:main", "list or copy the configs that come with the package"),
    "data": Verb("cv_lightning.commands.data:main", "check, export, build or corrupt data sets"),
    "sweep": Verb("cv_lightning.commands.sweep:main", "run a W&B sweep file without an account"),
    "chat": Verb("cv_lightning.commands.chat:main", "ask a model about an image, in the terminal or a browser"),
    "tiny": Verb("cv_lightning.commands.tiny:main", "write a tiny random-weight checkpoint"),
    "quickstart-summary": Verb("cv_lightning.digits.summary:main", "summarise a quickstart run: tables, summary.json"),
}
ABOUT = "options of all: --quiet (warnings and results only), --verbose (everything, libraries too)\n"


def main(argv: list[str]) -> int:
    """Run one verb.

    Args:
        argv: The command line without the program's name.

    Returns:
        The exit code; 2 if there is no such verb.
    """
    if argv[:1] == ["--version"]:
        from cv_lightning import __version__

        sys.stdout.write(f"cv_lightning {__version__}\n")
        return 0
    verb = find_verb(argv, VERBS, "python -m cv_lightning", "verb", ABOUT)
    if isinstance(verb, int):
        return verb
    from cv_lightning.environment import prepare_environment, set_up_logging, take_verbosity

    is_own = argv == sys.argv[1:]
    argv = [argv[0], *take_verbosity(argv[1:])]
    if is_own:  # ranks that Lightning starts read it, too
        sys.argv[1:] = argv
    arguments: list[str] | None = argv[1:]
    if verb.lightning:
        prepare_environment()
        arguments = None if is_own else argv  # Lightning reads sys.argv itself, and warns of a second command line
    set_up_logging()
    from cv_lightning.files import describe_disk_error

    try:
        result = verb.load()(arguments)
    except OSError as error:
        if not (said := describe_disk_error(error)):
            raise
        sys.stderr.write(f"error: {said}\n")
        return 1
    return result if isinstance(result, int) else 0


def run() -> None:
    """Entry point of the installed script."""
    from cv_lightning.environment import use_current_folder, use_utf8

    use_utf8()
    use_current_folder()
    if "WANDB_SWEEP_ID" in os.environ and any(VERBS[word].lightning for word in sys.argv[1:2] if word in VERBS):
        sys.argv[1:] = agent_arguments(sys.argv[1:], os.environ)  # ranks that Lightning starts read it, too
    sys.exit(main(sys.argv[1:]))


def agent_arguments(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of a trial that W&B's agent started, as LightningCLI takes it.

    A resumed run may get `--_wandb={...}` (wandb#4237), which is left out. Each trial gets its own run folder, unless
    the command names one.
    """
    kept = [word for word in arguments if not word.startswith("--_wandb=")]
    sweep, run = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    is_named = any(word.partition("=")[0] == "--trainer.default_root_dir" for word in kept)
    return kept if is_named or not (sweep and run) else [*kept, f"--trainer.default_root_dir=runs/sweeps/{sweep}/{run}"]


if __name__ == "__main__":
    run()
