from typing import Any
def run(image: Any, code: str, config: Any) -> None:
    return None
