"""The loop: microbatches, one division by the global count, steps, checkpoints, exact resume."""
