"""Guards: what may go in and come out."""
