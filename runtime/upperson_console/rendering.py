"""Templates of the pages with their filters, and the server's metrics."""

import datetime
import hashlib
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.responses import HTMLResponse

from upperson_console.accounts import Account
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import retention
from upperson_rt.printable import count_of, local_time, show_percent, show_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upperson_console.service import ConsoleService

STATIC = Path(__file__).parent / "static"


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
    environment.globals |= {"static": _static, "count_of": count_of, "zone": _zone}
    environment.filters |= {
        "clock": _clock,
        "ago": _ago,
        "input_time": _input_time,
        "local_time": local_time,
        "percent": lambda share: show_percent(share).replace(" ", "\u00a0"),
        "period": _period,
        "thousands": lambda number: f"{number:,}",
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


@cache
def _static(name: str) -> str:
    """Return the address of a static file, which changes with its content."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?{digest}"


def _zone() -> str:
    return datetime.datetime.now().astimezone().strftime("UTC%z")


def _input_time(seconds: float | None) -> str:
    return local_time(seconds).replace(" ", "T")


def _clock(seconds: float | None) -> str:
    return local_time(seconds).partition(" ")[2]


def _period(first: float | None, last: float | None) -> str:
    """Return ``2026-11-26 06:05:13 \u2013 06:05:19``; the day twice only if it differs."""
    begin, end = local_time(first), local_time(last)
    if begin == end:
        return begin
    day, _, clock = end.partition(" ")
    return f"{begin} \u2013 {clock if begin.startswith(f'{day} ') else end}"


def _ago(seconds: float | None) -> str:
    """Return the age of a time in its largest unit."""
    if seconds is None:
        return "never"
    passed = time.time() - seconds
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if passed >= length:
            return f"{count_of(int(passed / length), unit)} ago"
    return "just now" if passed > -60 else "in the future"


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
            **retention.counters(),
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
