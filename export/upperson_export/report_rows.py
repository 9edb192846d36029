"""The tables of a bundle's report, as text: a heading and rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from upperson_export.variants import SIMULATED, VARIANTS

_METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

_NOT_MEASURED: dict[str, Any] = {"metrics": None, "r1_drop": None, "float_types": {}}


def accuracy_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return one row a variant and backend: accuracy, change, form, size, time."""
    head = ["variant", "on", *(f"{name} %" for name in _METRICS), "R@1 change (95 %)"]
    rows = [[*head, "image", "text", "MiB", "ms/image", "ms/caption", "shipped"]]
    for name, row in report["variants"].items():
        measured = {VARIANTS[name].measured_on: row, **row["elsewhere"]}
        for backend in dict.fromkeys([*measured, *row["latency"]]):
            found = measured.get(backend, _NOT_MEASURED)
            metrics, times = found["metrics"] or {}, row["latency"].get(backend, {})
            types = found["float_types"] or {t: time["float_type"] for t, time in times.items()}
            rows.append(
                [
                    name,
                    _place(backend, types.values()),
                    *(f"{metrics[metric]:.2f}" if metrics else "-" for metric in _METRICS),
                    _change(found["r1_drop"]),
                    row["rungs"]["image"],
                    row["rungs"]["text"],
                    f"{row['size_bytes'] / 2**20:.1f}" if row["shipped"] else "-",
                    *(
                        f"{times[tower]['ms_per_item']:.1f}" if times else "-"
                        for tower in ("image", "text")
                    ),
                    "yes" if row["shipped"] else "no",
                ]
            )
    return rows


def ladder_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return one row for every form that was measured, in order."""
    rows = [
        [
            "variant", "towers", "form", "on", *(f"{name} %" for name in _METRICS),
            "R@1 change (95 %)", "cosine min / 1 % / median", "same top 10 %", "accepted",
        ]
    ]  # fmt: skip
    rows += [
        [
            row["variant"],
            row["tower"],
            row["rung"],
            _place(row["backend"], row["float_types"].values()),
            *_measurements(row),
        ]
        for row in report["ladder"]
    ]
    return rows


def float_linear_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return one row for every Linear that an int8 variant leaves in float, with its damage."""
    rows = [["variant", "tower", "Linear", "order changed %", "top 10 changed %", "cosine lost"]]
    rows += [
        [
            variant,
            tower,
            layer["node"],
            f"{layer['order_loss']:.2f}",
            f"{layer['overlap_loss']:.2f}",
            f"{layer['cosine_loss']:.1e}",
        ]
        for variant, row in report["variants"].items()
        for tower, layers in row["kept_float"].items()
        for layer in layers
    ]
    return rows


def _measurements(row: Mapping[str, Any]) -> list[str]:
    if row["failure"] is not None:
        return [*("-" for _ in _METRICS), "-", "-", "-", f"no: {row['failure']}"]
    return [
        *(f"{row['metrics'][metric]:.2f}" for metric in _METRICS),
        _change(row["r1_drop"]),
        " / ".join(f"{value:.4f}" for value in row["cosine"].values()),
        f"{row['top10_overlap']:.1f}",
        "yes" if row["accepted"] else "no",
    ]


def _place(backend: str, float_types: Iterable[str]) -> str:
    """Name a backend and what it computes floats in, unless its name says that."""
    known = [] if backend == SIMULATED else list(dict.fromkeys(float_types))
    return ", ".join([backend, *([" + ".join(known)] if known else [])])


def _change(lost: Mapping[str, float] | None) -> str:
    if lost is None:
        return "-"
    # Subtracted from 0, so that no change has no sign of its own.
    low, high = 0 - lost["high"], 0 - lost["low"]
    return f"{0 - lost['points']:+.2f} ({low:+.2f} to {high:+.2f})"
