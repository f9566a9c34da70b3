"""Data: from the files that people have to the rows that training and evaluation read."""
