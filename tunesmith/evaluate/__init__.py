"""Evaluation: the baseline and the tuned model on the same rows, and whether the difference is proved."""
