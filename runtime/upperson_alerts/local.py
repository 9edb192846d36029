"""Deliveries on this machine: a command, and standard output."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from upperson_alerts.delivery import Delivery, DeliveryOptions, Parcel, Refusal
from upperson_rt.cli.output import print_line
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import safe_repr, shortened


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
        for parcel in parcels:
            yield parcel.id, self._run(parcel)

    def _run(self, parcel: Parcel) -> Refusal | None:
        try:
            done = subprocess.run(
                self._command,
                input=parcel.body,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=self._timeout_s,
                env={**os.environ, "UPPERSON_MESSAGE_ID": parcel.id},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Refusal(f"it did not end within {self._timeout_s:g} s")
        except OSError as error:
            return Refusal(f"it cannot be run: {error.strerror}")
        if done.returncode == 0:
            return None
        last_line = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return Refusal(shortened(f"exit code {done.returncode} {last_line}".strip()))


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
