"""Sphinx settings of the documentation site; CONTRIBUTING.md has the command that builds it."""

import sys
from pathlib import Path

import selconv_jax

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "selconv-jax"
author = "the selconv-jax developers"
version = release = selconv_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "configuration_keys",
    "notebook",
    "public_names",
]
exclude_patterns = ["build"]
suppress_warnings = ["myst.header"]  # the tables of experiments/README.md start at the third level

html_theme = "furo"
html_title = "selconv-jax"
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"special-members": "__call__", "exclude-members": "dtype, param_dtype, setup"}
autosummary_generate = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# As a section of its own, "Attributes" is a list; types are in the signature.
napoleon_custom_sections = [("Attributes", "params_style")]
