"""The HTTP application: OpenAI's API on models that are served here."""
