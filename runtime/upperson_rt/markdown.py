"""Names from outside in Markdown: model cards and READMEs are passed on, and names are anything."""

import re

__all__ = ["code_span"]


def code_span(text: str) -> str:
    """Return text as a Markdown code span on one line; nothing in it is Markdown or HTML."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"
