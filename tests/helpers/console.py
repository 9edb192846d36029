"""A client of a console, without a network."""

import asyncio
import io
import json
import zipfile

import httpx
from PIL import Image

BASE = "http://127.0.0.1:8480"
START = 1_790_000_000.0
ODD = "<b>hall</b>' OR 1=1 --"
"""A camera whose name is HTML and SQL."""


class Client:
    """Sends requests to an application, each as its own connection."""

    def __init__(self, app, **headers):
        self.app, self.headers = app, headers

    def __call__(self, method, path, defects=False, **more):
        headers = {**self.headers, **more.pop("headers", {})}

        async def send():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=defects)
            async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(send())

    def get(self, path, **more):
        return self("GET", path, **more)

    def post(self, path, **more):
        return self("POST", path, **more)

    def search(self, **query):
        return self.post("/api/v1/search", json=query)


def client_of(console, token):
    return Client(console.app, authorization=f"Bearer {token}")


def problem(answer, status, code=None):
    """Return the one line of an answer that is a problem, with a code if one is given."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["status"], bool(body["title"])) == (status, True)
    assert code in (None, body["code"]), answer.text
    assert "\n" not in body["detail"]
    assert "Traceback" not in answer.text
    return body["detail"]


def id_of(console, key):
    return console.service.gallery.ids([key])[key]


def add_items(console, *items, text="red"):
    """Add items with the embedding of a sentence; return their ids."""
    console.service.gallery.add(items, console.service.encoder.encode_texts([text] * len(items)))
    return [id_of(console, item.key) for item in items]


def picture_in(content):
    """Decode the bytes of a picture."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def log_lines(console):
    return [json.loads(line) for line in console.log.read_text().splitlines()]


def last_line(console):
    return log_lines(console)[-1]


def logged(console, **fields):
    """Expect fields of the last line of the query log, which is returned."""
    line = last_line(console)
    assert {name: line.get(name) for name in fields} == fields
    return line


def exported(answer):
    """Return the files of an evidence package by name."""
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = archive.namelist()
        assert len(names) == len({*names})
        return {name: archive.read(name) for name in names}


def rows_of(answer):
    return json.loads(exported(answer)["items.json"])["items"]
