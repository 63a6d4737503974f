"""cv_lightning: train and evaluate vision-language models that think with images by writing code."""

__version__ = "0.1.0"
