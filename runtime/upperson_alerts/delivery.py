"""Delivers the messages of a gallery's outbox to one destination, each at least once.

A message is noted as delivered after the destination has accepted it, so a process that is killed
in between delivers some again, with the same id. What a destination refuses is tried again later;
while it cannot be reached, nothing counts as an attempt.
"""

import base64
import hashlib
import io
import json
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from upperson_alerts.alerts import VERSION, Alert, read_alerts
from upperson_alerts.outbox import Failure, Message, outbox_of
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.files import read_bounded
from upperson_rt.gallery import Gallery
from upperson_rt.locks import try_lock
from upperson_rt.printable import get_logger, safe_repr

_LOG = get_logger(__name__)
_BATCH = 50
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 3600.0
_LONGEST_DOWN_S = 60.0
_MOST_SECRET_BYTES = 10_000
_SNAPSHOT_PX = 512
_SENDING_S = 1.0
"""How long messages are sent that were read together: they may be removed meanwhile."""


class UnreachableError(Exception):
    """The destination cannot be reached: nothing is wrong with a message."""


@dataclass(frozen=True)
class Refusal:
    """Why a destination did not accept a message."""

    text: str
    after_s: float = 0.0
    """How long it asks to wait, at least."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A message as it is sent."""

    id: str
    """The same whenever the message is sent again."""
    alert: str
    """Id of its alert."""
    body: bytes
    """JSON in UTF-8."""


@dataclass(frozen=True, kw_only=True)
class DeliveryOptions:
    """How a destination is talked to."""

    timeout_s: float = 15.0
    """How long an answer may take."""
    secret: str | None = field(default=None, repr=False)
    """Of a webhook, or ``user:password`` of a broker."""
    ca_file: Path | None = None
    """Certificates (PEM) that are trusted instead of the system's."""
    discovery: bool = False
    """Whether alerts are announced to Home Assistant."""


class Delivery(ABC):
    """Sends messages to a destination; an extension of ``upperson.deliveries`` makes one.

    It is called with the address and `DeliveryOptions`.
    """

    @abstractmethod
    def deliver(self, parcels: Sequence[Parcel]) -> Iterator[tuple[str, Refusal | None]]:
        """Send messages; yield the id of each with None once it was accepted, or the refusal.

        Those that are not yielded are given again.

        Raises:
            UnreachableError: The rest could not be sent.
        """

    def announce(self, alerts: Sequence[Alert]) -> None:  # noqa: B027
        """Take the alerts that there are, at the beginning and after each change."""

    def close(self) -> None:  # noqa: B027
        """End the connection."""


def one_by_one(
    parcels: Sequence[Parcel], send: Callable[[Parcel], Refusal | None]
) -> Iterator[tuple[str, Refusal | None]]:
    """Send messages one after the other, for about a second; the rest is read again."""
    until = time.monotonic() + _SENDING_S
    for parcel in parcels:
        yield parcel.id, send(parcel)
        if time.monotonic() >= until:
            return


def open_delivery(address: str, options: DeliveryOptions) -> Delivery:
    """Return what delivers to an address.

    Raises:
        UsageError: There is none for its scheme, or it holds a login.
        InputError: Something that it names cannot be used.
        BackendError: A package that it needs is not installed.
    """
    scheme = address.partition(":")[0]
    known = extension_names("deliveries")
    if scheme not in known:
        raise UsageError(
            f"nothing delivers to {safe_repr(address)}: expected an address that begins with one "
            f"of {', '.join(known)}, such as  mqtt://broker/upperson/alerts",
            code="delivery_unknown",
            found=address,
        )
    if "://" in address and "@" in urlsplit(address).netloc:
        raise UsageError(
            f"the address {scheme}://... holds a login, which other users can see: write "
            "user:password into a file that only you can read, and name it with  --secret-file",
            code="login_in_address",
        )
    delivery: Delivery = load_extension("deliveries", scheme)(address, options)
    return delivery


def destination_name(address: str) -> str:
    """Return a name of a destination without what may be secret in its address.

    Raises:
        UsageError: The address is malformed.
    """
    scheme, _, rest = address.partition(":")
    try:
        digest = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        host = f"://{urlsplit(address).netloc}" if rest.startswith("//") else ""
        host.encode()
    except ValueError as error:
        raise UsageError(
            f"the address {safe_repr(address)} is malformed: expected one such as "
            "https://host/path  or  mqtt://broker/upperson/alerts",
            code="address_malformed",
        ) from error
    return f"{scheme}{host}#{digest}"


def read_secret(file: Path | None) -> str | None:
    """Return the secret in a file or, without one, in ``$UPPERSON_ALERT_SECRET``."""
    if file is None:
        return os.environ.get("UPPERSON_ALERT_SECRET") or None
    from upperson_network.remote import require_private

    require_private(file)
    try:
        secret = read_bounded(file, _MOST_SECRET_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}", code="secret_unreadable") from error
    if not secret:
        raise InputError(f"{file} is empty: expected a secret", code="secret_empty", path=file)
    return secret


@dataclass
class Report:
    """What came of deliveries so far."""

    delivered: int = 0
    refused: int = 0
    dead: int = 0
    is_reachable: bool = True


class Deliverer:
    """Delivers to one destination until it is stopped; a context manager."""

    def __init__(
        self,
        gallery: Gallery,
        address: str,
        options: DeliveryOptions,
        *,
        attempts: int = 40,
        snapshot: bool = False,
    ) -> None:
        """Open a destination.

        Args:
            gallery: With an outbox.
            address: Of the destination.
            options: How it is talked to.
            attempts: Refusals after which a message is a dead letter.
            snapshot: Attach the picture, if it is still there.

        Raises:
            InputError: Another process delivers to it, or the gallery has no outbox.
            UppersonError: See `open_delivery`.
        """
        self.report = Report()
        self.destination = destination_name(address)
        self._gallery = gallery
        self._attempts = attempts
        self._snapshot = snapshot
        self._version: object = None
        self._down = 0
        self._down_until = 0.0
        self._outcomes: dict[int, Failure | None] = {}
        """What is not noted yet, see `Outbox.settle`: more than one step's while the disk is full.
        """
        self._is_over: Callable[[], bool] = lambda: False
        with outbox_of(gallery):
            pass
        self._delivery = open_delivery(address, options)
        self._lock = _lock(Path(gallery.location), self.destination)
        with outbox_of(gallery, write=True) as outbox:
            outbox.begin(self.destination)

    def __enter__(self) -> "Deliverer":
        return self

    def __exit__(self, *error: object) -> None:
        self._delivery.close()
        os.close(self._lock)

    def run(self, is_over: Callable[[], bool], poll_s: float = 0.2) -> None:
        """Deliver until ``is_over`` says so, which is called after each message."""
        self._is_over = is_over
        while not is_over():
            if time.monotonic() < self._down_until or not self._try_step():
                time.sleep(poll_s)

    def _try_step(self) -> bool:
        try:
            return self.step()
        except InputError as error:  # Of the gallery: locked for long, or its disk is full.
            _LOG.warning("nothing is delivered: %s", error)
            self._down_until = time.monotonic() + _LONGEST_DOWN_S / 6
            return False

    def run_once(self) -> None:
        """Deliver what is due.

        Raises:
            BackendError: The destination cannot be reached; the rest waits.
        """
        is_more = True
        while is_more:
            is_more = self.step()
            if not self.report.is_reachable:
                raise BackendError(
                    f"{self.destination} cannot be reached: nothing is lost, the rest waits",
                    code="destination_unreachable",
                    destination=self.destination,
                )

    def step(self) -> bool:
        """Deliver some of what is due; return whether anything was accepted or refused.

        Raises:
            InputError: The gallery cannot be written. Nothing is delivered again meanwhile.
        """
        self._settle()
        with outbox_of(self._gallery) as outbox:
            due = outbox.due(self.destination, time.time(), _LONGEST_DELAY_S, _BATCH)
            version = outbox.document(VERSION)
            alerts = [] if version == self._version else [*read_alerts(outbox).values()]
        if not due and version == self._version:
            return False
        messages = {message.key: (message, attempts) for message, attempts in due}
        try:
            if version != self._version:
                self._delivery.announce(alerts)
                self._version = version
            for key, refusal in self._delivery.deliver([self._parcel(one) for one, _ in due]):
                message, attempts = messages[key]
                self._outcomes[message.seq] = (
                    None if refusal is None else self._failure(key, refusal, attempts + 1)
                )
                if self._is_over():
                    break
            self._reached()
        except UnreachableError as error:
            self._unreachable(str(error), was_sent=bool(self._outcomes))
        finally:
            is_any = self._settle()
        return is_any

    def _settle(self) -> bool:
        """Note what came of deliveries; return whether there was anything to note."""
        if not self._outcomes:
            return False
        with outbox_of(self._gallery, write=True) as outbox:
            outbox.settle(self.destination, self._outcomes)
        self.report.delivered += sum(one is None for one in self._outcomes.values())
        self._outcomes = {}
        return True

    def _reached(self) -> None:
        if not self.report.is_reachable:
            _LOG.warning("%s can be reached again", self.destination)
        self.report.is_reachable, self._down = True, 0

    def _unreachable(self, text: str, was_sent: bool) -> None:
        if self.report.is_reachable:
            _LOG.warning("%s cannot be reached: %s", self.destination, text)
        self.report.is_reachable = False
        self._down = 1 if was_sent else self._down + 1
        self._down_until = time.monotonic() + _delay(self._down, _LONGEST_DOWN_S)

    def _failure(self, key: str, refusal: Refusal, attempts: int) -> Failure:
        is_dead = attempts >= self._attempts
        self.report.refused += 1
        self.report.dead += is_dead
        if is_dead or attempts == 1:
            what = "is a dead letter" if is_dead else "is tried again"
            text = "%s does not accept %s: %s; it %s"
            _LOG.warning(text, self.destination, key, refusal.text, what)
        delay = max(_delay(attempts, _LONGEST_DELAY_S), min(refusal.after_s, _LONGEST_DELAY_S))
        return Failure(
            attempts=attempts, due=time.time() + delay, error=refusal.text, is_dead=is_dead
        )

    def _parcel(self, message: Message) -> Parcel:
        body = dict(message.body)
        if self._snapshot and isinstance(picture := body["data"].get("picture"), int):
            body["data"] = {**body["data"], "snapshot": snapshot_of(self._gallery, picture)}
        return Parcel(id=message.key, alert=message.topic, body=json.dumps(body).encode())


def _delay(attempts: int, longest_s: float) -> float:
    """Return how long to wait: twice as long each time, by chance up to a half less."""
    return min(longest_s, _FIRST_DELAY_S * 2.0 ** min(attempts - 1, 30)) * random.uniform(0.5, 1.0)


def _lock(folder: Path, destination: str) -> int:
    """Let no other process deliver to the same destination; return what to close."""
    name = hashlib.sha256(destination.encode()).hexdigest()[:8]
    file = folder / f"deliver-{name}.lock"
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(
            f"cannot write {file}: {error.strerror}", code="file_not_writable", path=file
        ) from error
    if not try_lock(handle):
        os.close(handle)
        raise InputError(
            f"another process delivers to {destination} already: end it first",
            code="delivery_running",
            destination=destination,
        )
    return handle


def snapshot_of(gallery: Gallery, picture: int) -> str | None:
    """Return a picture as JPEG in Base64, 512 pixels high at most; None if there is none."""
    from upperson_sheet.sheet import picture_of

    found = gallery.get([picture]).get(picture)
    image = None if found is None else picture_of(found[0], gallery.crops_dir)
    if image is None or isinstance(image, str):
        return None
    image.thumbnail((_SNAPSHOT_PX, _SNAPSHOT_PX))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
