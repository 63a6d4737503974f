"""The agent loop with an engine that says what a test wrote, a real tokenizer and a real sandbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
from PIL import Image
from scripted_engine import ScriptedEngine

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout, RolloutProgress
from cv_lightning.agent.prompt import PromptConfig, cut_middle
from cv_lightning.agent.request import RolloutRequest, requests_of
from cv_lightning.background import Background
from cv_lightning.engines.base import Completion, Request, SamplingConfig
from cv_lightning.rollout.collector import Collector
from cv_lightning.sandbox import Sandbox
from cv_lightning.types import (
    EndState,
    EngineError,
    Group,
    JudgeError,
    Message,
    SandboxResult,
    Task,
    ToolStatus,
    Trajectory,
)

TURN = (
    '<think>turned</think><tool_call>\n{"name": "code_image_tool", "arguments": '
    '{"code": "result = image.rotate(90, expand=True)", "image_index": 0}}\n</tool_call>'
)
ANSWER = "<think>read</think><answer>42</answer>"


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
    return Task(
        id=name, question="What number is written?", images=(Image.new("RGB", size, "white"),), ground_truth="42"
    )


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def roll(
    encoder: DialogueEncoder,
    background: Background,
    sandbox: object,
    script: Callable[[str, int], str],
    requests: list[RolloutRequest] | None = None,
    config: AgentConfig | None = None,
    **engine: int,
) -> tuple[list[Trajectory], ScriptedEngine]:
    scripted = ScriptedEngine(encoder, script, **engine)
    rollout = Rollout(scripted, sandbox, encoder, background, config or AgentConfig(max_turns=4), banned_ids=(1,))  # type: ignore[arg-type]
    return rollout.run(requests or [RolloutRequest(task(), 0)], SamplingConfig()), scripted


def test_a_tool_call_runs_and_its_image_comes_back(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    (trajectory,), engine = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn])
    assert trajectory.end_state is EndState.ANSWERED
    assert [op.name for op in trajectory.operations] == ["rotate_90"]
    assert trajectory.images[1].original.size == (64, 96)
    assert trajectory.images[1].to_source is not None and trajectory.images[1].parent == 0
    assert trajectory.policy_version == 7
    # What the engine saw in turn two is exactly what it saw and sampled before, and more.
    first, second = engine.requests
    assert list(second.prompt_ids[: len(first.prompt_ids)]) == list(first.prompt_ids)
    assert len(second.images) == 2 and second.seed != first.seed


def test_an_answer_prefix_forces_an_answer_where_the_tool_is_disabled(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    prefix = "<think>read</think><answer>"
    prompt = PromptConfig(system="none", system_without_tool="none", answer_prefix=prefix)
    config = AgentConfig(prompt=prompt, tool=False)
    (forced,), engine = roll(encoder, background, sandbox, lambda *_: "42</answer>", config=config)
    assert forced.end_state is EndState.ANSWERED and forced.turns[0].text == ANSWER
    ids = list(encoder.assistant_ids(prefix)[:-1])
    assert list(engine.requests[0].prompt_ids)[-len(ids) :] == ids
    sampled = [i for i, m in zip(forced.token_ids, forced.loss_mask, strict=True) if m]
    assert sampled == list(encoder.assistant_ids("42</answer>"))  # the prefix is context, and nothing learns from it
    (free,), engine = roll(encoder, background, sandbox, lambda *_: ANSWER, config=replace(config, tool=True))
    assert free.turns[0].text == ANSWER and list(engine.requests[0].prompt_ids)[-len(ids) :] != ids


def test_the_mask_marks_what_was_sampled_and_nothing_else(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn])
    sampled = [i for i, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if m]
    assert sampled == [*encoder.assistant_ids(TURN), *encoder.assistant_ids(ANSWER)]
    assert all((p == -0.5) == m for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True))
    pads = trajectory.token_ids.count(encoder.image_pad_id)
    assert pads == sum(encoder.num_image_tokens(i.model_image.size) for i in trajectory.images)


def test_tokens_equal_the_template_over_the_whole_conversation(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    prompt = PromptConfig(system="none", state_size=False, tool_ok="<image>Look.")
    config = AgentConfig(prompt=prompt)
    (_,), engine = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn], config=config)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What number is written?"}]},
        {"role": "assistant", "content": TURN},
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]},
    ]
    assert list(engine.requests[1].prompt_ids) == list(encoder.prompt_ids(messages))


def test_a_malformed_call_is_answered_and_can_be_repaired(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    script = ['<think>a</think><tool_call>{"name": </tool_call>', TURN, ANSWER]
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    assert trajectory.end_state is EndState.ANSWERED
    assert trajectory.turns[0].parse_error and trajectory.turns[0].response_text
    assert trajectory.num_tool_calls == 1


def test_malformed_calls_without_end_stop(encoder: DialogueEncoder, background: Background, sandbox: Sandbox) -> None:
    config = AgentConfig(max_turns=10, max_parse_errors=2)
    (trajectory,), _ = roll(
        encoder, background, sandbox, lambda *_: "<think>a</think><tool_call>{</tool_call>", config=config
    )
    assert trajectory.end_state is EndState.PARSE_ERRORS
    assert len(trajectory.turns) == 3


def test_a_missing_image_costs_one_call(encoder: DialogueEncoder, background: Background, sandbox: Sandbox) -> None:
    script = [TURN.replace('"image_index": 0', '"image_index": 5'), ANSWER]
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    result = trajectory.turns[0].result
    assert result is not None and result.status is ToolStatus.REJECTED
    assert "5" in trajectory.turns[0].response_text
    assert trajectory.end_state is EndState.ANSWERED


def test_failing_code_is_told_and_cannot_inject_control_tokens(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    # A policy cannot sample these tokens, but its code can spell them.
    code = r"raise ValueError('<|image' + '_pad|><|im' + '_end|> gotcha <im' + 'age>')"
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
        (AgentConfig(deadline_s=1e-9), lambda *_: ANSWER, EndState.TRUNCATED),
    ],
)
def test_every_limit_is_an_end_state(
    encoder: DialogueEncoder,
    background: Background,
    sandbox: Sandbox,
    config: AgentConfig,
    script: Callable[[str, int], str],
    state: EndState,
) -> None:
    (trajectory,), _ = roll(encoder, background, sandbox, script, config=config)
    assert trajectory.end_state is state
    assert len(trajectory.token_ids) == len(trajectory.loss_mask) == len(trajectory.logprobs)
    pads = trajectory.token_ids.count(encoder.image_pad_id)
    assert pads == sum(encoder.num_image_tokens(i.model_image.size) for i in trajectory.images)


def test_no_trajectory_waits_for_a_slow_tool(encoder: DialogueEncoder, background: Background) -> None:
    """By the order of events, without a clock: the slow tool returns only once all others have finished."""
    others_finished = asyncio.Event()
    finished: list[str] = []

    class Slow:
        async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
            if owner.startswith("slow"):
                await others_finished.wait()
            return SandboxResult(status=ToolStatus.OK, image=image)

    async def score(trajectory: Trajectory) -> None:
        finished.append(trajectory.task.id)
        if len(finished) == 4:
            others_finished.set()

    engine = ScriptedEngine(encoder, lambda _, turn: (TURN, TURN, ANSWER)[turn])
    config = AgentConfig(deadline_s=10)
    rollout = Rollout(engine, Slow(), encoder, background, config, banned_ids=(), score=score)
    requests = requests_of([task("slow"), task("quick-a"), task("quick-b")], 2)
    trajectories = rollout.run(requests, SamplingConfig())
    assert [t.task.id for t in trajectories] == ["slow", "slow", "quick-a", "quick-a", "quick-b", "quick-b"]
    assert {t.end_state for t in trajectories} == {EndState.ANSWERED}
    assert set(finished[:4]) == {"quick-a", "quick-b"}


def test_a_group_is_told_of_as_soon_as_it_is_judged(encoder: DialogueEncoder, background: Background) -> None:
    """Whole and scored, while others still run; a judge that fails costs its own trajectory only."""
    first_told = asyncio.Event()
    told: list[list[EndState]] = []

    class Slow:
        async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
            if owner.startswith("slow"):
                await first_told.wait()
            return SandboxResult(status=ToolStatus.OK, image=image)

    class Rewards:
        waits_for_terms = False

        def score_group(self, group: Group) -> None:
            assert [trajectory.sample for trajectory in group.trajectories] == [0, 1]

    async def score(trajectory: Trajectory) -> None:
        if trajectory.task.id == "quick" and trajectory.sample == 1:
            raise JudgeError("the judge is down")

    def on_group(group: Group) -> None:
        told.append([trajectory.end_state for trajectory in group.trajectories])
        background.loop.call_soon_threadsafe(first_told.set)

    engine = ScriptedEngine(encoder, lambda _, turn: (TURN, ANSWER)[turn])
    rollout = Rollout(engine, Slow(), encoder, background, AgentConfig(deadline_s=10), banned_ids=(), score=score)
    collector = Collector(rollout, Rewards(), on_group=on_group)  # type: ignore[arg-type]
    groups = collector.roll_out([task("slow"), task("quick")], 2, SamplingConfig())
    assert told == [[EndState.ANSWERED, EndState.ERROR_JUDGE], [EndState.ANSWERED, EndState.ANSWERED]]
    assert [group.task.id for group in groups] == ["slow", "quick"]


def test_only_an_answer_can_lack_a_verdict(encoder: DialogueEncoder, background: Background) -> None:
    async def score(trajectory: Trajectory) -> None:
        await asyncio.sleep(60)

    engine = ScriptedEngine(encoder, lambda name, _: ANSWER if name.startswith("answered") else "well")
    config = AgentConfig(deadline_s=0.2)
    rollout = Rollout(engine, Hanging(), encoder, background, config, banned_ids=(), score=score)
    trajectories = rollout.run([RolloutRequest(task(name), 0) for name in ("answered", "not")], SamplingConfig())
    assert [t.end_state for t in trajectories] == [EndState.ERROR_JUDGE, EndState.NO_ANSWER]
    assert "deadline_s" in trajectories[0].error and trajectories[1].error == ""


class Hanging:
    """Runs one snippet at a time, `seconds` each; those of `owner` never end."""

    def __init__(self, owner: str = "none", seconds: float = 0.0) -> None:
        self.owner, self.seconds = owner, seconds
        self.turn = asyncio.Lock()
        self.cancelled: list[str] = []

    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        try:
            if owner.startswith(self.owner):
                await asyncio.Event().wait()
            async with self.turn:
                await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(owner)
            raise
        return SandboxResult(status=ToolStatus.OK, image=image)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_call_that_never_returns_costs_its_own_trajectory_only(
    encoder: DialogueEncoder, background: Background, deterministic: bool
) -> None:
    hanging = Hanging("hung")
    requests = [RolloutRequest(task(name), 0) for name in ("a", "hung", "b")]
    config = AgentConfig(tool_deadline_s=0.2, deterministic=deterministic)
    trajectories, _ = roll(encoder, background, hanging, lambda _, turn: (TURN, ANSWER)[turn], requests, config)
    states = [t.end_state for t in trajectories]
    assert states == [EndState.ANSWERED, EndState.ERROR_SANDBOX, EndState.ANSWERED]
    assert "tool_deadline_s" in trajectories[1].error
    wait_until(lambda: [owner.split("/")[0] for owner in hanging.cancelled] == ["hung"])


def test_calls_that_queue_behind_slow_ones_are_not_late(encoder: DialogueEncoder, background: Background) -> None:
    requests = [RolloutRequest(task(f"t{i}"), 0) for i in range(8)]
    config = AgentConfig(tool_deadline_s=0.3)  # all eight together take 0.8 s, one at a time
    trajectories, _ = roll(
        encoder, background, Hanging(seconds=0.1), lambda _, turn: (TURN, ANSWER)[turn], requests, config
    )
    assert {t.end_state for t in trajectories} == {EndState.ANSWERED}


def test_the_deadline_stops_every_trajectory_and_loses_none(encoder: DialogueEncoder, background: Background) -> None:
    """Under way in the sandbox, arrived in the queue but not taken up, and still waiting for a place."""
    hanging = Hanging("hung")
    scored: list[str] = []

    async def score(trajectory: Trajectory) -> None:
        scored.append(trajectory.task.id)

    class Dawdling(ScriptedEngine):
        def step(self) -> list[Completion]:
            time.sleep(0.15)  # results of the quick tool arrive meanwhile
            return super().step()

    engine = Dawdling(encoder, lambda _, turn: (TURN, ANSWER)[min(turn, 1)])
    config = AgentConfig(deadline_s=0.4)
    rollout = Rollout(engine, hanging, encoder, background, config, banned_ids=(), score=score, window=4)
    requests = [RolloutRequest(task(name), 0) for name in ("hung", "a", "b", "c", "waiting-1", "waiting-2")]
    shown: list[int] = []
    trajectories = rollout.run(requests, SamplingConfig(), lambda state: shown.append(state.finished))
    assert [t.task.id for t in trajectories] == [request.task.id for request in requests]
    stopped = [t for t in trajectories if t.end_state is EndState.TRUNCATED]
    assert {"hung", "waiting-1", "waiting-2"} <= {t.task.id for t in stopped}
    assert all(t.end_state.is_error for t in stopped)  # no outcome: masked and not scored
    assert not set(scored) & {t.task.id for t in stopped}
    assert not engine.has_unfinished() and shown[-1] == len(requests)
    wait_until(lambda: "hung/0/0" in hanging.cancelled)


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("broken")])
def test_an_exception_leaves_no_request_and_no_snippet(
    encoder: DialogueEncoder, background: Background, error: type[BaseException] | BaseException
) -> None:
    hanging = Hanging("hung")

    class Interrupted(ScriptedEngine):
        def step(self) -> list[Completion]:
            if len(self.requests) >= 3 and not self.pending[0].id.startswith("hung"):
                raise error
            return super().step()

    engine = Interrupted(encoder, lambda *_: TURN)
    rollout = Rollout(engine, hanging, encoder, background, AgentConfig(), banned_ids=())
    with pytest.raises(BaseException) as caught:
        rollout.run([RolloutRequest(task(name), 0) for name in ("hung", "a", "b")], SamplingConfig())
    assert caught.type is (error if isinstance(error, type) else type(error))
    assert not engine.has_unfinished()
    wait_until(lambda: hanging.cancelled == ["hung/0/0"])


def test_ctrl_c_leaves_no_child(encoder: DialogueEncoder, background: Background, sandbox: Sandbox) -> None:
    before = children()
    endless = TURN.replace("result = image.rotate(90, expand=True)", "while True: image = image.rotate(1)")

    def interrupt(_: RolloutProgress) -> None:
        if len(children()) > len(before):
            raise KeyboardInterrupt

    engine = ScriptedEngine(encoder, lambda *_: endless)
    rollout = Rollout(engine, sandbox, encoder, background, AgentConfig(), banned_ids=())
    with pytest.raises(KeyboardInterrupt):
        rollout.run([RolloutRequest(task(), 0)], SamplingConfig(), interrupt)
    wait_until(lambda: len(children()) <= len(before))


def test_a_prompt_that_cannot_be_built_ends_its_trajectory_with_the_reason(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    marks = Task(
        id="m",
        question="q",
        images=task().images,
        ground_truth="1",
        messages=(Message(role="user", content="no mark"),),
    )
    strip = task("strip", size=(3000, 2))
    requests = [RolloutRequest(t, 0) for t in (marks, strip, task("fine"))]
    trajectories, engine = roll(encoder, background, sandbox, lambda *_: ANSWER, requests)
    assert [t.end_state for t in trajectories] == [EndState.ERROR_TASK, EndState.ERROR_TASK, EndState.ANSWERED]
    assert "task m: 0 <image> marks in its prompt but 1 images" in trajectories[0].error
    assert "3000x2" in trajectories[1].error
    assert [r.id.split("/")[0] for r in engine.requests] == ["fine"]


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (AgentConfig(max_prompt_tokens=2), {}),
        (AgentConfig(), {"max_model_len": 30}),
        (AgentConfig(max_images=1), {}),
    ],
)
def test_what_the_engine_cannot_take_never_reaches_it(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox, config: AgentConfig, limits: dict[str, int]
) -> None:
    image = task().images[0]
    two = Task(id="two", question="q", images=(image, image), ground_truth="1")
    (trajectory,), engine = roll(
        encoder, background, sandbox, lambda *_: ANSWER, [RolloutRequest(two, 0)], config, **limits
    )
    assert trajectory.end_state in (EndState.OVER_LENGTH, EndState.MAX_IMAGES)
    assert engine.requests == [] and trajectory.error


def test_a_request_that_the_engine_refuses_or_forgets_costs_one_trajectory(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    class Fussy(ScriptedEngine):
        def add_request(self, request: Request) -> None:
            if request.id.startswith("refused"):
                raise EngineError("too long for me")
            if not request.id.startswith("forgotten"):
                super().add_request(request)

    rollout = Rollout(Fussy(encoder, lambda *_: ANSWER), sandbox, encoder, background, AgentConfig(), banned_ids=())
    refused, forgotten, fine = rollout.run(
        [RolloutRequest(task(n), 0) for n in ("refused", "forgotten", "fine")], SamplingConfig()
    )
    assert (refused.end_state, refused.error) == (EndState.ERROR_ENGINE, "too long for me")
    assert forgotten.end_state is EndState.ERROR_ENGINE and "forgot" in forgotten.error
    assert fine.end_state is EndState.ANSWERED


def test_two_calls_in_a_turn_run_the_first_and_the_model_is_told(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    call = TURN.split("</think>")[1]
    script = [TURN + call.replace("rotate(90", "rotate(180"), ANSWER]
    (trajectory,), engine = roll(encoder, background, sandbox, lambda _, turn: script[turn])
    assert [op.name for op in trajectory.operations] == ["rotate_90"]
    told = encoder.tokenizer.decode(engine.requests[1].prompt_ids)
    assert "Only the first of your 2 calls was run" in told and told.count("<|image_pad|>") == 2


def test_a_turn_that_ends_by_another_token_keeps_the_template(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    class EndsText(ScriptedEngine):
        def step(self) -> list[Completion]:
            (done,) = super().step()
            ids = [*done.token_ids[:-1], encoder.tokenizer.pad_token_id]
            return [replace(done, token_ids=ids)]

    engine = EndsText(encoder, lambda _, turn: (TURN, ANSWER)[turn])
    rollout = Rollout(engine, sandbox, encoder, background, AgentConfig(), banned_ids=())
    (trajectory,) = rollout.run([RolloutRequest(task(), 0)], SamplingConfig())
    assert trajectory.end_state is EndState.ANSWERED
    where = trajectory.token_ids.index(encoder.tokenizer.pad_token_id)
    assert trajectory.token_ids[where + 1] == encoder.end_id
    assert trajectory.loss_mask[where : where + 2] == [True, False]


def test_a_response_cut_short_keeps_its_image(
    encoder: DialogueEncoder, background: Background, sandbox: Sandbox
) -> None:
    config = AgentConfig(
        max_tool_text_chars=20, prompt=PromptConfig(tool_ok="a long word before it <image> and a longer one after")
    )
    (trajectory,), _ = roll(encoder, background, sandbox, lambda _, turn: (TURN, ANSWER)[turn], config=config)
    assert trajectory.end_state is EndState.ANSWERED and len(trajectory.images) == 2
    assert len(trajectory.turns[0].response_text.replace("<image>", "")) <= 20


@pytest.mark.parametrize(
    "words",
    [{"tool_ok": "no mark"}, {"tool_ok": "<image><image>"}, {"tool_error": "{reason}"}, {"system": "nowhere.md"}],
)
def test_words_that_cannot_be_used_are_refused_by_name(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"prompt.{next(iter(words))}"):
        PromptConfig(**words)


def test_a_lost_sandbox_is_no_wrong_answer(encoder: DialogueEncoder, background: Background) -> None:
    class Broken:
        async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
            raise OSError("no more processes")

    (trajectory,), _ = roll(encoder, background, Broken(), lambda _, turn: (TURN, ANSWER)[turn])
    assert trajectory.end_state is EndState.ERROR_SANDBOX and trajectory.end_state.is_error
    assert "no more processes" in trajectory.error


def test_deterministic_order_does_not_depend_on_tool_speed(encoder: DialogueEncoder, background: Background) -> None:
    class Shuffled:
        def __init__(self, reverse: bool) -> None:
            self.reverse = reverse

        async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
            order = int(owner.rsplit("/", 1)[1])
            await asyncio.sleep(0.02 * ((5 - order) if self.reverse else order))
            return SandboxResult(status=ToolStatus.OK, image=image)

    seen = []
    for reverse in (False, True):
        requests = [RolloutRequest(task(f"t{i}"), 0) for i in range(5)]
        config = AgentConfig(deterministic=True)
        _, engine = roll(encoder, background, Shuffled(reverse), lambda _, turn: (TURN, ANSWER)[turn], requests, config)
        seen.append([r.id for r in engine.requests])
    assert seen[0] == seen[1]


def test_cut_middle_keeps_both_ends() -> None:
    cut = cut_middle("a" * 50 + "b" * 50, 20)
    assert len(cut) == 20 and cut.startswith("aaa") and cut.endswith("bbb")


def test_a_repeated_task_gets_other_samples() -> None:
    of = task()
    requests = requests_of([of, replace(of, id="other"), of], 2)
    made = [(request.sample_index, request.repeat) for request in requests if request.task.id == of.id]
    assert made == [(0, 0), (1, 0), (0, 1), (1, 1)]
