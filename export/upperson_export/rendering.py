"""Files from templates: HTML escapes all that it prints, Markdown prints outside names as code.

Whatever a template prints is printable (`upperson_rt.printable`).
"""

import json
import re
from pathlib import Path

import jinja2

from upperson_rt.printable import code_span, show_text

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
        finalize=show_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    environment.filters["quoted"] = _quoted
    return environment


def _quoted(text: str) -> str:
    # What `show_text` would write as \x85 is one byte to protobuf, and \u0085 a character to both.
    literal = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", literal)
