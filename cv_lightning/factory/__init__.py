"""Data sets: built, checked, corrupted and exported."""
