"""How many files and carriers a sampled token and an image pass on their way to the loss, in a real iteration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/trace_flow.py"


def test_token_and_image_reach_the_loss_through_few_files_with_one_processor_pass() -> None:
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    token, image = found["token"], found["image"]
    assert "rl/losses/ppo_clip.py" in token["files"] and "data/readers.py" in image["files"], "both ends are seen"
    assert len(token["files"]) <= 10 and len(token["carriers"]) <= 5 and len(token["shares"]) <= 2
    assert len(image["files"]) <= 12
    assert found["passes"] == [1, 1]
