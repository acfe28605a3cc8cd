"""``python -m selconv_jax``: the same as ``selconv``."""

import sys

from selconv_jax.cli.main import main

sys.exit(main())
