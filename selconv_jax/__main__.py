"""``python -m selconv_jax``: the same as ``selconv``."""

import sys

from selconv_jax._cli.main import main

sys.exit(main())
