"""Time stamps by RFC 3161: a time-stamp authority signs a hash and the time at which it got it.

A stamp proves that content existed by then. It holds the hash, and no content. Only
`TimeStampServer` uses a network; the package rfc3161-client is imported when it is needed.
"""

import hashlib
import http.client
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from upperson_network.remote import http_target, http_within, is_http_address
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError, missing_extra
from upperson_rt.files import read_bounded
from upperson_rt.printable import escape_for_display, one_line, safe_repr

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

MOST_STAMP_BYTES = 256 << 10
"""A stamp with its certificates has some 6 kB."""
_MOST_CERTIFICATE_BYTES = 1 << 20
_LONGEST_S = 5.0
"""For an answer. An export waits so long."""
_SHA256 = "2.16.840.1.101.3.4.2.1"


@dataclass(frozen=True, kw_only=True)
class TimeStamp:
    """What a stamp says."""

    time: str
    """ISO 8601, UTC."""
    authority: str
    """Subject of the certificate that signed it."""


def require_timestamps() -> Any:
    """Return the package rfc3161_client; raises BackendError if it is missing."""
    try:
        import rfc3161_client
    except ImportError as error:
        raise missing_extra("rfc3161-client", "timestamp", "a time stamp") from error
    return rfc3161_client


def read_certificates(path: Path) -> "list[Certificate]":
    """Read the certificates of a time-stamp authority, PEM: its root, and others of its chain.

    Raises InputError if there is none.
    """
    require_timestamps()
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(read_bounded(path, _MOST_CERTIFICATE_BYTES))
    except ValueError as error:
        raise InputError(
            f"{path} has no certificates that can be used: expected those of a time-stamp "
            f"authority in PEM, its root among them ({one_line(error)})",
            code="certificate_unreadable",
            path=path,
        ) from error


def read_stamp(
    answer: bytes,
    content: bytes,
    certificates: "Sequence[Certificate]" = (),
    nonce: int | None = None,
) -> TimeStamp:
    """Verify a stamp, and read it.

    Args:
        answer: What the authority sent, in DER.
        content: What was stamped.
        certificates: Those that are trusted. Without any, neither the signature nor who signed is
            verified. They must have been valid at the time of the stamp; a revocation is not seen.
        nonce: If given, that of the request.

    Raises:
        IntegrityError: It is no stamp, none of this content, or of no trusted authority.
    """
    client = require_timestamps()
    try:
        stamp = client.decode_timestamp_response(answer)
        if stamp.status != client.PKIStatus.GRANTED:
            refused = "; ".join(stamp.status_string) or f"status {stamp.status}"
            raise ValueError(f"the authority refused: {escape_for_display(refused)}")
        info = stamp.tst_info
        found = info.message_imprint.hash_algorithm.dotted_string, info.message_imprint.message
        if found != (_SHA256, hashlib.sha256(content).digest()):
            raise ValueError("it is one of another content")
        if nonce is not None and info.nonce != nonce:
            raise ValueError("it answers another request")
        if certificates:
            chain = list(certificates)
            roots = [one for one in chain if one.issuer == one.subject] or chain
            client.VerifierBuilder(roots=roots, intermediates=chain).build().verify(stamp, found[1])
        time = info.gen_time.astimezone(timezone.utc).isoformat(timespec="seconds")
        return TimeStamp(time=time, authority=escape_for_display(_authority(stamp)))
    except Exception as error:  # Malformed certificates raise errors without a common base.
        what = one_line(error).partition(": ErrorStack")[0] or type(error).__name__
        raise _not_valid(what) from error


@dataclass(frozen=True)
class TimeStampServer:
    """An authority; UsageError for an address that cannot be used."""

    url: str
    certificates: "Sequence[Certificate]" = ()
    """Those that verify its stamps at once; without any, only hash and nonce are compared."""
    is_required: bool = False
    """Whether nothing is exported without a stamp."""

    def __post_init__(self) -> None:
        require_timestamps()
        if not is_http_address(self.url):
            raise UsageError(
                "expected the address of a time-stamp authority without a login, such as "
                f"http://tsa.example/tsr, found {safe_repr(self.url)}",
                code="address_malformed",
            )

    @property
    def host(self) -> str:
        """The host of the address; the rest may be a secret."""
        return urlsplit(self.url).hostname or ""

    def stamp(self, content: bytes) -> tuple[bytes, TimeStamp]:
        """Return a stamp of content in DER, and what it says, within five seconds.

        Only a hash of the content is sent; no redirect is followed. Raises BackendError
        (``timestamp_unavailable``) if the authority sends no usable stamp in time.
        """
        client = require_timestamps()
        builder = client.TimestampRequestBuilder(hash_algorithm=client.HashAlgorithm.SHA256)
        request = builder.data(content).build()
        headers = {"Content-Type": "application/timestamp-query", "User-Agent": "upperson-rt"}
        try:
            with http_within(_LONGEST_S, self.url) as connection:
                connection.request("POST", http_target(self.url), request.as_bytes(), headers)
                with connection.getresponse() as answer:
                    if answer.status != http.client.OK:
                        raise ValueError(f"it answers {answer.status}")
                    stamp = answer.read(MOST_STAMP_BYTES)  # A longer one is no stamp then.
            return stamp, read_stamp(stamp, content, self.certificates, request.nonce)
        except (OSError, ValueError, http.client.HTTPException, IntegrityError) as error:
            what = one_line(error) or type(error).__name__
            raise BackendError(
                f"no time stamp of {self.host}: {what}", code="timestamp_unavailable"
            ) from error


def check_form(answer: bytes, content: bytes) -> None:
    """Check that an answer is a stamp of this content, without who signed it.

    Without the package rfc3161-client only the hash of the content is looked for. Raises
    IntegrityError (``timestamp_wrong``).
    """
    try:
        read_stamp(answer, content)
    except BackendError:
        if hashlib.sha256(content).digest() not in answer:
            raise _not_valid("it is one of another content") from None


def _not_valid(what: str) -> IntegrityError:
    return IntegrityError(f"the time stamp is not valid: {what}", code="timestamp_wrong")


def _authority(stamp: Any) -> str:
    """Return the subject of the certificate whose issuer and number the signature names."""
    from cryptography.x509 import load_der_x509_certificate

    (signer,) = stamp.signed_data.signer_infos
    for one in map(load_der_x509_certificate, stamp.signed_data.certificates):
        if (one.issuer, one.serial_number) == (signer.issuer, signer.serial_number):
            return str(one.subject.rfc4514_string())
    raise ValueError("it has no certificate of its authority")
