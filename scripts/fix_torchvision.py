"""Make `import torchvision` work with a torch for which its compiled operators were not built.

vLLM's CPU build installs a torchvision whose compiled part does not load with the CPU torch. Its image transforms are
plain torch and work; the import fails only because two operator schemas are missing. If the import fails, this script
declares them in the installed `torchvision/extension.py` and prints a line. The declaration has to be in the installed
file, because vLLM inspects model classes in a subprocess.
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
    """Fix the import if needed; exit code 1 if it still fails."""
    if imports():
        return 0
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("torchvision is not installed", file=sys.stderr)
        return 1
    path = pathlib.Path(spec.origin).parent / "extension.py"
    text = path.read_text()
    if MARK not in text:
        fixed = path.with_suffix(".tmp")  # the file itself may be a link to one in uv's cache
        fixed.write_text(text + PATCH)
        fixed.replace(path)
        print(f"fixed {path}: declared the schemas of torchvision's nms and qnms (its compiled part does not load)")
    if not imports():
        print("torchvision still cannot be imported; reinstall it for the installed torch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
