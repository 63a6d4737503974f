"""Reported operations, arguments and net effect, by library and by style of code."""

import pytest
from sandbox_samples import NOISE, general, smooth_image

from cv_lightning.types import Affine, SandboxResult

WIDTH, HEIGHT = 240, 180
CV2 = "a = np.array(image)\n"
TO_IMAGE = "\nresult = Image.fromarray(np.ascontiguousarray(a))"

CORE = [
    # Pillow
    ("result = image.rotate(90, expand=True)", "rotate_90"),
    ("result = image.rotate(-90, expand=True)", "rotate_270"),
    ("result = image.rotate(angle=540)", "rotate_180"),
    ("turn = image.rotate\nresult = turn(90, expand=True)", "rotate_90"),
    ("result = image.transpose(Image.Transpose.TRANSPOSE)", "flip_horizontal rotate_90"),
    ("result = image.transpose(Image.Transpose.TRANSVERSE)", "flip_horizontal rotate_270"),
    ("from PIL.Image import Transpose as T\nresult = image.transpose(T.FLIP_TOP_BOTTOM)", "flip_vertical"),
    ("from PIL import ImageOps as O\nresult = O.mirror(O.flip(image))", "rotate_180"),
    ("result = image.rotate(90, expand=True).rotate(180).transpose(0)", "flip_horizontal rotate_90"),
    ("result = image.rotate(90, expand=True).rotate(-90, expand=True)", ""),
    ("w, h = image.size\nresult = image.transform((w, h), Image.AFFINE, (-1, 0, w, 0, 1, 0))", "flip_horizontal"),
    ("result = ImageOps.exif_transpose(image)", ""),
    ("getattr(image, 'ro' + 'tate')\nresult = getattr(image, 'ro' + 'tate')(180)", "rotate_180"),
    # NumPy, slices without a name
    ("result = np.rot90(np.array(image), k=3)", "rotate_270"),
    ("result = np.rot90(np.array(image), 1, (1, 0))", "rotate_270"),
    ("result = np.array(image)[::-1]", "flip_vertical"),
    ("result = np.asarray(image)[:, ::-1].copy()", "flip_horizontal"),
    ("result = np.array(image)[::-1, ::-1, :]", "rotate_180"),
    ("result = np.array(image).transpose(1, 0, 2)[::-1]", "rotate_90"),
    ("result = np.swapaxes(np.array(image), 0, 1)", "flip_horizontal rotate_90"),
    ("result = np.flip(np.array(image), axis=(0, 1))", "rotate_180"),
    ("result = Image.fromarray(np.fliplr(np.array(image)))", "flip_horizontal"),
    ("a = np.array(image)\nresult = a * 0\nfor i, row in enumerate(a): result[-1 - i] = row", "flip_vertical"),
    ("a = np.array(image)\nresult = np.stack([a[:, ::-1, c] for c in range(3)], axis=-1)", "flip_horizontal"),
    ("a = np.array(image)\nresult = a[np.arange(len(a))[::-1]]", "flip_vertical"),
    ("a = np.array(image)\nresult = np.take(a, range(a.shape[1] - 1, -1, -1), axis=1)", "flip_horizontal"),
    # OpenCV
    (CV2 + "a = cv2.rotate(a, cv2.ROTATE_90_CLOCKWISE)" + TO_IMAGE, "rotate_270"),
    (CV2 + "a = cv2.rotate(a, rotateCode=1)" + TO_IMAGE, "rotate_180"),
    (CV2 + "a = cv2.flip(a, -1)" + TO_IMAGE, "rotate_180"),
    (CV2 + "a = cv2.flip(cv2.transpose(a), 0)" + TO_IMAGE, "rotate_90"),
    (CV2 + "h, w = a.shape[:2]\nm = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), 180, 1.0)\n"
     "a = cv2.warpAffine(a, m, (w, h))" + TO_IMAGE, "rotate_180"),
    (CV2 + "a = cv2.cvtColor(cv2.cvtColor(a, cv2.COLOR_RGB2BGR)[:, ::-1], cv2.COLOR_BGR2RGB)" + TO_IMAGE,
     "flip_horizontal"),
    # scikit-image
    ("from skimage import transform\nresult = transform.rotate(np.array(image), 90, resize=True)", "rotate_90"),
    ("from skimage.transform import rotate\nresult = np.uint8(rotate(np.array(image), 180) * 255)", "rotate_180"),
    # tone after geometry
    ("result = ImageEnhance.Contrast(image.rotate(180)).enhance(1.8)", "rotate_180"),
    ("result = ImageOps.grayscale(image.transpose(1)).filter(ImageFilter.GaussianBlur(2))", "flip_vertical"),
    ("from skimage import exposure\nresult = exposure.equalize_hist(np.array(image)[:, ::-1])", "flip_horizontal"),
    ("result = ImageOps.invert(image.rotate(90, expand=True))", "rotate_90"),
    ("result = image.rotate(90, expand=True).resize((60, 80))", "rotate_90"),
    ("result = image.rotate(45, expand=True)", ""),
    ("result = image.filter(ImageFilter.SHARPEN)", ""),
    # nothing that did not run
    ("# image.rotate(90)\ntext = 'image.rotate(90).crop((0, 0, 9, 9))'\nresult = image", ""),
    ("image.rotate(90)\nimage.crop((5, 5, 9, 9))\nresult = image", ""),
    ("if image.width < 3:\n    image = image.rotate(90)\nresult = image", ""),
    ("def turn(x): return x.rotate(90)\nresult = image", ""),
]  # fmt: skip

BOXES = [
    ("result = image.crop((20, 30, 140, 150))", (20, 30, 140, 150)),
    ("w, h = image.size\nresult = image.crop((w // 4, h // 4, w // 2, h // 2))", (60, 45, 120, 90)),
    ("result = image.crop((20, 30, 140, 150)).resize((480, 480), Image.LANCZOS)", (20, 30, 140, 150)),
    ("result = image.resize((480, 360), box=(20, 30, 140, 120))", (20, 30, 140, 120)),
    ("result = np.array(image)[30:150, 20:140]", (20, 30, 140, 150)),
    ("result = np.array(image)[30:-30, 20:-100].copy()", (20, 30, 140, 150)),
    (CV2 + "a = cv2.resize(a[30:150, 20:140], None, fx=2, fy=2, interpolation=2)" + TO_IMAGE, (20, 30, 140, 150)),
    ("a = np.array(image)[30:150, 20:140].copy() * 0.5 + 20\nresult = a.astype(np.uint8)", (20, 30, 140, 150)),
    ("a = np.array(image)[30:150, 20:140].copy()[::-1].copy()\nresult = a", (20, 30, 140, 150)),
    ("a = np.array(image)\nresult = np.array([[a[y, x] for x in range(20, 140)] for y in range(30, 150)])",
     (20, 30, 140, 150)),
    ("result = image.crop((10, 20, 200, 170)).crop((10, 10, 130, 130))", (20, 30, 140, 150)),
    ("result = image.rotate(90, expand=True).crop((10, 20, 100, 140))", (100, 10, 220, 100)),
    ("result = ImageOps.crop(image, 30)", (30, 30, 210, 150)),
    ("result = ImageOps.fit(image, (90, 90))", (30, 0, 210, 180)),
    ("result = ImageEnhance.Contrast(image.crop((20, 30, 140, 150))).enhance(1.5)", (20, 30, 140, 150)),
    ("crops = [image.crop(b) for b in [(0, 0, 50, 50), (20, 30, 140, 150)]]\nresult = crops[1]", (20, 30, 140, 150)),
    ("result = image.crop((-20, -30, 120, 120))", (0, 0, 120, 120)),
    ("result = image.crop((0, 0, 240, 180))", None),
    ("result = image.crop((-5, -5, 300, 300))", None),
    ("result = ImageOps.expand(image, 20)", None),
    ("result = image.resize((50, 50))", None),
    ("image.thumbnail((60, 60))\nresult = image", None),
    ("result = image.rotate(90)", None),
]  # fmt: skip

NAMES = [
    ("result = ImageEnhance.Brightness(image).enhance(0.5)", "brightness_down"),
    ("result = ImageEnhance.Sharpness(image).enhance(2)", "sharpness"),
    ("result = image.filter(ImageFilter.MedianFilter(3))", "median_blur"),
    ("result = ImageOps.autocontrast(ImageOps.equalize(image))", "equalize autocontrast"),
    ("ImageDraw.Draw(image).rectangle((3, 3, 30, 30), outline='red')\nresult = image", "draw"),
    (CV2 + "a = cv2.GaussianBlur(a, (5, 5), 1.5)\na = cv2.cvtColor(a, cv2.COLOR_RGB2GRAY)" + TO_IMAGE,
     "gaussian_blur grayscale"),
    (CV2 + "cv2.rectangle(a, (3, 3), (30, 30), (255, 0, 0), 2)" + TO_IMAGE, "draw"),
    (CV2 + "a = cv2.bilateralFilter(a, 5, 50, 50)" + TO_IMAGE, "smooth"),
    ("from skimage import filters\nresult = filters.gaussian(np.array(image), 1, channel_axis=2)", "gaussian_blur"),
    ("from skimage import exposure\nresult = exposure.adjust_gamma(np.array(image), 0.5)", "tone"),
    ("from skimage import transform\nresult = transform.resize(np.array(image), (90, 120))", "resize"),
    ("result = image.convert('L')", "grayscale"),
    ("result = image.rotate(12, expand=True)", "rotate"),
]  # fmt: skip


def run(code: str) -> SandboxResult:
    result = general().run_sync(smooth_image(), code)
    assert result.image is not None and result.effect is not None, result.error
    return result


@pytest.mark.parametrize(("code", "core"), CORE)
def test_net_symmetries(code: str, core: str) -> None:
    assert run(code).effect.core == tuple(core.split()), [op.name for op in run(code).operations]  # type: ignore[union-attr]


@pytest.mark.parametrize(("code", "box"), BOXES)
def test_boxes_in_input_pixels(code: str, box: tuple[int, int, int, int] | None) -> None:
    found = run(code).effect
    assert found is not None
    assert (found.crop_box is None) if box is None else found.crop_box == pytest.approx(box, abs=1.01)
    assert ("crop" in found.core) is (box is not None)


@pytest.mark.parametrize(("code", "names"), NAMES)
def test_names_of_operations(code: str, names: str) -> None:
    assert [op.name for op in run(code).operations if op.used] == names.split()


def test_operations_come_in_order_with_arguments_and_sizes() -> None:
    result = run(
        "k = 45\nimage.crop((0, 0, 9, 9))\na = image.rotate(2 * k, expand=True)\nresult = a.crop((1, 2, k, k + 5))"
    )
    assert [(op.call, op.used) for op in result.operations] == [
        ("Image.crop", False),
        ("Image.rotate", True),
        ("Image.crop", True),
    ]
    rotate, crop = result.operations[1:]
    assert rotate.arguments == {"angle": 90, "expand": True} and crop.arguments == {"box": (1, 2, 45, 50)}
    assert (rotate.input_size, rotate.output_size, crop.output_size) == ((240, 180), (180, 240), (44, 48))


def test_the_map_comes_with_the_result() -> None:
    effect = run("result = image.rotate(90, expand=True).crop((10, 20, 100, 140)).resize((180, 240))").effect
    assert effect is not None and effect.to_input == pytest.approx(Affine(0, -0.5, 220, 0.5, 0, 10))
    effect = run("result = Image.new('RGB', (50, 50), 'red')").effect
    assert effect is not None and effect.to_input is None and effect.core == ()


def test_another_image_gets_no_map() -> None:
    code = (
        "y, x = np.mgrid[:96, :128]\nresult = np.stack([x % 13 * 19, y % 7 * 30, (x * y) % 256], -1).astype(np.uint8)"
    )
    result = general().run_sync(NOISE, code)
    assert result.effect is not None and result.effect.to_input is None and result.effect.crop_box is None


FORGERIES = [
    "import sys\nt = sys.modules['cv_lightning.sandbox.tracer']\n"
    "t.TRACER.record('Image.rotate', {'angle': 90}, image, image)\nresult = image",
    "import sys\nt = sys.modules['cv_lightning.sandbox.tracer']\nA = sys.modules['cv_lightning.types'].Affine\n"
    "result = image.copy()\nt.TRACER.set_origin(result, t.Origin(A(-1, 0, 128, 0, -1, 96), frozenset()))",
    "import sys\nt = sys.modules['cv_lightning.sandbox.tracer']\nA = sys.modules['cv_lightning.types'].Affine\n"
    "result = image.copy()\nt.TRACER.set_origin(result, t.Origin(A(0.5, 0, 20, 0, 0.5, 20), frozenset()))",
]  # fmt: skip


@pytest.mark.parametrize("code", FORGERIES)
def test_model_code_cannot_forge_an_effect(code: str) -> None:
    result = general().run_sync(NOISE, code)
    assert result.effect is not None and result.effect.core == () and result.effect.crop_box is None, result.error
