"""Pure tensor mathematics; imports torch and ``palate.types`` only."""
