"""Rules over a run's metrics that say what goes wrong: evidence, likely causes, remedies as settings."""
