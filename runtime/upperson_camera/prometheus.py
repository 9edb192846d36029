"""Statistics of a pipeline for Prometheus, over HTTP or as a text file."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from upperson_camera.pipeline import Pipeline
from upperson_camera.source import import_extra
from upperson_camera.stats import BOUNDS_S, BY_REASON, HELP
from upperson_maintenance.retention import counters
from upperson_rt.cli.output import print_note
from upperson_rt.errors import InputError
from upperson_rt.printable import get_logger

_log = get_logger(__name__)

_EDGES = range(0, len(BOUNDS_S), 4)
"""Every fourth edge: each is double the one before."""
_DURATIONS = {
    "latency": "From a frame's arrival to its row in the gallery.",
    "encode_latency": "From the choice of a crop to its row in the gallery.",
}


def _prometheus() -> Any:
    what = "prometheus_client", "prometheus-client", "metrics", "publishing metrics"
    prometheus = import_extra(*what)
    import_module("prometheus_client.core")
    return prometheus


class _Collector:
    """Collects the statistics as metric families."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def collect(self) -> Iterator[Any]:
        core, stats = _prometheus().core, self._pipeline.stats()
        counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        plain = {
            name: counter(f"upperson_{name}", text, labels=["camera"])
            for name, text in HELP.items()
            if name not in BY_REASON
        }
        by_reason = {
            name: counter(f"upperson_{name}", HELP[name], labels=["camera", "reason"])
            for name in BY_REASON
        }
        up = gauge("upperson_camera_up", "1 while the camera gives pictures.", labels=["camera"])
        for camera, numbers in stats.cameras.items():
            for name, family in plain.items():
                family.add_metric([camera], getattr(numbers, name))
            for name, family in by_reason.items():
                for reason, number in getattr(numbers, name).items():
                    family.add_metric([camera, reason], number)
            if numbers.state != "removed":
                up.add_metric([camera], float(numbers.state == "running"))
        for reason, number in stats.failures.items():
            by_reason["failures"].add_metric(["", reason], number)
        yield from (*plain.values(), *by_reason.values(), up)
        depth = gauge("upperson_queue_depth", "What waits in a queue.", labels=["queue", "camera"])
        for camera, number in stats.frame_queues.items():
            depth.add_metric(["frames", camera], number)
        depth.add_metric(["crops", ""], stats.crop_queue)
        depth.add_metric(["commits", ""], stats.commit_queue)
        depth.add_metric(["buffer", ""], stats.buffered)
        yield depth
        text = "Bytes that crops take on disk while they wait for the gallery."
        yield gauge("upperson_buffer_bytes", text, value=stats.buffered_bytes)
        text = "0 while a gallery on a server takes no rows."
        yield gauge("upperson_gallery_up", text, value=float(stats.gallery_problem is None))
        text = "Rows that earlier runs had left on disk."
        yield counter("upperson_recovered", text, value=stats.recovered)
        busy_s, text = stats.encoder_busy_s, "Seconds in which the encoder worked."
        yield counter("upperson_encoder_busy_seconds", text, value=busy_s)
        yield counter("upperson_batches", "Batches the encoder ran.", value=stats.batches)
        for name, (text, value) in counters().items():
            yield counter(f"upperson_{name}", text, value=value)
        yield gauge("upperson_uptime_seconds", "Seconds since the start.", value=stats.seconds)
        for name, durations in self._pipeline.durations.items():
            counts, total_s = durations.snapshot()
            buckets = [(f"{BOUNDS_S[edge]:g}", float(sum(counts[: edge + 1]))) for edge in _EDGES]
            buckets.append(("+Inf", float(sum(counts))))
            yield core.HistogramMetricFamily(
                f"upperson_{name}_seconds", _DURATIONS[name], buckets=buckets, sum_value=total_s
            )


def _registry(pipeline: Pipeline) -> Any:
    registry = _prometheus().CollectorRegistry()
    registry.register(_Collector(pipeline))
    return registry


class MetricsServer:
    """Serves the metrics at ``http://ADDRESS:PORT/metrics`` until it is closed."""

    def __init__(self, pipeline: Pipeline, port: int, address: str = "127.0.0.1") -> None:
        """Start serving; a port of 0 takes any that is free.

        Raises:
            BackendError: prometheus-client is not installed.
            InputError: The port cannot be used.
        """
        try:
            self._server, self._thread = _prometheus().start_http_server(
                port, addr=address, registry=_registry(pipeline)
            )
        except OSError as error:
            text = f"metrics cannot be served at {address}:{port}: {error.strerror}"
            raise InputError(text, code="port_not_usable", port=port) from error
        self.url = f"http://{address}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class MetricsFile:
    """Writes the metrics into a file every few seconds, each time as a whole.

    That is how node_exporter's textfile collector wants them; its files end in ``.prom``.
    """

    def __init__(self, pipeline: Pipeline, path: Path, every_s: float = 5.0) -> None:
        """Write the file once, then start a thread that goes on.

        Raises:
            BackendError: prometheus-client is not installed.
            InputError: The file cannot be written.
        """
        self.path = path
        self._registry = _registry(pipeline)
        self._every_s = every_s
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self, within_s: float = 10.0) -> None:
        """Write the last state and end; abandon a disk that is stuck."""
        self._stop.set()
        self._thread.join(within_s)
        if self._thread.is_alive():
            _log.error(
                "metrics %s are left as they are: the disk did not answer within %g s",
                self.path,
                within_s,
                extra={"event": "metrics"},
            )

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(self._every_s)
            try:
                self._write()
            except InputError as error:  # A full disk may be emptied again.
                _log.error("%s", error, extra={"event": "metrics"})

    def _write(self) -> None:
        try:
            _prometheus().write_to_textfile(str(self.path), self._registry)
        except OSError as error:
            text = f"cannot write metrics {self.path}: {error.strerror}"
            raise InputError(text, code="file_not_writable", path=self.path) from error


def publish(pipeline: Pipeline, port: int | None, file: Path | None, stack: ExitStack) -> None:
    """Serve metrics on a port, write them to a file, or both, until the stack ends."""
    if port is not None:
        server = MetricsServer(pipeline, port)
        stack.callback(server.close)
        print_note(f"metrics: {server.url}")
    if file is not None:
        stack.callback(MetricsFile(pipeline, file).close)
