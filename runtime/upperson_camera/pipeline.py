"""Camera pipelines: from pictures in any thread to rows in a gallery."""

import datetime
import math
import secrets
import threading
import time as time_module
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, cast

from upperson_camera.buffered import BufferStage, SendStage
from upperson_camera.cameras import Cameras, end_cameras
from upperson_camera.clips import ClipStage
from upperson_camera.commit import CommitStage
from upperson_camera.crops import EncodeStage
from upperson_camera.disk_buffer import DiskBuffer
from upperson_camera.frames import SubmitResult
from upperson_camera.queues import BoundedQueue, DropPolicy
from upperson_camera.regions import Polygon, Regions
from upperson_camera.settings import (
    CameraOptions,
    CameraSettings,
    PipelineOptions,
    PipelineSettings,
    Shared,
    camera_settings,
    detector_of,
    with_options,
)
from upperson_camera.source import Opener, Source
from upperson_camera.stats import Counters, Durations, Latency, PipelineStats
from upperson_rt.arguments import check_callable, check_number, check_object
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, IntegrityError, UppersonError, UsageError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.snapshots import snapshot_folder
from upperson_rt.ingest.detector import Detector
from upperson_rt.ingest.service import Ingest, Output
from upperson_rt.printable import count_of, error_text, get_logger, safe_repr

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from upperson_rt.preprocess import PixelArray

_log = get_logger(__name__)

_STEP_S = 0.02
_COMMITS_WAITING = 4
_SHARED: Mapping[str, tuple[str, type[UppersonError]]] = {
    "encoder": ("the encoder", BackendError),
    "buffer": ("the buffer on disk", InputError),
    "gallery": ("the gallery", InputError),
    "on_commit": ("on_commit", UppersonError),
}
"""What all cameras share: its name in a message, and the error if it fails or is stuck."""


class Pipeline:
    """Fills a gallery with crops of the people in front of cameras, or in your own frames.

        with upperson_rt.Pipeline(encoder, gallery) as pipeline:
            pipeline.add_camera("gate", "rtsp://10.0.0.5/stream", detector=my_detector)
            pipeline.add_camera("hall")
            ...
            pipeline.submit("hall", frame, boxes)      # from your own loop, in any thread

    Between a picture and its row lie four stages in threads of their own: for each camera capture,
    and detection with tracking and selection; for all cameras one encoder and one writer. The
    queues between them are bounded. The drop policy decides what a full queue drops, and `stats`
    counts everything that was dropped.

    Rows for a gallery on a server are written into a buffer on disk first: while the server is away
    nothing is lost, and memory does not grow. What still waits at the end, `stop` raises; the next
    run sends it.

    If a camera fails, the others go on. If the encoder or the gallery fails, the pipeline stops,
    and every later call raises that error. What is stuck at the end is abandoned.
    """

    def __init__(
        self,
        encoder: Encoder,
        gallery: Gallery,
        settings: PipelineSettings | None = None,
        *,
        on_commit: Callable[[Sequence[Item]], None] | None = None,
        outputs: Sequence[Output] = (),
        **options: "Unpack[PipelineOptions]",
    ) -> None:
        """Take settings and check them; work begins as a context manager or with `start`.

        Args:
            encoder: Whose image tower to use.
            gallery: Opened with the encoder's fingerprint; stays open.
            settings: How to work; the defaults if left out.
            on_commit: Called with the items of each batch once it is durable, in the writer's
                thread; an error in it stops the pipeline.
            outputs: Get the same items, after ``on_commit``.
            options: Fields of `PipelineSettings`, such as ``every_s=5.0``; they go before
                ``settings``. None is the default.

        Raises:
            UsageError: An option is unknown, an argument is of another kind or a number out of
                range, or the gallery has no place for pictures.
            IntegrityError: The gallery holds the embeddings of another model.
        """
        check_object(encoder, "an encoder", ("encode_pixels", "fingerprint", "variant"))
        check_object(gallery, "a gallery", ("add", "fingerprint"))
        if not isinstance(settings, PipelineSettings | None):
            raise UsageError(f"settings must be PipelineSettings, found {safe_repr(settings)}")
        if on_commit is not None:
            check_callable(on_commit, "on_commit")
            callback = SimpleNamespace(
                committed=lambda items, replaced: on_commit(items), close=lambda: None
            )
            outputs = (cast(Output, callback), *outputs)
        self.settings = with_options(settings or PipelineSettings(), options, PipelineOptions)
        if gallery.fingerprint != encoder.fingerprint:
            text = (
                f"gallery {gallery.location} holds embeddings of another model "
                f"({gallery.fingerprint}) than the encoder's ({encoder.fingerprint})"
            )
            raise IntegrityError(text, code="other_model")
        if self.settings.save_crops and gallery.crops_dir is None:
            text = (
                f"gallery {gallery.location} has no place for pictures: keep vectors only "
                "(save_crops=False, or --vectors-only)"
            )
            raise UsageError(text, code="no_place_for_pictures")
        if self.settings.clip_s is not None and not self.settings.save_crops:
            text = "frames and clips belong to saved pictures: save those, or leave out the clips"
            raise UsageError(text, code="clips_without_pictures")
        now = datetime.datetime.now(datetime.timezone.utc)
        # The random part: devices may boot with the same wrong time.
        self.run_name = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        """Unique to this run; a part of its track names, such as ``gate/RUN-7``."""
        self._encoder, self._gallery = encoder, gallery
        self._buffer: DiskBuffer | None = None
        if getattr(gallery, "is_remote", False):  # A program's own gallery may be any object.
            self._buffer = DiskBuffer(self.settings.buffer, gallery, self.settings.buffer_bytes)
        counters, crops_dir = Counters(), gallery.crops_dir if self.settings.save_crops else None
        self._clips: ClipStage | None = None
        if crops_dir is not None:
            limits = self.settings.clip_days, self.settings.clip_mb << 20
            self._clips = ClipStage(crops_dir, counters, *limits)
        self._shared = shared = Shared(
            settings=self.settings,
            run_name=self.run_name,
            encoder=encoder,
            crops=BoundedQueue(self.settings.crop_queue),
            batches=BoundedQueue(_COMMITS_WAITING),
            snapshots=snapshot_folder(gallery),
            buffer=self._buffer,
            clips=self._clips,
            counters=counters,
        )
        self._crops, self._batches = shared.crops, shared.batches
        common = Ingest(encoder, gallery, self.settings.batch_size, outputs), shared
        self._encode = EncodeStage(*common, lambda error: self._fail(error, self._encode.part))
        self._sender: SendStage | None = None
        self._buffering: BufferStage | None = None
        if self._buffer is None:
            self._commit = CommitStage(*common, self._fail_commit)
        else:
            self._commit = self._sender = SendStage(*common, self._fail_commit, self._buffer)
            self._buffering = BufferStage(
                shared, lambda error: self._fail(error, "buffer"), self._buffer, self._sender
            )
        self._cameras = Cameras(shared)
        self._lock = threading.Lock()
        self._started: float | None = None
        self._stopped: float | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._failures: Counter[str] = Counter()

    def add_camera(
        self,
        name: str,
        source: str | Source | None = None,
        detector: Detector | None = None,
        *,
        drop: DropPolicy | None = None,
        start_time: float | None = None,
        realtime: bool = False,
        opener: Opener | None = None,
        zones: Sequence[Polygon] = (),
        masks: Sequence[Polygon] = (),
        **options: "Unpack[CameraOptions]",
    ) -> None:
        """Add a camera, before or after the start.

        Args:
            name: Any name; rows, folders and statistics go by it.
            source: A file, rtsp:// or http:// address, device or GStreamer pipeline, read by the
                pipeline. None for a camera whose frames you `submit`.
            detector: Gets a frame, uint8 **BGR** [H, W, 3], and returns rows of x0, y0, x1, y1 and
                perhaps a score. Needed for a source, and for frames submitted without boxes. One
                that several cameras share is called by one of them at a time. A `CameraDetector`
                makes one for each camera.
            drop: ``oldest`` or ``newest``; or ``block``, the default of a file, which waits. With
                it `submit` waits as well, and nothing is dropped for want of room. A file in real
                time cannot wait.
            start_time: Unix time of a file's first frame; by default its last change minus its
                length, which is right for recordings that were never copied.
            realtime: Play a file as a live camera would: no faster than it was taken, and what
                comes while the queue is full is dropped and counted.
            opener: Opens the source, such as a `Reader` of your own; by default the pipeline's,
                `open_source`.
            zones: Polygons, corners as x and y in shares of the picture's width and height: people
                count where their foot point (middle of the lower edge) or the centre of their box
                lies in one; everywhere if there are none. Others count as ``outside_zone``.
            masks: Polygons: boxes with their foot point in one are ignored (``masked``).
            options: Fields of `PipelineSettings` for this camera (`CameraOptions`).

        Raises:
            UsageError: The name is taken, a source has no detector, an option is unknown, or a
                policy does not fit.
            InputError: The source is nothing that can be read, the time none in unix seconds, or a
                polygon malformed.
            BackendError: OpenCV or PyAV is missing, or it cannot read such a source.
        """
        camera = camera_settings(
            self.settings,
            name,
            source,
            detector,
            drop=drop,
            start_time=start_time,
            realtime=realtime,
            opener=opener,
            regions=Regions(zones=zones, masks=masks),
            options=options,
        )
        self.add_prepared(self.prepare_camera(camera))

    def prepare_camera(self, camera: CameraSettings) -> CameraSettings:
        """Return a camera with its own detector, if it has a `CameraDetector`."""
        found = detector_of(camera, lambda: self._cameras.stats_of(camera.name))
        return replace(camera, detector=found)

    def add_prepared(self, camera: CameraSettings) -> None:
        """Add a camera that `prepare_camera` has returned.

        Raises:
            UsageError: The name is taken, or the pipeline has been stopped.
        """
        with self._lock:
            self._refuse_stopped()
            if self._clips is not None and camera.saves_frames:
                self._clips.start()
            added = self._cameras.add(camera)
            if self._started is not None:
                added.start()

    def remove_camera(self, name: str) -> None:
        """Remove a camera, before or after the start; its name is free again.

        It takes no more frames and finishes those that wait, its tracks give their last pictures,
        and the gallery gets what was accepted (`drain` waits for that). Its counters stay in
        `stats`, and go on if it is added again. A detector or source that does not return is
        abandoned as by `stop`; what waits longer for the encoder ends by itself.

        Raises:
            UsageError: No such camera, the pipeline has been stopped, or a thread of it calls.
        """
        self._refuse_own_threads("remove_camera")
        camera = self._cameras[name]
        self._refuse_stopped()
        patience_s = self.settings.end_within_s
        end_cameras([camera], patience_s, 3 * patience_s, lambda began: None)
        with self._lock:
            self._cameras.forget(camera)

    def set_zones(
        self, camera: str, zones: Sequence[Polygon] = (), masks: Sequence[Polygon] = ()
    ) -> None:
        """Replace the zones and masks of a camera, from its next frame on; see `add_camera`.

        Raises:
            UsageError: No such camera.
            InputError: A polygon is malformed.
        """
        self._cameras[camera].set_regions(Regions(zones=zones, masks=masks))

    def start(self) -> None:
        """Load the image tower and start all threads.

        Raises:
            UsageError: It was started or stopped before.
            InputError: The gallery's folder of pictures cannot be written to.
            BackendError: The image tower cannot be loaded.
            IntegrityError: The image tower gives wrong results.
        """
        self._encoder.backend("image")
        with self._lock:
            if self._started is not None or self._stopping:
                raise UsageError("a pipeline can be started once", code="started_twice")
            if self._buffer is not None:
                self._open_buffer(self._buffer)
            for stage in self._stages:
                stage.start()
            self._started = time_module.monotonic()
            for camera in self._cameras:
                camera.start()

    def _open_buffer(self, buffer: DiskBuffer) -> None:
        if left := buffer.open():
            text = "%s of an earlier run in %s: the gallery gets them first"
            found = count_of(left, "crop waits", "crops wait")
            _log.warning(text, found, buffer.path, extra={"event": "buffered", "waiting": left})
        for other in buffer.others():
            rows = other.rows
            wait = "crops may wait" if rows is None else count_of(rows, "crop waits", "crops wait")
            text = (
                "%s in %s for gallery %s of model %s, which this run does not send: watch with "
                "that address and that model's bundle to send them, or delete the file"
            )
            about = other.gallery or "(unknown)", other.fingerprint or "(unknown)"
            extra = {**other._asdict(), "event": "buffered_for_other"}
            _log.warning(text, wait, other.path, *about, extra=extra)

    def submit(
        self,
        camera: str,
        frame: "PixelArray",
        boxes: Any = None,
        time: float | None = None,
        *,
        tracks: Sequence[str | int] | None = None,
        rgb: bool = False,
        wait_s: float | None = None,
    ) -> SubmitResult:
        """Submit a frame, from any thread; returns at once unless it may wait.

        Args:
            camera: Name of a camera that was added without a source.
            frame: uint8 BGR [H, W, 3]; copied, so its memory is yours again.
            boxes: Rows of x0, y0, x1, y1 and perhaps a score in pixels; an empty list for
                none. None runs the camera's detector.
            time: When it was taken, unix seconds; now, if left out. Frames of a camera come in the
                order of their times.
            tracks: Names of your own tracks, one a box; None has the pipeline track.
            rgb: The frame is RGB instead.
            wait_s: Longest wait for room in the camera's queue; other calls for that camera wait
                meanwhile. None waits as long as it takes if the camera's policy is ``block``, and
                else not at all.

        Returns:
            What became of the frame and of the one that it displaced; true if it was queued.

        Raises:
            UsageError: No such camera, the pipeline does not run, or a thread of it would wait.
            InputError: Not such a frame, time or tracks.
            UppersonError: What stopped the pipeline.
        """
        self._raise_failure()
        known = self._cameras[camera]
        self._refuse_stopped()
        if self._started is None:
            raise UsageError("the pipeline does not run: start it first", code="not_running")
        longest_s = math.inf if known.waits else 0.0
        if wait_s is not None:
            longest_s = check_number(wait_s, "wait_s", least=0.0)
        if longest_s:
            self._refuse_own_threads("submit")
        return known.submit(frame, boxes, time, tracks, rgb, longest_s)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Select the best detections so far, and wait until all accepted frames are committed.

        The pipeline goes on.

        Returns:
            Whether that was reached in time; while frames keep coming, it may never be.

        Raises:
            UsageError: A thread of the pipeline calls it, such as from ``on_commit`` or a detector.
            UppersonError: What stopped the pipeline.
        """
        self._refuse_own_threads("drain")
        until = _deadline(timeout_s)
        for camera in self._cameras:
            camera.flush()
        while not self._is_idle():
            self._raise_failure()
            if time_module.monotonic() > until:
                return False
            time_module.sleep(_STEP_S)
        self._raise_failure()
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every source has ended, which live ones never do; return whether they have.

        Raises:
            UppersonError: What stopped the pipeline.
        """
        until = _deadline(timeout_s)
        while True:
            self._raise_failure()
            cameras = list(self._cameras)
            if cameras and all(camera.is_over for camera in cameras):
                return True
            left = until - time_module.monotonic()
            if left <= 0:
                return False
            time_module.sleep(min(_STEP_S, left))

    def stop(self) -> None:
        """Take no more frames, finish and commit what was accepted, and end all threads.

        What is stuck is abandoned, named in the log and counted in `stats` (``failures``): a
        detector, an encoder, a gallery or ``on_commit`` when one of its calls lasts longer than
        ``end_within_s``. After that time cameras drop the frames that wait. The encoder, the
        gallery and ``on_commit`` have any number of calls that return in time.

        Raises:
            UsageError: A thread of the pipeline calls it, such as from ``on_commit`` or a detector.
            UppersonError: What stopped the pipeline, or was stuck: the encoder or the gallery, and
                accepted crops are lost; or ``on_commit``, and none are; or crops that wait on disk
                for a gallery on a server (``gallery_away``), and none are lost.
        """
        self._refuse_own_threads("stop")
        with self._lock:
            self._stopping = True
            cameras = self._cameras.all
        began = time_module.monotonic()
        end_cameras(cameras, self.settings.end_within_s, math.inf, self._abandon_stuck)
        for detector in list(self._shared.detectors.values()):
            detector.close()  # What was abandoned may still wait for it.
        ends = [self._crops.close, self._batches.close]
        if self._sender is not None:
            ends.append(self._sender.end)
        for end, stage in zip(ends, reversed(self._stages), strict=True):
            end()
            while stage.is_alive:
                self._abandon_stuck(began)
                stage.join(_STEP_S)
        if self._clips is not None:
            self._clips.end(self.settings.end_within_s)
        if self._buffer is not None and self._sender is not None:
            self._close_buffer(self._buffer, self._sender.away)
        if self._stopped is None:
            self._stopped = time_module.monotonic()
        self._raise_failure()

    def _close_buffer(self, buffer: DiskBuffer, away: str | None) -> None:
        if not self._failures["buffer_stuck"]:  # Closing it would hang, too.
            buffer.close()
        if self._started is None or not (len(buffer) or away):
            return
        wait = (
            f"{count_of(len(buffer), 'crop waits', 'crops wait')} in {buffer.path} for "
            f"gallery {self._gallery.location}"
        )
        if self._failure is not None:
            event = {"event": "buffered", "waiting": len(buffer)}
            _log.warning("%s: the next run with this folder sends them", wait, extra=event)
            return
        error = BackendError(
            f"{wait}, which takes no rows ({away or 'the time was up'}): nothing is lost, the next "
            "run with this folder sends them",
            code="gallery_away",
            waiting=len(buffer),
            path=buffer.path,
        )
        self._failed(error, "gallery_away")

    def stats(self) -> PipelineStats:
        """Return what was done so far; works at any time, also after the end."""
        ended = self._stopped or time_module.monotonic()
        seconds = 0.0 if self._started is None else ended - self._started
        busy_s = self._encode.busy_s
        return PipelineStats(
            seconds=seconds,
            failures=dict(self._failures),
            cameras=self._cameras.stats(),
            batches=self._encode.count,
            encoder_busy_s=busy_s,
            encoder_busy_share=min(1.0, busy_s / seconds) if seconds else 0.0,
            frame_queues={camera.name: camera.frames_waiting for camera in self._cameras},
            crop_queue=len(self._crops),
            commit_queue=len(self._batches),
            buffered=0 if self._buffer is None else len(self._buffer),
            buffered_bytes=0 if self._buffer is None else self._buffer.size_bytes,
            gallery_problem=None if self._sender is None else self._sender.problem,
            recovered=0 if self._sender is None else self._sender.recovered,
            latency=Latency.of(self._commit.latency),
            encode_latency=Latency.of(self._commit.encode_latency),
        )

    @property
    def durations(self) -> dict[str, Durations]:
        """The histograms behind the latencies, by the names of `PipelineStats`."""
        return {"latency": self._commit.latency, "encode_latency": self._commit.encode_latency}

    def __enter__(self) -> "Pipeline":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except BaseException as failure:
            if error is None:
                raise
            _log.error("the pipeline had failed as well: %s", failure)

    def _abandon_stuck(self, since: float) -> None:
        """Abandon an encoder, a gallery or an output that does not return."""
        limit_s = self.settings.end_within_s
        for stage in self._stages:
            if stage.call_s(since) > limit_s and (part := stage.abandon()) is not None:
                if part == "gallery" and self._buffer is not None:  # Its crops are on disk.
                    self._failures["gallery_stuck"] += 1
                    continue
                name, kind = _SHARED[part]
                error = kind(
                    f"{name} did not return within {limit_s:g} s of the end", code=f"{part}_stuck"
                )
                # Without outputs, the rest is still committed.
                self._failed(error, f"{part}_stuck", discard=part != "on_commit")

    @property
    def _stages(self) -> tuple[BufferStage | CommitStage | EncodeStage, ...]:
        """The threads that cameras share, the last one first."""
        if self._buffering is None:
            return (self._commit, self._encode)
        return (self._commit, self._buffering, self._encode)

    def _fail_commit(self, error: BaseException) -> None:
        self._fail(error, self._commit.part)

    def _fail(self, error: BaseException, part: str) -> None:
        """Stop everything: without encoder and gallery all work is lost."""
        if not isinstance(error, Exception):  # SystemExit must not end the caller.
            name, kind = _SHARED[part]
            refusal = kind(f"{name} ended with {error_text(error)}", code=f"{part}_ended")
            refusal.__cause__, error = error, refusal
        self._failed(error, f"{part}_error")

    def _failed(self, error: BaseException, reason: str, discard: bool = True) -> None:
        self._failures[reason] += 1
        self._failure = self._failure or error
        if discard:  # Before logging: its handlers are a plug-in boundary.
            self._discard()
        _log.error("the pipeline stops: %s", error, extra={"event": "failed"})

    def _discard(self) -> None:
        for camera in self._cameras.all:
            camera.refuse_frames()
        self._crops.close()
        self._batches.close()
        lost = [self._crops.clear(), *(crops for crops, _ in self._batches.clear())]
        for crops in lost:
            self._shared.counters.count_crops(crops, "crops_dropped.failed")

    def _refuse_own_threads(self, what: str) -> None:
        """Raise UsageError in a thread of the pipeline: it would wait for itself."""
        of_cameras = [stage for camera in self._cameras.all for stage in camera.stages]
        for stage in (*self._stages, *of_cameras):
            if stage.is_current:
                text = (
                    f"{what} was called from {stage.part}, for which it would wait: call it from a "
                    "thread of your own"
                )
                raise UsageError(text, code="called_from_own_thread", call=what, part=stage.part)

    def _refuse_stopped(self) -> None:
        if self._stopping:
            raise UsageError("the pipeline has been stopped: make a new one", code="not_running")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _is_idle(self) -> bool:
        """Check from the first stage to the last, so that no crop slips past."""
        return (
            all(camera.is_idle for camera in self._cameras.all)
            and self._crops.is_idle
            and self._batches.is_idle
            and (self._sender is None or self._sender.is_idle)
        )


def _deadline(timeout_s: float | None) -> float:
    if timeout_s is None:
        return math.inf
    return time_module.monotonic() + check_number(timeout_s, "timeout_s")
