"""Models: adapters of families, loading, packing, attention, log-probabilities, export."""
