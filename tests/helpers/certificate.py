"""A certificate that signs itself, by default for 127.0.0.1."""

import datetime
import ipaddress
from pathlib import Path

import pytest


def written(
    folder: Path,
    bits: int | None = 2048,
    password: bytes | None = None,
    name: str = "key",
    host: str = "127.0.0.1",
    days: int = 1,
) -> tuple[Path, Path]:
    """Return the files of a new certificate and its key, RSA of so many bits or P-256 for None."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = (
        ec.generate_private_key(ec.SECP256R1())
        if bits is None
        else rsa.generate_private_key(65537, bits)
    )
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "console")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), serial_number=1)
    builder = builder.not_valid_before(now - 9 * day).not_valid_after(now + days * day)
    builder = builder.add_extension(names, False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    certificate = builder.sign(key, hashes.SHA256())
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    hidden = serialization.NoEncryption()
    if password is not None:
        hidden = serialization.BestAvailableEncryption(password)
    files = folder / f"{name}.cert.pem", folder / f"{name}.pem"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, kind, hidden))
    return files
