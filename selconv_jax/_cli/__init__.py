"""The ``selconv`` command."""
