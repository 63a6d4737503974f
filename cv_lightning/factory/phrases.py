"""Texts of the offline teacher: several phrasings for every situation, and correct and failing code for each step."""

from __future__ import annotations

import random

STATE = {
    "rotate_90": "lies on its side, turned by a quarter counter-clockwise",
    "rotate_180": "stands on its head",
    "rotate_270": "lies on its side, turned by a quarter clockwise",
    "flip_horizontal": "is mirrored left to right",
    "flip_vertical": "is mirrored top to bottom",
}
"""Appearance of an image after a transform."""
UNDO = {
    "rotate_90": "rotate it by 270 degrees counter-clockwise",
    "rotate_180": "rotate it by 180 degrees",
    "rotate_270": "rotate it by 90 degrees counter-clockwise",
    "flip_horizontal": "mirror it left to right",
    "flip_vertical": "flip it top to bottom",
}
"""Operation that undoes a transform, in words."""
UNDO_CODE = {
    "rotate_90": (
        "result = image.rotate(270, expand=True)",
        "result = image.rotate(-90, expand=True)",
        "result = image.transpose(Image.Transpose.ROTATE_270)",
        "result = image.transpose(Image.ROTATE_270)",
    ),
    "rotate_180": (
        "result = image.rotate(180)",
        "result = image.rotate(180, expand=True)",
        "result = image.transpose(Image.Transpose.ROTATE_180)",
    ),
    "rotate_270": (
        "result = image.rotate(90, expand=True)",
        "result = image.transpose(Image.Transpose.ROTATE_90)",
        "result = image.transpose(Image.ROTATE_90)",
    ),
    "flip_horizontal": (
        "result = ImageOps.mirror(image)",
        "result = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)",
        "result = image.transpose(Image.FLIP_LEFT_RIGHT)",
    ),
    "flip_vertical": (
        "result = ImageOps.flip(image)",
        "result = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)",
        "result = image.transpose(Image.FLIP_TOP_BOTTOM)",
    ),
}
CROP_CODE = (
    "{before}result = image.crop({edges})",
    "{before}box = {edges}\nresult = image.crop(box)",
    "{before}region = {edges}\nresult = image.crop(region)",
)
CROP_DESCRIPTION = ("Zoom in on the part that matters", "Crop to the relevant region", "Cut out the small detail")

OPENING = (
    "I am asked: {question}",
    'The question is "{question}".',
    "I need to find out: {question}",
    "Let me look at the image for this: {question}",
    "First I check whether the image can be read as it is.",
    "",
)
TURN = (
    "The image {state}. I will {undo} before I read it.",
    "What I see {state}, so I {undo} first.",
    "It {state}; to put it upright I {undo}.",
    "This {state}. Reading it this way invites mistakes: I {undo}.",
    "The content {state}. I should {undo} and look again.",
)
CROP = (
    "What matters is too small to read at this scale. I crop to it.",
    "The relevant part takes up little of the image, so I zoom in on it.",
    "I can see where the detail is but cannot make it out; a crop will show it larger.",
    "The region in question is tiny. I cut it out to see it in full resolution.",
    "Let me look closer at the spot that holds the answer.",
)
CROP_FINER = (
    "Closer, but still small. I narrow the crop further.",
    "The target is in this part; I zoom in once more.",
    "This view holds what I need, with much around it. A tighter crop will do.",
    "I am on the right spot and go one step finer.",
)
REPAIR = {
    "exception": (
        "The code failed with {error}. I correct it.",
        "That raised {error}; I write the call properly this time.",
        "{error}: my mistake in the code. I try again with the right call.",
        "The tool reports {error}, so nothing was changed. I fix the snippet.",
    ),
    "wrong_turn": (
        "That was the wrong operation: the image is still not upright. I go back to the image before it.",
        "The result looks wrong, I misjudged the orientation. I start again from the earlier image.",
        "This did not put it upright. I discard it and look at the image before it again.",
    ),
    "missed_crop": (
        "The crop missed: what I need is not in it. I go back and choose another region.",
        "I cut out the wrong part. I return to the larger view and correct the coordinates.",
        "This region does not hold the answer; it lies beside it. I crop again.",
    ),
}
ANSWER_AT_ONCE = (
    "The image is upright and what is asked can be read as it is; no tool is needed.",
    "I can see this clearly without editing the image.",
    "Everything is legible at this size. I answer directly.",
    "The image needs no change to answer: {question}",
)
ANSWER_AFTER_TOOL = (
    "Now it can be read clearly.",
    "With this view I can answer: {question}",
    "This shows what I was looking for.",
    "The image is now as it should be, and the answer is visible.",
    "That is legible. I have what I need.",
)

RETURNED = {
    "image": "",
    "text": "\nprint(result.size)",
    "pair": "\nshow(result.crop((0, 0, (result.width + 1) // 2, result.height)))",
}
"""What is added to a call's code, by what it returns."""


def broken(code: str, action: str, rng: random.Random) -> str:
    """The code with a mistake that raises an exception when it runs.

    Args:
        code: Correct code of the step.
        action: turn or crop.
        rng: Chooses the mistake.
    """
    if action == "crop":
        others = [code.replace(".crop(", ".crop_box("), code.replace(".crop(", ".cut(")]
    else:
        others = ["result = image.rotate_image(90)", "result = cv2.rotate(image, cv2.ROTATE_90)"]
    wrong_name = code.replace("image.", "picture.").replace("(image)", "(picture)")
    return rng.choice([wrong_name, code.rstrip(")"), f'image = Image.open("image.png")\n{code}', *others])
