"""Starts the process that decodes a photo."""

import os
import subprocess
import sys
from pathlib import Path

from upperson_photos.decoder import SETUP_FAILED
from upperson_rt.errors import BackendError

_TIMEOUT_S = 120.0


def decode_apart(kind: str, content: bytes, most_pixels: int) -> bytes:
    """Return a photo as a PNG, from a process of its own; see `decoder.main`.

    Raises:
        BackendError: The process cannot start or set itself up.
        ValueError: It fails, or takes too long.
    """
    program = str(Path(__file__).with_name("decoder.py"))
    # Isolated, it would not know the packages of PYTHONPATH and of the user.
    folders = [folder for folder in sys.path if os.path.isabs(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", program, kind, str(most_pixels), *folders],
            input=content,
            capture_output=True,
            timeout=_TIMEOUT_S,
            env={"MALLOC_ARENA_MAX": "1"},  # Of each thread's memory 64 MiB would count.
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"its decoder took more than {_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise BackendError(f"{sys.executable}: {error.strerror}") from error
    if done.returncode == SETUP_FAILED:
        raise BackendError(done.stderr.decode(errors="replace").strip())
    if done.returncode:
        raise ValueError("its decoder failed: it is damaged, or too large")
    return done.stdout
