"""What the server counts, as text for Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upperson_rt.serve.desk import Desk

__all__ = ["server_metrics"]


class _Collector:
    def __init__(self, desk: "Desk") -> None:
        self._desk = desk

    def collect(self) -> "Iterator[CounterMetricFamily | GaugeMetricFamily]":
        turns = self._desk.questions.turns
        for name, text, value in (
            ("searches", "Searches that were answered.", self._desk.searches),
            ("encoder_turns", "Times the encoder ran for the console.", turns.taken),
            ("encoder_refusals", "Requests refused because too many waited.", turns.refused),
            ("encoder_busy_seconds", "Seconds in which the encoder worked.", turns.busy_s),
        ):
            yield CounterMetricFamily(f"upperson_serve_{name}", text, value=value)
        kept = self._desk.pictures.kept_bytes
        for name, text, value in (
            ("encoder_waiting", "Requests at the encoder.", turns.waiting),
            ("kept_picture_bytes", "Bytes of pictures that are kept ready.", kept),
        ):
            yield GaugeMetricFamily(f"upperson_serve_{name}", text, value=value)


def server_metrics(desk: "Desk") -> str:
    """Return the metrics of a desk."""
    registry = CollectorRegistry()
    registry.register(_Collector(desk))
    return generate_latest(registry).decode()
