"""What a text holds that should not be there: personal data, secrets, offence. Rows are cleaned and answers guarded by it."""
