"""Tools that the policy can call."""

from cv_lightning.tools.base import CodeRunner, Tool, ToolContext
from cv_lightning.tools.code_image import DEFAULT_TOOLS, CodeTool

__all__ = ["DEFAULT_TOOLS", "CodeRunner", "CodeTool", "Tool", "ToolContext"]
