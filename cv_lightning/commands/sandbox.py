"""`cv-lightning sandbox`: test the sandbox, or run one snippet and show what it did."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from cv_lightning.command_line import put_json, run_verb
from cv_lightning.images import decode_image
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.sandbox.cases import MAX_SHOWN, PACKAGED, load_cases, report, run_cases
from cv_lightning.sandbox.config import MAX_CODE_CHARS
from cv_lightning.types import DataError, ToolStatus

OPERATION = {name: name for name in ("name", "call", "arguments", "used")} | {
    "input": "input_size",
    "output": "output_size",
}
"""Attributes of an operation by their key in the printed JSON."""


def sandbox(
    self_test: bool = False,
    run: list[Path] | None = None,
    corpus: Path = PACKAGED,
    text: bool = False,
    json: Path | None = None,
    output: Path | None = None,
    timeout_s: float = 2.0,
    no_private_root: bool = False,
    allow_unsafe: bool = False,
) -> int:
    """Test the sandbox, or run one snippet in it and show what it did.

    Exit code 0: contained, or ran; 1: a case was not contained, or the snippet failed; 2: it cannot start.

    Args:
        self_test: Run the packaged cases, or those of --corpus.
        run: CODE.py IMAGE: run one snippet on an image and print its trace.
        corpus: Cases to run.
        text: Run all cases of --self-test with printed text and several images, not only those that ask for it.
        json: Write the result into this file; - prints it as JSON.
        output: File for the last image that --run makes; also -o.
        timeout_s: Limit of a snippet in seconds.
        no_private_root: Run without a private root, as hosts that do not allow one.
        allow_unsafe: Start although a required layer is missing.
    """
    if self_test == (run is not None) or (run is not None and len(run) != 2):
        raise DataError("give --self_test, or --run CODE.py IMAGE")
    if missing := [path for path in (*(run or ()), corpus) if not path.exists()]:
        raise DataError(f"{missing[0]}: no such file")
    config = SandboxConfig(
        timeout_s=timeout_s,
        max_code_chars=MAX_CODE_CHARS,
        private_root=not no_private_root,
        allow_unsafe=allow_unsafe,
    )
    with Sandbox(config) as started:
        if run is None:
            return _self_test(started, corpus, text, json)
        return _run(started, run[0], run[1], output, json)


def _self_test(sandbox: Sandbox, corpus: Path, text: bool, file: Path | None) -> int:
    summary = report(sandbox, run_cases(sandbox, load_cases(str(corpus)), text=text))
    if not put_json(file, summary):
        for name, state in summary["layers"].items():
            print(f"{name:14} {state}")
        for case in summary["cases"]:
            print(f"{'ok  ' if case['ok'] else 'FAIL'} {case['name']:34} {case['got'][:100]}")
        print(f"{summary['passed']} contained, {summary['failed']} not")
    return int(summary["failed"] > 0)


def _run(sandbox: Sandbox, file: Path, image: Path, output: Path | None, written: Path | None) -> int:
    try:
        code = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text: --run CODE.py IMAGE, the code first") from error
    picture = decode_image(image)
    result = sandbox.run_sync(picture, code, max_shown=MAX_SHOWN)
    shown = {
        "status": str(result.status),
        "error": result.error,
        "text": result.text,
        "images": [made.size for made in result.made],
        "executor": result.executor,
        "elapsed_ms": round(1000 * result.elapsed_s, 2),
        "operations": [{key: getattr(op, name) for key, name in OPERATION.items()} for op in result.operations],
        "core": result.effect.core if result.effect else (),
        "crop_box": result.effect.crop_box if result.effect else None,
        "to_input": result.effect.to_input if result.effect else None,
    }
    if not put_json(written, shown):
        print(json.dumps(shown, indent=1))
    if result.image is not None and output:
        try:
            result.image.save(output)
        except ValueError as error:
            raise DataError(f"--output {output}: {error}; end it in .png, .jpg or .webp") from error
    return int(result.status is not ToolStatus.OK)


main = partial(run_verb, sandbox, name="sandbox")
