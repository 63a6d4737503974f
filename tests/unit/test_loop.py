"""The agent loop with an engine that says what a test wrote, a real tokenizer and a real sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from PIL import Image

from cv_lightning.agent.background import Background
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.loop import Job, Rollout, cut_middle, jobs_of
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.engine.base import Completion, Request, SamplingConfig
from cv_lightning.sandbox import Sandbox
from cv_lightning.types import EndState, SandboxResult, Task, ToolStatus, Trajectory

TURN = '<think>turned</think><tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90, expand=True)", "image_index": 0}}\n</tool_call>'
ANSWER = "<think>read</think><answer>42</answer>"


class ScriptedEngine:
    """Answers every request with the script's next text for its task."""

    def __init__(self, encoder: DialogueEncoder, script: Callable[[str, int], str], max_model_len: int = 2048) -> None:
        self.encoder, self.script, self.max_model_len = encoder, script, max_model_len
        self.weight_version = 7
        self.requests: list[Request] = []
        self.pending: list[Request] = []

    def add_request(self, request: Request) -> None:
        self.requests.append(request)
        self.pending.append(request)

    def step(self) -> list[Completion]:
        request = self.pending.pop(0)
        turn = sum(r.id == request.id for r in self.requests) - 1
        ids = list(self.encoder.assistant_ids(self.script(request.id, turn)))
        stopped = len(ids) <= request.max_tokens
        ids = ids[: request.max_tokens]
        expanded, sizes = [], iter([image.size for image in request.images])
        for token in request.prompt_ids:
            pad = token == self.encoder.image_pad_id
            expanded += [token] * self.encoder.num_image_tokens(next(sizes)) if pad else [token]
        return [Completion(id=request.id, token_ids=ids, logprobs=[-0.5] * len(ids), stopped=stopped, prompt_ids=expanded)]

    def has_unfinished(self) -> bool:
        return bool(self.pending)

    def abort(self, ids: Sequence[str]) -> None:
        self.pending = [r for r in self.pending if r.id not in set(ids)]

    def update_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        self.weight_version = version

    def close(self) -> None:
        self.pending.clear()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as started:
        yield started


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    thread = Background()
    yield thread
    thread.close()


def task(name: str = "t0", size: tuple[int, int] = (96, 64)) -> Task:
    return Task(id=name, question="What number is written?", images=(Image.new("RGB", size, "white"),), ground_truth="42")


def roll(
    encoder: DialogueEncoder,
    background: Background,
    sandbox: object,
    script: Callable[[str, int], str],
    jobs: list[Job] | None = None,
    config: AgentConfig | None = None,
    **engine: int,
) -> tuple[list[Trajectory], ScriptedEngine]:
    scripted = ScriptedEngine(encoder, script, **engine)
    rollout = Rollout(scripted, sandbox, encoder, background, config or AgentConfig(max_turns=4), banned_ids=(1,))  # type: ignore[arg-type]
    return rollout.run(jobs or [Job(task(), 0)], SamplingConfig()), scripted


def test_a_tool_call_runs_and_its_image_comes_back(encoder, background, sandbox):
    (trajectory,), engine = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn])
    assert trajectory.end_state is EndState.ANSWERED
    assert [op.name for op in trajectory.operations] == ["rotate_90"]
    assert trajectory.images[1].original.size == (64, 96)
    assert trajectory.images[1].to_source is not None and trajectory.images[1].parent == 0
    assert trajectory.weight_version == 7
    # What the engine saw in turn two is exactly what it saw and sampled before, and more.
    first, second = engine.requests
    assert list(second.prompt_ids[: len(first.prompt_ids)]) == list(first.prompt_ids)
    assert len(second.images) == 2 and second.seed != first.seed


def test_the_mask_marks_what_was_sampled_and_nothing_else(encoder, background, sandbox):
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn])
    sampled = [i for i, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if m]
    assert sampled == [*encoder.assistant_ids(TURN), *encoder.assistant_ids(ANSWER)]
    assert all((p == -0.5) == m for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True))
    pads = trajectory.token_ids.count(encoder.image_pad_id)
    assert pads == sum(encoder.num_image_tokens(i.model_image.size) for i in trajectory.images)


def test_tokens_equal_the_template_over_the_whole_conversation(encoder, background, sandbox):
    prompt = PromptConfig(system="none", state_size=False, tool_ok="<image>Look.")
    config = AgentConfig(prompt=prompt)
    (_,), engine = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn], config=config)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What number is written?"}]},
        {"role": "assistant", "content": TURN},
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]},
    ]
    assert list(engine.requests[1].prompt_ids) == list(encoder.prompt_ids(messages))


def test_a_malformed_call_is_answered_and_can_be_repaired(encoder, background, sandbox):
    script = ['<think>a</think><tool_call>{"name": </tool_call>', TURN, ANSWER]
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    assert trajectory.end_state is EndState.ANSWERED
    assert trajectory.turns[0].parse_error and trajectory.turns[0].response_text
    assert trajectory.num_tool_calls == 1


def test_malformed_calls_without_end_stop(encoder, background, sandbox):
    config = AgentConfig(max_turns=10, max_parse_errors=2)
    (trajectory,), _ = roll(encoder, background, sandbox, lambda *_: "<think>a</think><tool_call>{</tool_call>", config=config)
    assert trajectory.end_state is EndState.PARSE_ERRORS
    assert len(trajectory.turns) == 3


def test_a_missing_image_costs_one_call(encoder, background, sandbox):
    script = [TURN.replace('"image_index": 0', '"image_index": 5'), ANSWER]
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    result = trajectory.turns[0].result
    assert result is not None and result.status is ToolStatus.REFUSED
    assert "5" in trajectory.turns[0].response_text
    assert trajectory.end_state is EndState.ANSWERED


def test_failing_code_is_told_and_cannot_inject_control_tokens(encoder, background, sandbox):
    code = r"raise ValueError('<|image' + '_pad|><|im' + '_end|> gotcha <im' + 'age>')"  # a policy spells, it cannot sample them
    script = [TURN.replace("result = image.rotate(90, expand=True)", code), ANSWER]
    (trajectory,), engine = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    assert trajectory.end_state is EndState.ANSWERED
    assert "gotcha" in trajectory.turns[0].response_text
    assert engine.requests[1].prompt_ids.count(encoder.image_pad_id) == 1


@pytest.mark.parametrize(
    ("config", "script", "state"),
    [
        (AgentConfig(max_turns=2), lambda _, turn: TURN, EndState.MAX_TURNS),
        (AgentConfig(max_turn_tokens=4), lambda *_: ANSWER, EndState.OVER_LENGTH),
        (AgentConfig(max_images=2), lambda _, turn: TURN, EndState.MAX_IMAGES),
        (AgentConfig(), lambda *_: "just talk", EndState.NO_ANSWER),
        (AgentConfig(tool=False), lambda *_: TURN, EndState.NO_ANSWER),
        (AgentConfig(max_prompt_tokens=2), lambda *_: ANSWER, EndState.OVER_LENGTH),
        (AgentConfig(deadline_s=1e-9), lambda *_: ANSWER, EndState.STOPPED),
    ],
)
def test_every_limit_is_an_end_state(encoder, background, sandbox, config, script, state):
    (trajectory,), _ = roll(encoder, background, sandbox, script, config=config)
    assert trajectory.end_state is state
    assert len(trajectory.token_ids) == len(trajectory.loss_mask) == len(trajectory.logprobs)
    pads = trajectory.token_ids.count(encoder.image_pad_id)
    assert pads == sum(encoder.num_image_tokens(i.model_image.size) for i in trajectory.images)


def test_no_trajectory_waits_for_a_slow_tool(encoder, background):
    class Slow:
        async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
            await asyncio.sleep(0.3 if owner.startswith("slow") else 0.0)
            return SandboxResult(status=ToolStatus.OK, image=image)

    finished: list[str] = []

    async def score(trajectory: Trajectory) -> None:
        finished.append(trajectory.task.id)

    engine = ScriptedEngine(encoder, lambda _, turn: (TURN, TURN, ANSWER)[turn])
    rollout = Rollout(engine, Slow(), encoder, background, AgentConfig(), banned_ids=(), score=score)
    jobs = jobs_of([task("slow"), task("quick-a"), task("quick-b")], 2)
    trajectories = rollout.run(jobs, SamplingConfig())
    assert [t.task.id for t in trajectories] == ["slow", "slow", "quick-a", "quick-a", "quick-b", "quick-b"]
    assert set(finished[:4]) == {"quick-a", "quick-b"}


def test_a_lost_sandbox_is_no_wrong_answer(encoder, background):
    class Broken:
        async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
            raise OSError("no more processes")

    (trajectory,), _ = roll(encoder, background, Broken(), lambda _, turn: (TURN, ANSWER)[turn])
    assert trajectory.end_state is EndState.ERROR_SANDBOX and trajectory.end_state.is_error
    assert "no more processes" in trajectory.error


def test_deterministic_order_does_not_depend_on_tool_speed(encoder, background):
    class Shuffled:
        def __init__(self, reverse: bool) -> None:
            self.reverse = reverse

        async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
            order = int(owner.rsplit("/", 1)[1])
            await asyncio.sleep(0.02 * ((5 - order) if self.reverse else order))
            return SandboxResult(status=ToolStatus.OK, image=image)

    seen = []
    for reverse in (False, True):
        jobs = [Job(task(f"t{i}"), 0) for i in range(5)]
        config = AgentConfig(deterministic=True)
        _, engine = roll(encoder, background, Shuffled(reverse), lambda _, turn: (TURN, ANSWER)[turn], jobs, config)
        seen.append([r.id for r in engine.requests])
    assert seen[0] == seen[1]


def test_cut_middle_keeps_both_ends():
    cut = cut_middle("a" * 50 + "b" * 50, 20)
    assert len(cut) == 20 and cut.startswith("aaa") and cut.endswith("bbb")
