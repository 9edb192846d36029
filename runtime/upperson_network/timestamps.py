"""Asking a time-stamp authority for a stamp (RFC 3161 over HTTP)."""

import http.client
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from upperson_network.remote import http_target, http_within
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.printable import one_line, safe_repr
from upperson_rt.timestamps import (
    MOST_STAMP_BYTES,
    TimeStamp,
    make_request,
    read_certificates,
    read_stamp,
    require_timestamps,
)

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_LONGEST_S = 5.0
"""For an answer. An export waits so long."""


@dataclass(frozen=True)
class TimeStampServer:
    """An authority, and whether it is needed."""

    url: str
    certificates: "Sequence[Certificate]" = ()
    """Those that verify its stamps at once; without any, only hash and nonce are compared."""
    is_required: bool = False
    """Whether nothing is exported without a stamp."""

    @classmethod
    def open(
        cls, url: str, certificates: Path | None = None, is_required: bool = False
    ) -> "TimeStampServer":
        """Check an address, and read a file of certificates (PEM).

        Raises UsageError, InputError, or BackendError if the package rfc3161-client is missing.
        """
        require_timestamps()
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_usable = False
        if not is_usable or "@" in url or not url.isascii() or not url.isprintable() or " " in url:
            raise UsageError(
                "expected the address of a time-stamp authority without a login, such as "
                f"http://tsa.example/tsr, found {safe_repr(url)}",
                code="address_malformed",
            )
        found = [] if certificates is None else read_certificates(certificates)
        return cls(url, found, is_required)

    @property
    def host(self) -> str:
        """The host of the address; the rest may be a secret."""
        return urlsplit(self.url).hostname or ""

    def stamp(self, content: bytes) -> tuple[bytes, TimeStamp]:
        """Return a stamp of content in DER, and what it says, within five seconds.

        Only a hash of the content is sent; no redirect is followed. Raises BackendError
        (``timestamp_unavailable``) if the authority sends no usable stamp in time.
        """
        request, nonce = make_request(content)
        headers = {"Content-Type": "application/timestamp-query", "User-Agent": "upperson-rt"}
        try:
            with http_within(_LONGEST_S, self.url) as connection:
                connection.request("POST", http_target(self.url), request, headers)
                answer = connection.getresponse()
                if answer.status != http.client.OK:
                    raise ValueError(f"it answers {answer.status}")
                stamp = answer.read(MOST_STAMP_BYTES + 1)
            if len(stamp) > MOST_STAMP_BYTES:
                raise ValueError(f"its answer has more than {MOST_STAMP_BYTES >> 10} KiB")
            return stamp, read_stamp(stamp, content, self.certificates, nonce)
        except (OSError, ValueError, http.client.HTTPException, IntegrityError) as error:
            what = one_line(error) or type(error).__name__
            raise BackendError(
                f"no time stamp of {self.host}: {what}", code="timestamp_unavailable"
            ) from error
