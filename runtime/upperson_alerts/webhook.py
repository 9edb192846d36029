"""Webhooks, signed as Standard Webhooks describe it (standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import http.client
import ssl
import time
from collections.abc import Iterator, Sequence

from upperson_alerts.delivery import (
    Delivery,
    DeliveryOptions,
    Parcel,
    Refusal,
    UnreachableError,
    one_by_one,
)
from upperson_network.remote import http_target, http_within, is_http_address
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import one_line

_MOST_ANSWER_BYTES = 64 << 10


class WebhookDelivery(Delivery):
    """Posts each message; an answer of 200 to 299 accepts it. No redirect is followed."""

    def __init__(self, address: str, options: DeliveryOptions) -> None:
        """Read the secret, ``whsec_`` and Base64 or any text; without one nothing is signed."""
        if not is_http_address(address):
            raise UsageError(
                f"expected the address of a webhook, such as https://host/path, found one of "
                f"{len(address)} characters without a usable host",
                code="address_malformed",
            )
        self._address = address
        self._timeout_s = options.timeout_s
        self._key = None if options.secret is None else read_key(options.secret)
        self._context = None
        if address.startswith("https:"):
            self._context = tls_context(options)

    def deliver(self, parcels: Sequence[Parcel]) -> Iterator[tuple[str, Refusal | None]]:
        """Post messages one after the other."""
        yield from one_by_one(parcels, self._post)

    def _post(self, parcel: Parcel) -> Refusal | None:
        headers = {"Content-Type": "application/json", "User-Agent": "upperson-rt"}
        headers |= signed_headers(parcel.id, parcel.body, time.time(), self._key)
        is_connected, status, after = False, 0, ""
        try:
            with http_within(self._timeout_s, self._address, self._context) as connection:
                connection.connect()
                is_connected = True
                connection.request("POST", http_target(self._address), parcel.body, headers)
                answer = connection.getresponse()
                status, after = answer.status, answer.getheader("Retry-After", "")
                answer.read(_MOST_ANSWER_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not is_connected:
                raise UnreachableError(one_line(error)) from error
            if not status and isinstance(error, TimeoutError):
                return Refusal(f"no answer within {self._timeout_s:g} s")
            if not status:  # Else the status is the answer, whatever becomes of its text.
                return Refusal(f"no answer: {type(error).__name__}")
        if 200 <= status < 300:
            return None
        is_number = after.isascii() and after.isdigit()
        return Refusal(f"it answers {status}", float(after[:6]) if is_number else 0.0)


def tls_context(options: DeliveryOptions) -> ssl.SSLContext:
    """Return what verifies the certificate of a server."""
    try:
        return ssl.create_default_context(cafile=options.ca_file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read certificates from {options.ca_file}: {one_line(error)}",
            code="certificate_unreadable",
            path=options.ca_file,
        ) from error


def read_key(secret: str) -> bytes:
    """Return the key of a secret: ``whsec_`` and Base64, or any other text as it is."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise InputError(
            "the secret begins with whsec_, but the rest is no Base64", code="secret_malformed"
        ) from error


def signed_headers(id_: str, body: bytes, now: float, key: bytes | None) -> dict[str, str]:
    """Return the headers of Standard Webhooks; without a key there is no signature."""
    headers = {"webhook-id": id_, "webhook-timestamp": str(int(now))}
    if key is not None:
        content = f"{id_}.{int(now)}.".encode() + body
        digest = hmac.new(key, content, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode('ascii')}"
    return headers
