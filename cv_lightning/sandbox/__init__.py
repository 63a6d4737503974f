"""Run model-written image code, sealed off, and tell what really ran. See docs/sandbox.md."""

from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.sandbox import Sandbox

__all__ = ["Sandbox", "SandboxConfig"]
