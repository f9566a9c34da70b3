"""Training methods, one file each; method.py says what a method is."""
