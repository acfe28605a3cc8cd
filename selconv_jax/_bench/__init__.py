"""How long steps take, what they need, and how they compare: behind ``selconv bench``."""
