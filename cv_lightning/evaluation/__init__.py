"""Evaluation: metrics on trajectories, the quickstart's summary, the report page."""
