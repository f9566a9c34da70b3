"""Searching for settings: many short trainings, the best one's recipe kept."""
