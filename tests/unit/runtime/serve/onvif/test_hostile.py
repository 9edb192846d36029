"""Requests that were made to do harm: refused with a fault, at once and within little memory."""

import asyncio
import json
import tracemalloc

import pytest
from starlette.requests import Request

from tests.helpers.console import START
from tests.unit.runtime.serve.onvif.conftest import NAMESPACES, security
from tests.unit.runtime.serve.onvif.test_security import CAMERAS, post
from tests.unit.runtime.serve.test_guard import FORM, answered
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


def whole(body, before="", header=""):
    return (
        f"{before}<env:Envelope {NAMESPACES}><env:Header>{header}</env:Header>"
        f"<env:Body>{body}</env:Body></env:Envelope>"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (whole("<a>&l9;</a>", before=BOMB), "a document type is not taken"),
        (whole("<a>&x;</a>", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), "document"),
        (whole("<a/>", '<!DOCTYPE a SYSTEM "http://127.0.0.1:1/x.dtd">'), "a document type"),
        (
            whole("<a/>", f'<?xml version="1.0" encoding="UTF-16"?>{BOMB}').encode("utf-16"),
            "in UTF-8",
        ),
        (whole("<a/>", '<?xml version="1.0" encoding="x-none"?>') + "<", "not well-formed"),
        (whole("<a>" * 3000), "more than 1000 tags"),
        (whole("<a/>" * 3000), "more than 1000 tags"),
        (whole("<!-- x -->" * 3000), "more than 1000 tags"),
        (whole(f"<a {' '.join(f'b{n}=``' for n in range(3000))}/>".replace("`", "'")), "2000 attr"),
        (whole("<a>" * 400 + "</a>" * 400), "is not offered here"),
        (whole("<a>&nothing;</a>"), "not well-formed"),
        (whole("<a><b></a></b>"), "not well-formed"),
        (whole("<a>\x00</a>"), "not well-formed"),
        (whole("<a/><b/>"), "one request"),
        (whole(""), "one request"),
        (f"<env:Envelope {NAMESPACES}/>", "one request"),
        ("<a/>", "expected an envelope of SOAP 1.2"),
        ('<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"/>', "SOAP 1.2"),
        (whole("<a/>", header='<b env:mustUnderstand="1"/>'), "is not understood"),
        ("", "not well-formed"),
        (b"\xff<", "not well-formed"),
        ("--x\r\nContent-Type: application/xop+xml\r\n\r\n", "not well-formed"),
        (whole("<tse:FindEvents/>"), "is not offered here"),
        (whole("<tds:SystemReboot/>"), "is not offered here"),
        (whole("<tds:GetServices/>"), "needs IncludeCapability"),
        (whole("<tds:GetServices><tds:Other/></tds:GetServices>"), "takes IncludeCapability"),
        (
            whole(
                "<tds:GetServices><tds:IncludeCapability>maybe</tds:IncludeCapability>"
                "</tds:GetServices>"
            ),
            "true or false",
        ),
        (
            whole("<tds:GetCapabilities><tds:Category>X</tds:Category></tds:GetCapabilities>"),
            "a Category is one of",
        ),
    ],
)
def test_a_malformed_request_is_a_fault(shared, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    status, answer = post(shared, content)
    assert status in (400, 500)
    assert answer.headers["content-type"] == "application/soap+xml; charset=utf-8"
    assert words in answer.text
    assert answer.text.count("env:Fault>") == 2
    assert "Traceback" not in answer.text


def test_a_bomb_takes_no_memory():
    """The parser never sees it: ten levels of ten are 10 GB of text."""
    content = whole("<a>&l9;</a>", before=BOMB).encode()
    tracemalloc.start()
    try:
        with pytest.raises(FaultError, match="document type"):
            read_envelope(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_large_request_needs_credentials_first(shared, envelope):
    """A large request must authenticate at its beginning."""
    large = f"<tse:X>{'A' * 200_000}</tse:X>"
    wrong = security("vms", "wrong")
    late = whole(large + wrong)
    for content in (envelope(shared, large, header=""), envelope(shared, large, wrong), late):
        content = content if isinstance(content, bytes) else content.encode()
        status, answer = post(shared, content)
        assert status in (400, 401)
        assert "ter:NotAuthorized" in answer.text
    status, answer = post(shared, envelope(shared, large))
    assert (status, "only a picture" in answer.text) == (400, True)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_request_without_credentials_is_refused_in_any_number_of_blocks(shared, blocks):
    """The last block may be the one that is too much: nothing is left to read then."""
    content = whole(f"<tse:X>{'A' * 200_000}</tse:X>").encode()
    size = -(-len(content) // blocks)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < blocks}
        for number, part in enumerate(parts, 1)
    ]
    left = iter(messages)

    async def receive():
        return next(left)

    scope = {"type": "http", "method": "POST", "path": "/onvif/search_service", "headers": []}
    answer = asyncio.run(shared.routes._answer(Request(scope, receive)))
    assert answer.status_code in (400, 401)
    assert b"ter:NotAuthorized" in answer.body
    assert list(left) == [], "clients read an answer only after all was sent"


def test_no_request_is_larger_than_a_picture(shared, envelope):
    body = "<tse:SearchImageByImageRequest>@</tse:SearchImageByImageRequest>"
    for is_told in (False, True):
        start, end = envelope(shared, body).split(b"@")
        parts = (start, *[b"A" * 65536] * (21 * 16), end)
        length = {"content-length": str(sum(map(len, parts)))} if is_told else {}
        status, answer = post(shared, iter(parts), **length)
        assert status == 413
        assert answer.json()["code"] == "body_too_large"


def test_few_large_requests_are_read_at_a_time(shared, envelope):
    shared.routes._large = 2
    try:
        status, answer = post(shared, envelope(shared, f"<tse:X>{'A' * 200_000}</tse:X>"))
    finally:
        shared.routes._large = 0
    assert status == 500
    assert "ter:ResourceProblem" in answer.text
    status, answer = post(shared, envelope(shared, CAMERAS + " " * 200_000))
    assert (status, "only a picture" in answer.text) == (400, True)
    assert shared.routes._large == 0


def test_bodies_that_never_end_keep_no_client_out(shared):
    """They have places of their own, and give way there."""
    guard = shared.guard

    async def run():
        idle = [
            asyncio.create_task(answered(guard, "POST", "/onvif/search_service", FORM, first=b"<"))
            for _ in range(64)
        ]
        while len(guard._others) < 64:
            await asyncio.sleep(0.01)
        other = await answered(guard, "GET", "/onvif/search.wsdl", more=False)
        status, _, why = await idle[0]
        for one in idle:
            one.cancel()
        return other[0], status, why, len(guard._authenticated) + len(guard._anonymous)

    status, evicted, why, elsewhere = asyncio.run(run())
    assert (status, evicted, elsewhere) == (200, 408, 0)
    assert json.loads(why)["code"] == "body_evicted"
    assert len(guard._others) == 0


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (unix_time, {"2026-09-21T14:13:20Z": START, "2026-09-21T14:13:20": START,
                     "2026-09-21T16:13:20.250+02:00": START + 0.25,
                     "2026-09-21T08:43:20-05:30": START,
                     "0001-01-01T00:00:00Z": -62_135_596_800.0,
                     "9999-12-31T23:59:59Z": 253_402_300_799.0}),
        (seconds, {"PT30S": 30, "PT0S": 0, "PT1.5S": 1.5, "P1DT2H3M4S": 93_784,
                   "P1Y2M": 36_720_000, "PT1H": 3600, "P1D": 86_400}),
        (number(0), {"0": 0, "+7": 7, "2147483647": 2**31 - 1, "-0": 0}),
        (picture, {" aGVs\nbG8= ": b"hello"}),
    ],
)  # fmt: skip
def test_values_are_read(read, values):
    assert {text: read("value", text) for text in values} == values


@pytest.mark.parametrize(
    ("read", "texts"),
    [
        (unix_time, ["", "now", "2026-09-21", "2026-09-21T24:00:01Z", "2026-02-30T00:00:00Z",
                     "12026-01-01T00:00:00Z", "2026-09-21T14:13:20+15:00",
                     "2026-09-21T14:13:20+02:99", "2026-09-21T14:13:20Zx",
                     "\u0662026-09-21T14:13:20Z", "0000-01-01T00:00:00Z"]),
        (seconds, ["", "P", "PT", "P1DT", "-PT1S", "30", "PT1S1M", "PT.5S", "PT1e9S"]),
        (number(0), ["", "1.0", "0x1", "9" * 10, "-1", "\u0661", "1 2", "9" * 5000]),
        (picture, ["aGVsbG8", "aGVsbG8=!", "\u00e4"]),
    ],
)  # fmt: skip
def test_malformed_values_are_refused(read, texts):
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
