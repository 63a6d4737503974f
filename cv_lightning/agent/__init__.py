"""The agent: prompt, protocol, dialogue and the loop that runs many trajectories through one engine."""
