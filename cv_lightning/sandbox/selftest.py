from typing import Any
START_CASES: tuple[Any, ...] = ()
def run_cases(sandbox: Any, cases: Any) -> list[Any]:
    return []
