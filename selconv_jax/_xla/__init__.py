"""Batch norm, convolutions and barriers, each in the formulation that the target's compiler handles best."""
