"""Generated programs give the same pixels, operations and effect as a plan and in a child, bit for bit."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sandbox_samples import NOISE, general

from cv_lightning.sandbox import SandboxConfig, plan
from cv_lightning.types import SandboxResult, ToolStatus

IN_CALLER = SandboxConfig(plan_budget_ms=1e6)
WIDTH, HEIGHT = NOISE.size

numbers = st.integers(-40, 140)
angles = st.one_of(
    st.sampled_from(
        ["0", "90", "-90", "180", "270", "45", "33.5", "360", "90 * 3", "math.degrees(math.pi)", "-w % 360"]
    )
)
flags = st.sampled_from(["True", "False", "1", "0"])
resamplings = st.sampled_from(["Image.BICUBIC", "Image.Resampling.BILINEAR", "Image.NEAREST", "resample=Image.BICUBIC"])
colours = st.sampled_from(["'white'", "(1, 2, 3)", "'#00ff80'", "0"])


@st.composite
def boxes(draw: st.DrawFn) -> str:
    left, top = draw(numbers), draw(numbers)
    width, height = draw(st.integers(1, 120)), draw(st.integers(1, 120))
    return draw(
        st.sampled_from(
            [
                f"({left}, {top}, {left + width}, {top + height})",
                f"({left}, {top}, {left} + w // 2, {top} + h // 3)",
                "(w // 4, h // 4, 3 * w // 4, 3 * h // 4)",
                f"(0.1 * w, 0.2 * h, 0.9 * w, max(h, {height}) * 0.8)",
                f"({left}.5, {top}.5, {left + width}.5, {top + height}.5)",
                f"[{left}, {top}, {left + width}, {top + height}]",
                "(e[0], e[1], e[2] + 9, e[-1])",
            ]
        )
    )


@st.composite
def steps(draw: st.DrawFn) -> str:
    """An expression in `x`, an image."""
    kind = draw(st.integers(0, 15))
    if kind <= 2:
        return f"x.crop({draw(boxes())})"
    if kind <= 5:
        extra = draw(st.sampled_from(["", f", expand={draw(flags)}", f", {draw(resamplings)}"]))
        fill = draw(st.sampled_from(["", f", fillcolor={draw(colours)}"]))
        return f"x.rotate({draw(angles)}{extra}{fill})"
    if kind == 6:
        method = draw(
            st.sampled_from(["0", "1", "2", "3", "4", "5", "6", "Image.FLIP_LEFT_RIGHT", "Image.Transpose.TRANSPOSE"])
        )
        return f"x.transpose({method})"
    if kind == 7:
        size = draw(st.sampled_from(["(x.width * 2, x.height // 2 + 1)", "(37, 91)", "(int(w * 0.7), int(h * 1.3))"]))
        extra = draw(st.sampled_from(["", ", Image.LANCZOS", ", Image.NEAREST", ", box=(5, 6, 30, 40)"]))
        return f"x.resize({size}{extra})"
    if kind == 8:
        return draw(st.sampled_from(["x.convert('L')", "x.convert('RGB')", "x.copy()", "x.convert(mode='L')"]))
    if kind == 9:
        name = draw(st.sampled_from(["Contrast", "Brightness", "Sharpness", "Color"]))
        return f"ImageEnhance.{name}(x).enhance({draw(st.sampled_from(['0', '0.5', '1', '1.7', '3', 'w / h']))})"
    if kind == 10:
        return draw(st.sampled_from(["ImageOps.mirror(x)", "ImageOps.flip(x)", "ImageOps.grayscale(x)", "mirror(x)"]))
    if kind == 11:
        calls = ["autocontrast(x)", "autocontrast(x, cutoff=2)", "equalize(x)", "invert(x)", "posterize(x, 3)"]
        return f"ImageOps.{draw(st.sampled_from([*calls, 'solarize(x, threshold=100)']))}"
    if kind == 12:
        calls = ["expand(x, 7, fill=0)", "crop(x, 3)", "fit(x, (40, 50))", "pad(x, (60, 40))"]
        return f"ImageOps.{draw(st.sampled_from(calls))}"
    if kind == 13:
        name = draw(
            st.sampled_from(
                ["GaussianBlur(2)", "BoxBlur(radius=1)", "MedianFilter(3)", "UnsharpMask(2, 150, 3)", "SHARPEN"]
            )
        )
        return f"x.filter(ImageFilter.{name})"
    if kind == 14:
        return f"x.rotate(90 if x.width > {draw(numbers)} else {draw(angles)}, expand=True)"
    return "x"


@st.composite
def programs(draw: st.DrawFn) -> str:
    lines = ["from PIL.ImageOps import mirror", "w, h = image.size", "e = [3, 4, 50, 60]", "w += 1"]
    names = ["image", "img"]
    for number in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([f"a{number}", "a0", "image", "img", "result", "output"]))
        source = draw(st.sampled_from(names))
        lines.append(f"x = {source}")
        lines.append(f"{name} = {draw(steps())}")
        names.append(name)
    if draw(st.booleans()):
        lines.append(f"result = {draw(st.sampled_from(names))}")
    return "\n".join(lines)


def assert_same(planned: SandboxResult, child: SandboxResult, code: str) -> None:
    assert child.image is not None and planned.image is not None, (code, child.error, planned.error)
    assert child.image.size == planned.image.size, code
    assert child.image.tobytes() == planned.image.tobytes(), code
    told = [
        [(o.name, o.call, o.arguments, o.input_size, o.output_size, o.used) for o in one.operations]
        for one in (planned, child)
    ]
    assert told[0] == told[1], code


def test_plans_give_the_same_in_the_caller_and_in_a_child() -> None:
    taken: list[bool] = []

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(programs())
    def compare(code: str) -> None:
        child = general().run_sync(NOISE, code)
        planned = plan.run(NOISE, code, IN_CALLER)
        taken.append(planned is not None)
        if planned is not None:
            assert child.status is ToolStatus.OK, (code, child.error)
            assert_same(planned, child, code)
            if child.effect and planned.effect and child.effect.to_input and planned.effect.to_input:
                # For a child only what the pixels prove is believed; where it is, both have the same labels.
                assert set(child.effect.core) == set(planned.effect.core), code

    compare()
    assert len(taken) >= 60 and sum(taken) > 0.6 * len(taken), f"{sum(taken)} of {len(taken)} were plans"
