"""How `upperson-rt watch` shows what is going on, and what was done."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from upperson_rt.cli.output import PlainTable, new_table, print_line
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_rt.camera import PipelineStats

__all__ = ["print_summary", "progress_line", "status_table"]

_OK = {"running", "ended"}


def status_table(now: "PipelineStats", earlier: "PipelineStats | None") -> PlainTable:
    """Return a line a camera, and one for the encoder; rates are those since ``earlier``."""
    right = ("frames/s", "dropped", "people", "added")
    table = new_table("camera", "", *right, right=right)
    for name, camera in now.cameras.items():
        table.add_row(
            name,
            (camera.state, "green" if camera.state in _OK else "yellow"),
            f"{_rate(now, earlier, name):.1f}",
            str(sum(camera.frames_dropped.values())),
            str(camera.tracks),
            str(camera.committed),
        )
    seconds, busy_s = now.seconds, now.encoder_busy_s
    if earlier is not None:
        seconds, busy_s = seconds - earlier.seconds, busy_s - earlier.encoder_busy_s
    share = min(1.0, busy_s / seconds) if seconds > 0 else 0.0
    table.add_row("encoder", f"{share:.0%} busy", "", "", "", f"{now.crop_queue} wait")
    return table


def print_summary(stats: "PipelineStats", gallery: str, items: int | None) -> None:
    """Print what was done: a few lines on stdout; ``items`` is None if the gallery failed."""
    holds = "failed" if items is None else f"now holds {items}"
    print_line(
        f"added {count_of(stats.total('committed'), 'picture')} of "
        f"{count_of(stats.total('tracks'), 'track')} in {stats.seconds:.1f} s; gallery "
        f"'{gallery}' {holds}"
    )
    print_line(
        f"frames: {stats.total('frames_read')} read, {stats.total('frames_processed')} searched, "
        f"dropped {_reasons(stats.dropped('frames_dropped'))}"
    )
    print_line(
        f"people: {count_of(stats.total('detections'), 'box', 'boxes')}, "
        f"{stats.total('accepted')} accepted, left out {_reasons(stats.dropped('crops_dropped'))}"
    )
    if replaced := stats.total("replaced"):
        print_line(f"{count_of(replaced, 'picture')} took the place of what was there before")
    others = {n: c.added_by_others for n, c in stats.cameras.items() if c.added_by_others}
    if others:
        print_line(f"added by others under the same name of a camera: {_reasons(others)}")
    if stats.total("reconnects") or stats.total("stalls"):
        print_line(
            f"sources: {count_of(stats.total('outages'), 'outage')}, "
            f"{count_of(stats.total('reconnects'), 'attempt')} to open one again, "
            f"{count_of(stats.total('stalls'), 'stall')}"
        )
    if changes := stats.total("resolution_changes"):
        print_line(f"resolution: {count_of(changes, 'change')}")
    if stats.latency.p50_s is not None and stats.latency.p99_s is not None:
        print_line(
            f"from frame to gallery: {stats.latency.p50_s:.2f} s median, "
            f"{stats.latency.p99_s:.2f} s p99; encoder busy {stats.encoder_busy_share:.0%}"
        )


def progress_line(stats: "PipelineStats") -> str:
    """Return what was done so far, in a line for where nothing can be redrawn."""
    away = [name for name, camera in stats.cameras.items() if camera.state not in _OK]
    return (
        f"{stats.seconds:.0f} s: {count_of(stats.total('frames_processed'), 'frame')} searched, "
        f"{count_of(stats.total('tracks'), 'track')}, "
        f"{count_of(stats.total('committed'), 'picture')} added"
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
