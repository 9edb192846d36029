"""Passwords that two sides know: where they stand, and proof without sending them."""

import base64
import hashlib
import os
import re
import stat
from pathlib import Path

from upperson_rt.errors import InputError

__all__ = ["may_hide_login", "password_digest", "require_private"]

_NUMBER = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[^\]]*\])(:\d*)?")
"""A host that is no user's name, with its port."""


def may_hide_login(address: str) -> bool:
    """Tell whether an address may have a password that is taken for something else.

    A / ends the host: to whoever reads it, ``rtsp://admin:12/x@camera`` is of a host ``admin``, and
    a part of a password is its port, the rest its path. So it is with a / in a user's name.
    """
    rest = address.partition("://")[2]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if _NUMBER.fullmatch(place.rpartition("@")[2]):
        return False
    behind = rest[len(place) :]
    return "@" in behind if ":" in place else re.search(r":[^/?#]*@", behind) is not None


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
