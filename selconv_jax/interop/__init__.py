"""Checkpoints of other implementations of the method."""

__all__ = ["torch"]
