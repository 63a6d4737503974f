"""What happens around training: rollouts, weight sync, self-tests, progress, export, the run record."""
