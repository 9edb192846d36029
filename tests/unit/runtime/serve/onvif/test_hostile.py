"""Malicious requests: refused with a fault, at once and within little memory."""

import asyncio

import pytest
from starlette.requests import Request

from tests.helpers.console import START
from tests.unit.runtime.serve.onvif.conftest import envelope, security, whole
from tests.unit.runtime.serve.onvif.test_security import post
from tests.unit.runtime.serve.test_bounds import traced
from upperson_console.onvif.soap import (
    FaultError,
    element,
    number,
    picture,
    read_envelope,
    seconds,
    time_text,
    unix_time,
)

LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha" * 50}">' for n in range(10))
BOMB = f"<!DOCTYPE x [{LAUGHS}]>"
UTF_16 = whole("<a/>", f'<?xml version="1.0" encoding="UTF-16"?>{BOMB}').encode("utf-16")
NO_TYPE, MANY, BROKEN = "a document type", "more than 1000 tags", "not well-formed"
ONE, VERSION, UNKNOWN = "one request", "an envelope of SOAP 1.2", "is not offered here"
SERVICES, CATEGORY = "tds:GetServices", "<tds:Category>X</tds:Category>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (whole("<a>&l9;</a>", before=BOMB), NO_TYPE),
        (whole("<a>&x;</a>", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), NO_TYPE),
        (UTF_16, "in UTF-8"),
        (whole("<a/>", '<?xml version="1.0" encoding="x-none"?>') + "<", BROKEN),
        (whole("<a>" * 3000), MANY),
        (whole("<a/>" * 3000), MANY),
        (whole(f"<a {' '.join(f'b{n}=``' for n in range(3000))}/>".replace("`", "'")), "2000 attr"),
        (whole("<a>" * 400 + "</a>" * 400), UNKNOWN),
        (whole("<a><b></a></b>"), BROKEN),
        (whole("<a/><b/>"), ONE),
        (whole(""), ONE),
        ('<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"/>', VERSION),
        (whole("<a/>", header='<b env:mustUnderstand="1"/>'), "is not understood"),
        ("", BROKEN),
        ("--x\r\nContent-Type: application/xop+xml\r\n\r\n", BROKEN),
        (whole("<tse:FindPTZPosition/>"), UNKNOWN),
        (whole(f"<{SERVICES}/>"), "needs IncludeCapability"),
        (whole(f"<{SERVICES}><tds:Other/></{SERVICES}>"), "takes IncludeCapability"),
        (whole(f"<tds:GetCapabilities>{CATEGORY}</tds:GetCapabilities>"), "a Category is one of"),
    ],
)
def test_a_malformed_request_is_a_fault(shared, content, words):
    answer = post(shared, content)
    kind = answer.status_code in (400, 500), answer.headers["content-type"]
    assert kind == (True, "application/soap+xml; charset=utf-8")
    assert words in answer.text
    assert (answer.text.count("env:Fault>"), "Traceback" in answer.text) == (2, False)


def test_a_bomb_takes_no_memory():
    """The parser never sees it: ten levels of ten are 10 GB of text."""
    content = whole("<a>&l9;</a>", before=BOMB).encode()
    with traced() as peak, pytest.raises(FaultError, match="document type"):
        read_envelope(content)
    assert peak() < 1 << 20


LARGE = f"<tse:X>{'A' * 200_000}</tse:X>"


def test_a_large_request_needs_credentials_first(shared):
    wrong = security("vms", "wrong")
    for content in (
        envelope(shared, LARGE, header=""),
        envelope(shared, LARGE, wrong),
        whole(LARGE + wrong).encode(),  # Not at its beginning.
    ):
        answer = post(shared, content)
        assert (answer.status_code in (400, 401), "ter:NotAuthorized" in answer.text) == (
            True,
            True,
        )
    answer = post(shared, envelope(shared, LARGE))
    assert (answer.status_code, "only a picture" in answer.text) == (400, True)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_request_without_credentials_is_refused_in_any_number_of_blocks(shared, blocks):
    """The last block may be the one that is too much: nothing is left to read then."""
    content = whole(LARGE).encode()
    size = -(-len(content) // blocks)
    left = [content[start : start + size] for start in range(0, len(content), size)]

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    scope = {"type": "http", "method": "POST", "path": "/onvif/search_service", "headers": []}
    answer = asyncio.run(shared.routes._answer(Request(scope, receive)))
    assert (answer.status_code in (400, 401), b"ter:NotAuthorized" in answer.body) == (True, True)
    assert left == [], "clients read an answer only after all was sent"


def test_large_requests_have_bounds_and_few_places(shared):
    start, end = envelope(
        shared, "<tse:SearchImageByImageRequest>@</tse:SearchImageByImageRequest>"
    ).split(b"@")
    parts = (start, *[b"A" * 65536] * (21 * 16), end)
    for headers in ({"content-length": str(sum(map(len, parts)))}, {}):
        answer = post(shared, iter(parts), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    shared.routes._large = 2
    try:
        answer = post(shared, envelope(shared, LARGE))
    finally:
        shared.routes._large = 0
    assert (answer.status_code, "ter:ResourceProblem" in answer.text) == (500, True)
    assert shared.routes._large == 0


VALUES = {
    unix_time: {
        "2026-09-21T14:13:20Z": START,
        "2026-09-21T14:13:20": START,
        "2026-09-21T16:13:20.250+02:00": START + 0.25,
        "2026-09-21T08:43:20-05:30": START,
        "0001-01-01T00:00:00Z": -62_135_596_800.0,
        "9999-12-31T23:59:59Z": 253_402_300_799.0,
    },
    seconds: {"PT0S": 0, "PT1.5S": 1.5, "P1DT2H3M4S": 93_784, "P1Y2M": 36_720_000, "P1D": 86_400},
    number(0): {"0": 0, "+7": 7, "2147483647": 2**31 - 1, "-0": 0},
    picture: {" aGVs\nbG8= ": b"hello"},
}
MALFORMED = {
    unix_time: [
        "", "2026-09-21", "2026-09-21T24:00:01Z", "2026-02-30T00:00:00Z",
        "12026-01-01T00:00:00Z", "2026-09-21T14:13:20+15:00", "2026-09-21T14:13:20+02:99",
        "2026-09-21T14:13:20Zx", "\u0662026-09-21T14:13:20Z", "0000-01-01T00:00:00Z",
    ],
    seconds: ["", "P", "PT", "P1DT", "-PT1S", "30", "PT1S1M", "PT.5S", "PT1e9S"],
    number(0): ["", "1.0", "0x1", "9" * 10, "-1", "\u0661", "1 2", "9" * 5000],
    picture: ["aGVsbG8", "aGVsbG8=!", "\u00e4"],
}  # fmt: skip


def test_values_are_read_or_refused():
    for read, values in VALUES.items():
        assert {text: read("value", text) for text in values} == values
    for read, texts in MALFORMED.items():
        for text in texts:
            with pytest.raises(FaultError) as found:
                read("value", text)
            assert found.value.subcodes == ("InvalidArgVal",), text


def test_what_xml_cannot_hold_is_replaced():
    text = element("x", "a", "gate\x00\x1b[2J\ud800\ufffe<&").text
    assert text == "gate\ufffd\ufffd[2J\ufffd\ufffd<&"
    assert time_text(1e20) == "9999-12-31T23:59:59.000Z"
    assert time_text(-1e20) == "0001-01-01T00:00:00.000Z"
    assert time_text(START + 0.0004) == "2026-09-21T14:13:20.000Z"
