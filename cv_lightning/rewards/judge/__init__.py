"""The judge: a model that compares answers, behind an OpenAI-compatible endpoint."""

from cv_lightning.rewards.judge.client import Judge

__all__ = ["Judge"]
