"""Deliveries on this machine: a command, and standard output."""

import os
import select
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from upperson_alerts.delivery import Delivery, DeliveryOptions, Parcel, Refusal, one_by_one
from upperson_rt.cli.output import print_line
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import one_line, safe_repr, shortened

_PIPE_BYTES = 64 << 10
_KEPT_BYTES = 4096


class CommandDelivery(Delivery):
    """Runs a command for each message, which is on its stdin; exit code 0 accepts it.

    No shell reads the command. Its id is in ``$UPPERSON_MESSAGE_ID``.
    """

    def __init__(self, address: str, options: DeliveryOptions) -> None:
        """Read ``command:PROGRAM ARGUMENT...``."""
        try:
            self._command = shlex.split(address.partition(":")[2])
        except ValueError as error:
            raise UsageError(
                f"the command is malformed: {error}", code="command_malformed"
            ) from error
        program = self._command[0] if self._command else ""
        if shutil.which(program) is None:
            raise InputError(
                f"there is no program {safe_repr(program)}: expected  command:PROGRAM ARGUMENT...",
                code="command_not_found",
                found=program,
            )
        self._timeout_s = options.timeout_s

    def deliver(self, parcels: Sequence[Parcel]) -> Iterator[tuple[str, Refusal | None]]:
        """Run the command for one message after the other."""
        yield from one_by_one(parcels, self._run)

    def _run(self, parcel: Parcel) -> Refusal | None:
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "UPPERSON_MESSAGE_ID": parcel.id},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return Refusal(f"it cannot be run: {one_line(error)}")
        assert process.stderr is not None
        errors = _Tail(process.stderr)
        # What the command leaves running may hold stderr: its end is not waited for.
        process.stderr = None
        try:
            process.communicate(parcel.body, self._timeout_s)
        except subprocess.TimeoutExpired:
            return Refusal(f"it did not end within {self._timeout_s:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # Its children, too.
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
            text = errors.end()
        if process.returncode == 0:
            return None
        last_line = text.strip().rpartition("\n")[2]
        return Refusal(shortened(f"exit code {process.returncode} {last_line}".strip()))


class _Tail:
    """Reads a pipe so that its writer never waits; keeps the end of what was written."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._end = pipe, b""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        left = _PIPE_BYTES  # Once its writer has ended, no more than a pipe holds is its own.
        with self._pipe:
            while left > 0:
                was_over = self._is_over.is_set()
                if not select.select([self._pipe], [], [], 0 if was_over else 0.02)[0]:
                    if was_over:
                        return
                    continue
                chunk = os.read(self._pipe.fileno(), _PIPE_BYTES)
                if not chunk:
                    return
                self._end = (self._end + chunk)[-_KEPT_BYTES:]
                left -= len(chunk) if was_over else 0

    def end(self) -> str:
        """Return the end of what was written so far."""
        self._is_over.set()
        self._thread.join()
        return self._end.decode("utf-8", "replace")


class StdoutDelivery(Delivery):
    """Prints each message as a line of JSON."""

    def __init__(self, address: str, options: DeliveryOptions) -> None:
        """Take ``stdout``."""
        if address != "stdout":
            raise UsageError(
                f"expected  stdout  alone, found {safe_repr(address)}", code="address_malformed"
            )

    def deliver(self, parcels: Sequence[Parcel]) -> Iterator[tuple[str, Refusal | None]]:
        """Print messages."""
        for parcel in parcels:
            print_line(parcel.body.decode())
            yield parcel.id, None
