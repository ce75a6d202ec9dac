"""Configuration of the documentation site (Sphinx, MyST, Furo)."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "persample"
author = "The persample authors"
copyright = "2026, The persample authors"
version = release = installed("persample")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["conf.py", "_build"]
default_role = "py:obj"  # `single quotes` in docstrings: a link where there is something to link to

html_theme = "furo"
html_title = "persample"
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Pages in percent format are notebooks as well.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"  # `make check` switches it off: there the tests have run the same code
nb_execution_cache_path = "../build/notebooks"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
