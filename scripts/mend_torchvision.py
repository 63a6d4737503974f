"""Make `import torchvision` work beside a torch its compiled operators were not built for.

vLLM's CPU build pulls a torchvision whose compiled part does not load next to the CPU torch. Its image
transforms are plain torch and work; the import fails only because two operator *schemas* are missing.
This declares them in the installed `torchvision/extension.py`, only when the import fails, and says so.
It has to live in the installed file: vLLM inspects model classes in a subprocess of its own.
"""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

MARK = "# cv_lightning: operator schemas for a torchvision without compiled operators"
PATCH = f"""

{MARK}
if not _has_ops():
    _cv_lightning_schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _cv_lightning_schemas.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> bool:
    """True if a fresh interpreter can import torchvision."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def main() -> int:
    """Mend if needed; exit code 1 if the import still fails."""
    if imports():
        return 0
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("torchvision is not installed", file=sys.stderr)
        return 1
    path = pathlib.Path(spec.origin).parent / "extension.py"
    text = path.read_text()
    if MARK not in text:
        path.write_text(text + PATCH)
        print(f"mended {path}: declared the schemas of torchvision's nms and qnms (its compiled part does not load)")
    if not imports():
        print("torchvision still cannot be imported; reinstall it for the installed torch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
