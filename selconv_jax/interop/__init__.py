"""Checkpoints of other implementations of the method."""
