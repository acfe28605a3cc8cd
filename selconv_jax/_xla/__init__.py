"""Batch norm, convolution and barriers in the formulation that each platform's compiler handles best."""
