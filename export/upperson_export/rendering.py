"""Files from templates: HTML escapes all that it prints, Markdown prints outside names as code."""

import json
from pathlib import Path

import jinja2

from upperson_rt.markdown import code_span

_SHARED = Path(__file__).parent / "templates"


def templates(folder: Path = _SHARED) -> jinja2.Environment:
    """Return the templates of a folder; a name that is missing is an error.

    ``*.html.j2`` escape whatever they print, and may extend ``page.html.j2``, the common look.
    Other files print names from outside through the filters ``code``, a code span of Markdown, or
    ``quoted``, a string literal that Python and protobuf's text format both read back unchanged.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment
