"""Keys as openssl writes them."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def write_keys(folder: Path, name: str, key: Any, password: bytes | None = None) -> None:
    """Write NAME.pem and NAME.pub, the first one locked if there is a password."""
    lock = NoEncryption() if password is None else BestAvailableEncryption(password)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
