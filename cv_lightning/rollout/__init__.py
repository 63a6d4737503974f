"""Rollouts: from tasks to scored groups, engine checks at start-up, and evaluation by rollouts."""
