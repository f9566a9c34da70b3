"""What is trained of a model, a file for each kind: an Adapter (adapter.py)."""
