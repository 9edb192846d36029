r"""Text from outside, made safe to show: on a terminal, in a log, on a sheet, in Markdown and HTML.

Names of cameras, tracks, keys, files and models may hold anything: commands to a terminal, marks
that turn the order of reading round, line ends, bytes that are no text. They are shown, such as
``\x1b``, and not obeyed. Commands print through `upperson_rt.cli.output`, modules log through
`get_logger`, and templates take `show_text`, so that no caller has to think of it.
"""

import datetime
import logging
import re
import unicodedata

from upperson_rt.errors import UppersonError

_ALSO_SHOWN = frozenset("\u00a0\u202f\u3000\u200c\u200d")
"""Spaces and joiners that French, Japanese, Persian or an emoji need; they move nothing."""

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0\U0001d159")
"""Fillers, a Braille cell without dots and a note without a head: letters and symbols by kind."""

_SHOWN_CHARACTERS = 60
_LONG_NAME = 100
_LONG_ERROR = 1000


def escape_for_display(text: str) -> str:
    r"""Return text on one line, with an escape of Python for all that is not there to be seen.

    That is what Unicode calls control, format, surrogate and unassigned characters, and separators
    of lines and paragraphs: ``\x1b``, ``\n``, ``\u202e``, ``\udcff``. What is printable already
    comes back as it is, so doing it twice changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or one in _ALSO_SHOWN
        else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def visible_text(text: str) -> str:
    """Return a reason, name or note without spaces around it; empty if nothing of it is seen.

    It needs a letter, digit, symbol or mark of punctuation: spaces, joiners and the like are none.
    """
    is_seen = any(unicodedata.category(one)[0] in "LNPS" and one not in _BLANK for one in text)
    return text.strip() if is_seen else ""


def one_line(message: object) -> str:
    """Return what a library says, often over several lines, as one; names in ours stay exact."""
    return " ".join(str(message).split())


def error_text(error: BaseException) -> str:
    """Return ``ValueError: what it says`` on one line, of an error of any code.

    Errors of ours need no name. What others say may be a whole picture; the beginning will do.
    """
    try:
        name = "" if isinstance(error, UppersonError) else f"{type(error).__name__}: "
        text = f"{name}{one_line(error)}"
    except BaseException:  # Its own __str__ fails, or wants to end the program.
        return f"{type(error).__name__}, which cannot be shown"
    return text if len(text) <= _LONG_ERROR else f"{text[: _LONG_ERROR - 3]}..."


def safe_repr(value: object) -> str:
    """Return what a value looks like, in a few words, for a message that refuses it."""
    try:
        text = escape_for_display(one_line(repr(value)))
    except Exception:  # Such as an integer with more digits than Python writes.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def shortened(name: str) -> str:
    """Return a name of a file from elsewhere as it is, or in a few words if it is a long one."""
    return name if len(name) <= _LONG_NAME else safe_repr(name)


def show_text(value: object) -> object:
    """Make a value printable if it is plain text: the ``finalize`` of templates.

    Parts that a template has made itself are of another type, and have their line ends.
    """
    return escape_for_display(value) if type(value) is str else value


def show_percent(probability: float) -> str:
    """Return a probability, 0 to 1, in percent; what is nearly 0 or 1 is not rounded to it."""
    if probability < 0.01:
        return "< 1 %"
    return "> 99 %" if probability > 0.99 else f"{100 * probability:.0f} %"


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 picture``, ``2 pictures``; ``many`` if no s does it."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def code_span(text: str) -> str:
    """Return text as a Markdown code span on one line; nothing in it is Markdown or HTML."""
    text = escape_for_display(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def local_time(unix_seconds: float | None) -> str:
    """Return ``2026-11-24 14:00:00`` in local time; seconds, if no calendar reaches that time.

    It is empty for None.
    """
    if unix_seconds is None:
        return ""
    try:
        moment = datetime.datetime.fromtimestamp(unix_seconds)
    except (OverflowError, OSError, ValueError):
        return f"{unix_seconds:g} s"
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; its messages are printable for every handler."""
    found = logging.getLogger(name)
    found.addFilter(_make_printable)  # Once, however often it is called.
    return found


def _make_printable(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception as error:  # Handlers catch what a value's __str__ raises; a filter must, too.
        message = f"{safe_repr(record.msg)} of values that cannot be shown: {type(error).__name__}"
    record.msg, record.args = escape_for_display(message), None
    return True
