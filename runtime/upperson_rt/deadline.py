"""Connections to strangers that end when their time is up, whatever still comes in.

The time limit of a socket counts from one byte to the next: who sends one now and then could go on
for ever.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["LateError", "ending"]


class LateError(TimeoutError):
    """The time was up."""


@contextmanager
def ending(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a connection when its time is up; whoever reads from it then gets no more.

    Args:
        connection: It is open; reading may go on after it was closed, as `http.client` does.
        seconds: From now.

    Raises:
        LateError: The time was up.
    """
    late = threading.Event()

    def shut() -> None:
        late.set()
        with suppress(OSError):  # It has ended just now.
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise LateError(f"it does not answer within {seconds:g} s")
