"""The LightningModules: SFT and GRPO on one shared base."""
