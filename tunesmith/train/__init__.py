"""Training: one loop, a file for each method, a file for each adapter."""
