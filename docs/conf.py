"""Settings of the documentation generator (`make site`).

The source folder is the repository, so that pages and their relative links are the same here and on a code host.
"""

from __future__ import annotations

import tomllib
from inspect import isclass, isroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pygments.lexers.special import TextLexer

if TYPE_CHECKING:  # the tests read CONTENTS without the generator
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent

CONTENTS = {  # title and file of every page, in the order in which people ask
    "Questions": {
        "Start": "README",
        "Your own labels": "docs/own-labels",
        "The map": "docs/claims",
        "Gallery": "docs/gallery",
        "Problems from your disk": "docs/data",
        "Your own problems": "docs/own-problems",
        "Your own model": "docs/own-model",
        "Supported models": "docs/support",
        "A large model": "docs/wan22",
        "Scale": "docs/scale",
        "Early answers and ensembles": "docs/uses",
        "Decodable or used": "docs/causal",
        "Behaviours": "docs/behaviour",
        "Errors by symptom": "docs/errors",
    },
    "Reference": {
        "Architecture": "docs/architecture",
        "Tasks": "docs/tasks",
        "Guarantees": "docs/contracts",
        "Simulations": "docs/validity",
        "Results": "docs/results",
        "Benchmarks": "docs/benchmarks",
        "The mini model": "cosprobe/weights/mini/README",
        "API": "docs/api/index",
        "Contributing": "CONTRIBUTING",
        "Changelog": "CHANGELOG",
    },
}
LONGEST = 90  # longest value of a constant that the API reference prints

project, author = "cosprobe", "The cosprobe authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
root_doc = "README"
include_patterns = [f"{page}.md" for pages in CONTENTS.values() for page in pages.values()] + ["docs/api/*.md"]
exclude_patterns = [".*", "runs", "site", "build", "dist"]
html_theme = "furo"
html_title = f"cosprobe {release}"
myst_heading_anchors = 4
default_role = "code"
autodoc_member_order = "bysource"
maximum_signature_line_length = 120


def setup(app: Sphinx) -> None:
    app.add_lexer("mermaid", TextLexer)  # as text: the site loads no scripts from elsewhere
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", add_constants)
    app.connect("autodoc-process-signature", mend_defaults)


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds the tables of contents to the first page. A code host would show them in the README as code."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            lines = "\n".join(f"{title} <{'self' if file == page else '/' + file}>" for title, file in pages.items())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def add_constants(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Lists the constants of a package: autodoc leaves out what has no docstring."""
    names = getattr(item, "__all__", ()) if what == "module" else ()
    members = {each: getattr(item, each) for each in names}
    values = {each: value for each, value in members.items() if not (isclass(value) or isroutine(value))}
    if values:
        lines += ["Constants:", ""]
        lines += [
            f"* `{each}` = `{value!r}`" if len(repr(value)) <= LONGEST else f"* `{each}`"
            for each, value in values.items()
        ]


def mend_defaults(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str | None, result: str | None
) -> Any:
    """Writes the defaults of dataclass fields that a function makes as `...`; `<factory>` is not Python."""
    return signature and signature.replace("<factory>", "..."), result
