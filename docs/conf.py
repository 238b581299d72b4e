"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from qopt import __version__  # noqa: E402

project = "qopt"
author = "the qopt authors"
copyright = "the qopt authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "generated"]
exclude_patterns = ["pictures/*.py"]
html_theme = "furo"
html_title = f"qopt {release}"

myst_heading_anchors = 3
smartquotes = False  # two dashes stay an option

# a word in single backticks is a name where there is one of it, else code
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),
    # of other libraries, whose index is not at hand without a network
    (r"py:.*", r"(torch|numpy|np|onnx|onnx_ir|ir|pydantic|pathlib|collections\.abc)\..*|Tensor|NDArray|Path"),
    # rows of reports, which the JSON Schemas describe; pydantic writes their names without a module
    (r"py:class", r"[A-Z]\w+"),
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
