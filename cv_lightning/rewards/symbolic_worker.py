"""The process behind `symbolic.SymbolicComparer`: reads JSON pairs of formulas, writes `1` or `0`, a line each.

Run as a script, so that it imports math-verify and nothing of this project.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30
LIMIT_S = 60
"""Time after which a comparison ends the process. The caller waits less; this counts where it was killed meanwhile."""


def are_equal(answer: str, ground_truth: str) -> bool:
    """True if math-verify can read both and proves them equal."""
    import math_verify

    said, truth = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (answer, ground_truth))
    return bool(said and truth and math_verify.verify(truth, said, timeout_seconds=None))


def main() -> None:
    """Answer until the input ends."""
    import math_verify  # noqa: F401 - takes a second, before the first question has its time limit

    logging.disable(logging.CRITICAL)  # it warns of each time-out that is left to the caller
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(LIMIT_S)
        try:
            equal = are_equal(*json.loads(line))
        except Exception:  # whatever sympy raises, a formula that it cannot read is not equal
            equal = False
        signal.alarm(0)
        print(int(equal), flush=True)


if __name__ == "__main__":
    main()
