"""Training: configuration, state, step, loop, checkpoints, logs."""
