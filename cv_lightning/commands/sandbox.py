"""`python -m cv_lightning sandbox`: test the sandbox, or run one snippet and show what it did."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cv_lightning.images import decode_image
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.sandbox.config import MAX_CODE_CHARS
from cv_lightning.sandbox.selftest import PACKAGED, load_cases, report, run_cases
from cv_lightning.types import CVLightningError


def main(argv: list[str]) -> int:
    """Entry. Exit code 0: contained, or ran; 1: a case was not contained, or the snippet failed; 2: cannot start."""
    parser = argparse.ArgumentParser(prog="python -m cv_lightning sandbox", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--self-test", action="store_true", help="run the packaged cases, or those of --corpus")
    what.add_argument("--run", nargs=2, metavar=("CODE.py", "IMAGE"), help="run one snippet and print its trace")
    parser.add_argument("--corpus", default=str(PACKAGED), help="cases to run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", help="where --run writes the result")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="limit of a snippet in seconds")
    parser.add_argument("--no-private-root", action="store_true", help="as on a host that allows no private root")
    parser.add_argument("--allow-unsafe", action="store_true", help="start although a required layer is missing")
    options = parser.parse_args(argv)
    config = SandboxConfig(
        timeout_s=options.timeout_s,
        max_code_chars=MAX_CODE_CHARS,
        private_root=not options.no_private_root,
        allow_unsafe=options.allow_unsafe,
    )
    try:
        with Sandbox(config) as sandbox:
            return _self_test(sandbox, options) if options.self_test else _run(sandbox, options)
    except (CVLightningError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2


def _self_test(sandbox: Sandbox, options: argparse.Namespace) -> int:
    summary = report(sandbox, run_cases(sandbox, load_cases(options.corpus)))
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        for name, state in summary["layers"].items():
            print(f"{name:14} {state}")
        for case in summary["cases"]:
            print(f"{'ok  ' if case['ok'] else 'FAIL'} {case['name']:34} {case['got'][:100]}")
        print(f"{summary['passed']} contained, {summary['failed']} not")
    return int(summary["failed"] > 0)


def _run(sandbox: Sandbox, options: argparse.Namespace) -> int:
    try:
        code = Path(options.run[0]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CVLightningError(f"{options.run[0]} is no text: --run CODE.py IMAGE, the code first") from error
    picture = decode_image(options.run[1])
    result = sandbox.run_sync(picture, code)
    shown = {
        "status": str(result.status),
        "error": result.error,
        "tier": result.tier,
        "elapsed_ms": round(1000 * result.elapsed_s, 2),
        "operations": [
            {
                "name": op.name,
                "call": op.call,
                "arguments": op.arguments,
                "input": op.input_size,
                "output": op.output_size,
                "used": op.used,
            }
            for op in result.operations
        ],
        "core": result.effect.core if result.effect else (),
        "crop_box": result.effect.crop_box if result.effect else None,
        "to_input": result.effect.to_input if result.effect else None,
    }
    print(json.dumps(shown, indent=None if options.json else 1))
    if result.image is not None and options.output:
        try:
            result.image.save(options.output)
        except ValueError as error:
            raise CVLightningError(f"-o {options.output}: {error}; end it in .png, .jpg or .webp") from error
    return int(result.image is None)
