"""The algorithm of reinforcement learning: advantages, policy losses, KL, masks, micro-batches. No models, no ranks."""
