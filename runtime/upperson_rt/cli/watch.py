"""`upperson-rt watch`."""

import os
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.ending import ending_gently, leave_open
from upperson_rt.cli.opening import open_announced, open_store
from upperson_rt.cli.options import (
    BackendOption,
    BundleOption,
    Debug,
    DetectorClass,
    DetectorLayout,
    DetectorScore,
    DeviceOption,
    GalleryOption,
    Json,
    NetrcOption,
    Threads,
    TrustOption,
    VariantOption,
    default_bundle,
    default_gallery,
    unix_seconds,
)
from upperson_rt.cli.output import live_display, print_json, print_note
from upperson_rt.cli.watch_status import (
    print_summary,
    progress_line,
    status_table,
)
from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.printable import count_of, local_time

if TYPE_CHECKING:
    from upperson_rt.camera import Pipeline, PipelineStats, Source

__all__ = ["watch"]

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_REDRAW_S = 0.5
_TELL_S = 10.0
"""Between two lines about the progress, where stderr is no terminal."""
_COMMITTING = "committing what was accepted; Ctrl-C or SIGTERM ends it at once"


def watch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Video file, rtsp:// or http:// address, /dev/video0, or GStreamer pipeline; "
            "with NAME= in front to name the camera.",
        ),
    ],
    bundle: BundleOption = default_bundle,
    trust: TrustOption = None,
    gallery: GalleryOption = default_gallery,
    logins: NetrcOption = None,
    camera: Annotated[
        str | None,
        typer.Option("--camera", help="Name of the camera, if there is one source."),
    ] = None,
    detector: Annotated[
        str,
        typer.Option(
            "--detector",
            help="hog (OpenCV's, weak), FILE.onnx (YOLO, YOLOX, RT-DETR, D-FINE, RF-DETR), "
            "FILE.json (boxes of this very video), or MODULE:FACTORY of your own.",
        ),
    ] = "hog",
    detector_layout: DetectorLayout = None,
    detector_class: DetectorClass = None,
    detector_score: DetectorScore = None,
    tracker: Annotated[
        str,
        typer.Option(
            "--tracker",
            help="What follows people: upperson, or bytetrack, ocsort, botsort (extra trackers).",
        ),
    ] = "upperson",
    every: Annotated[
        float,
        typer.Option("--every", min=0.0, help="Seconds between two pictures of one person."),
    ] = 2.0,
    min_height: Annotated[
        int, typer.Option("--min-height", min=1, help="Least height of a person, in pixels.")
    ] = 64,
    vectors_only: Annotated[bool, typer.Option("--vectors-only", help="Save no pictures.")] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Pictures run and committed at a time.")
    ] = 16,
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop",
            help="What gives way when the machine is too slow: oldest, newest, or block (files).",
            show_default="oldest; files wait",
        ),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            "--start",
            parser=unix_seconds,
            metavar="TIME",
            help="When files begin: ISO 8601 (local) or unix seconds.",
            show_default="a file's last change minus its length",
        ),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play files no faster than they were taken.")
    ] = False,
    stall: Annotated[
        float,
        typer.Option("--stall", min=0.1, help="Seconds without a picture until it reconnects."),
    ] = 10.0,
    duration: Annotated[
        float | None, typer.Option("--duration", min=0.0, help="Stop after so many seconds.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=0, max=65535, help="Serve Prometheus metrics on 127.0.0.1."
        ),
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option("--metrics-file", metavar="FILE.prom", help="Write them into a file."),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Stderr as JSON lines, without a display.")
    ] = False,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Watch cameras or videos, and add the people in them to the gallery.

    Each person crossing the view becomes a track, and every few seconds the best picture of it is
    added. Live cameras are opened again whenever they fail. Ctrl-C or SIGTERM ends it: what was
    accepted is committed first, and what does not return within 10 s is left behind and named. A
    second one ends it at once. A camera that had to be given up, or that never gave a picture,
    makes the exit code 3, after all others have ended.

    Example: `upperson-rt watch gate=rtsp://10.0.0.5/stream hall=/dev/video0 --detector yolo.onnx`
    """
    named = _named_sources(sources, camera, logins)
    from upperson_rt.camera import (
        CaptureRules,
        Pipeline,
        PipelineSettings,
        QualityRules,
    )
    from upperson_rt.camera.queues import check_policy
    from upperson_rt.camera.source import quiet_opencv
    from upperson_rt.camera.stream import show_ffmpeg_lines
    from upperson_rt.camera.tracker import check_tracker

    with ExitStack() as stack:
        if not debug:
            quiet_opencv()
        elif any(source.kind == "network" for source in named.values()):
            show_ffmpeg_lines()
        policy = None if drop is None else check_policy(drop)
        settings = PipelineSettings(
            tracker=check_tracker(tracker),
            every_s=every,
            quality=QualityRules(min_height_px=min_height),
            save_crops=not vectors_only,
            batch_size=batch_size,
            capture_rules=CaptureRules(stall_s=stall),
        )
        found = open_announced(
            detector, detector_layout, detector_class, detector_score, threads, "videos"
        )
        opening = stack.enter_context(ExitStack())
        opened, _, store = opening.enter_context(
            open_store(
                bundle,
                gallery,
                "image",
                trust=trust,
                variant=variant,
                backend=backend,
                device=device,
                threads=threads,
                create=True,
            )
        )
        pipeline = Pipeline(opened.encoder(), store, settings)
        for name, source in named.items():
            begins = _begin_of_file(name, source) if start is None else start
            pipeline.add_camera(
                name, source, found, drop=policy, start_time=begins, realtime=realtime
            )
        _publish(pipeline, metrics_port, metrics_file, stack)
        failure: UppersonError | None = None
        with ending_gently() as stopped:
            try:
                _run(pipeline, stopped, duration, show=not log_json)
            except UppersonError as error:
                failure = error  # What was counted until then is worth knowing.
        stats = pipeline.stats()
        items = store.count() if failure is None else None
        if stats.stuck:  # A gallery that hangs is not closed: that would hang, too.
            leave_open(pipeline, opening.pop_all() if "gallery_stuck" in stats.failures else None)
    failed = {n: c.error for n, c in stats.cameras.items() if c.state == "failed"}
    silent = {
        name: camera.error or f"nothing came in {stats.seconds:.0f} s"
        for name, camera in stats.cameras.items()
        if named[name].is_live
        and camera.frames_read == camera.frames_dropped.get("empty", 0)
        and name not in failed
    }
    if as_json:
        print_json({"gallery": str(gallery), "items": items, **stats.as_dict()})
    else:
        print_summary(stats, str(gallery), items)
    if failure is not None:
        raise failure
    problems = [
        f"{len(some)} of {count_of(len(named), 'camera')} {what}: "
        + "; ".join(f"{name}: {error}" for name, error in some.items())
        for some, what in (
            (failed, "was given up" if len(failed) == 1 else "were given up"),
            (silent, "never gave a picture"),
        )
        if some
    ]
    if problems:
        raise InputError(". ".join(problems))


def _named_sources(
    texts: list[str], camera: str | None, logins: Path | None
) -> "dict[str, Source]":
    """Return the sources by the names of their cameras."""
    from upperson_rt.camera import StreamReader, parse_source
    from upperson_rt.camera.logins import Logins

    if camera is not None and len(texts) > 1:
        raise UsageError("--camera names one source; with several write  NAME=SOURCE  for each")
    known = Logins() if logins is None else Logins.read(logins)
    named: dict[str, Source] = {}
    for text in texts:
        match = None if os.path.isfile(text) else _NAMED.fullmatch(text)
        source = parse_source(match[2] if match else text)
        StreamReader.require(source)
        name = camera or (match[1] if match else source.default_name)
        if name in named:
            raise UsageError(f"two cameras are called {name}: write  NAME=SOURCE  for each")
        named[name] = known.given_to(source)
    return named


def _begin_of_file(name: str, source: "Source") -> float | None:
    """Return when a file begins as far as one can tell, and say so; None for a live source."""
    from upperson_rt.camera.source import guess_start_time

    if source.is_live:
        return None
    begins = guess_start_time(source)
    print_note(
        f"{name}: the file begins at {local_time(begins)}, going by its last change; "
        "--start sets it"
    )
    return begins


def _publish(pipeline: "Pipeline", port: int | None, file: Path | None, stack: ExitStack) -> None:
    from upperson_rt.camera.prometheus import MetricsFile, MetricsServer

    if port is not None:
        server = MetricsServer(pipeline, port)
        stack.callback(server.close)
        print_note(f"metrics: {server.url}")
    if file is not None:
        stack.callback(MetricsFile(pipeline, file).close)


def _run(pipeline: "Pipeline", stopped: list[int], duration: float | None, show: bool) -> None:
    """Run until every source has ended, a signal has come or time is up; then finish the work."""
    until = float("inf") if duration is None else time.monotonic() + duration
    with ExitStack() as stack:
        redraw = stack.enter_context(live_display(show))
        earlier: PipelineStats | None = None
        told = time.monotonic()
        with pipeline:
            while not stopped and time.monotonic() < until:
                if pipeline.wait(min(_REDRAW_S, max(0.0, until - time.monotonic()))):
                    break
                if redraw is not None:
                    now = pipeline.stats()
                    redraw(status_table(now, earlier))
                    earlier = now
                elif show and time.monotonic() - told >= _TELL_S:
                    print_note(progress_line(pipeline.stats()))
                    told = time.monotonic()
            if redraw is not None:
                redraw(_COMMITTING)
            elif stopped:
                print_note(_COMMITTING)
