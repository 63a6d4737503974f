"""A user's tool, named in YAML only, in the real agent loop and prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from PIL import Image
from scripted_engine import ScriptedEngine

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.cli import ConfigOnly, main
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.sandbox import Sandbox
from cv_lightning.types import IDENTITY, EndState, Task, ToolStatus

YAML = """
rollout:
  agent:
    max_turns: 4
    tools:
      - cv_lightning.tools.CodeTool
      - class_path: grid_tool.Grid
        init_args: {color: blue}
"""
BAD = '<think>a</think><tool_call>{"name": "grid", "arguments": {"columns": 99}}</tool_call>'
GRID = BAD.replace("99", '3, "image_index": 0')
CODE = (
    '<think>a</think><tool_call>{"name": "code_image_tool", "arguments": '
    '{"code": "result = image.rotate(90, expand=True)", "image_index": 1}}</tool_call>'
)
ANSWER = "<think>read</think><answer>42</answer>"


def test_a_tool_brought_by_yaml_runs_beside_the_code_tool(
    encoder: DialogueEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "run.yaml").write_text(YAML)
    parser = ArgumentParser()
    parser.add_class_arguments(RolloutCallback, "rollout")
    config = parser.parse_path(str(tmp_path / "run.yaml"))
    agent = parser.instantiate(config).rollout.agent
    engine = ScriptedEngine(encoder, lambda _, turn: (BAD, GRID, CODE, ANSWER)[turn], max_model_len=8192)
    background = Background()
    with Sandbox() as sandbox:
        rollout = Rollout(engine, sandbox, encoder, background, agent, banned_ids=())
        task = Task(id="t", question="Where?", images=(Image.new("RGB", (96, 64), "white"),), ground_truth="42")
        (trajectory,) = rollout.run([RolloutRequest(task, 0)], SamplingConfig())
    background.close()
    bad, grid, _, _ = trajectory.turns
    assert trajectory.end_state is EndState.ANSWERED, trajectory.error
    assert bad.parse_error is not None and "99 is greater than the maximum of 26" in bad.parse_error
    assert grid.tool_call is not None and grid.tool_call.arguments == {"columns": 3, "rows": 4, "image_index": 0}
    assert grid.result is not None and grid.result.status is ToolStatus.OK
    assert "3 x 4 cells, A1 at the top left." in grid.response_text and grid.response_text.count("<image>") == 1
    source, gridded, turned = trajectory.images
    assert (gridded.parent, gridded.to_source, turned.parent) == (0, IDENTITY, 1)
    assert gridded.original.getpixel((32, 40)) == (0, 0, 255) and source.original.getpixel((32, 40)) == (255,) * 3
    assert [op.name for op in trajectory.operations] == ["grid", "rotate_90"]
    prompt = encoder.tokenizer.decode(engine.requests[0].prompt_ids)
    assert "`grid` draws labelled grid lines" in prompt and "`code_image_tool` runs Python" in prompt


def test_a_run_config_names_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` reads them, and the record of the run holds what was read."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = "model:\n  class_path: GRPOModule\n  init_args: {policy: {path: nowhere}}\ndata: TaskDataModule\n"
    (tmp_path / "run.yaml").write_text(YAML + module)
    tools = main(["fit", "--config", str(tmp_path / "run.yaml")], ConfigOnly).as_dict()["rollout"]["agent"]["tools"]
    assert [tool["class_path"].rpartition(".")[2] for tool in tools] == ["CodeTool", "Grid"]
    assert tools[1]["init_args"] == {"color": "blue"}
