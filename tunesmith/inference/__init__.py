"""Generating and scoring behind one protocol."""
