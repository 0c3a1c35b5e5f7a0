"""Whole runs as data: a YAML file with stages, and the runner that chains them."""
