"""Training methods, one file each; method.py says what a method is, pairs.py what those that learn from pairs share."""
