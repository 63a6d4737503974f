"""Qwen-VL: loading, special tokens, packing, attention on packed rows, log-probabilities, tiny checkpoints."""
