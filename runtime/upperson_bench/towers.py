"""The benchmark of a bundle: every variant on every backend of a device, in turns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_autotune.timing import Timing, time_in_turns
from upperson_bench.processes import Startup, measure_startup
from upperson_rt.backends import auto_order
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import BackendError, IntegrityError, UsageError, install_command
from upperson_rt.manifest import Manifest
from upperson_rt.strict import suggestion
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import TOWERS, Tower, run_tower

WARMUP = 1
LEAST_RUNS = 3

_CAPTIONS = (
    "a woman with long dark hair in a red winter coat and blue jeans walks while she carries a "
    "brown bag on one shoulder",
    "the man wears a grey hooded sweater, black trousers and white running shoes and has a "
    "backpack on his back",
    "a young person in a yellow raincoat and rubber boots holds a closed umbrella in the right "
    "hand",
    "an older man with a flat cap, a checked shirt under a green vest and loose brown trousers "
    "looks down at his phone",
    "she has short blond hair and wears a white summer dress with blue flowers, sandals and "
    "a small black handbag",
    "a tall man in a dark suit with a light blue shirt and no tie pulls a silver suitcase "
    "behind him",
    "a boy in a striped shirt with short sleeves, green shorts and sneakers carries a skateboard "
    "under his arm",
    "the woman wears a purple jacket, a long black skirt and a wide scarf and pushes a pram with "
    "both hands",
)  # fmt: skip


def captions(count: int) -> list[str]:
    """Return descriptions of people as long as those of the usual data sets, 20 to 30 tokens."""
    return [_CAPTIONS[index % len(_CAPTIONS)] for index in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedBatch:
    """An array that enters a tower, and its runs by the contender's name."""

    tower: Tower
    inputs: str
    """``pictures``, ``captions`` padded to the longest of the batch, or ``padded captions``, to the
    model's context length."""
    shape: tuple[int, ...]
    timings: dict[str, Timing]


@dataclass(kw_only=True, slots=True)
class BundleBench:
    """What was measured."""

    startups: dict[str, Startup] = field(default_factory=dict)
    """By the contender's name, such as ``int8 on openvino``."""
    refused: dict[str, str] = field(default_factory=dict)
    """Contenders that do not run or do not compute what they should, and why."""
    cases: list[TimedBatch] = field(default_factory=list)

    @property
    def baseline(self) -> str:
        """The contender that speeds are relative to: the first one that runs."""
        return next(iter(self.startups))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; ``speedup`` is relative to ``baseline``."""
        return {
            "baseline": self.baseline,
            "contenders": {name: asdict(startup) for name, startup in self.startups.items()},
            "refused": self.refused,
            "cases": [
                {
                    "tower": case.tower,
                    "inputs": case.inputs,
                    "shape": list(case.shape),
                    "timings": {
                        name: timing.as_dict(case.shape[0])
                        | {"speedup": case.timings[self.baseline].median_s / timing.median_s}
                        for name, timing in case.timings.items()
                    },
                }
                for case in self.cases
            ],
        }


def bench_bundle(
    path: Path,
    *,
    trust: Path | None = None,
    variants: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str = "cpu",
    threads: int | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    seconds: float = 2.0,
    progress: Callable[[str, int, int], None],
) -> BundleBench:
    """Start every contender in a process of its own, then time those that work in turns.

    Without variants or backends all of them run that the bundle has and that are installed; each
    gets ``seconds`` a case and at least ``LEAST_RUNS`` runs. ``trust`` is that of `Bundle.open`.
    If none starts, the first one's error is raised.
    """
    if not batch_sizes or min(batch_sizes) < 1 or not 0 <= seconds < float("inf"):
        raise UsageError(
            f"expected batch sizes from 1 and a number of seconds from 0, found "
            f"{', '.join(map(str, batch_sizes)) or 'no size'} and {seconds} seconds"
        )
    manifest = read_manifest(path, trust)
    contenders = _contenders(path, manifest, variants, backends, device)
    found = BundleBench()
    failure: BackendError | IntegrityError | None = None
    for done, (name, (variant, backend)) in enumerate(contenders.items()):
        progress(f"starting {name}", done, len(contenders))
        try:
            found.startups[name] = measure_startup(path, variant, backend, device, threads, trust)
        except (BackendError, IntegrityError) as error:
            found.refused[name] = str(error)
            failure = failure or type(error)(f"nothing to measure: {name}: {error}")
    if not found.startups and failure is not None:
        raise failure

    inputs = list(_inputs(path, manifest, batch_sizes))
    for tower in TOWERS:
        loaded = {
            name: Bundle.open(
                path, variant, backend, device, verify=False, threads=threads
            ).backend(tower)
            for name, (variant, backend) in contenders.items()
            if name in found.startups  # Verified there.
        }
        for kind, what, batch in inputs:
            if kind != tower:
                continue
            progress(f"timing {what}, batch {len(batch)}", len(found.cases), len(inputs))
            timings = time_in_turns(
                {name: partial(run_tower, to, kind, batch) for name, to in loaded.items()},
                warmup=WARMUP,
                rounds=LEAST_RUNS,
                seconds=seconds * len(loaded),
            )
            found.cases.append(
                TimedBatch(tower=kind, inputs=what, shape=batch.shape, timings=timings)
            )
    progress("timing", len(inputs), len(inputs))
    return found


def _contenders(
    path: Path,
    manifest: Manifest,
    variants: Sequence[str],
    backends: Sequence[str],
    device: str,
) -> dict[str, tuple[str, str]]:
    for variant in variants:
        if variant not in manifest.variants:
            raise UsageError(
                f"bundle {path} has no variant '{variant}', "
                f"{suggestion(variant, manifest.variants)}"
            )
    if "auto" in backends:
        raise UsageError("'auto' is no backend to measure: name one, or leave the option out")
    names = backends or [name for name in auto_order(device) if find_spec(name) is not None]
    if not names:
        raise BackendError(
            f"no inference backend for the device '{device}' is installed: run "
            f" {install_command('cpu')}"
        )
    return {
        f"{variant} on {backend}": (variant, backend)
        for variant in (variants or manifest.variants)
        for backend in names
    }


def _inputs(
    path: Path, manifest: Manifest, batch_sizes: Sequence[int]
) -> Iterator[tuple[Tower, str, NDArray[Any]]]:
    """Yield tower, what enters it, and the batch: random pixels, and real sentences."""
    image, text = manifest.image, manifest.text
    tokenizer = Tokenizer.from_file(path / text.tokenizer.file, text.context_length)
    rng = np.random.default_rng(0)
    for size in batch_sizes:
        pixels = rng.integers(0, 256, (size, image.height_px, image.width_px, 3), np.uint8)
        yield "image", "pictures", pixels
    for size in batch_sizes:
        ids = tokenizer.encode(captions(size)).input_ids
        yield "text", "captions", ids
        padding = text.context_length - ids.shape[1]
        yield "text", "padded captions", np.pad(ids, ((0, 0), (0, padding)))
