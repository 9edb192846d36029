"""SOAP 1.2: envelopes are read within bounds, answers and faults are written.

Markup is counted before the parser reads it, which bounds elements, attributes and nesting; only
the text of a picture can be large. What is malformed raises FaultError.
"""

import base64
import binascii
import datetime
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal, TypeAlias, TypeVar
from xml.etree.ElementTree import Element, register_namespace, tostring

from upperson_network.soap import ENVELOPE, parse_beginning
from upperson_rt.printable import escape_for_display, safe_repr

ERROR = "http://www.onvif.org/ver10/error"
DEVICE = "http://www.onvif.org/ver10/device/wsdl"
SEARCH = "http://www.onvif.org/ver10/search/wsdl"
SCHEMA = "http://www.onvif.org/ver10/schema"
TOPICS = "http://www.onvif.org/ver10/topics"
NOTIFICATION = "http://docs.oasis-open.org/wsn/b-2"
WSSE = "http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss-wssecurity-secext-1.0.xsd"
WSU = "http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss-wssecurity-utility-1.0.xsd"
_ADDRESSING = "http://www.w3.org/2005/08/addressing"
for _prefix, _namespace in (
    ("env", ENVELOPE), ("tds", DEVICE), ("tse", SEARCH), ("tt", SCHEMA), ("wsnt", NOTIFICATION),
):  # fmt: skip
    register_namespace(_prefix, _namespace)

_MOST_TAGS = 1000
"""Of any kind, comments too: a request of a client has less than a hundred."""
_MOST_QUOTES = 4000
"""Two for each attribute and namespace."""
_UNDERSTOOD = {f"{{{WSSE}}}Security", f"{{{_ADDRESSING}}}Action", f"{{{_ADDRESSING}}}To"}
"""Headers that may be marked as such that must be understood."""
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)
_SPAN = re.compile(
    r"P(?:(\d{1,9})Y)?(?:(\d{1,9})M)?(?:(\d{1,9})D)?"
    r"(?:T(?:(\d{1,9})H)?(?:(\d{1,9})M)?(?:(\d{1,9}(?:\.\d{1,12})?)S)?)?",
    re.ASCII,
)
_UNITS_S = (365 * 86400.0, 30 * 86400.0, 86400.0, 3600.0, 60.0, 1.0)
Code: TypeAlias = Literal["Sender", "Receiver", "VersionMismatch", "MustUnderstand"]
T = TypeVar("T")


class FaultError(Exception):
    """A request that is answered with a fault."""

    def __init__(self, code: Code, subcodes: Collection[str], reason: str) -> None:
        """Answer with a code of SOAP, subcodes of ONVIF from outside in, and one line."""
        super().__init__(reason)
        self.code = code
        self.subcodes = tuple(subcodes)
        self.reason = escape_for_display(reason)


def invalid(reason: str, *more: str) -> FaultError:
    """Return the fault of a value that cannot be used."""
    return FaultError("Sender", ("InvalidArgVal", *more), reason)


# Reading.


def header_of(start: bytes | bytearray) -> Element | None:
    """Return the header of an envelope whose beginning is known; None if it is not whole yet."""
    root = _parsed(start, whole=False)
    if root is None or child(root, ENVELOPE, "Body") is None:
        return None
    return _header(root)


def read_envelope(content: bytes | bytearray) -> tuple[Element, Element]:
    """Return the header of an envelope, empty if there is none, and the request in its body."""
    root = _parsed(content, whole=True)
    assert root is not None  # Else it would not be well-formed.
    header, body = _header(root), child(root, ENVELOPE, "Body")
    if body is None or len(body) != 1:
        raise _malformed("the envelope must have a body with one request")
    return header, body[0]


def child(parent: Element, namespace: str, name: str) -> Element | None:
    """Return the first child with a name."""
    return parent.find(f"{{{namespace}}}{name}")


def _parsed(content: bytes | bytearray, whole: bool) -> Element | None:
    """Return the root of a document, or of its beginning as far as it goes."""
    if b"\0" in content:  # UTF-16 and UTF-32 would hide the counted characters.
        raise _malformed("the request is not well-formed: it must be in UTF-8")
    quotes = content.count(b'"') + content.count(b"'")
    if content.count(b"<") > _MOST_TAGS or quotes > _MOST_QUOTES:
        raise _malformed(f"more than {_MOST_TAGS} tags or {_MOST_QUOTES // 2} attributes")
    try:
        return parse_beginning(content, encoding="utf-8", is_whole=whole)
    except ValueError as error:
        raise _malformed(f"the request cannot be read: {error}") from error


def _header(root: Element) -> Element:
    if root.tag != f"{{{ENVELOPE}}}Envelope":
        if root.tag.endswith("}Envelope"):
            raise FaultError("VersionMismatch", (), "expected an envelope of SOAP 1.2")
        raise _malformed(f"expected an envelope of SOAP 1.2, found {safe_repr(root.tag)}")
    header = child(root, ENVELOPE, "Header")
    if header is None:
        return Element("Header")
    for block in header:
        must = block.get(f"{{{ENVELOPE}}}mustUnderstand", "false").strip() in ("1", "true")
        if must and block.tag not in _UNDERSTOOD:
            raise FaultError(
                "MustUnderstand", (), f"the header {safe_repr(block.tag)} is not understood"
            )
    return header


def _malformed(reason: str) -> FaultError:
    return FaultError("Sender", ("WellFormed",), reason)


class Fields:
    """The values of a request."""

    def __init__(self, parent: Element, *names: str, repeated: Collection[str] = ()) -> None:
        """Look at the children of an element, which have these names, each once or repeated."""
        self._parent = parent.tag.rpartition("}")[2]
        self._found: dict[str, list[Element]] = {}
        for found in parent:
            name = found.tag.rpartition("}")[2]
            if name not in (*names, *repeated):
                known = ", ".join((*names, *repeated)) or "nothing"
                raise self._malformed(f"takes {known}; found {safe_repr(name)}")
            if name in self._found and name not in repeated:
                raise self._malformed(f"has {name} twice")
            self._found.setdefault(name, []).append(found)

    def _malformed(self, why: str) -> FaultError:
        return FaultError("Sender", ("InvalidArgs",), f"{self._parent} {why}")

    def one(self, name: str, read: Callable[[str, str], T]) -> T:
        """Return a value that must be there."""
        value = self.maybe(name, read)
        if value is None:
            raise self._malformed(f"needs {name}")
        return value

    def maybe(self, name: str, read: Callable[[str, str], T]) -> T | None:
        """Return a value, or None if it is not there."""
        found = self.all(name)
        return read(name, (found[0].text or "").strip()) if found else None

    def all(self, name: str) -> list[Element]:
        """Return the elements of a name."""
        return self._found.get(name, [])


# What each value may be: functions of its name, for the fault, and its text.


def text(name: str, value: str) -> str:
    """Read a text."""
    return value


def is_true(name: str, value: str) -> bool:
    """Read a boolean."""
    if value not in ("true", "1", "false", "0"):
        raise invalid(f"{name} must be true or false, found {safe_repr(value)}")
    return value in ("true", "1")


def number(least: int) -> Callable[[str, str], int]:
    """Return what reads a whole number from a least one to that of 32 bits."""

    def read(name: str, value: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,10}", value, re.ASCII) or not least <= int(value) < 1 << 31:
            raise invalid(f"{name} must be a whole number from {least}, found {safe_repr(value)}")
        return int(value)

    return read


def similarity(name: str, value: str) -> float:
    """Read a number from 0 to 1."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise invalid(f"{name} must be from 0, least alike, to 1, found {safe_repr(value)}")
    return found


def unix_time(name: str, value: str) -> float:
    """Read a dateTime, UTC where no zone stands there; return unix seconds."""
    found = _TIME.fullmatch(value)
    try:
        if found is None:
            raise ValueError
        *fields, fraction, zone = found.groups()
        year, month, day, hour, minute, second = map(int, fields)
        utc = datetime.timezone.utc
        moment = datetime.datetime(year, month, day, hour, minute, second, tzinfo=utc)
        time = moment.timestamp() + float(f"0.{fraction or 0}")
        if zone not in (None, "Z"):
            hours, minutes = int(zone[1:3]), int(zone[4:])
            if minutes > 59 or hours * 60 + minutes > 14 * 60:
                raise ValueError
            time -= (hours * 3600 + minutes * 60) * (-1 if zone[0] == "-" else 1)
    except ValueError as error:
        raise invalid(
            f"{name} must be a time such as 2026-11-24T14:00:00Z, found {safe_repr(value)}"
        ) from error
    return time


def seconds(name: str, value: str) -> float:
    """Read a duration, with months of 30 days and years of 365; return seconds."""
    found = _SPAN.fullmatch(value)
    if found is None or value.endswith(("P", "T")):
        raise invalid(f"{name} must be a duration such as PT30S, found {safe_repr(value)}")
    parts = (float(part or 0) for part in found.groups())
    return sum(part * unit for part, unit in zip(parts, _UNITS_S, strict=True))


def picture(name: str, value: str) -> bytes:
    """Read the bytes of base64; spaces and ends of lines do not count."""
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{name} must be a picture in base64") from error


# Writing.


def element(
    namespace: str, name: str, *content: Element | str | None, **attributes: str
) -> Element:
    """Return an element with children, or a text; what XML cannot hold becomes U+FFFD."""
    made = Element(f"{{{namespace}}}{name}", attributes)
    for one in content:
        if isinstance(one, str):
            made.text = _NO_XML.sub("\ufffd", one)
        elif one is not None:
            made.append(one)
    return made


def elements(namespace: str, values: Mapping[str, object]) -> list[Element]:
    """Return an element with a text for each value."""
    return [element(namespace, name, str(value)) for name, value in values.items()]


def time_text(unix_seconds: float) -> str:
    """Return a time as dateTime in UTC, within the years that the format allows."""
    bounded = min(max(unix_seconds, -62_135_596_800.0), 253_402_300_799.0)
    start = datetime.datetime(1970, 1, 1)
    moment = start + datetime.timedelta(milliseconds=round(bounded * 1000))
    return moment.isoformat(timespec="milliseconds") + "Z"


def message(answer: Element) -> bytes:
    """Return an envelope around an answer."""
    envelope = element(ENVELOPE, "Envelope", element(ENVELOPE, "Body", answer))
    envelope.set("xmlns:ter", ERROR)  # Of the codes of faults, which are texts, as topics are.
    envelope.set("xmlns:tns1", TOPICS)
    content: bytes = tostring(envelope, "utf-8", xml_declaration=True)
    return content


def fault_answer(fault: FaultError) -> tuple[int, bytes]:
    """Return the status and the content that answer a fault."""
    inner: Element | None = None
    for subcode in reversed(fault.subcodes):
        value = element(ENVELOPE, "Value", f"ter:{subcode}")
        inner = element(ENVELOPE, "Subcode", value, inner)
    reason = element(ENVELOPE, "Text", fault.reason)
    reason.set("{http://www.w3.org/XML/1998/namespace}lang", "en")
    code = element(ENVELOPE, "Code", element(ENVELOPE, "Value", f"env:{fault.code}"), inner)
    content = message(element(ENVELOPE, "Fault", code, element(ENVELOPE, "Reason", reason)))
    return 400 if fault.code == "Sender" else 500, content
