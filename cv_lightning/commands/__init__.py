"""Plain commands, one file each."""
