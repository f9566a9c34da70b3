"""Base models: their names, where they are, how they are loaded, what they cost."""
