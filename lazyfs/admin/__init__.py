"""Looking after a store and a cache: list, verify, collect garbage."""
