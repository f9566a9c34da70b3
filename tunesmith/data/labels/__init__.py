"""Labels from people and from rules: how far they agree, and what to make of them."""
