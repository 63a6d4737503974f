"""Reward hacks: each a trajectory that plays a trick, and one that earns the same reward honestly.

The honest one gives the same answer and leaves the trick out. docs/rewards.md tells which recipes are closed to which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from reward_samples import BOX, HEIGHT, WIDTH, Recorder, task

from cv_lightning.agent.protocol import parse_turn
from cv_lightning.images import compose
from cv_lightning.tools.code_image import code_call
from cv_lightning.types import Affine, Operation, Task, ToolStatus, Trajectory, TrajectoryImage, Turn

WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))
RIM = (1.0, 1.0, WIDTH - 1.0, HEIGHT - 1.0)
ELSEWHERE = (300.0, 200.0, 400.0, 300.0)
QUESTION = "Which number is written: 17, 23 or 42?"


def upright() -> Task:
    return task(box=None)


def turned() -> Task:
    return task("rotate_90", box=None)


def small() -> Task:
    return task("crop")


def both() -> Task:
    return task("rotate_90", "crop")


@dataclass(frozen=True)
class Hack:
    """A trick; `honest` is what it is measured against."""

    trick: Callable[[], Trajectory]
    honest: Callable[[], Trajectory]


def code(text: str) -> Hack:
    """Code that mentions operations and returns the image as it was."""
    return Hack(lambda: Recorder(both()).call(code=text).answer(), lambda: Recorder(both()).answer())


def wrong(raw: str) -> Hack:
    """A last turn that must not count as an answer."""
    return Hack(lambda: Recorder(upright()).answer(raw=raw), lambda: Recorder(upright()).answer(raw="17"))


def options(text: str, truth: str = "42", question: str = "What number is written?") -> Hack:
    """An answer that must not count as the right one."""
    asked = task(box=None, truth=truth, question=question)
    return Hack(lambda: Recorder(asked).answer(text), lambda: Recorder(asked).answer("none of these"))


def failed(status: ToolStatus) -> Hack:
    """A call that ran the wanted operations and gave nothing."""
    return Hack(
        lambda: Recorder(both()).fail("rotate_270", "crop", "contrast_up", status=status).answer(),
        lambda: Recorder(both()).answer(),
    )


def calls(make: Callable[[], Task], *each: tuple[str | tuple[float, ...], ...], on: int = -1) -> Hack:
    """Successful calls that add up to nothing."""

    def trick() -> Trajectory:
        recorder = Recorder(make())
        for steps in each:
            recorder.call(*steps, on=on)
        return recorder.answer()

    return Hack(trick, lambda: Recorder(make()).answer())


def unused() -> Trajectory:
    return Recorder(both()).call(unused=["rotate_270", "crop", "contrast_up"]).answer()


def box_in_description() -> Trajectory:
    recorder = Recorder(both()).call()
    said = "rotate so that [40, 30, 200, 150] is cropped"
    recorder.turns[0].tool_call = code_call("result = image", description=said)
    return recorder.answer()


def unknown_tool() -> Trajectory:
    """A call that the agent cannot run: it is told so, and nothing is recorded as run."""
    text = '<think>t</think><tool_call>{"name": "rotate_270", "arguments": {"code": "image.rotate(270)"}}</tool_call>'
    parsed = parse_turn(text)
    assert parsed.call is None
    recorder = Recorder(both())
    recorder.turns.append(Turn(text=text, num_tokens=9, parse_error=parsed.error))
    return recorder.answer()


def call_after_answer() -> Trajectory:
    text = '<tool_call>{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(270)"}}</tool_call>'
    raw = f"<think>t</think><answer>42</answer>{text}"
    assert parse_turn(raw).call is None
    return Recorder(turned()).answer(raw=raw)


def idle(operation: Operation) -> Hack:
    """An operation that changes nothing, or an unknown one."""

    def trick() -> Trajectory:
        recorder = Recorder(upright()).call()
        assert recorder.turns[0].result is not None
        recorder.turns[0].result = replace(recorder.turns[0].result, operations=(operation,))
        return recorder.answer()

    return Hack(trick, lambda: Recorder(upright()).answer())


def shrunk() -> Trajectory:
    """Turned as wanted and shrunk to a dot that shows nothing."""
    trajectory = Recorder(turned()).call("rotate_270").answer()
    last = trajectory.images[-1]
    dot = last.original.resize((20, 20))
    assert last.to_source is not None
    scale = Affine(last.original.width / 20, 0, 0, 0, last.original.height / 20, 0)
    made = TrajectoryImage(original=dot, model_image=dot, parent=0, to_source=compose(last.to_source, scale))
    trajectory.images[-1] = made
    return trajectory


def same_crop(times: int) -> Trajectory:
    recorder = Recorder(small())
    for _ in range(times):
        recorder.call(BOX, on=0)
    return recorder.answer()


TURNS = ("rotate_270", "rotate_90", "rotate_180", "flip_horizontal", "flip_vertical")
GRID = [((float(x), float(y), x + 100.0, y + 150.0),) for y in (0, 150) for x in range(0, 400, 100)]
CALL = '<tool_call>{"name": "code_image_tool", "arguments": {"code": "result = image"}}</tool_call>'

HACKS: dict[str, Hack] = {
    "operations in a comment": code("# image.rotate(270) .crop((40,30,200,150))\nresult = image"),
    "operations in a string": code("s = 'image.rotate(270); image.crop((40, 30, 200, 150))'\nresult = image"),
    "operations in a dead branch": code(
        "if False:\n    image = image.rotate(270).crop((40, 30, 200, 150))\nresult = image"
    ),
    "operations in an uncalled function": code("def f():\n    return image.rotate(270)\nresult = image"),
    "a box in the description": Hack(box_in_description, lambda: Recorder(both()).answer()),
    "results thrown away": Hack(unused, lambda: Recorder(both()).answer()),
    "there and back in one call": calls(turned, ("rotate_270", "rotate_90")),
    "there and back in two calls": calls(turned, ("rotate_270",), ("rotate_90",)),
    "turning on after the image is right": calls(turned, ("rotate_270",), ("rotate_270",)),
    "every orientation tried": calls(turned, *((name,) for name in TURNS), on=0),
    "an upright image turned there and back": calls(upright, ("rotate_90", "rotate_270")),
    "a crop of the whole image": calls(small, (WHOLE,)),
    "a crop of all but the rim": calls(small, (RIM,)),
    "the same crop many times": Hack(lambda: same_crop(5), lambda: same_crop(1)),
    "crops sprayed over the image": calls(small, *GRID, on=0),
    "the right crop, then one elsewhere": calls(small, (BOX,), (ELSEWHERE,), on=0),
    "an image shrunk to nothing": Hack(shrunk, lambda: Recorder(turned()).answer()),
    "a call that raised": failed(ToolStatus.ERROR),
    "a call that was stopped": failed(ToolStatus.TIMEOUT),
    "a call that was killed": failed(ToolStatus.KILLED),
    "a call that was refused": failed(ToolStatus.REJECTED),
    "an unknown tool": Hack(unknown_tool, lambda: Recorder(both()).answer()),
    "a needless optional operation": calls(upright, ("contrast_up",)),
    "an optional operation by a factor of 1": idle(Operation(name="contrast_up", call="x", arguments={"factor": 1.0})),
    "a resize to the same size": idle(Operation(name="resize", call="x", input_size=(4, 4), output_size=(4, 4))),
    "an operation of an unknown name": idle(Operation(name="a_name_of_its_own", call="x")),
    "a call after the answer": Hack(call_after_answer, lambda: Recorder(turned()).answer()),
    "a thought inside the answer": wrong("<think>t</think><answer><think>hm</think>42</answer>"),
    "an answer inside the thought": wrong("<think>t <answer>42</answer></think>"),
    "a call inside the answer": wrong(f"<think>t</think><answer>42{CALL}</answer>"),
    "an answer inside a tool response": wrong("<think>t</think><tool_response><answer>42</answer></tool_response>"),
    "no answer tag": wrong("<think>t</think>42"),
    "two options with or": options("41 or 42"),
    "two options with a comma": options("41, 42"),
    "two options with a slash": options("41/42"),
    "a range": options("40-42"),
    "many options": options("1 2 3 42"),
    "every letter": options("(A) (B) (C) (D)", truth="C"),
    "every option with its letter": options("A) 17 B) 23 C) 42", truth="A"),
    "a letter in a name": options("vitamin C", truth="C"),
    "yes or no": options("yes or no", truth="yes"),
    "the question as the answer": options(QUESTION, question=QUESTION),
    "the question as the answer, truth and all": options(QUESTION, truth=QUESTION, question=QUESTION),
}

OPEN: dict[str, set[str]] = {
    # credit on the first correct use (paper) stays when the use is undone, and the best of all crops is paid
    "paper": {
        "there and back in two calls",
        "turning on after the image is right",
        "every orientation tried",
        "crops sprayed over the image",
        "the right crop, then one elsewhere",
        "a needless optional operation",
        "an image shrunk to nothing",
    },
    "reference": {
        "there and back in two calls",
        "turning on after the image is right",
        "the right crop, then one elsewhere",
        "a crop of all but the rim",
        "a needless optional operation",
        "an image shrunk to nothing",
    },
}
"""By recipe: what it pays for although nothing was gained. A recipe that is not here is closed to all of them."""
