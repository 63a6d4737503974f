"""Tools that the policy can call."""

from cv_lightning.tools.base import CodeRunner, Tool, ToolContext
from cv_lightning.tools.code_image import DEFAULT_TOOLS, CodeTool
from cv_lightning.tools.crop_box import CropBoxTool

__all__ = ["DEFAULT_TOOLS", "CodeRunner", "CodeTool", "CropBoxTool", "Tool", "ToolContext"]
