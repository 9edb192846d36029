"""Exported towers against the literal model, on a CPU; measured the same way on a GPU.

All contenders of a library or form embed the same batch in one process, in turns, and their
embeddings must agree with those of the reference.

Shapes: N batch, L tokens.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import numpy as np
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import (
    LITERAL,
    OPENVINO,
    ORT_FP32,
    ORT_INT8,
    TENSORRT,
    TRTEXEC,
    WITH_BF16,
    Contender,
    Embeds,
    Makers,
    Rows,
    cpu_contenders,
)
from benchmarks.random_model import (
    BaseOption,
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
    random_model,
    tower_inputs,
)
from benchmarks.report import (
    SPEEDS,
    TIMES,
    Column,
    conditions,
    print_report,
    table,
    timed_rows,
)
from benchmarks.tower_graphs import TowerGraphs, write_graphs
from upperson.model.encoder import UPPerson
from upperson_autotune.timing import time_in_turns
from upperson_export.variants import VariantName
from upperson_rt.agreement import compare_embeds
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Threads
from upperson_rt.cli.output import show_progress
from upperson_rt.errors import BackendError, IntegrityError
from upperson_rt.towers import TOWERS, Tower
from upperson_scores.rankings import exchanged_item

T = TypeVar("T")
Skipped: TypeAlias = dict[str, str]
"""Why something was not measured, by name."""
Make: TypeAlias = Callable[[Tower, TowerGraphs, Sequence[Rows], UPPerson, Path], Makers]
"""Returns a tower's contenders for its graphs, its batches, its model and an empty folder."""

PADDED = ", padded"
FASTEST_INT8 = (f"{OPENVINO}int8{WITH_BF16}", f"{OPENVINO}int8", ORT_INT8)
"""What the runtime's fastest backend makes of int8: the first of these that took part."""

CALIBRATION_SAMPLES = 8  # Other people and captions than those of the batch.

COLUMNS = {
    "items/s": Column("items_per_s", "{:.1f}"),
    **TIMES,
    **SPEEDS,
    "GFLOP/s": Column("gflops", "{:.0f}"),
    "lowest cosine": Column("min_cosine", "{:.6f}"),
}

app = new_app("Time exported towers against a literal implementation of the formulas.")


@app.command(cls=Command)
def towers(
    base: BaseOption = ModelSpec.base,
    height: HeightOption = ModelSpec.height_px,
    width: WidthOption = ModelSpec.width_px,
    batch_size: Annotated[int, typer.Option(min=1, help="Images and captions at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of every contender.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them, not timed.")] = 1,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time exported towers on the CPU against a literal implementation of the formulas.

    A model with random weights is folded, exported and quantized as `upperson export` does it, and
    embeds rendered people and random captions of 20 to 30 tokens. Contenders take turns in one
    process, and must give equal embeddings. Captions are also padded to the context length.

    Example: `python -m benchmarks.towers --threads 1`
    """
    spec = ModelSpec(base=base, height_px=height, width_px=width, batch_size=batch_size)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    with show_progress() as progress:
        found, shapes = measure_towers(
            spec,
            [batch_size],
            ("int8",),
            lambda kind, graphs, batches, model, _: cpu_contenders(
                kind, graphs, batches[-1], model, threads
            ),
            reference=LITERAL,
            padded=True,
            rounds=rounds,
            warmup=warmup,
            progress=progress,
        )
    packages = ("torch", "open_clip_torch", "onnxruntime", "openvino")
    result = conditions(
        "towers", *packages, threads=threads, batch_size=batch_size, warmup=warmup
    ) | {
        "spec": asdict(spec) | shapes,
        "rounds": rounds,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "summary": summarize(found, batch_size),
        "towers": found,
    }
    facts = [
        f"{base} at {height}x{width}, random weights, batch {batch_size}; captions of "
        f"{shapes['tokens']} tokens, padded ones of {shapes['context_length']}; {warmup} + "
        f"{rounds} rounds in turns"
    ]
    if not (result["machine"]["instruction_sets"] or {}).get("amx_bf16"):
        facts.append("no AMX here: int8 and bf16 gain several times as much on a CPU that has it")
    padding = {"over padded": Column("padded_ratio", "{:.2f}x")}
    tables = [
        table(
            f"{kind} tower",
            found[kind]["batches"][batch_size],
            COLUMNS | (padding if kind == "text" else {}),
        )
        for kind in TOWERS
    ]
    print_report(result, facts, tables)


def measure_towers(
    spec: ModelSpec,
    batches: Sequence[int],
    variants: Sequence[VariantName],
    make: Make,
    *,
    reference: str,
    padded: bool = False,
    skipped: Skipped | None = None,
    rounds: int,
    warmup: int,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[Tower, Any], dict[str, int]]:
    """Export a random model and time both towers; return plain values, and the sizes of texts.

    A tower's ``batches`` are rows by contender, by batch size; ``gflop_per_item`` is the work of
    the folded tower's matrix products, by which ``gflops`` counts, whatever a contender computes.
    ``padded_ratio`` is how much faster a contender is than on padded captions, ``host_ms`` the time
    until the work was queued.

    Args:
        spec: The model.
        batches: Sizes, the smallest first.
        variants: Of the exported files, beside fp32.
        make: Returns the contenders.
        reference: Name of the contender with which all others must agree.
        padded: Whether captions run padded to the context length, too.
        skipped: Takes what fails and why; None: a failure ends the benchmark.
        rounds: Timed runs of each contender and batch.
        warmup: Runs of each before that.
        progress: Called with the work, how much of it is done, and how much there is.

    Raises:
        BackendError: A library fails, or the reference cannot run.
        IntegrityError: A contender embeds something else than the reference.
    """
    model = random_model(spec, random_base(spec)).eval()
    inputs = tower_inputs(replace(spec, batch_size=max(2, *batches)))
    samples = tower_inputs(replace(spec, batch_size=CALIBRATION_SAMPLES, seed=spec.seed + 1))
    context_length = model.text.context_length
    found: dict[Tower, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = write_graphs(
            model, samples, folder,
            variants=variants, threads=torch.get_num_threads(), progress=progress,
        )  # fmt: skip
        for kind in TOWERS:
            rows = [inputs[kind][:size] for size in batches]
            progress(f"{kind} tower: loading", 0, 1)
            failed: Skipped | None = None if skipped is None else {}
            found[kind] = _measure(
                graphs[kind].folded,
                make(kind, graphs[kind], rows, model, folder),
                [
                    _forms(batch, context_length if padded and kind == "text" else 0)
                    for batch in rows
                ],
                reference=reference,
                skipped=failed,
                rounds=rounds,
                warmup=warmup,
                progress=partial(progress, f"{kind} tower, in turns"),
            )
            if skipped is not None and failed is not None:
                skipped |= {f"{what}, {kind} tower": reason for what, reason in failed.items()}
    return found, {"tokens": inputs["text"].shape[1], "context_length": context_length}


def _forms(batch: Rows, padded_length: int) -> dict[str, Rows]:
    """Return a batch by the suffix of its contenders' names; also padded, if a length is given."""
    if not padded_length:
        return {"": batch}
    return {"": batch, PADDED: np.pad(batch, ((0, 0), (0, padded_length - batch.shape[1])))}


def _measure(
    folded: nn.Module,
    makers: Makers,
    batches: Sequence[Mapping[str, Rows]],
    *,
    reference: str,
    skipped: Skipped | None,
    rounds: int,
    warmup: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    contenders, cosines = agreeing(makers, batches[-1], reference, skipped)
    flop = flop_of(folded, batches[0][""][:1])
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for forms in batches:
        size = len(forms[""])
        runs = {
            name + suffix: partial(one.run, rows)
            for name, one in contenders.items()
            for suffix, rows in forms.items()
            if name + suffix in cosines
        }
        timings = time_in_turns(
            runs,
            warmup=warmup,
            rounds=rounds,
            progress=lambda done: progress(
                len(found) * (warmup + rounds) + done, len(batches) * (warmup + rounds)
            ),
        )
        rows = timed_rows(timings, reference, size)
        for name, row in rows.items():
            row["min_cosine"] = cosines[name]
            if PADDED in forms and name + PADDED in rows:
                row["padded_ratio"] = rows[name + PADDED]["p50_ms"] / row["p50_ms"]
        for name, one in contenders.items():
            rows[name]["host_ms"] = _host_ms(one, forms[""], rounds)
            if one.alone is not None:
                label = name.replace(TENSORRT, TRTEXEC)
                what = f"{label} at batch {size}"
                if times := _try(what, partial(one.alone, forms[""]), skipped):
                    rows[label] = times
        for row in rows.values():
            row["gflops"] = flop * size / row["p50_ms"] / 1e6
        found[size] = rows
    return {"gflop_per_item": flop / 1e9, "batches": found}


def agreeing(
    makers: Makers, forms: Mapping[str, Rows], reference: str, skipped: Skipped | None
) -> tuple[dict[str, Contender], dict[str, float]]:
    """Make the contenders, and keep those that embed as the reference, with their cosines to it.

    Raises:
        BackendError: The reference cannot run; without ``skipped`` any other as well.
        IntegrityError: Without ``skipped``: a contender embeds something else.
    """
    contenders: dict[str, Contender] = {}
    for library, maker in makers.items():
        _try(library, partial(contenders.update, maker), skipped)
    if reference not in contenders:
        raise BackendError(
            f"'{reference}', with which all others are compared, cannot run: {skipped}"
        )
    expected = contenders[reference].run(forms[""])
    cosines: dict[str, float] = {}
    for name, one in list(contenders.items()):
        for suffix, rows in forms.items():
            if suffix and name == LITERAL:
                continue  # It pads by itself.
            compare = partial(_compare, name + suffix, one, rows, expected, reference)
            cosine = _try(name + suffix, compare, skipped)
            if cosine is not None:
                cosines[name + suffix] = cosine
    return {name: contenders[name] for name in contenders if name in cosines}, cosines


def _compare(name: str, one: Contender, rows: Rows, expected: Embeds, reference: str) -> float:
    return min_cosine(name, one.run(rows), expected, one.min_cosine, reference)


def min_cosine(
    name: str, found: Embeds, expected: Embeds, floor: float, reference: str = LITERAL
) -> float:
    """Return the lowest cosine of a contender's embeddings to a reference's.

    Raises:
        IntegrityError: It is below the floor, or an item is nearer to another's embedding than to
            its own.
    """
    agreement = compare_embeds(expected, found)
    # Random weights embed all items alike: without their mean they can be told apart.
    mean = expected.mean(axis=0)
    exchanged = exchanged_item(expected - mean, found - mean, np.arange(len(found)))
    if exchanged or not agreement.agrees(min_cosine=floor).all():
        raise IntegrityError(
            f"'{name}' does not embed as '{reference}': expected a cosine of at least {floor} and "
            f"every item nearest to itself, found {agreement.min_cosine:.6f}"
            f"{', and items exchanged' if exchanged else ''}"
            f"{', and rows that are not finite' if agreement.not_finite else ''}: its times "
            "mean nothing; please report this with the versions"
        )
    return agreement.min_cosine


def _try(what: str, work: Callable[[], T], skipped: Skipped | None) -> T | None:
    """Do something; note why it fails, where that shall not end the benchmark."""
    if skipped is None:
        return work()
    try:
        return work()
    except (BackendError, IntegrityError, torch.OutOfMemoryError) as error:
        skipped[what] = str(error)
        return None


@torch.no_grad()
def flop_of(tower: nn.Module, item: Rows) -> int:
    """Count the matrix products of one item: 2 FLOP for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        tower(torch.from_numpy(item))
    return int(counter.get_total_flops())


def _host_ms(one: Contender, rows: Rows, rounds: int) -> float | None:
    """Return how long the host is busy until the work is queued, where that can be measured."""
    if one.start is None:
        return None
    seconds = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        one.start(rows)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def summarize(towers: Mapping[Tower, Any], batch_size: int) -> dict[str, Any]:
    """Return the ratios of README's table, by the clock and, with ``cpu_``, by processor time."""
    image, text = (towers[kind]["batches"][batch_size] for kind in TOWERS)
    best = next(name for name in FASTEST_INT8 if name in image)
    summary: dict[str, Any] = {"image_int8": best}
    for prefix, ms in (("", "p50_ms"), ("cpu_", "cpu_ms")):
        summary |= {
            f"{prefix}image_int8_over_literal": image[LITERAL][ms] / image[best][ms],
            f"{prefix}image_int8_over_onnxruntime_fp32": image[ORT_FP32][ms] / image[best][ms],
            f"{prefix}text_fp32_over_padded": text[ORT_FP32 + PADDED][ms] / text[ORT_FP32][ms],
        }
    return summary


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.towers")
