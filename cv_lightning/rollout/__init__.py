"""Rolling out: the agent on an engine, scored; weights in, trajectories out; evaluation by rollouts."""
