"""The documentation site: `make docs` builds it into `build/docs`.

Sphinx with MyST and the book theme, as JAX, Flax and optax have it. Pages are Markdown
that also reads well where the repository is browsed. Equations become MathML here, so
that a page needs no script from elsewhere.
"""

import re
from importlib import metadata
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "lorapre_jax"
version = release = metadata.version("lorapre-jax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True  # A name that leads nowhere is a warning, and a warning is an error.

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # The text says what each argument may be.
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 68
add_module_names = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"lorapre_jax {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "footer_content_items": [],
}

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = {
    "examples/llama/README.md": "llama.md",
    "benchmarks/results/quality/table_a.md": "results/all_a.md",
    "benchmarks/results/quality/table_b.md": "results/all_b.md",
    "benchmarks/results/archive/table_b_dense_4e-3.md": "results/all_b_dense_4e-3.md",
}
"""Pages from outside this folder, and what includes them here."""

_PAGES = "".join(page.read_text() for page in Path(__file__).parent.glob("api/*.md"))
ENTRIES = {
    path.rpartition(".")[2]: path
    for path in re.findall(r"^\.\. auto\w+:: ([\w.]+)", _PAGES, re.MULTILINE)
}
"""What the reference documents, by its name: public names and classes of results."""

_LINK = re.compile(r"\]\((\.\./[^)#\s]*\.md)")
# Roles and links to addresses, which stay as they are; or code in single backticks.
_CODE = re.compile(r":\w+:`[^`]+`|`[^`]+<https[^`]+`_|(?<!`)`([^`]+)`(?!`)(?=(\w?))")
_RAISES = re.compile(r"^( +)(What(?:ever)? .*raises?\.)$", re.MULTILINE)


def _to_included(app, docname, source) -> None:
    """Links to Markdown outside this folder, which Sphinx does not know as pages."""

    def link(found: re.Match[str]) -> str:
        path = (Path(app.srcdir, docname).parent / found[1]).resolve()
        if path.is_relative_to(app.srcdir):
            return found[0]
        page = INCLUDED.get(str(path.relative_to(ROOT)))
        return f"](/{page}" if page else f"](path:{found[1]}"

    source[0] = _LINK.sub(link, source[0])


def _as_rest(app, what, name, obj, options, lines) -> None:
    """Single backticks are code here, and links if they name an entry."""
    del app, what, name, obj, options

    def code(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        text = " ".join(found[1].split())
        known = text.partition("(")[0].removeprefix("lorapre_jax.")
        known = known.removeprefix("lp.")
        end = "\\ " if found[2] else ""  # reST wants no letter right behind code.
        if known in ENTRIES:
            return f":py:obj:`{text} <{ENTRIES[known]}>`{end}"
        return f"``{text}``{end}"

    text = _RAISES.sub(r"\1Exception: \2", "\n".join(lines))
    lines[:] = _CODE.sub(code, text).split("\n")


def _math(writer, node, is_block: bool) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("source-read", _to_included)
    app.connect("autodoc-process-docstring", _as_rest, priority=100)  # Before Napoleon.
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _math(writer, node, False), None),
        block_renderers=(lambda writer, node: _math(writer, node, True), None),
    )
