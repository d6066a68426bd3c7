"""How the documentation is built: `make docs`."""

project = "rlhf-gym"
author = "the rlhf-gym developers"
copyright = "2026, the rlhf-gym developers"
extensions = ["myst_parser", "sphinx.ext.doctest", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "rlhf-gym"
exclude_patterns = ["_build"]
doctest_global_setup = """
import warnings
warnings.filterwarnings("ignore")
"""
