"""Configuration of the documentation site (Sphinx, MyST, Furo)."""

from __future__ import annotations

import os
import runpy
from importlib.metadata import distribution
from importlib.metadata import version as installed
from pathlib import Path

import jupytext
from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.writers.html5 import HTML5Translator

project = "persample"
author = "The persample authors"
copyright = "2026, The persample authors"
version = release = installed("persample")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["conf.py", "figures.py"]
default_role = "py:obj"  # `single quotes` in docstrings: a link where there is something to link to

html_theme = "furo"
html_title = "persample"
pygments_dark_style = "github-dark"  # the default one underlines imports, as if they were links
mathematics = distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")  # nothing else is used of it
html_static_path = ["_static", str(mathematics)]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

HERE = Path(__file__).parent

# Pictures are drawn by the library itself; again where anything it is made of has changed.
figures = HERE / "figures.py"
sources = [figures, *(HERE.parent / "persample").rglob("*.py")]
drawn = list((HERE / "figures").glob("*.svg"))
if not drawn or min(map(os.path.getmtime, drawn)) < max(map(os.path.getmtime, sources)):
    runpy.run_path(str(figures))["draw"](HERE / "figures")

# The examples are pages too: turned into notebooks beside the other pages, executed, and shown with their output.
(HERE / "examples").mkdir(exist_ok=True)
for old in (HERE / "examples").glob("*.ipynb"):
    if not (HERE.parent / "examples" / f"{old.stem}.py").exists():
        old.unlink()
for script in (HERE.parent / "examples").glob("*.py"):
    page = HERE / "examples" / f"{script.stem}.ipynb"
    if not page.exists() or page.stat().st_mtime < script.stat().st_mtime:
        notebook = jupytext.read(script, fmt="py:percent")
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        jupytext.write(notebook, page)

nb_execution_mode = "cache"  # `make check` switches it off: there the tests have run the same code
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # what imports say about the machine; in the tests, a warning is an error

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

# A property's docstring begins with its shape and a colon, too, which Napoleon would take for a type.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))

html_math_renderer = "mathml"  # browsers draw it by themselves: no script, no network
latex = LatexToMathML()


def formula(html: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    display = isinstance(node, nodes.math_block)
    drawn = latex.convert_with_local_state(node.astext(), displaystyle=display)  # raises where it can't
    html.body.append(f'<div class="math">{drawn}</div>' if display else drawn)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(formula, None), block_renderers=(formula, None))
