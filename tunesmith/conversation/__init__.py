"""Conversations: the one currency of data, and the one way to turn them into tokens."""
