"""Training rows made of other training rows, each with its provenance; never one that is like a held-out row."""
