"""Fine-tuning jobs: a queue in the database, workers, and what comes of them. A job is a recipe given to `pipeline`."""
