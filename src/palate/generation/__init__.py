"""Sampling responses: ``sampler.sample`` is the embedded default."""
