"""Answering by models: routing, guards, caches and limits. No HTTP is spoken here."""
