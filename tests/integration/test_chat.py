"""The playground: ask, edit, stop and save a question, and the terminal."""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chat_samples import ANSWER, TURN, playground
from PIL import Image
from rich.console import Console

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.commands.chat import main, parse
from cv_lightning.engines import SamplingConfig
from cv_lightning.trajectory import path_of, read_groups
from cv_lightning.types import CVLightningError, EndState, Trajectory
from cv_lightning.viewer.playground.examples import examples_of
from cv_lightning.viewer.playground.session import Exchange, Playground
from cv_lightning.viewer.playground.terminal import Terminal

IMAGE = Image.new("RGB", (96, 64), "white")


@pytest.fixture
def play(encoder: DialogueEncoder, tmp_path: Path) -> Iterator[Playground]:
    with playground(encoder, tmp_path / "chat") as opened:
        yield opened


def ask(play: Playground) -> tuple[Exchange, list[str]]:
    """An exchange, and its status at every call of the watcher."""
    seen: list[str] = []
    exchange = play.ask(IMAGE, "What is written?", SamplingConfig(), lambda e: seen.append(e.status))
    return exchange, seen


def test_every_turn_is_reported_as_it_happens(play: Playground) -> None:
    exchange, seen = ask(play)
    assert seen == ["thinking", "thinking", "running the code", "thinking", "thinking", "answered"]
    assert [turn.text for turn in exchange.turns] == [TURN, ANSWER]
    result = exchange.turns[0].result
    assert result is not None and result.image is not None and result.image.size == (64, 96)
    assert [operation.name for operation in result.operations] == ["rotate_90"]


def test_edited_code_really_runs_and_is_not_learned_from(play: Playground) -> None:
    first, _ = ask(play)
    second = play.try_code(first, 0, "result = image.crop((0, 0, 32, 48))", lambda e: None)
    assert second.turns[0].edited and not second.turns[1].edited
    assert second.turns[0].result is not None and second.turns[0].result.image is not None
    assert second.turns[0].result.image.size == (32, 48)
    assert second.turns[0].text.startswith("<think>turned</think>")
    trajectory = second.trajectory
    assert trajectory is not None and trajectory.end_state is EndState.ANSWERED
    sampled = [id for id, kept in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if kept]
    assert sampled == list(play.rollout.encoder.assistant_ids(ANSWER))
    with pytest.raises(CVLightningError, match="turn 2 holds no code"):
        play.try_code(first, 1, "", lambda e: None)


def test_a_saved_exchange_is_read_by_the_store(play: Playground) -> None:
    first, _ = ask(play)
    assert first.turns[0].result is not None and first.turns[0].result.image is not None
    file = play.image_file(first.turns[0].result.image)
    play.save(first)
    play.save(play.try_code(first, 0, "result = image.rotate(180)", lambda e: None))
    one, two = read_groups(play.out)
    assert one.task.question == "What is written?" and one.task.kind == "playground"
    assert two.task.metadata["edited_turns"] == [0] and one.task.id != two.task.id
    record = one.trajectories[0]
    assert path_of(record.images[1].original) == file and record.images[1].original.size == (64, 96)
    assert record.turns[0].tool_call is not None and record.turns[0].result is not None


def test_stop_ends_an_exchange_at_once_and_keeps_it_whole(encoder: DialogueEncoder, tmp_path: Path) -> None:
    with playground(encoder, tmp_path, seconds=60.0) as play:
        running: list[Exchange] = []
        ended: list[Exchange] = []
        thread = threading.Thread(
            target=lambda: ended.append(play.ask(IMAGE, "What?", SamplingConfig(), running.append))
        )
        thread.start()
        while not (running and play.rollout.engine.has_unfinished()):
            time.sleep(0.01)
        with pytest.raises(CVLightningError, match="another question is being answered"):
            ask(play)
        running[0].stop()
        thread.join(timeout=10)
        assert ended[0].trajectory is not None and ended[0].trajectory.end_state is EndState.TRUNCATED
        assert not play.rollout.engine.has_unfinished()
        play.save(ended[0])


def test_the_terminal_asks_edits_and_saves(play: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    IMAGE.save(tmp_path / "an image.png")
    monkeypatch.setenv("EDITOR", "sed -i s/90/180/")
    commands = [
        "What?",
        f":image {tmp_path / 'an image.png'}",
        "What is written?",
        ":edit",
        ":save",
        ":edit 9",
        ":example 3",
        ":example 2",
        ":quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(commands)))
    out = io.StringIO()
    (tmp_path / "an image.txt").write_text("Which [bold]number[/bold]?")
    shutil.copy(tmp_path / "an image.png", tmp_path / "b.png")
    examples = examples_of(tmp_path)
    Terminal(play, SamplingConfig(), console=Console(file=out, width=160), examples=examples).loop()
    said = out.getvalue()
    assert ":example 1   an image.png: Which [bold]number[/bold]?" in said and "there is no example 3" in said
    assert said.count("b.png: What is in this image?") == 2 and said.count("answered; ") == 3
    assert "there is no image yet" in said
    assert "64x96 pixels (ran: rotate_90" in said and "96x64 pixels (ran: rotate_180" in said
    assert "turn 1 (your code)" in said and "turn 9 has no code; turns with code: 1" in said
    [group] = read_groups(play.out)
    assert group.trajectories[0].turns[0].tool_call is not None
    assert "rotate(180" in group.trajectories[0].turns[0].tool_call.code


def test_a_real_model_from_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    IMAGE.save(tmp_path / "a.png")
    arguments = ["--model", str(tiny_checkpoint), "--image", str(tmp_path / "a.png"), "--question", "What is written?"]
    arguments += ["--engine.kind", "transformers", "--agent.max_turn_tokens", "16", "--sampling.temperature", "1"]
    code = main([*arguments, "--out", str(tmp_path / "chat"), "--save", "--dtype", "float32"])
    [group] = read_groups(tmp_path / "chat")
    trajectory = group.trajectories[0]
    assert trajectory.turns and trajectory.tokens.num_sampled_tokens <= 16 * len(trajectory.turns)
    assert code == (0 if trajectory.end_state is EndState.ANSWERED else 1)
    assert "turn 1" in capsys.readouterr().out


def test_the_settings_of_a_models_training_run_are_used(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "fit_config.yaml").write_text(
        """
trainer:
  callbacks:
  - class_path: cv_lightning.callbacks.rollout.RolloutCallback
    init_args: {agent: {max_turns: 4, prompt: {system: none}}, engine: {max_model_len: 512}, sandbox: null}
model: {init_args: {policy: {path: x, dtype: float16, min_pixels: 64, max_pixels: null}}}
"""
    )
    options = parse(["--model", str(tmp_path / "run" / "model"), "--agent.max_turns", "5"])
    assert (options.agent.max_turns, options.agent.prompt.system) == (5, "none")
    assert (options.engine.max_model_len, options.engine.max_num_seqs) == (512, 1)
    assert (options.dtype, options.min_pixels, options.max_pixels) == ("float16", 64, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a MODEL or --ckpt"),
        (["--model", "x", "--question", "q"], "--question needs --image"),
        (["--model", "runs/no_such_model", "--image", "x", "--question", "q"], "runs/no_such_model: no such folder"),
    ],
    ids=["nothing", "no image", "no model"],
)
def test_bad_options_are_messages(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_served_model_without_log_probabilities_can_be_edited_and_saved(
    play: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Rollout.run

    def without_logprobs(self: Rollout, *arguments: object, **options: object) -> list[Trajectory]:
        made = run(self, *arguments, **options)  # type: ignore[arg-type]
        return [replace(trajectory, loss_mask=[False] * len(trajectory.loss_mask)) for trajectory in made]

    monkeypatch.setattr(Rollout, "run", without_logprobs)
    first, _ = ask(play)
    second = play.try_code(first, 0, "result = image.crop((0, 0, 32, 48))", lambda e: None)
    for exchange in (first, second):
        assert exchange.trajectory is not None and not any(exchange.trajectory.loss_mask)
        assert play.save(exchange).is_file()
