"""How commands end, and what they log: errors become one line and an exit code, for both programs.

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
from upperson_rt.cli.output import messages_to, print_error, print_json, print_line, print_note
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.printable import get_logger, one_line, printable

__all__ = [
    "Command",
    "JsonFormatter",
    "end",
    "ending_gently",
    "how_it_ended",
    "leave_open",
    "listen",
    "logging_to_stderr",
    "new_app",
    "run_app",
]

# --- How a process ends: on a first and a second signal, and beside threads that never return
#
# Python runs the handlers of signals in the main thread, between two steps of its own. A step of
# training, an export or a search may spend minutes in native code until then, so a thread listens
# as well, and ends the process where the main thread does not. Results appear by renaming and rows
# by transactions: ending at any moment leaves no half of either. Temporary folders go the next
# time.

_GRACE_S = 5.0
"""How long a command may clean up; service managers wait ten seconds and more."""
_AGAIN_S = 0.01
"""After which a signal that was lost is sent again; the callback that lost it is over then."""
_LATE = f"it did not end by itself within {_GRACE_S:g} s"
_AT_ONCE = "a second signal ended it at once, and what was not finished is lost"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SHOW_CURSOR = b"\n\x1b[?25h"

_left_open: list[object] = []
_saying = threading.Lock()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: a command cleans up after it as after Ctrl-C."""


class _State:
    """What the listening thread has to know."""

    def __init__(self) -> None:
        self.listening = False
        self.gentle = False
        """Whether the first signal is a request that takes its time."""


_state = _State()


def how_it_ended(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the word for what ended a command, and its exit code: 128 + the signal's number."""
    number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
    return _WORDS[number], 128 + number


def listen() -> None:
    """Have SIGTERM end this process as Ctrl-C does, and both in time, whatever it is doing."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _unraisable
    if sys.platform == "win32":  # Pipes cannot be told of signals there.
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    _state.listening = True
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


@contextmanager
def ending_gently() -> Iterator[list[int]]:
    """Give a list that the first SIGINT or SIGTERM is put into; the second ends the process.

    That happens at once, also while the main thread is in native code.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            _end_now(number, _AT_ONCE)

    before = {number: signal.signal(number, note) for number in _WORDS}
    _state.gentle = True
    try:
        yield received
    finally:
        _state.gentle = False
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and _state.listening:  # What is left to do has its time, too.
            rest = threading.Timer(_GRACE_S, _end_now, (received[0], _LATE))
            rest.daemon = True
            rest.start()


def leave_open(*hanging: object) -> None:
    """Have the process end without closing what hangs, and without waiting for its threads."""
    _left_open.append(hanging)


def end(code: int) -> NoReturn:
    """End the process.

    After a signal, and beside what was left open, that happens without Python's own end: it would
    wait for threads, may crash beside them, and takes seconds to free a model.
    """
    if not _left_open and code - 128 not in _WORDS:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # Who reads it may have gone.
            stream.flush()
    _leave(code)


def _leave(code: int) -> NoReturn:
    # Processes that load pictures would notice within seconds; nobody else's are among them.
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.terminate()
    os._exit(code)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one would cut the cleaning up short.
    raise _Terminated


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Send a signal again that came in a callback which no error leaves, as of a weak reference.

    It would be lost otherwise, but for a traceback. Exports run many such callbacks.
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
    """Count signals as they come in; end the process when its time is up."""
    until, ending, gentle = float("inf"), 0, 0
    while True:
        left = None if until == float("inf") else max(0.0, until - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            _end_now(ending, _LATE)
        number = os.read(reading, 1)[0]
        if number not in _WORDS:
            continue
        gentle = gentle + 1 if _state.gentle else 0
        if gentle > 1:
            _end_now(number, _AT_ONCE)
        if not gentle and until == float("inf"):
            until, ending = time.monotonic() + _GRACE_S, number


def _end_now(number: int, why: str) -> NoReturn:
    if _saying.acquire(blocking=False):
        _say(number, why)
    else:
        time.sleep(1)  # Another thread says it, and ends the process then.
    _leave(128 + number)


def _say(number: int, why: str) -> None:
    said = f"error: {_WORDS[signal.Signals(number)]}: {why}\n".encode()
    if os.isatty(2):
        said = _SHOW_CURSOR + said  # A progress display may have hidden it.
    with suppress(OSError):  # Who reads it may have gone,
        if select.select([], [2], [], 0)[1]:  # or hang, too.
            os.write(2, said)


def _forget() -> None:
    """Let a forked process, such as one that loads pictures, end by signals as usual."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- The log of a command on stderr: warnings as text, or all that is told there as JSON lines

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


# --- How commands end: errors become one line and an exit code. Shared by both command lines


class Command(TyperCommand):
    """A command that reports errors in one line; with its option ``--debug`` also the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; one with ``--log-json`` keeps a log on stderr meanwhile."""
        as_json = ctx.params.get("log_json")
        with nullcontext() if as_json is None else logging_to_stderr(as_json):
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # Typer ends these itself.
        except UppersonError as error:
            if ctx.params.get("as_json"):
                print_json({"error": error.as_json()})
            _report(str(error), debug=ctx.params.get("debug", False))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            message, code = how_it_ended(error)
            _report(message, debug=ctx.params.get("debug", False))
            raise typer.Exit(code) from None  # `run_app` tells it from what nobody has reported.
        except OSError as error:  # Such as a full disk under stdout.
            _report(str(error), debug=ctx.params.get("debug", False))
            raise typer.Exit(InputError.exit_code) from error
        except Exception as error:  # A defect; this is the one place that may catch everything.
            debug = ctx.params.get("debug", False)
            advice = "" if debug else "; run the command again with --debug for the details"
            name = type(error).__name__
            _report(f"internal error: {name}: {one_line(error)}{advice}", debug=debug)
            raise typer.Exit(1) from error


class _Group(TyperGroup):
    """A group of commands; what Typer says of wrong options is printable, too."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the options of the group."""
        with _printable_usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of a command, and run it."""
        with _printable_usage():
            return super().invoke(ctx)


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = printable(message)  # type: ignore[attr-defined]
        raise


def new_app(help: str, program: str | None = None) -> typer.Typer:
    """Return a group of commands in the house style; a program, which is named, has --version."""
    app = typer.Typer(
        cls=_Group,
        help=help,
        no_args_is_help=True,
        add_completion=False,
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
                "--version", callback=print_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        pass

    return app


def run_app(app: typer.Typer, name: str) -> NoReturn:
    """Run an application on the arguments of the process, and exit with its code."""
    listen()
    # What is wrong with a picture is told once, as an error, not by Pillow for each of its tags.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no terminal.
            stream.reconfigure(errors="backslashreplace")  # Not every terminal knows Unicode.
    code = 0
    try:
        app(prog_name=name)
    except KeyboardInterrupt as error:  # Outside of a command: while it is being imported.
        message, code = how_it_ended(error)
        _report(message, debug=False)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        cause = ended.__context__ and ended.__context__.__cause__
        if isinstance(cause, KeyboardInterrupt):  # While options were read: all is Ctrl-C to Typer.
            message, code = how_it_ended(cause)
            _report(message, debug=False)
    end(code)


def _report(message: str, debug: bool) -> None:
    if debug:
        for line in traceback.format_exc().rstrip("\n").split("\n"):
            print_note(line)
    print_error(message)
