"""Templates of the pages with their filters, and the server's metrics."""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.responses import HTMLResponse

from upperson_console import reported, times, translation
from upperson_console.accounts import Account
from upperson_maintenance.retention import counters as erased
from upperson_rt.errors import UppersonError
from upperson_rt.printable import show_percent, show_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upperson_console.service import ConsoleService

STATIC = Path(__file__).parent / "static"
WAITING: ContextVar[Callable[[], int]] = ContextVar("WAITING", default=int)
"""Returns the number of requests that the account of this request may decide."""


@cache
def templates() -> jinja2.Environment:
    """Return the templates, which escape HTML and control characters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=show_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "_": translation.gettext,
        "ngettext": translation.ngettext,
        "word": translation.word,
        "static": _static,
        "reader": translation.reader,
        "script_texts": _script_texts,
        "waiting": lambda: WAITING.get()(),
        "zone_name": times.zone_name,
        "reported": reported,
    }
    environment.filters |= {
        "ago": times.age,
        "clock": lambda seconds: times.local_time(seconds).partition(" ")[2],
        "input_time": lambda seconds: times.local_time(seconds, "%Y-%m-%dT%H:%M:%S"),
        "is_twice": times.is_twice,
        "iso_text": times.iso_text,
        "local_time": times.local_time,
        "number": _number,
        "percent": lambda share: show_percent(share).replace(" ", "\u00a0"),
        "period": times.period,
        "sentence": translation.sentence,
    }
    return environment


def render(name: str, account: Account | None, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page."""
    html = templates().get_template(f"{name}.html.j2").render(account=account, **values)
    return HTMLResponse(html, status)


def local_path(place: str) -> str:
    """Return a path of this server; any other address becomes the first page."""
    is_local = place.startswith("/") and not place.startswith(("//", "/\\"))
    return place if is_local and place.isprintable() else "/"


@jinja2.pass_context
def _number(_: jinja2.runtime.Context, value: float, form: str = ",") -> str:
    """Return a number in the reader's language; with a context, no constant is folded."""
    return translation.number(value, form)


@cache
def _static(name: str) -> str:
    """Return the address of a static file, which changes with its content."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?{digest}"


@cache
def script_keys() -> list[str]:
    """Return the texts of the script, which it writes as ``_("text")``."""
    script = (STATIC / "console.js").read_text(encoding="utf-8")
    return re.findall(r'\b_\("([^"]+)"', script)


def _script_texts() -> dict[str, str]:
    """Return what the script shows in the reader's language, by its English texts."""
    found = {key: translation.gettext(key) for key in script_keys()}
    return {key: text for key, text in found.items() if text != key}


# --- Metrics for Prometheus


class _Collector:
    def __init__(self, service: "ConsoleService", account: Account) -> None:
        self._service, self._account = service, account

    def collect(self) -> "Iterator[CounterMetricFamily | GaugeMetricFamily]":
        service, queue = self._service, self._service.queue
        counters = {
            "searches": ("Searches.", service.searches),
            "encoder_turns": ("Requests that the encoder served.", queue.served),
            "encoder_refusals": ("Requests refused because the queue was full.", queue.refused),
            "quota_refusals": ("Requests refused by the view quota.", service.view_log.refusals),
            "encoder_busy_seconds": ("Seconds in which the encoder worked.", queue.busy_s),
            **erased(),
        }
        broken = int(bool(service.log.problem))
        gauges = {
            "encoder_waiting": ("Requests that run at the encoder or wait for it.", queue.waiting),
            "kept_picture_bytes": ("Bytes of cached pictures.", service.pictures.kept_bytes),
            "log_broken": ("1 while a break of the query log is not acknowledged.", broken),
        }
        for kind, values in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (text, value) in values.items():
                yield kind(f"upperson_serve_{name}", text, value=value)
        yield from self._shift()

    def _shift(self) -> "Iterator[GaugeMetricFamily]":
        """How far the pictures of each camera are from those of the score calibration."""
        judge = self._service.current.last.search.judge
        if judge.calibration is None or judge.shift is None:
            return
        text = "Squared distance of a camera's pictures from those of the score calibration."
        distance = GaugeMetricFamily(
            "upperson_score_shift_distance", text, labels=["camera", "period"]
        )
        with suppress(UppersonError):  # Of a gallery that cannot be read now.
            for group in judge.shift.groups():
                if self._account.sees(group.camera):
                    period = "night" if group.is_night else "day"
                    distance.add_metric([group.camera or "", period], group.distance)
        yield distance
        text = "Distance from which scores of a camera are not calibrated."
        limit = judge.calibration.reference.threshold
        yield GaugeMetricFamily("upperson_score_shift_limit", text, value=limit)


def server_metrics(service: "ConsoleService", account: Account) -> str:
    """Return the metrics in the text format of Prometheus, of the cameras that an account sees."""
    registry = CollectorRegistry()
    registry.register(_Collector(service, account))
    return generate_latest(registry).decode()
