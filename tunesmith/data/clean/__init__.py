"""Cleaning: the recipe's steps, in order, and an account of what each did."""
