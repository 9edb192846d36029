"""`upperson-rt watch`."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_camera.cli.options import Connection, NetrcOption
from upperson_camera.cli.sources import (
    begin_of_file,
    named_sources,
    open_config,
    open_detector,
    read_logins,
    refuse_beside,
    with_access,
)
from upperson_camera.cli.summary import print_summary, progress_line, status_table
from upperson_maintenance.cli.retention import Keeping
from upperson_rt.cli.app import ending_gently, leave_open
from upperson_rt.cli.groups import ADVANCED, OptionGroup, grouped
from upperson_rt.cli.opening import open_store
from upperson_rt.cli.options import (
    Debug,
    DetectorClass,
    DetectorInput,
    DetectorLayout,
    DetectorScore,
    GalleryOption,
    Json,
    Model,
    age_seconds,
    default_gallery,
    unix_seconds,
)
from upperson_rt.cli.output import (
    live_display,
    print_json,
    print_note,
)
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_camera import Pipeline, PipelineSettings, PipelineStats, Source
    from upperson_camera.config import CamerasFile

_REDRAW_S = 0.5
_PROGRESS_S = 10.0
"""Between two lines about the progress, where stderr is no terminal."""
_LOST_OF_BUFFER = "the next run sends what is in the buffer on disk, other unfinished work is lost"
_COMMITTING = "committing what was accepted; Ctrl-C or SIGTERM ends it at once"


@dataclass(frozen=True)
class Tuning(OptionGroup, panel=ADVANCED):
    """How sources are read and crops are made."""

    realtime: Annotated[
        bool,
        typer.Option(
            "--realtime", help="Play files at their own pace; drop frames as a camera would."
        ),
    ] = False
    hwaccel: Annotated[
        str,
        typer.Option(
            "--hwaccel",
            metavar="DEVICE",
            help="Decode on a device that FFmpeg has: auto, or its name, such as cuda or vaapi.",
        ),
    ] = "none"
    stall: Annotated[
        float,
        typer.Option("--stall", min=0.1, help="Seconds without a picture until it reconnects."),
    ] = 10.0
    reconnect_max: Annotated[
        float,
        typer.Option(
            "--reconnect-max", min=0.1, help="Most seconds between two attempts to reconnect."
        ),
    ] = 3.0
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop",
            help="What gives way when the machine is too slow: oldest, newest, or block (files).",
            show_default="oldest; files wait",
        ),
    ] = None
    tracker: Annotated[
        str,
        typer.Option(
            "--tracker",
            metavar="NAME[:OPTION=VALUE,...]",
            help="Tracker: upperson, or bytetrack, ocsort, botsort (extra trackers).",
        ),
    ] = "upperson"
    motion_gate: Annotated[
        bool,
        typer.Option(
            "--motion-gate/--no-motion-gate",
            help="Search frames with motion only, and one every 5 s.",
        ),
    ] = True
    detect_fps: Annotated[
        float | None,
        typer.Option(
            "--detect-fps",
            min=0.01,
            metavar="N",
            help="Most frames a second of a camera that are searched.",
            show_default="all",
        ),
    ] = None
    min_height: Annotated[
        int,
        typer.Option("--min-height", min=1, help="Least height of a person, in pixels."),
    ] = 64
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, help="Pictures run and committed at a time."),
    ] = 16
    commit_every: Annotated[
        float | None,
        typer.Option(
            "--commit-every",
            parser=age_seconds,
            metavar="AGE",
            show_default="at once",
            help="Commit pictures together after so long, such as 10s, or when there are 2,048: "
            "spares SD cards. A power cut may lose those that wait, never the gallery.",
        ),
    ] = None
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            metavar="NAME",
            help="Installed output that also gets each committed row. Repeatable.",
        ),
    ] = None
    buffer: Annotated[
        Path,
        typer.Option(
            "--buffer",
            metavar="FOLDER",
            help="Where pictures wait while a gallery on a server is away.",
        ),
    ] = Path("buffer")
    buffer_size: Annotated[
        int,
        typer.Option(
            "--buffer-size",
            min=1,
            metavar="MB",
            help="From this size on no more pictures are accepted, and files wait.",
        ),
    ] = 1024
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            "--metrics-file", metavar="FILE.prom", help="Write Prometheus metrics into a file."
        ),
    ] = None


@dataclass(frozen=True)
class Playback(OptionGroup, panel="Cameras"):
    """How sources are named, and when they begin and end."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.yaml",
            help="Cameras with zones and settings of their own, instead of SOURCE; read again "
            "when it changes.",
        ),
    ] = None
    camera: Annotated[
        str | None,
        typer.Option("--camera", help="Name of the camera, if there is one source."),
    ] = None
    logins: NetrcOption = None
    start: Annotated[
        float | None,
        typer.Option(
            "--start",
            parser=unix_seconds,
            metavar="TIME",
            help="When files begin: ISO 8601 (local) or unix seconds.",
            show_default="a file's last change minus its length",
        ),
    ] = None
    duration: Annotated[
        float | None, typer.Option("--duration", min=0.0, help="Stop after so many seconds.")
    ] = None


@dataclass(frozen=True)
class Detection(OptionGroup, panel=ADVANCED):
    """What finds people."""

    detector: Annotated[
        str,
        typer.Option(
            "--detector",
            help="auto (the best one installed), nanodet, ssdlite, hog (OpenCV's, weak), FILE.onnx "
            "(YOLO, YOLOX, RT-DETR, D-FINE, RF-DETR, NanoDet, SSD), FILE.xml (OpenVINO's IR), "
            "FILE.json (boxes of this very video), or MODULE:FACTORY of your own.",
            rich_help_panel="Detection and crops",
        ),
    ] = "auto"
    detector_layout: DetectorLayout = None
    detector_class: DetectorClass = None
    detector_score: DetectorScore = None
    detector_input: DetectorInput = None


@dataclass(frozen=True)
class ModelAndGallery(Model, panel="Model and gallery"):
    """The exported model, and the gallery that is filled."""

    gallery: GalleryOption = default_gallery


@dataclass(frozen=True)
class Crops(OptionGroup, panel="Detection and crops"):
    """Which crops are added."""

    every: Annotated[
        float,
        typer.Option("--every", min=0.0, help="Seconds between two pictures of one person."),
    ] = 2.0
    still_every: Annotated[
        float,
        typer.Option("--still-every", min=0.0, help="The same while the person stands still."),
    ] = 300.0
    vectors_only: Annotated[bool, typer.Option("--vectors-only", help="Save no pictures.")] = False
    clips: Annotated[
        float | None,
        typer.Option(
            "--clips",
            min=0.0,
            max=60.0,
            metavar="SECONDS",
            help="Also save the whole frame of each picture, and a clip from so many seconds "
            "before to so many after it; 0 for the frame only. Devices and GStreamer give no clip.",
            show_default="neither",
        ),
    ] = None
    clips_days: Annotated[
        float,
        typer.Option(
            "--clips-days",
            min=0.001,
            metavar="DAYS",
            help="Delete frames and clips after so many days.",
        ),
    ] = 7.0
    clips_size: Annotated[
        int,
        typer.Option(
            "--clips-size",
            min=1,
            metavar="MiB",
            help="Most MiB of frames and clips; the oldest are deleted first.",
        ),
    ] = 4096


@dataclass(frozen=True)
class Reports(OptionGroup, panel="Output"):
    """How the command reports."""

    as_json: Json = False
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=0, max=65535, help="Serve Prometheus metrics on 127.0.0.1."
        ),
    ] = None
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Stderr as JSON lines, without a display.")
    ] = False
    debug: Debug = False


@grouped
def watch(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Video file, rtsp:// or http:// address, /dev/video0, or GStreamer pipeline; "
            "with NAME= in front to name the camera.",
            show_default=False,
        ),
    ] = None,
    *,
    playback: Playback,
    detection: Detection,
    crops: Crops,
    model: ModelAndGallery,
    keeping: Keeping,
    reports: Reports,
    tuning: Tuning,
    connection: Connection,
) -> None:
    """Watch cameras or videos, and add the people in them to the gallery.

    Each person becomes a track, and every few seconds the best crop of it is added. Live cameras
    are opened again whenever they fail. Ctrl-C or SIGTERM ends it: what was accepted is committed
    first, and what does not return within 10 s is abandoned and named. A second one ends it at
    once. If a camera failed or never gave a picture, the exit code is 3 after all others have
    ended.

    Example: `upperson-rt watch gate=rtsp://10.0.0.5/stream hall=/dev/video0 --detector yolo.onnx`
    """
    beside = {"--camera": playback.camera, "--insecure": connection.insecure}
    refuse_beside(playback.config, SOURCE=sources, **beside)
    logins = read_logins(playback.logins)
    named = with_access(named_sources(sources or [], playback.camera, logins), connection)
    from upperson_camera import Pipeline
    from upperson_camera.decoding import find_hwaccel, show_ffmpeg_lines
    from upperson_camera.late_gallery import open_now_or_later
    from upperson_camera.prometheus import publish
    from upperson_camera.queues import check_policy
    from upperson_camera.source import quiet_opencv
    from upperson_maintenance.retention import RetentionThread
    from upperson_rt.ingest.service import open_outputs

    if not reports.debug:
        quiet_opencv()
    elif playback.config or any(one.kind in ("file", "network") for one in named.values()):
        show_ffmpeg_lines()
    _, decodes = find_hwaccel(tuning.hwaccel)
    if tuning.hwaccel != "none" and named:  # A file of cameras says it for each.
        print_note(decodes)
        named = {name: replace(source, hwaccel=tuning.hwaccel) for name, source in named.items()}
    retention = keeping.retention()
    policy = None if tuning.drop is None else check_policy(tuning.drop)
    settings = _settings(crops, tuning)
    with ExitStack() as stack:
        file: CamerasFile | None = None
        if playback.config is None:
            found = open_detector(
                model.threads,
                detection.detector,
                detection.detector_layout,
                detection.detector_class,
                detection.detector_score,
                detection.detector_input,
            )
        else:
            defaults = _defaults(playback, detection, tuning, connection)
            file = open_config(playback.config, settings, logins, model.threads, defaults)
        opening = stack.enter_context(ExitStack())
        opened, _, store = opening.enter_context(
            open_store(model, model.gallery, "image", opening=open_now_or_later)
        )
        sinks = stack.enter_context(ExitStack())
        outputs = open_outputs(tuning.outputs or ())
        for output in outputs:
            sinks.callback(output.close)
        pipeline = Pipeline(opened.encoder(), store, settings, outputs=outputs)
        if file is not None:
            file.start(pipeline)
        for name, source in named.items():
            begins = begin_of_file(name, source) if playback.start is None else playback.start
            pipeline.add_camera(
                name, source, found, drop=policy, start_time=begins, realtime=tuning.realtime
            )
        if retention is not None:
            opening.enter_context(closing(RetentionThread(retention, store)))
        publish(pipeline, reports.metrics_port, tuning.metrics_file, stack)
        failure: UppersonError | None = None
        lost = (_LOST_OF_BUFFER,) if store.is_remote else ()
        with ending_gently(*lost) as stopped:
            try:
                _run(pipeline, stopped, playback.duration, not reports.log_json, file)
            except UppersonError as error:
                failure = error  # What was counted until then is still reported.
        stats = pipeline.stats()
        items = None if failure is not None or stats.stuck else store.count()
        if stats.stuck:  # What hangs is not closed: that would hang, too.
            leave_open(
                pipeline,
                opening.pop_all() if "gallery_stuck" in stats.failures else None,
                sinks.pop_all() if "on_commit_stuck" in stats.failures else None,
            )
    if reports.as_json:
        print_json({"gallery": model.gallery, "items": items, **stats.as_dict()})
    else:
        print_summary(stats, model.gallery, items)
    if failure is not None:
        raise failure
    _refuse_failed(stats, named if file is None else file.sources)


def _defaults(
    playback: Playback, detection: Detection, tuning: Tuning, connection: Connection
) -> dict[str, object]:
    """Return what holds for cameras of a file that do not say otherwise, by the file's keys."""
    return {
        **asdict(detection),
        "drop": tuning.drop,
        "realtime": tuning.realtime,
        "hwaccel": tuning.hwaccel,
        "start_time": playback.start,
        "ca": None if connection.ca is None else str(connection.ca),
        "allow_hosts": connection.allow_host or (),
    }


def _settings(crops: Crops, tuning: Tuning) -> "PipelineSettings":
    from upperson_camera import CaptureRules, PipelineSettings
    from upperson_rt.ingest.boxes import QualityRules

    return PipelineSettings(
        tracker=tuning.tracker,
        motion_gate=tuning.motion_gate,
        detect_fps=tuning.detect_fps,
        every_s=crops.every,
        still_every_s=crops.still_every,
        quality=QualityRules(min_height_px=tuning.min_height),
        save_crops=not crops.vectors_only,
        clip_s=crops.clips,
        clip_days=crops.clips_days,
        clip_mb=crops.clips_size,
        batch_size=tuning.batch_size,
        commit_every_s=tuning.commit_every or 0.0,
        buffer=tuning.buffer,
        buffer_bytes=tuning.buffer_size << 20,
        capture_rules=CaptureRules(stall_s=tuning.stall, longest_wait_s=tuning.reconnect_max),
    )


def _refuse_failed(stats: "PipelineStats", named: "Mapping[str, Source]") -> None:
    """Raise InputError if a camera failed, or a live one never gave a picture."""
    cameras = {name: stats.cameras[name] for name in named}  # Not those that were removed.
    failed = {n: c.error for n, c in cameras.items() if c.state == "failed"}
    silent = {
        name: camera.error or f"nothing came in {stats.seconds:.0f} s"
        for name, camera in cameras.items()
        if named[name].is_live
        and camera.frames_read == camera.frames_dropped.get("empty", 0)
        and name not in failed
    }
    problems = [
        f"{len(some)} of {count_of(len(named), 'camera')} {what}: "
        + "; ".join(f"{name}: {error}" for name, error in some.items())
        for some, what in ((failed, "failed"), (silent, "never gave a picture"))
        if some
    ]
    if problems:
        raise InputError(". ".join(problems), code="camera_failed", failed=failed, silent=silent)


def _run(
    pipeline: "Pipeline",
    stopped: list[int],
    duration: float | None,
    show: bool,
    file: "CamerasFile | None",
) -> None:
    """Run until all sources have ended, a signal comes or the time is up; then commit."""
    until = float("inf") if duration is None else time.monotonic() + duration
    with ExitStack() as stack:
        redraw = stack.enter_context(live_display(show))
        earlier: PipelineStats | None = None
        last_line = time.monotonic()
        with pipeline:
            while not stopped and time.monotonic() < until:
                if pipeline.wait(min(_REDRAW_S, max(0.0, until - time.monotonic()))):
                    break
                if file is not None and (changes := file.poll()) is not None:
                    print_note(changes)
                if redraw is not None:
                    now = pipeline.stats()
                    redraw(status_table(now, earlier))
                    earlier = now
                elif show and time.monotonic() - last_line >= _PROGRESS_S:
                    print_note(progress_line(pipeline.stats()))
                    last_line = time.monotonic()
            if redraw is not None:
                redraw(_COMMITTING)
            elif stopped:
                print_note(_COMMITTING)
