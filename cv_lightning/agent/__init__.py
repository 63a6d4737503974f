"""The agent: prompt, parser, dialogue, and the loop that runs many trajectories through one engine."""
