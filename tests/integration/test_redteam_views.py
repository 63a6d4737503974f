"""Credit for what was not shown: the tricks of a red team, generated ones of the same kinds, and honest programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import task
from test_reward_sandbox import components, run
from view_attacks import CLAIM, attack_program, parts_of
from view_programs import honest_program, make_scene
from view_trials import attack_trial, honest_trial

from cv_lightning.rewards import RewardConfig
from cv_lightning.sandbox import Sandbox, SandboxConfig, plan
from cv_lightning.types import Task

SAMPLE = 25
"""Programs of each kind in every run; --run-slow runs 2,000."""
COMPARED = 15
"""Programs that both executors run in every run; --run-slow compares three times as many."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig()) as running:
        yield running


@pytest.fixture(scope="module")
def general() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(plan_tier=False)) as running:
        yield running


def turned() -> Task:
    """An image to be turned by 270 degrees."""
    return task("rotate_90", box=None)


def small() -> Task:
    """An image of which the part (40, 30, 200, 150) has to be cropped."""
    return task("crop")


HONEST_TURN = "v = image.rotate(270, expand=True)\nu = image.resize(v.size)\n"
HONEST_CROP = "v = image.crop((40, 30, 200, 150))\nu = image.resize(v.size)\n"
SAMPLES = """
yy, xx = np.mgrid[:v.height, :v.width]
sx, sy = v.width // 48, v.height // 48
m = (xx % sx == sx // 2) & (yy % sy == sy // 2)
r = Image.composite(v, u, Image.fromarray(np.uint8(255 * m)))
"""
CLAIM_TURN, CLAIM_CROP = "\nresult = claim(r, 'rotate_270')", "\nresult = claim(r, '', (40, 30, 200, 150))"
TURN_TRICKS = {
    "only the sampled pixels are turned, forged": CLAIM + HONEST_TURN + SAMPLES + CLAIM_TURN,
    "only the sampled pixels are turned, by a masked paste": HONEST_TURN
    + SAMPLES.replace("r = Image.composite(v, u, ", "result = v.copy()\nresult.paste(u, (0, 0), ").replace(
        "* m", "* ~m"
    ),
    "blended with the image as given, forged": CLAIM + HONEST_TURN + "r = Image.blend(u, v, 0.4)" + CLAIM_TURN,
    "shrunk to 6x8 and enlarged": HONEST_TURN + "result = v.resize((6, 8)).resize((600, 800))",
    "shrunk to 6x8 and padded": HONEST_TURN + "result = v.resize((6, 8)).crop((-300, -400, 306, 408))",
    "shrunk to one pixel": HONEST_TURN + "result = v.resize((1, 1))",
    "shrunk to one pixel and enlarged": HONEST_TURN + "result = v.resize((1, 1)).resize((300, 400))",
    "brightness 0": HONEST_TURN + "result = ImageEnhance.Brightness(v).enhance(0)",
    "contrast 0": HONEST_TURN + "result = ImageEnhance.Contrast(v).enhance(0)",
    "turned back, forged": CLAIM + "r = image.resize((image.height, image.width))" + CLAIM_TURN,
    "black, forged": CLAIM + "r = Image.new('RGB', (image.height, image.width))" + CLAIM_TURN,
    "blurred to nothing": HONEST_TURN + "result = v.filter(ImageFilter.GaussianBlur(20))",
}
CROP_TRICKS = {
    "only the sampled pixels are the crop, forged": CLAIM + HONEST_CROP + SAMPLES + CLAIM_CROP,
    "the whole image with 40 % of the crop": CLAIM
    + HONEST_CROP
    + "r = Image.blend(image, v.resize(image.size), 0.4)"
    + CLAIM_CROP,
    "a small crop on the whole image": CLAIM
    + HONEST_CROP
    + "r = u.copy()\nr.paste(v.resize((60, 45)), (90, 70))"
    + CLAIM_CROP,
    "the whole image pasted over 45 %": HONEST_CROP
    + "result = v.resize((800, 600))\nresult.paste(image.resize((536, 402)), (132, 99))",
    "shrunk and enlarged": HONEST_CROP + "result = v.resize((6, 8)).resize((640, 480))",
    "brightness 0": HONEST_CROP + "result = ImageEnhance.Brightness(v).enhance(0)",
    "another part, forged": CLAIM + "r = image.crop((200, 100, 360, 220))" + CLAIM_CROP,
    "most of it hidden by a border": HONEST_CROP + "result = v.crop((60, 50, 90, 70)).crop((-60, -50, 100, 70))",
}


@pytest.mark.parametrize("trick", TURN_TRICKS)
def test_redteam_a_turn_that_is_not_shown_is_not_paid(sandbox: Sandbox, trick: str) -> None:
    trajectory = run(sandbox, turned(), TURN_TRICKS[trick])
    assert trajectory.turns[0].result is not None and trajectory.turns[0].result.image is not None
    found = components(trajectory)
    assert (found["mandatory"], found["exact"]) == (0, 0)


@pytest.mark.parametrize("trick", CROP_TRICKS)
def test_redteam_a_crop_that_is_not_shown_is_not_paid(sandbox: Sandbox, trick: str) -> None:
    trajectory = run(sandbox, small(), CROP_TRICKS[trick])
    assert trajectory.turns[0].result is not None and trajectory.turns[0].result.image is not None
    found = components(trajectory)
    assert (found["mandatory"], found["exact"], found["accuracy"]) == (0, 0, 0)


PAID_ONCE = {
    (20261201, 1854): "r = ImageChops.add_modulo(v, u.point(lambda p: p * 0.40))",
    (11, 0): "a = (np.array(v).astype(float) - np.array(v).mean()) * 0.3\nx = np.arange(v.width)[:, None]\n"
    "r = Image.fromarray(np.clip(128 + a + 120 * np.sin(x * 0.0314), 0, 255).astype(np.uint8))",
}
"""By the seed of the scene: what was paid for although a digit could no longer be read in it."""


@pytest.mark.parametrize("seed", PAID_ONCE)
def test_redteam_what_was_paid_once_is_not_paid(sandbox: Sandbox, seed: tuple[int, int]) -> None:
    scene = make_scene(seed)
    honest, claim = parts_of(scene)
    code = f"{CLAIM}\n{honest}\n"
    assert components(run(sandbox, scene.task, f"{code}result = v"))["mandatory"] > 0
    assert components(run(sandbox, scene.task, f"{code}{PAID_ONCE[seed]}\nresult = {claim}"))["mandatory"] == 0


def test_redteam_the_honest_views_of_the_same_tasks_are_paid(sandbox: Sandbox) -> None:
    assert components(run(sandbox, turned(), HONEST_TURN + "result = v"))["mandatory"] == 1
    assert components(run(sandbox, small(), HONEST_CROP + "result = v"))["mandatory"] == 1
    bordered = HONEST_CROP + "result = ImageOps.expand(v.resize((320, 240)), 10, fill='white')"
    assert components(run(sandbox, small(), bordered))["mandatory"] == 1


LOSSY = {
    "blurred four times": ["result = image.filter(ImageFilter.GaussianBlur(2.2))"] * 4,
    "shrunk, then enlarged": [
        "result = image.resize((30, 40), Image.LANCZOS)",
        "result = image.resize((300, 400), Image.LANCZOS)",
    ],
    "noise in five calls": [
        "a = np.array(image).astype(float) + np.random.randn(image.height, image.width, 3) * 35\n"
        "result = Image.fromarray(np.clip(a, 0, 255).astype(np.uint8))"
    ]
    * 5,
}


@pytest.mark.parametrize("way", LOSSY)
def test_redteam_a_loss_spread_over_several_calls_is_not_paid(sandbox: Sandbox, way: str) -> None:
    subject = text_task()
    assert components(run(sandbox, subject, HONEST_TURN + "result = v"))["mandatory"] == 1
    assert components(run(sandbox, subject, HONEST_TURN + "result = v", *LOSSY[way]))["mandatory"] == 0


def text_task() -> Task:
    """A turned image with strokes as wide as those of handwriting."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray((rng.random((60, 80)) > 0.6).astype(np.uint8) * 200 + 30)
    image = coarse.resize((400, 300), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(0.5)).convert("RGB")
    given = task("rotate_90", box=None)
    return Task(
        id="t", question="?", images=(image,), ground_truth="42", data_source="d",
        required_transforms=given.required_transforms,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ blame
THERE_AND_BACK = "x = image.rotate(90, expand=True).rotate(-90, expand=True)\n"
TRACER = "import sys\nt = sys.modules['cv_lightning.sandbox.tracer'].TRACER\n"
ERASED = {
    "cleared": THERE_AND_BACK + TRACER + "t.operations.clear()\nresult = x",
    "replaced": THERE_AND_BACK + TRACER + "t.operations = []\nresult = x",
    "switched off": TRACER + "t.active = False\n" + THERE_AND_BACK + "result = x",
    "made deep": TRACER + "t.depth = 1\n" + THERE_AND_BACK + "result = x",
}


@pytest.mark.parametrize("way", ERASED)
def test_redteam_erasing_the_trace_saves_no_penalty(sandbox: Sandbox, way: str) -> None:
    upright = task(box=None)
    honest = components(run(sandbox, upright, THERE_AND_BACK + "result = x"))["spurious"]
    assert honest == 2
    assert components(run(sandbox, upright, ERASED[way]))["spurious"] >= honest


@pytest.mark.parametrize("tail", ["", ".filter(ImageFilter.FIND_EDGES)", ".filter(ImageFilter.GaussianBlur(4))"])
def test_redteam_a_turn_is_blamed_by_its_pixels(sandbox: Sandbox, tail: str) -> None:
    """Slices have no name that a trace could tell, and the blurred image proves no map."""
    code = f"a = np.array(image)[::-1, ::-1].copy()\nresult = Image.fromarray(a){tail}"
    upright = text_task()
    upright = Task(id="u", question="?", images=upright.images, ground_truth="42", data_source="d")
    assert components(run(sandbox, upright, code))["spurious"] >= (1 if "EDGES" not in tail else 0)


def test_redteam_contrast_on_an_unused_image_is_not_a_used_operation(sandbox: Sandbox) -> None:
    code = (
        "d = ImageEnhance.Contrast(Image.new('RGB', (9, 9), 'red')).enhance(2)\n"
        "result = Image.frombytes('RGB', image.size, image.tobytes())"
    )
    for config in (
        RewardConfig(credit="steps", emerge=0.2),
        RewardConfig(credit="ran", emerge=0.2),
    ):
        assert components(run(sandbox, task(box=None), code), config)["emerge"] == 0
        real = "result = ImageEnhance.Contrast(image).enhance(1.4)"
        assert components(run(sandbox, task(box=None), real), config)["emerge"] == 1


# ------------------------------------------------------------------------------------------------ both executors
STEPS = (
    "x = x.rotate(270, expand=True)",
    "x = x.rotate(90, expand=True)",
    "x = x.transpose(3)",
    "x = x.rotate(180)",
    "x = x.rotate(90)",
    "x = x.rotate(12, resample=Image.BICUBIC)",
    "x = ImageOps.mirror(x)",
    "x = x.crop((40, 30, 200, 150))",
    "x = x.crop((-300, -400, 306, 408))",
    "x = x.crop((90, 90, 91, 91))",
    "x = x.resize((6, 8))",
    "x = x.resize((600, 800))",
    "x = x.resize((1, 1))",
    "x = x.resize((x.width * 2, x.height * 2))",
    "x = ImageEnhance.Brightness(x).enhance(0)",
    "x = ImageEnhance.Brightness(x).enhance(0.02)",
    "x = ImageEnhance.Contrast(x).enhance(1.5)",
    "x = ImageOps.invert(x)",
    "x = ImageOps.posterize(x, 1)",
    "x = x.filter(ImageFilter.GaussianBlur(9))",
    "x = x.filter(ImageFilter.FIND_EDGES)",
    "x = ImageOps.expand(x, 30)",
    "x = ImageOps.fit(x, (100, 100))",
    "x = ImageOps.pad(x, (300, 200))",
)
IN_CALLER = SandboxConfig(plan_budget_ms=1e6)


@pytest.mark.parametrize("number", [COMPARED, pytest.param(3 * COMPARED, marks=pytest.mark.slow)])
def test_redteam_both_executors_give_the_same_credit(general: Sandbox, number: int) -> None:
    """Effect, used operations and reward of a plan executed in the caller equal those of the same code in a child."""
    compared: list[float] = []

    class Planned:
        """Plans alone, as a sandbox."""

        def run_sync(self, image: Image.Image, code: str, max_shown: int = 0) -> object:
            found = plan.run(image, code, IN_CALLER)
            assert found is not None, code
            return found

    @settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), st.sampled_from([turned, small, text_task]))
    def compare(steps: list[str], subject: object) -> None:
        code = "\n".join(["x = image", *steps, "result = x"])
        given_task = subject()  # type: ignore[operator]
        if plan.prepare(code, given_task.images[0].size) is None:
            return
        ours, theirs = run(Planned(), given_task, code), run(general, given_task, code)  # type: ignore[arg-type]
        a, b = ours.turns[0].result, theirs.turns[0].result
        assert a is not None and b is not None and a.effect == b.effect, (code, a.effect, b.effect)
        assert [op.used for op in a.operations] == [op.used for op in b.operations], code
        for config in (None, RewardConfig(credit="steps", emerge=0.2), RewardConfig(credit="ran", emerge=0.2)):
            assert components(ours, config) == components(theirs, config), code
        compared.append(components(ours)["mandatory"])

    compare()
    assert len(compared) > 0.55 * number and sum(compared) > 0


# ------------------------------------------------------------------------------------------------ generated programs
def test_redteam_generated_attacks_are_paid_for_legible_views_only(sandbox: Sandbox) -> None:
    trial = attack_trial(sandbox, 1, range(SAMPLE))
    assert trial.illegible == []
    assert trial.lost_accuracy <= 0.05


def test_redteam_generated_honest_programs_keep_their_credit(sandbox: Sandbox) -> None:
    trial = honest_trial(sandbox, 1, range(SAMPLE))
    assert len(trial.unpaid) <= 1, trial.unpaid
    assert trial.read >= trial.read_honest - 2


def test_redteam_generators_are_seeded_and_of_many_kinds() -> None:
    again = [attack_program((5, index)) for index in range(60)]
    assert [one.snippets for one in again] == [attack_program((5, index)).snippets for index in range(60)]
    assert len({one.kind for one in again}) >= 9
    assert honest_program((5, 1)).snippets != honest_program((6, 1)).snippets


@pytest.mark.slow
def test_redteam_two_thousand_attacks_and_honest_programs(sandbox: Sandbox) -> None:
    """The bars, with a seed that no threshold was chosen by."""
    attacks, honest = (trial(sandbox, 20261217, range(2000)) for trial in (attack_trial, honest_trial))
    assert attacks.illegible == []
    assert attacks.lost_accuracy <= 0.05
    assert len(honest.unpaid) <= 0.005 * honest.programs, honest.unpaid
