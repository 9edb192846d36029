"""Passwords that two sides know: files that hold them, and proof without sending them."""

import base64
import hashlib
import os
import stat
from pathlib import Path

from upperson_rt.errors import InputError

__all__ = ["password_digest", "require_private"]


def require_private(path: Path) -> None:
    """Refuse a file of passwords that others than its owner may use, where a system tells.

    Raises:
        InputError: Others may, or it is not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(
            f"{path} holds passwords, and others may read it: keep it to its owner with  "
            f"chmod 600 {path}"
        )


def password_digest(nonce: bytes, created: str, password: str) -> str:
    """Return the digest of WS-Security's UsernameToken profile, in Base64."""
    digest = hashlib.sha1(nonce + created.encode() + password.encode(), usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode("ascii")
