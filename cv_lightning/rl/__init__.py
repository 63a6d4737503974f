"""From scored trajectories to a loss: collector, advantages, policy losses, micro-batches."""
