"""How Sphinx builds this site: `python -m sphinx -W -b html docs docs/_build/html`. No network."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import pvae

project, author, copyright = "pvae", "the authors of pvae", "the authors of pvae"
version = release = pvae.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = f"pvae {version}"
html_copy_source = False
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute"]

# pages: Markdown, with the anchors that GitHub makes of headings; notebooks run while it builds
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_raise_on_error = True
nb_execution_timeout = 3600  # seconds a cell
nb_merge_streams = True
nb_output_stderr = "remove"  # such as a word on progress bars; an error stops the build

# the reference: a page for each module, made from the docstrings
default_role = "code"
autodoc_default_options = {"members": True, "ignore-module-all": True, "no-value": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

# links of README.md, CONTRIBUTING.md and examples/README.md, which are pages of the site too
PAGES = {"README": "index", "CONTRIBUTING": "contributing", "examples/README": "gallery"}


def as_on_the_site(text: str) -> str:
    """Text whose links lead to pages of the site, where they led to files of the repository."""
    text = re.sub(r"(\]\()(?:\.\./)?docs/", r"\1", text)
    files = "|".join(PAGES)
    return re.sub(rf"(\]\()(?:\.\./)?({files})\.md", lambda m: f"]({PAGES[m[2]]}.md", text)


def setup(app: Any) -> None:
    def read(*args: Any) -> None:
        args[-1][0] = as_on_the_site(args[-1][0])

    def skip(*args: Any) -> bool | None:  # a named tuple's fields, which its own text tells
        return True if str(args[3].__doc__).startswith("Alias for field") else None

    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", read)
    app.connect("include-read", read)

    # formulas as MathML, which browsers draw themselves: no script, and none from a network
    def formula(writer: Any, node: nodes.Element) -> None:
        if isinstance(node, nodes.math_block):
            drawn = tex2mathml(node.astext(), as_block=True)
            writer.body.append(f'<div style="overflow-x: auto; margin: 1em 0">{drawn}</div>')
        else:
            writer.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.config.html_math_renderer = "mathml"
