"""Policy losses, one class a file; `model.init_args.algorithm.loss` names one by `class_path`."""

from cv_lightning.rl.losses.base import PolicyLoss, TokenBatch
from cv_lightning.rl.losses.cispo import CISPO
from cv_lightning.rl.losses.dppo import DPPO
from cv_lightning.rl.losses.gspo import GSPO
from cv_lightning.rl.losses.ppo_clip import PPOClip

__all__ = ["CISPO", "DPPO", "GSPO", "PPOClip", "PolicyLoss", "TokenBatch"]
