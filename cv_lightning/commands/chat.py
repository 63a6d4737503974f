"""`cv-lightning chat`: ask a model about an image, and watch its reasoning, code and tool results."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cv_lightning.environment import prepare_environment
from cv_lightning.types import CheckpointError

prepare_environment()  # before transformers and vLLM

from cv_lightning.agent.config import AgentConfig  # noqa: E402
from cv_lightning.command_line import arguments, run_verb  # noqa: E402
from cv_lightning.commands.export import ExportRequest, export, find_run_config, read_run_config  # noqa: E402
from cv_lightning.early import local_folder_error  # noqa: E402
from cv_lightning.engines.base import EngineConfig, SamplingConfig  # noqa: E402
from cv_lightning.models.loading import model_positions  # noqa: E402
from cv_lightning.ranges import PositiveInt, Range, check_ranges  # noqa: E402
from cv_lightning.sandbox.config import SandboxConfig  # noqa: E402

if TYPE_CHECKING:
    from cv_lightning.viewer.playground.examples import Example


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Model and question. Agent, engine and sandbox have the settings of the run that trained the model."""

    model: str | None = None
    """Hugging Face folder or hub name of a vision-language model, or a run's folder with `model/` in it."""
    ckpt: Path | None = None
    """Checkpoint of a run, in place of `model`: .ckpt file, DeepSpeed folder, or the run's folder."""
    image: Path | None = None
    """The image."""
    question: str | None = None
    """Ask this, print the trajectory, and end; exit code 1: not answered. Without it, questions are read from the
    keyboard."""
    examples: Path | None = None
    """Folder of images (NAME.txt: the question about NAME.png) or file of tasks or conversations to choose from; None:
    generated scenes with digits."""
    save: bool = False
    """Keep the trajectory of `question`."""
    inline: bool = False
    """Draw images in the terminal, in coloured blocks."""
    web: bool = False
    """Show a page in the browser in place of the terminal."""
    port: Annotated[int, Range(at_least=0, at_most=65535)] = 8780
    """Port of the page, on 127.0.0.1 only."""
    out: Path = Path("runs/chat")
    """Folder of saved trajectories and images."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights."""
    min_pixels: PositiveInt | None = None
    """Smallest image that the model sees, in pixels; None: as its processor says."""
    max_pixels: PositiveInt | None = None
    """Largest image that the model sees, in pixels; None: as its processor says."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Limits and prompt of the agent."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine that generates."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Limits of the sandbox that runs the model's code."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Sampling of tokens; greedy by default."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.ckpt is None):
            raise ValueError("give a MODEL or --ckpt CHECKPOINT, one of them")
        if self.question is not None and (self.image is None or self.web):
            raise ValueError("--question needs --image FILE, and goes without --web")
        check_ranges(self)
        if self.model is not None and (wrong := local_folder_error(self.model)):
            raise ValueError(f"MODEL {self.model}: {wrong}")
        for name, path in (("--ckpt", self.ckpt), ("IMAGE", self.image)):
            if path is not None and not path.exists():
                raise ValueError(f"{name} {path}: no such file")


def _chat(options: ChatOptions) -> int:
    with ExitStack() as stack:
        return _run(options, stack)


def _run(options: ChatOptions, stack: ExitStack) -> int:
    from cv_lightning.models.loading import PolicyConfig
    from cv_lightning.viewer.playground.session import open_playground
    from cv_lightning.viewer.playground.terminal import Terminal, one_question

    path = None if options.model is None else str(_model_folder(Path(options.model)))
    if options.ckpt is not None:
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="cv-lightning-")) + "/model"
        request = ExportRequest(ckpt=options.ckpt, out=Path(path), dtype=options.dtype, verify=False)
        print(export(request), file=sys.stderr)
    assert path is not None
    policy = PolicyConfig(path=path, dtype=options.dtype, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    opened = open_playground(policy, options.agent, options.engine, options.sandbox, options.out)
    if options.web:
        from cv_lightning.viewer.playground.web import check_port, serve

        check_port(options.port)
        examples = _examples(options)
        serve(stack.enter_context(opened), options.sampling, options.port, options.image, examples)
        return 0
    examples = _examples(options) if options.question is None else []
    terminal = Terminal(stack.enter_context(opened), options.sampling, options.inline, examples=examples)
    if options.image is not None:
        terminal.open_image(options.image)
    if options.question is not None:
        return one_question(terminal, options.question, options.save)
    terminal.loop()
    return 0


def _examples(options: ChatOptions) -> list[Example]:
    """The user's examples, else a held-out scene of each kind of digits, which needs no download."""
    from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task
    from cv_lightning.viewer.playground.examples import example_of, examples_of

    if options.examples is not None:
        return examples_of(options.examples)
    tasks = {kind: digit_task(DigitsConfig(), "held_out", 0, kind) for kind in KINDS}
    return [example_of(task, kind.replace("_", " ")) for kind, task in tasks.items()]


# ------------------------------------------------------------------------------------------------ options
def parse(words: list[str]) -> ChatOptions:
    """The options of a command line."""
    return ChatOptions(**(arguments(ChatOptions, words, "chat", _use_run) or {}))


def _use_run(parser: Any, words: list[str]) -> None:
    """Make the settings of the model's run the defaults.

    Raises:
        CheckpointError: The run's config cannot be read by this version.
    """
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--model", "--ckpt") and value:
            _set_defaults(parser, _model_folder(Path(value)))


def _model_folder(given: Path) -> Path:
    """The exported model of a run's folder; any other path as it is."""
    exported = given / "model"
    return exported if (exported / "config.json").is_file() and not (given / "config.json").is_file() else given


def _set_defaults(parser: Any, path: Path) -> None:
    file = find_run_config(path)
    defaults = run_defaults(file) if file is not None else {}
    if "engine.max_model_len" not in defaults and (longest := model_positions(path)):
        defaults["engine.max_model_len"] = min(longest, EngineConfig.max_model_len)
    try:
        parser.set_defaults({**defaults, "engine.max_num_seqs": 1})
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be used by this version ({error}); rename it to chat with default settings"
        ) from error


def run_defaults(file: Path) -> dict[str, Any]:
    """Agent, engine, sandbox and weights of a run's config, as values by flag.

    Raises:
        CheckpointError: It is not a run's config.
    """
    config = read_run_config(file)
    model = config["model"]["init_args"]
    found = {name: value for name, value in model["policy"].items() if name in ("dtype", "min_pixels", "max_pixels")}
    rollout = config.get("rollout") or {}
    if str(config["model"].get("class_path")).endswith("SFTModule"):
        agent = rollout.get("agent") or {}
        found["agent"] = {name: agent[name] for name in ("prompt", "tools") if agent.get(name)}
    else:
        found |= {name: rollout.get(name) or {} for name in ("agent", "engine", "sandbox")}
    return dict(_flat(found))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


main = partial(run_verb, ChatOptions, name="chat", run=_chat, prepare=_use_run)
