"""Checkpoints on disk: what they were trained by, whether they are whole, and how they are read."""
