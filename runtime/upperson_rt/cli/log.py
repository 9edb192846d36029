"""The log of a command on stderr: warnings as text, or all that is told there as JSON lines."""

import datetime
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from upperson_rt.cli.output import messages_to
from upperson_rt.printable import get_logger

__all__ = ["JsonFormatter", "logging_to_stderr"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes time (UTC), level, logger and message, and whatever was passed as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # In ASCII: what a name holds must not reach a terminal as it is.
        return json.dumps(line, default=str)


@contextmanager
def logging_to_stderr(as_json: bool) -> Iterator[None]:
    """Send the runtime's log to stderr.

    Args:
        as_json: Everything as JSON lines, with what a command says of itself and why it fails;
            else warnings as text.
    """
    logger = get_logger("upperson_rt")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if as_json else logging.Formatter("%(levelname)s: %(message)s")
    )
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if as_json else logging.WARNING)
    with ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        stack.callback(logger.removeHandler, handler)
        if as_json:
            stack.enter_context(messages_to(get_logger("upperson_rt.cli")))
        yield
