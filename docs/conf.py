"""How Sphinx builds the guide; `make docs` turns every warning into an error."""

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = _project["name"]
author = "The rootflow authors"
copyright = f"2026, {author}"
version = release = _project["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
autodoc_typehints = "none"  # shapes and types are in the words of the docstrings
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"{project} {version}"
