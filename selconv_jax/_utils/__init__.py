"""Helpers for the whole package: argument checks, the console, lazy imports, versions."""
