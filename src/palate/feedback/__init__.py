"""Where judgements come from."""
