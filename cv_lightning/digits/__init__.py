"""The embedded task: scenes of handwritten digits, their demonstrations, the tiny model and the quickstart."""
