"""What the commands of both programs share: errors, signals, exit codes and logs.

    app = new_app("Find a person's pictures from a sentence.", "upperson-rt")

    @app.command(cls=Command)
    def query(..., debug: Debug = False) -> None: ...

    def main() -> None:
        run_app(app, "upperson-rt")

Exit codes are those of `upperson_rt.errors`, 1 for a defect of the program, 130 for Ctrl-C, 143
for SIGTERM.
"""

import datetime
import io
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from upperson_rt import __version__
from upperson_rt.cli.output import (
    messages_to,
    one_json_object,
    print_error,
    print_json,
    print_line,
    print_note,
)
from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.printable import escape_for_display, get_logger, one_line, safe_repr

# --- Signals
#
# Python runs signal handlers in the main thread, between two bytecodes. Native code may keep that
# thread for minutes, so another thread listens as well, and ends the process if the main thread
# does not. That is safe at any moment: results appear by renaming and rows by transactions. The
# next run removes temporary folders.

_GRACE_S = 5.0
"""Time limit for cleaning up; service managers wait ten seconds and more."""
_AGAIN_S = 0.01
"""Delay of a signal that is sent again; the callback that lost it has ended by then."""
_SAME_S = 1.0
"""Time from a first signal within which another one of its kind is the same request.

GNU timeout and others signal a process, and then the group that it is in.
"""
_LATE = f"it did not end within {_GRACE_S:g} s"
_AT_ONCE = "a second signal ended it at once"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SHOW_CURSOR = b"\n\x1b[?25h"

_left_open: list[object] = []
_reporting = threading.Lock()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a command handles as Ctrl-C."""


class _State:
    """Shared with the listening thread."""

    listening = False
    gentle = False
    """Whether the first signal has no time limit; see `ending_gently`."""
    lost = ""
    """What a second signal loses."""


class _First:
    """The first signal of those that ask a command to end."""

    def __init__(self) -> None:
        self._number = 0
        self._at_s = 0.0

    def is_followed_by(self, number: int) -> bool:
        """Return whether a signal is a second request; the first one is kept."""
        now_s = time.monotonic()
        if not self._number:
            self._number, self._at_s = number, now_s
            return False
        return number != self._number or now_s - self._at_s >= _SAME_S


def how_it_ended(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the name of the signal that ended a command, and its exit code: 128 + its number."""
    number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
    return _WORDS[number], 128 + number


def listen() -> None:
    """Handle SIGTERM as Ctrl-C, and end the process by either within a time limit."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _unraisable
    if sys.platform == "win32":  # Has no wakeup pipes.
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    _State.listening = True
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


@contextmanager
def ending_gently(lost: str = "unfinished work is lost") -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list; a second one ends the process at once.

    Another one of the same kind within a second of the first is the same request.

    Args:
        lost: What the second signal loses, for its message: ASCII, in one line.
    """
    received: list[int] = []
    first = _First()

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if first.is_followed_by(number):
            _end_now(number, f"{_AT_ONCE}; {_State.lost}")

    before = {number: signal.signal(number, note) for number in _WORDS}
    _State.lost, _State.gentle = lost, True
    try:
        yield received
    finally:
        _State.gentle = False
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and _State.listening:  # A time limit for the rest of the command.
            rest = threading.Timer(_GRACE_S, _end_now, (received[0], _LATE))
            rest.daemon = True
            rest.start()


def leave_open(*hanging: object) -> None:
    """Keep stuck objects unclosed: the process ends without waiting for their threads."""
    _left_open.append(hanging)


def end(code: int) -> NoReturn:
    """End the process.

    After a signal or `leave_open`, Python's own shutdown is skipped: it would wait for threads, may
    crash beside them, and takes seconds to free a model.
    """
    if not _left_open and code - 128 not in _WORDS:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # A closed pipe.
            stream.flush()
    _leave(code)


def _leave(code: int) -> NoReturn:
    # These are workers that load pictures; they would notice only after seconds.
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.terminate()
    os._exit(code)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one would interrupt the clean-up.
    raise _Terminated


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Send a signal again that was raised in a callback, such as that of a weak reference.

    Python only prints errors of callbacks. Exports run many of them.
    """
    if not isinstance(found.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(found)
        return
    number = signal.SIGINT
    if isinstance(found.exc_value, _Terminated):
        number = signal.SIGTERM
        signal.signal(number, _terminate)
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _watch(reading: int) -> None:
    """Read signals; end the process at a second request, or when its time is up."""
    until, ending, first = float("inf"), 0, _First()
    while True:
        left = None if until == float("inf") else max(0.0, until - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            _end_now(ending, _LATE)
        number = os.read(reading, 1)[0]
        if number not in _WORDS:
            continue
        if not _State.gentle:
            first = _First()
            if until == float("inf"):
                until, ending = time.monotonic() + _GRACE_S, number
        elif first.is_followed_by(number):
            _end_now(number, f"{_AT_ONCE}; {_State.lost}")


def _end_now(number: int, why: str) -> NoReturn:
    if _reporting.acquire(blocking=False):
        line = f"error: {_WORDS[signal.Signals(number)]}: {why}\n".encode()
        if os.isatty(2):
            line = _SHOW_CURSOR + line  # A progress display may have hidden it.
        with suppress(OSError):  # A closed pipe.
            if select.select([], [2], [], 0)[1]:  # Its reader may hang, too.
                os.write(2, line)
    else:
        time.sleep(1)  # Another thread reports, and then ends the process.
    _leave(128 + number)


def _forget() -> None:
    """Restore the default signal handling in a forked process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- Logs on stderr: warnings as text, or everything as JSON lines

_LOGGED = (
    "upperson_rt", "upperson_alerts", "upperson_camera", "upperson_log", "upperson_maintenance",
    "upperson_milvus", "upperson_tensorrt",
)  # fmt: skip
"""Packages whose log a command shows."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes time (UTC), level, logger, message and ``extra`` fields."""

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
        # In ASCII: names may hold control characters, which a terminal would obey.
        return json.dumps(line, default=str)


@contextmanager
def logging_to_stderr(as_json: bool) -> Iterator[None]:
    """Send the runtime's log to stderr: warnings as text, or everything as JSON lines.

    Notes and errors of the command are among these lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    as_text = logging.Formatter("%(levelname)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else as_text)
    with ExitStack() as stack:
        for package in _LOGGED:
            logger = get_logger(package)
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeHandler, handler)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if as_json else logging.WARNING)
        if as_json:
            stack.enter_context(messages_to(get_logger("upperson_rt.cli")))
        yield


# --- Errors


_RENAMED = {
    "--backends": ("--backend", ("parity",)),
    "--batch": ("--batch-size", ("parity", "towers")),
    "--picture": ("--image", ("doctor",)),
    "--pictures": ("--images", ("distill",)),
    "--seconds": ("--duration", ("pipeline", "synthesize-video", "towers")),
    "--start": ("--init-from", ("pretrain-small",)),
    "--where": ("--attribute", ("delete", "export", "query")),
}
"""By the name of an option in the release before: its name now, and the commands that have it."""


class Command(TyperCommand):
    """A command that reports errors in one line; with ``--debug`` also the traceback."""

    def make_context(self, info_name: Any, args: list[str], *more: Any, **extra: Any) -> Any:
        """Read the options; a value that its parser refuses is reported as other errors are."""
        args = [*self._with_new_names(args)]
        as_json, debug = "--json" in args, "--debug" in args
        try:
            self._refuse_values_of_flags(args)
            return super().make_context(info_name, args, *more, **extra)
        except UppersonError as error:
            if as_json:
                print_json({"error": error.as_json()})
            _report(str(error), debug)
            raise typer.Exit(error.exit_code) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options; ``--help`` shows no type for a flag."""
        return _without_types_of_flags(super().get_params(ctx))

    def _with_new_names(self, args: list[str]) -> Iterator[str]:
        """Yield the words of the command line, with renamed options by their names now."""
        known = {name for one in self.params for name in one.opts}
        for place, word in enumerate(args):
            old, equals, value = word.partition("=")
            new, commands = _RENAMED.get(old, ("", ()))
            if self.name in commands and new in known and "--" not in args[:place]:
                print_note(f"{old} is called {new} now; the old name goes with the next release")
                word = f"{new}{equals}{value}"
            yield word

    def _refuse_values_of_flags(self, args: list[str]) -> None:
        """Raise UsageError for ``--explain true``: the word would become an argument.

        A sentence may begin with "no": it is refused only where no other single word follows it.
        """
        options = args[: args.index("--")] if "--" in args else args
        flags = {name for one in self.params if getattr(one, "is_flag", False) for name in one.opts}
        for flag, word, after in zip(options, options[1:], [*options[2:], ""], strict=False):
            if flag not in flags or word.lower() not in ("true", "false", "yes", "no"):
                continue
            if word.lower() == "no" and after and not after.startswith("-") and " " not in after:
                continue
            has_sentence = any(one.metavar == "SENTENCE" for one in self.params)
            otherwise = "put it first if it is an argument"
            if has_sentence:
                otherwise = "put the sentence first and in quotes"
            raise UsageError(
                f"{flag} takes no value, found {safe_repr(word)} after it: leave the word out, or "
                f"{otherwise}",
                code="flag_value",
                flag=flag,
                found=word,
            )

    def invoke(self, ctx: Any) -> Any:
        """Run the command; one with ``--log-json`` keeps a log on stderr meanwhile."""
        as_json = ctx.params.get("log_json")
        with nullcontext() if as_json is None else logging_to_stderr(as_json):
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug", False)
        with one_json_object() as print_if_first:
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
                raise  # Typer ends these itself.
            except UppersonError as error:
                if ctx.params.get("as_json"):
                    print_if_first({"error": error.as_json()})
                _report(str(error), debug)
                raise typer.Exit(error.exit_code) from error
            except KeyboardInterrupt as error:
                message, code = how_it_ended(error)
                _report(message, debug)
                raise typer.Exit(code) from None  # Without a cause: `run_app` reports those.
            except OSError as error:  # Such as a full disk under stdout.
                _report(str(error), debug)
                raise typer.Exit(InputError.exit_code) from error
            except Exception as error:  # A defect; only here everything may be caught.
                advice = "" if debug else "; run the command again with --debug for the details"
                name = type(error).__name__
                _report(f"internal error: {name}: {one_line(error)}{advice}", debug)
                raise typer.Exit(1) from error


class _Group(TyperGroup):
    """A group of commands that escapes what Typer prints of wrong options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _printable_usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage():
            return super().invoke(ctx)


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    for one in params:
        if getattr(one, "is_flag", False):
            one.metavar = ""
    return params


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = escape_for_display(message)  # type: ignore[attr-defined]
        raise


def new_app(help: str, program: str | None = None) -> typer.Typer:
    """Return a group of commands; one with the name of a program has ``--version``."""
    app = typer.Typer(
        cls=_Group,
        help=help,
        no_args_is_help=True,
        add_completion=program is not None,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    if program is None:
        return app

    def print_version(wanted: bool) -> None:
        if wanted:
            print_line(f"{program} {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", "-V", callback=print_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        pass

    return app


def run_app(app: typer.Typer, name: str) -> NoReturn:
    """Run an application on the arguments of the process, and exit with its code."""
    listen()
    # A broken picture is reported once, as an error; Pillow warns of each of its tags.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no terminal.
            stream.reconfigure(errors="backslashreplace")  # For terminals without Unicode.
    code = 0
    try:
        app(prog_name=name)
    except KeyboardInterrupt as error:  # During imports, outside of a command.
        message, code = how_it_ended(error)
        _report(message, debug=False)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        cause = ended.__context__ and ended.__context__.__cause__
        if isinstance(cause, KeyboardInterrupt):  # While options were read.
            message, code = how_it_ended(cause)
            _report(message, debug=False)
    end(code)


def _report(message: str, debug: bool) -> None:
    if debug:
        for line in traceback.format_exc().rstrip("\n").split("\n"):
            print_note(line)
    print_error(message)
