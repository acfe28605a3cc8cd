"""Helpers of all rings: argument checks, the console, lazy imports, versions."""
