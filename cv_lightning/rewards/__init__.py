"""Rewards: answers, format, use of the tool, the judge, and the module that composes them."""

from cv_lightning.rewards.config import RewardConfig
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.module import RewardModule
from cv_lightning.rewards.terms import AnsweredGroup, FunctionTerm, RewardTerm

__all__ = ["AnsweredGroup", "FunctionTerm", "JudgeConfig", "RewardConfig", "RewardModule", "RewardTerm"]
