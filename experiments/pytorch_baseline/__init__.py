"""PyTorch networks for comparison in ``selconv bench --torch``; not part of the package."""
