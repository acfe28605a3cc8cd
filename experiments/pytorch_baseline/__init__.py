"""Networks in PyTorch that ``selconv bench --torch`` compares with; they are no part of the package."""
