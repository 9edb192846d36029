"""Asking a time-stamp authority for a stamp (RFC 3161 over HTTP)."""

import http.client
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from upperson_network.remote import http_target, http_within, is_http_address
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.printable import one_line, safe_repr
from upperson_rt.timestamps import MOST_STAMP_BYTES, TimeStamp, read_stamp, require_timestamps

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_LONGEST_S = 5.0
"""For an answer. An export waits so long."""


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
