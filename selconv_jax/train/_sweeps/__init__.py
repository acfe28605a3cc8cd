"""Sweeps: every configuration with every seed, in this process or in several."""
