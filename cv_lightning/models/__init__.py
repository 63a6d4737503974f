"""Models: adapters of families, loading, packing, attention on packed rows, log-probabilities, export."""
