"""Time, memory and compilation of training steps, measured by ``selconv bench``."""
