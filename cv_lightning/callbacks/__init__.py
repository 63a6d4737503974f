"""Lightning callbacks: rollouts, start-up checks, progress, checkpoints, export, run record, watchdog."""
