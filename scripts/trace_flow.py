"""Measures which package files and carriers a sampled token and an image pass on their way to the loss.

One GRPO iteration runs on a tiny random-weight model and a Parquet file of digits. Two values are followed: the ids and
log-probabilities of one sampled turn, from the engine's output to forward pass and policy loss, and the image of one
row, from its Parquet cell to the forward pass. A profile function looks at every call of the package's functions. The
rule:

- A function *handles* the value if an argument, a local variable or its result is the value itself, alone or inside
  plain lists, tuples and dicts; or if one of them is an object of the package that holds the value under an attribute
  which the function's code names. An image has five forms: the cell's bytes, the decoded image, the resized one, the
  processed tensor, and a tensor of several images that contains it. Otherwise the function *passes* such objects on.
- A file is on the *chain* if one of its functions handles the value and has at its end an object with the value that it
  did not have at its start and from which, through further such functions, the last one gets it. A file that handles
  the value off the chain (checks, rewards, metrics, the trajectory store) only *reads* it.
- A *carrier* is a class of the package whose objects on the chain have a copy of the value of their own. A class whose
  attribute is the very object that an earlier carrier has (such as `Trajectory`, which has the dialogue's lists)
  *shares* it.

    python scripts/trace_flow.py [--engine transformers|vllm] [--json]
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from cv_lightning.environment import prepare_environment

prepare_environment()

import lightning.pytorch as pl  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import cv_lightning  # noqa: E402
from cv_lightning.agent.config import AgentConfig  # noqa: E402
from cv_lightning.agent.prompt import PromptConfig  # noqa: E402
from cv_lightning.callbacks.rollout import RolloutCallback  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.data.modules import TaskDataModule  # noqa: E402
from cv_lightning.digits.export import write_digits_parquet  # noqa: E402
from cv_lightning.digits.scenes import DigitsConfig  # noqa: E402
from cv_lightning.engines import Completion, Engine, EngineConfig  # noqa: E402
from cv_lightning.images import content_hash, decode_image  # noqa: E402
from cv_lightning.models.loading import PolicyConfig  # noqa: E402
from cv_lightning.modules.base import OptimizerConfig, PolicyModule  # noqa: E402
from cv_lightning.modules.grpo import GRPOModule  # noqa: E402
from cv_lightning.rl.algorithm import AlgorithmConfig  # noqa: E402

PACKAGE = Path(cv_lightning.__file__).parent
MIN_TOKENS = 8
"""Length of a turn that cannot be found elsewhere by chance."""
DEPTH = 7
"""How far objects of the package are looked into."""
TOKEN_ENDS = (
    "models/adapters/qwen_vl.py:QwenVLAdapter.packed_hidden",
    "models/logprobs.py:packed_logprobs",
    "rl/losses/ppo_clip.py",
)
"""The model reads the ids, the log-probabilities are those of the targets, the policy loss reads the engine's."""
IMAGE_ENDS = ("models/adapters/base.py:PackedInputs.image_tensors",)
"""The model's forward asks for the tensors."""


class Tokens:
    """The ids and the log-probabilities of one sampled turn."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def is_in(self, value: Any) -> bool:
        """True if a sequence of numbers contains the turn's ids or log-probabilities."""
        if not self.ids:
            return False
        if isinstance(value, torch.Tensor | np.ndarray):
            if not MIN_TOKENS <= np.prod(value.shape) <= 1 << 16:
                return False
            value = (value.detach().cpu() if isinstance(value, torch.Tensor) else value).reshape(-1).tolist()
        elif not isinstance(value, list | tuple) or len(value) < len(self.ids):
            return False
        if isinstance(value[0], bool) or not isinstance(value[0], int | float):
            return False
        if isinstance(value[0], int):
            return _contains(value, self.ids)
        return len(value) >= len(self.ids) and _contains(value, self.logprobs)  # exactly: the trainer's differ


class Picture:
    """The image of one row of the file, in its five forms."""

    def __init__(self, module: GRPOModule, cell: bytes) -> None:
        decoded = decode_image(cell)
        shown = module.encoder.model_image(decoded)
        self.cell, self.hashes = cell, {content_hash(decoded), content_hash(shown)}
        self.shown = content_hash(shown)
        self.pixels = max(module.adapter.process_images([shown])[0].tensors.values(), key=torch.Tensor.numel)
        self._known: dict[int, tuple[Image.Image, bool]] = {}

    def is_in(self, value: Any) -> bool:
        """True if a value is the image in one of its forms, or a tensor that contains it."""
        if isinstance(value, bytes):
            return value == self.cell
        if isinstance(value, Image.Image):
            if id(value) not in self._known:
                self._known[id(value)] = value, content_hash(value) in self.hashes
            return self._known[id(value)][1]
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1:] == self.pixels.shape[1:]:
            starts = (value[:, :8].cpu() == self.pixels[0, :8]).all(-1).nonzero().flatten().tolist()
            size = len(self.pixels)
            return any(torch.equal(value[start : start + size].cpu(), self.pixels) for start in starts)
        return False


@dataclass
class Event:
    """One call of a function that had the value in hand."""

    file: str
    name: str
    handles: bool
    before: set[int]
    """Ids of what it had in hand at its start."""
    new: set[int]
    """Ids of what it had in hand at its end only."""
    held: dict[tuple[str, str], set[int]]
    """By class and attribute, the objects under it that are the value."""


@dataclass
class Chain:
    """Record of the functions that had the value in hand."""

    value: Tokens | Picture
    ends: tuple[str, ...]
    """Starts of `file:function` of the last functions."""
    events: list[Event] = field(default_factory=list)
    _before: dict[int, set[int]] = field(default_factory=dict)
    """By frame, what it had in hand when it was called."""
    _alive: dict[int, Any] = field(default_factory=dict)
    """Everything that was seen, so that no id is used twice."""

    def look(self, frame: FrameType, file: str, values: Mapping[str, Any], *, at_end: bool) -> None:
        """Note what one function has in hand at its start or end."""
        direct: list[Any] = []
        held: dict[tuple[str, str], set[int]] = {}
        holders: list[Any] = []
        for value in values.values():
            direct += _directly(self.value, value)
            for owner, attribute, part in _holders(self.value, value):
                held.setdefault((type(owner).__name__, attribute), set()).add(id(part))
                holders += [owner, part]
        has = {id(part): part for part in (*direct, *holders)}
        self._alive |= has
        if not at_end:
            self._before[id(frame)] = set(has)
            return
        before, code = self._before.pop(id(frame), set()), frame.f_code
        if has:
            handles = bool(direct) or any(attribute in _names(code) for _, attribute in held)
            self.events.append(Event(file, code.co_qualname, handles, before, set(has) - before, held))

    def result(self) -> dict[str, Any]:
        """Files and carriers; a file is named once, where it does most."""
        needed: set[int] = set()
        on_chain: list[Event] = []
        for event in reversed(self.events):
            if f"{event.file}:{event.name}".startswith(self.ends) or (event.handles and event.new & needed):
                needed |= event.before | event.new
                on_chain.append(event)
        files = _by_file(reversed(on_chain))
        readers = _by_file(e for e in self.events if e.handles and e.file not in files)
        passed = _by_file(e for e in self.events if e.file not in files | readers)
        copies: dict[str, set[str]] = {}
        shares: dict[str, set[str]] = {}
        owners: dict[int, str] = {}
        for event in reversed(on_chain):
            for (owner, attribute), parts in event.held.items():
                first = owners.setdefault(min(parts & owners.keys(), default=min(parts)), owner)
                owners |= dict.fromkeys(parts - owners.keys(), owner)
                (copies if first == owner else shares).setdefault(owner, set()).add(attribute)
        shares = {owner: names for owner, names in shares.items() if owner not in copies}
        found = {"files": files, "carriers": copies, "shares": shares, "readers": readers, "passed": passed}
        return {title: {key: sorted(names) for key, names in part.items()} for title, part in found.items()}


def _by_file(events: Iterable[Event]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for event in events:
        found.setdefault(event.file, set()).add(event.name)
    return found


@cache
def _names(code: CodeType) -> frozenset[str]:
    """The names that a function's code uses, its comprehensions included."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType) and const.co_name.startswith("<")]
    return frozenset(code.co_names).union(*map(_names, inner))


def _contains(values: Any, run: list[Any]) -> bool:
    first, size = run[0], len(run)
    return any(list(values[at : at + size]) == run for at, value in enumerate(values) if value == first)


def _directly(wanted: Tokens | Picture, value: Any, depth: int = 3) -> Iterator[Any]:
    """The wanted value itself, alone or inside plain containers."""
    if wanted.is_in(value):
        yield value
    elif depth and isinstance(value, list | tuple | dict) and not _is_flat(value):
        for part in list(value.values() if isinstance(value, dict) else value):
            yield from _directly(wanted, part, depth - 1)


def _holders(wanted: Tokens | Picture, value: Any) -> Iterator[tuple[Any, str, Any]]:
    """Every object of the package in `value` that holds the wanted value, the attribute, and the value there."""
    seen: set[int] = set()

    def walk(value: Any, depth: int) -> Iterator[tuple[Any, str, Any]]:
        if depth == 0 or id(value) in seen or isinstance(value, torch.nn.Module | pl.Trainer | pl.Callback):
            return
        seen.add(id(value))
        if type(value).__module__.startswith("cv_lightning"):
            for name, part in _attributes(value):
                for found in _directly(wanted, part):
                    yield value, name, found
                yield from walk(part, depth - 1)
        elif isinstance(value, list | tuple | dict) and not _is_flat(value):
            for part in list(value.values() if isinstance(value, dict) else value):
                yield from walk(part, depth - 1)

    yield from walk(value, DEPTH)


def _is_flat(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], int | float | str)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return list(getattr(value, "__dict__", {}).items())


class Tracer:
    """A profile function over the functions of the package."""

    def __init__(self, chains: list[Chain]) -> None:
        self.chains = chains
        self.active = True
        self._files: dict[CodeType, str] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if event not in ("call", "return") or not self.active:
            return
        code = frame.f_code
        file = self._files.get(code)
        if file is None:
            path = Path(code.co_filename)
            own = path.is_relative_to(PACKAGE) and not code.co_name.startswith("<")
            file = self._files[code] = str(path.relative_to(PACKAGE)) if own else ""
        if not file:
            return
        sys.setprofile(None)
        try:
            values = dict(frame.f_locals)
            if event == "return":
                values["return"] = argument
            for chain in self.chains:
                chain.look(frame, file, values, at_end=event == "return")
        finally:
            sys.setprofile(self)

    def __enter__(self) -> Tracer:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.active = False
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)


class TracedCallback(RolloutCallback):
    """Starts to trace the tokens of the first turn that is long enough, as the engine hands it out."""

    tokens: Tokens
    engine_file = ""

    def _build_engine(self, module: PolicyModule) -> Engine:
        engine = super()._build_engine(module)
        step, tokens = engine.step, self.tokens
        self.engine_file = str(Path(inspect.getfile(type(engine))).relative_to(PACKAGE))

        def traced_step() -> list[Completion]:
            completions = step()
            for done in completions:
                if not tokens.ids and len(set(done.token_ids)) >= MIN_TOKENS and done.logprobs:
                    tokens.ids, tokens.logprobs = list(done.token_ids), list(done.logprobs)
            return completions

        engine.step = traced_step  # type: ignore[method-assign]
        return engine


class Passes:
    """Counts how often the image processor gets each image."""

    def __init__(self, processor: Any) -> None:
        self.kind, self.count = type(processor), Counter[str]()
        self.real = self.kind.__call__

    def __enter__(self) -> Passes:
        def counted(processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            several = images if isinstance(images, list | tuple) else [images]
            self.count.update(content_hash(image) for image in several if isinstance(image, Image.Image))
            return self.real(processor, images, *args, **kwargs)

        self.kind.__call__ = counted
        return self

    def __exit__(self, *_: object) -> None:
        self.kind.__call__ = self.real


def trace(kind: str, folder: Path) -> dict[str, Any]:
    """Run one iteration.

    Args:
        kind: Of the engine.
        folder: For checkpoint, data and run.

    Returns:
        Chains of `token` and `image`, each with files, carriers, shares, readers and passed; `passes`: how often the
        image processor was given each image of the file.
    """
    write(TinyCheckpoint(out=folder / "model"))
    write_digits_parquet(folder / "rl.parquet", DigitsConfig(), "train", 2)
    cells = [row[0]["bytes"] for row in pq.read_table(folder / "rl.parquet")["images"].to_pylist()]
    algorithm = AlgorithmConfig(entropy_weight=1e-3)  # or nothing is learned where all rewards are equal
    module = GRPOModule(
        PolicyConfig(path=str(folder / "model"), dtype="float32"), OptimizerConfig(), algorithm=algorithm
    )
    words = PromptConfig(system="none", state_size=False)
    callback = TracedCallback(
        agent=AgentConfig(max_turns=1, max_turn_tokens=16, max_images=2, prompt=words, deterministic=True),
        engine=EngineConfig(kind=kind, max_model_len=512, max_num_seqs=8, max_images=2),
        num_samples=2,
        mismatch_tolerance=0,
    )
    callback.tokens = Tokens()
    picture, *others = [Picture(module, cell) for cell in cells]
    chains = [Chain(callback.tokens, TOKEN_ENDS), Chain(picture, IMAGE_ENDS)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    data = TaskDataModule(train_files=[str(folder / "rl.parquet")], tasks_per_iteration=2, num_iterations=1)
    with Passes(module.adapter.processor.image_processor) as passes, Tracer(chains):
        trainer.fit(module, datamodule=data)
    token, image = (chain.result() for chain in chains)
    token["files"] = {callback.engine_file: ["the engine's output"]} | token["files"]
    return {
        "engine": kind,
        "token": token,
        "image": image,
        "passes": [passes.count[seen.shown] for seen in (picture, *others)],
    }


def table(found: dict[str, Any]) -> str:
    """The chains for people to read."""
    lines = []
    for name in ("token", "image"):
        chain = found[name]
        lines.append(f"{name}: {len(chain['files'])} files, {len(chain['carriers'])} carriers")
        for title in ("files", "carriers", "shares", "readers", "passed"):
            lines.append(f"  {title} ({len(chain[title])})")
            lines += [f"    {key:<34} {', '.join(values)}" for key, values in chain[title].items()]
    lines.append(f"image processor passes per image: {', '.join(map(str, found['passes']))}")
    return "\n".join(lines)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = trace(given.engine, Path(folder))
    print(json.dumps(found, indent=1) if given.json else table(found))


if __name__ == "__main__":
    main()
