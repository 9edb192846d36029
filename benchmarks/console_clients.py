"""Those who ask the console in its benchmark: one by itself, and many at once."""

import asyncio
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown", "pink", "purple")
_CLOTHES = ("coat", "jacket", "shirt", "dress", "hoodie", "sweater")
_PEOPLE = ("woman", "man", "girl", "boy", "person")
_THUMBNAILS = 6
_ALONE = 100
_PAGES = {
    "start": "/",
    "a search": "/?q=woman+in+a+red+coat",
    "a person": "/people/1?q=woman+in+a+red+coat",
    "live": "/live",
    "records": "/records",
    "records, every line checked": "/records?check=true",
    "API: an item": "/api/v1/items/1",
    "API: cameras": "/api/v1/cameras",
    "API: info": "/api/v1/info",
}


def ask_alone(url: str) -> tuple[float, list[float], list[float]]:
    """Return the seconds of the first search, of others, and of thumbnails, with nobody beside."""
    import httpx

    searches, thumbnails = [], []
    chance = random.Random(0)
    with httpx.Client(base_url=url, timeout=600) as client:
        for _ in range(_ALONE + 1):
            began = time.monotonic()
            answer = client.post("/api/v1/search", json={"sentence": _sentence(chance)})
            searches.append(time.monotonic() - began)
            answer.raise_for_status()
            for hit in answer.json()["hits"][:_THUMBNAILS]:
                if hit["picture"] is not None:
                    began = time.monotonic()
                    client.get(hit["picture"] + "?size=thumb").raise_for_status()
                    thumbnails.append(time.monotonic() - began)
    return searches[0], searches[1:], thumbnails


def open_pages(url: str) -> dict[str, list[int]]:
    """Return the milliseconds of pages when they are opened first, and once more."""
    import httpx

    took: dict[str, list[int]] = {}
    with httpx.Client(base_url=url, timeout=600) as client:
        for name, path in _PAGES.items():
            for _ in range(2):
                began = time.monotonic()
                answer = client.get(path)
                took.setdefault(name, []).append(round(1000 * (time.monotonic() - began)))
                if answer.status_code != 404:  # An empty gallery has no first item.
                    answer.raise_for_status()
    return took


@dataclass(frozen=True)
class Sample:
    """A look at the server while it is asked."""

    memory_mb: int
    rows: int
    """Added so far."""
    kept_bytes: int
    """Of pictures that it keeps ready."""


class Load:
    """Clients who each search and look, again and again."""

    def __init__(self, url: str, look: Callable[[], tuple[int, int]]) -> None:
        """Ask a server.

        Args:
            url: Where it answers.
            look: Returns its memory in MB and how many rows have been added.
        """
        self._url, self._look = url, look
        self.samples: list[Sample] = []
        self._answered: list[tuple[str, int, float]] = []

    @property
    def statuses(self) -> list[str]:
        """Kind and status of each answer."""
        return [f"{kind} {status}" for kind, status, _ in self._answered]

    def seconds_of(self, kind: str) -> list[float]:
        """Return what answers of a kind took that were none of an error."""
        return [took for own, status, took in self._answered if (own, status) == (kind, 200)]

    async def go(self, clients: int, seconds: float, every_second: Callable[[], None]) -> None:
        """Let so many ask for so long."""
        import httpx

        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:

            async def get(kind: str, path: str) -> None:
                began = time.monotonic()
                answer = await client.get(path)
                self._answered.append((kind, answer.status_code, time.monotonic() - began))

            async def ask(number: int) -> None:
                chance = random.Random(number)
                while time.monotonic() < until:
                    began = time.monotonic()
                    answer = await client.post(
                        "/api/v1/search", json={"sentence": _sentence(chance)}
                    )
                    took = time.monotonic() - began
                    self._answered.append(("search", answer.status_code, took))
                    if answer.status_code == 429:
                        after = float(answer.headers["retry-after"])
                        await asyncio.sleep(after * chance.uniform(0.5, 1))
                        continue
                    for hit in answer.json().get("hits", [])[:_THUMBNAILS]:
                        if hit["picture"] is not None:
                            await get("picture", hit["picture"] + "?size=thumb")

            async def look() -> None:
                while True:
                    metrics = (await client.get("/api/v1/metrics")).text
                    kept = re.search(r"^upperson_serve_kept_picture_bytes (\S+)", metrics, re.M)
                    assert kept is not None, metrics
                    memory_mb, rows = await asyncio.to_thread(self._look)
                    self.samples.append(Sample(memory_mb, rows, int(float(kept[1]))))
                    if time.monotonic() >= until:
                        break
                    await asyncio.to_thread(every_second)
                    await asyncio.sleep(1)

            await asyncio.gather(look(), *(ask(number) for number in range(clients)))


def quantiles(seconds: list[float]) -> list[int]:
    """Return p50, p95 and p99 in milliseconds."""
    if not seconds:
        return []
    return [round(1000 * float(np.quantile(seconds, part))) for part in (0.5, 0.95, 0.99)]


def _sentence(chance: random.Random) -> str:
    upper = f"{chance.choice(_COLOURS)} {chance.choice(_CLOTHES)}"
    return f"{chance.choice(_PEOPLE)} in a {upper} and {chance.choice(_COLOURS)} trousers"
