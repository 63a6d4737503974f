"""The judge: a model that compares answers, behind an OpenAI-compatible endpoint."""
