"""Writing checkpoints so that nothing is lost, and reading back exactly what was written."""
