"""A time-stamp authority (RFC 3161) on 127.0.0.1; openssl makes its stamps."""

import datetime
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tests.helpers.signing_keys import write_keys
from tests.helpers.small_servers import HttpHandler, handled

SETTINGS = """[tsa]
default_tsa = stamps
[stamps]
serial = serial
signer_digest = sha256
default_policy = 1.2.3.4
digests = sha256, sha512
ess_cert_id_alg = sha256
"""


def _certificate(folder: Path, name: str, issuer: str, days: int) -> None:
    """Write NAME.cert.pem and its key; it is valid for so many days since yesterday."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_keys(folder, name, key)
    signer = key
    if name != issuer:
        signer = load_pem_private_key((folder / f"{issuer}.pem").read_bytes(), None)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, issuer)]
    day = datetime.timedelta(days=1)
    start = datetime.datetime.now(datetime.timezone.utc) - day
    builder = x509.CertificateBuilder(names[1], names[0], key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(start).not_valid_after(start + days * day)
    builder = builder.add_extension(x509.BasicConstraints(name == issuer, None), True)
    if name != issuer:
        use = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.TIME_STAMPING])
        builder = builder.add_extension(use, True)
    made = builder.sign(signer, hashes.SHA256())
    (folder / f"{name}.cert.pem").write_bytes(made.public_bytes(Encoding.PEM))


def make_authority(folder: Path) -> Path:
    """Make an authority, with the certificates root.cert.pem and tsa.cert.pem, in a folder."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    folder.mkdir(parents=True, exist_ok=True)
    _certificate(folder, "root", "root", 10)
    _certificate(folder, "tsa", "root", 5)
    (folder / "ts.cnf").write_text(SETTINGS)
    (folder / "serial").write_text("01")
    return folder


def stamp(folder: Path, request: bytes) -> bytes:
    (folder / "request").write_bytes(request)
    command = (
        "openssl ts -reply -config ts.cnf -queryfile request -signer tsa.cert.pem -inkey tsa.pem"
    )
    return subprocess.run(command.split(), cwd=folder, capture_output=True, check=True).stdout


@contextmanager
def time_stamping(folder: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Serve an authority; give its address, and the requests that it gets."""
    requests: list[bytes] = []

    class Handler(HttpHandler):
        def do_POST(self) -> None:  # noqa: N802
            requests.append(self.body())
            kind = ("Content-Type", "application/timestamp-reply")
            self.answer(200, stamp(folder, requests[-1]), kind)

    with handled(Handler) as port:
        yield f"http://127.0.0.1:{port}/tsr", requests
