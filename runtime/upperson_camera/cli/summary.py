"""What `upperson-rt watch` shows of a pipeline: a table, a line of progress, and a summary."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from upperson_rt.cli.output import PlainTable, new_table, print_line
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_camera import PipelineStats

_OK = {"running", "ended", "removed"}


def status_table(now: "PipelineStats", earlier: "PipelineStats | None") -> PlainTable:
    """Return a line a camera, and one for the encoder; rates are those since ``earlier``."""
    right = ("frames/s", "dropped", "people", "added")
    table = new_table("camera", "", *right, right=right)
    for name, camera in now.cameras.items():
        if camera.state == "removed":
            continue
        table.add_row(
            name,
            (camera.state, "green" if camera.state in _OK else "yellow"),
            f"{_rate(now, earlier, name):.1f}",
            str(sum(camera.frames_dropped.values())),
            str(camera.tracks),
            str(camera.committed),
        )
    seconds = now.seconds - (earlier.seconds if earlier else 0.0)
    busy_s = now.encoder_busy_s - (earlier.encoder_busy_s if earlier else 0.0)
    share = min(1.0, busy_s / seconds) if seconds > 0 else 0.0
    table.add_row("encoder", f"{share:.0%} busy", "", "", "", f"{now.crop_queue} wait")
    if now.buffered:
        state = ("away", "yellow") if now.gallery_problem else ""
        table.add_row("gallery", state, "", "", "", f"{now.buffered} wait on disk")
    return table


def print_summary(stats: "PipelineStats", gallery: str, items: int | None) -> None:
    """Print a summary on stdout; ``items`` is None if the gallery failed."""
    holds = "failed" if items is None else f"now holds {items}"
    print_line(
        f"added {count_of(stats.total('committed'), 'picture')} in {stats.seconds:.1f} s; "
        f"{count_of(stats.total('tracks'), 'track')} followed; gallery '{gallery}' {holds}"
    )
    skipped = stats.dropped("frames_skipped")
    print_line(
        f"frames: {stats.total('frames_read')} read, {stats.total('frames_processed')} searched, "
        + (f"skipped {_reasons(skipped)}, " if skipped else "")
        + f"dropped {_reasons(stats.dropped('frames_dropped'))}"
    )
    print_line(
        f"people: {count_of(stats.total('detections'), 'box', 'boxes')}, "
        f"{stats.total('accepted')} accepted, left out {_reasons(stats.dropped('crops_dropped'))}"
    )
    if stats.recovered:
        print_line(f"{count_of(stats.recovered, 'picture')} of earlier runs had waited on disk")
    if stats.buffered:
        print_line(f"{count_of(stats.buffered, 'picture')} wait on disk for the gallery")
    lost = stats.dropped("clips_dropped")
    if lost or stats.total("whole_frames"):
        print_line(
            f"{count_of(stats.total('whole_frames'), 'whole frame')} and "
            f"{count_of(stats.total('clips'), 'clip')} saved, left out {_reasons(lost)}"
        )
    if replaced := stats.total("replaced"):
        print_line(f"{count_of(replaced, 'picture')} took the place of what was there before")
    if others := {n: c.added_by_others for n, c in stats.cameras.items() if c.added_by_others}:
        print_line(f"added by others under the same name of a camera: {_reasons(others)}")
    if stats.total("reconnects") or stats.total("stalls"):
        print_line(
            f"sources: {count_of(stats.total('outages'), 'outage')}, "
            f"{count_of(stats.total('reconnects'), 'attempt')} to open one again, "
            f"{count_of(stats.total('stalls'), 'stall')}"
        )
    if changes := stats.total("resolution_changes"):
        print_line(f"resolution: {count_of(changes, 'change')}")
    if (blank := stats.total("blank_frames")) or stats.total("decoder_errors"):
        print_line(
            f"pictures: {count_of(blank, 'frame')} of one colour, "
            f"{count_of(stats.total('decoder_errors'), 'error')} of the decoder"
        )
    if stats.latency.p50_s is not None and stats.latency.p99_s is not None:
        print_line(
            f"from frame to gallery: {stats.latency.p50_s:.2f} s median, "
            f"{stats.latency.p99_s:.2f} s p99; encoder busy {stats.encoder_busy_share:.0%}"
        )


def progress_line(stats: "PipelineStats") -> str:
    """Return the progress in one line, for a stderr that is no terminal."""
    away = [name for name, camera in stats.cameras.items() if camera.state not in _OK]
    return (
        f"{stats.seconds:.0f} s: {count_of(stats.total('frames_processed'), 'frame')} searched, "
        f"{count_of(stats.total('tracks'), 'track')}, "
        f"{count_of(stats.total('committed'), 'picture')} added"
        + (f"; {count_of(stats.buffered, 'picture')} wait on disk" if stats.buffered else "")
        + "".join(f"; {name} {stats.cameras[name].state}" for name in away)
    )


def _rate(now: "PipelineStats", earlier: "PipelineStats | None", camera: str) -> float:
    frames, seconds = now.cameras[camera].frames_read, now.seconds
    if earlier is not None and camera in earlier.cameras:
        frames -= earlier.cameras[camera].frames_read
        seconds -= earlier.seconds
    return frames / seconds if seconds > 0 else 0.0


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"
