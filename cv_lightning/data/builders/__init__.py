"""Builders: from a table of images, questions and answers to SFT conversations and RL tasks."""
