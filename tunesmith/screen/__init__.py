"""What a text holds that should not be there: personal data, secrets, offence. It cleans rows and guards answers."""
