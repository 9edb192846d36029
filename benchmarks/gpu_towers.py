"""Folded towers on a GPU: torch, ONNX Runtime, TensorRT and its trtexec on the same weights.

A run begins with an array in the host's memory and ends with embeddings there. That of trtexec is
the engine alone: its input lies on the GPU already.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gemm import gemm_contenders, peaks
from benchmarks.gpu_libraries import find_trtexec
from benchmarks.tower_graphs import TowerGraphs
from benchmarks.towers import ENOUGH_ROWS, Embeds, flop_of, min_cosine
from upperson_export.plain import PlainImageTower, PlainTower
from upperson_export.variants import VARIANTS, VariantName
from upperson_rt.backends import open_backend
from upperson_rt.backends.measurement import Timing, time_in_turns
from upperson_rt.errors import BackendError, IntegrityError
from upperson_rt.tensorrt.bindings import import_tensorrt, open_gpu
from upperson_rt.tensorrt.builder import DEFAULT_WORKSPACE_MIB, InputProfile, build_engine
from upperson_rt.tensorrt.session import EngineSession
from upperson_rt.towers import GRAPH_NAMES, SHORTEST_TEXT, Tower, run_tower

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Each has a peak of its own. fp32 is no TF32: torch does not use it unasked."""

REFERENCE = "torch fp32"
MIN_COSINE_BF16 = 0.99

GRAPHS = ", CUDA graphs"
TENSORRT, TRTEXEC = "TensorRT ", "trtexec "
"""Before the variant: an engine as we run it, and alone."""

T = TypeVar("T")
Rows: TypeAlias = NDArray[Any]
Skipped: TypeAlias = dict[str, str]
"""Why something was not measured, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to embed a batch of any size."""

    run: Callable[[Rows], Embeds]
    float_type: str
    """The peak that it is compared with; int8 is compared with that of fp16, and may exceed it."""
    min_cosine: float
    start: Callable[[Rows], object] | None = None
    """Queue the work without waiting for it, where that can be timed apart."""
    plan: Path | None = None
    """An engine that trtexec may run, too."""


def in_float_type(tower: PlainTower, float_type: str, device: str) -> PlainTower:
    """Return a copy that computes in a float type, its norms included, from the same inputs."""
    dtype = FLOAT_TYPES[float_type]
    copy = deepcopy(tower).to(device, dtype)
    if isinstance(copy, PlainImageTower) and dtype != torch.float32:
        # Pixels become float32 first, as ONNX has it.
        cast = torch.autocast(torch.device(device).type, dtype)
        copy.patch.forward = cast(copy.patch.forward)  # type: ignore[method-assign]
    return copy


def torch_contenders(tower: PlainTower, device: str) -> Iterator[tuple[str, Contender]]:
    """Yield the folded tower itself in every float type."""
    for float_type in FLOAT_TYPES:
        start = partial(_start_in_torch, in_float_type(tower, float_type, device), device)
        yield (
            f"torch {float_type}",
            Contender(
                run=partial(_run_in_torch, start),
                float_type=float_type,
                min_cosine=MIN_COSINE_BF16
                if float_type == "bf16"
                else VARIANTS["fp16" if float_type == "fp16" else "fp32"].canary_min_cosine,
                start=start,
            ),
        )


@torch.inference_mode()
def _start_in_torch(tower: PlainTower, device: str, rows: Rows) -> Tensor:
    embeds: Tensor = tower(torch.from_numpy(rows).to(device))
    return embeds


def _run_in_torch(start: Callable[[Rows], Tensor], rows: Rows) -> Embeds:
    embeds: Embeds = start(rows).float().cpu().numpy()
    return embeds


def onnxruntime_contenders(
    tower: Tower, graphs: TowerGraphs, device: str
) -> Iterator[tuple[str, Contender]]:
    """Yield float graphs in ONNX Runtime: it has no int8 on GPUs worth the name."""
    variants: tuple[VariantName, ...] = ("fp32", "fp16")
    for variant in variants:
        backend = open_backend(graphs.files[variant], "onnxruntime", device)
        yield f"ONNX Runtime {variant}", _contender(partial(run_tower, backend, tower), variant)


def tensorrt_contenders(
    tower: Tower, graphs: TowerGraphs, batches: Sequence[Rows], longest: int, folder: Path
) -> Iterator[tuple[str, Contender]]:
    """Build the engine of every variant, and yield it without and with CUDA graphs.

    Args:
        tower: Which one.
        graphs: Its files.
        batches: What it will run, the smallest first.
        longest: Tokens that texts may have.
        folder: Where engines go, for trtexec.
    """
    cuda, trt = open_gpu("cuda"), import_tensorrt()
    sizes = tuple(rows.shape[1:] for rows in batches)
    low, high = ((SHORTEST_TEXT,), (longest,)) if tower == "text" else (sizes[0], sizes[-1])
    typical = batches[len(batches) // 2].shape
    profile = InputProfile(GRAPH_NAMES[tower][0], (1, *low), typical, (len(batches[-1]), *high))
    for row in VARIANTS.values():
        if row.name != "fp32" and not row.tensorrt:
            continue
        file = graphs.files[row.name]
        with cuda.current():
            built = build_engine(trt, file, profile, workspace_bytes=DEFAULT_WORKSPACE_MIB << 20)
        plan = folder / f"{file.stem}.engine"
        plan.write_bytes(built.plan)
        for suffix in ("", GRAPHS):
            session = EngineSession(trt, cuda, built.plan, cuda_graphs=bool(suffix))
            alone = None if suffix else plan
            yield f"{TENSORRT}{row.name}{suffix}", _contender(session.run, row.name, alone)


def _contender(
    run: Callable[[Rows], Rows], variant: VariantName, plan: Path | None = None
) -> Contender:
    row = VARIANTS[variant]
    return Contender(
        run=lambda rows: run(rows).astype(np.float32, copy=False),
        float_type="fp16" if row.float_type == "f16" else "fp32",
        min_cosine=row.canary_min_cosine,
        plan=plan,
    )


def measure_tower(
    tower: Tower,
    graphs: TowerGraphs,
    batches: Sequence[Rows],
    linears: Sequence[tuple[int, int]],
    *,
    device: str,
    missing: Mapping[str, str],
    longest: int,
    rounds: int,
    warmup: int,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Any], Skipped]:
    """Time one tower's contenders in turns; return plain values, and what was left out and why.

    ``share`` is what the median run achieves of the median run of the fastest matrix product of a
    block's shapes, in the same float type. ``host_ms`` is the time until the work was queued.

    Args:
        tower: Which one.
        graphs: It, folded and as files.
        batches: The smallest first.
        linears: Inputs and outputs of a block's Linears.
        device: Of torch and ONNX Runtime.
        missing: Why a library (see `gpu_libraries.LIBRARIES`) is not there; nothing where it is.
        longest: Tokens that texts may have.
        rounds: Timed runs of each contender and batch.
        warmup: Runs of each before that.
        progress: Told what is being done, how much of it is done, and how much there is.
    """
    flop = flop_of(graphs.folded, batches[0][:1])
    peak = _peaks(linears, flop * len(batches[-1]), device)
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Iterator[tuple[str, Contender]]] = {
            "torch": torch_contenders(graphs.folded, device),
            "ONNX Runtime": onnxruntime_contenders(tower, graphs, device),
            "TensorRT": tensorrt_contenders(tower, graphs, batches, longest, Path(folder)),
        }
        there = {library: make for library, make in makers.items() if not missing[library]}
        progress(f"{tower} tower: loading", 0, 1)
        contenders, cosines, skipped = _agreeing(there, batches[-1])
        for rows in batches:
            timings = time_in_turns(
                {name: partial(one.run, rows) for name, one in contenders.items()},
                warmup=warmup,
                rounds=rounds,
                progress=partial(
                    _tell, progress, f"{tower} tower, batch {len(rows)}", rounds + warmup
                ),
            )
            times = {
                name: timings[name].as_dict(len(rows))
                | {"host_ms": _host_ms(one, rows, device, rounds), "min_cosine": cosines[name]}
                for name, one in contenders.items()
            }
            if not missing["trtexec"]:
                alone, failed = _trtexec_times(contenders, GRAPH_NAMES[tower][0], rows)
                times |= alone
                skipped |= failed
            for name, row in times.items():
                float_type = contenders[name.replace(TRTEXEC, TENSORRT)].float_type
                flops = flop * len(rows) / (row["p50_ms"] / 1000)
                row["share"] = flops / peak[float_type]
            found[len(rows)] = times
    about = {f"{what}, {tower} tower": reason for what, reason in skipped.items()}
    return {"gflop_per_item": flop / 1e9, "peak_flops": peak, "batches": found}, about


def _agreeing(
    makers: Mapping[str, Iterator[tuple[str, Contender]]], rows: Rows
) -> tuple[dict[str, Contender], dict[str, float], Skipped]:
    """Make the contenders, and keep those that embed as the reference, with their cosines to it.

    The others are left out with a reason.
    """
    contenders: dict[str, Contender] = {}
    cosines: dict[str, float] = {}
    skipped: Skipped = {}
    for library, make in makers.items():
        _try(library, partial(contenders.update, make), skipped)
    expected = contenders[REFERENCE].run(rows)
    for name, one in contenders.items():
        cosine = _try(name, partial(_cosine, name, one, rows, expected), skipped)
        if cosine is not None:
            cosines[name] = cosine
    return {name: contenders[name] for name in cosines}, cosines, skipped


def _cosine(name: str, one: Contender, rows: Rows, expected: Embeds) -> float:
    return min_cosine(name, one.run(rows), expected, floor=one.min_cosine, reference=REFERENCE)


def _trtexec_times(
    contenders: Mapping[str, Contender], input_name: str, rows: Rows
) -> tuple[dict[str, dict[str, Any]], Skipped]:
    found: dict[str, dict[str, Any]] = {}
    skipped: Skipped = {}
    for name, one in contenders.items():
        if one.plan is not None:
            label = name.replace(TENSORRT, TRTEXEC)
            work = partial(run_trtexec, one.plan, input_name, rows)
            if times := _try(f"{label} at batch {len(rows)}", work, skipped):
                found[label] = times
    return found, skipped


def _try(what: str, work: Callable[[], T], skipped: Skipped) -> T | None:
    """Do something; where it fails, note why and go on: the rest is worth measuring."""
    try:
        return work()
    except (BackendError, IntegrityError, torch.OutOfMemoryError) as error:
        skipped[what] = str(error)
        return None


def _tell(progress: Callable[[str, int, int], None], work: str, rounds: int, done: int) -> None:
    progress(work, done, rounds)


def _peaks(linears: Sequence[tuple[int, int]], flop: int, device: str) -> dict[str, float]:
    """Return FLOP a second of the median run of the fastest product, by float type."""
    rows = 8 * ENOUGH_ROWS if device != "cpu" else 64  # Some CPUs take for ever in half precision.
    runs: dict[Any, Callable[[], object]] = dict(
        gemm_contenders(rows, linears, flop, dtypes=FLOAT_TYPES, device=device)
    )
    timings: dict[Any, Timing] = time_in_turns(runs, warmup=2, rounds=9)
    return {name: peak["p50_flops"] for name, peak in peaks(timings, flop).items()}


def _host_ms(one: Contender, rows: Rows, device: str, rounds: int) -> float | None:
    """Return how long the host is busy until the work is queued, where that can be told."""
    if one.start is None:
        return None
    seconds = []
    for _ in range(rounds):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        one.start(rows)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def run_trtexec(plan: Path, input_name: str, rows: Rows) -> dict[str, Any]:
    """Let trtexec run an engine on one batch, and return its times.

    Raises:
        BackendError: It fails, for example because it is of another TensorRT.
    """
    file = plan.with_suffix(".input")
    rows.tofile(file)
    shape = "x".join(map(str, rows.shape))
    command = [
        find_trtexec() or "trtexec", f"--loadEngine={plan}", f"--shapes={input_name}:{shape}",
        f"--loadInputs={input_name}:{file}", "--useCudaGraph", "--noDataTransfers",
    ]  # fmt: skip
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    compute, queued = (
        re.search(rf"(?m){name}: (.*median = .*)$", done.stdout)
        for name in ("GPU Compute Time", "Enqueue Time")
    )
    if done.returncode or compute is None or queued is None:
        lines = re.findall(r"(?m)\[E\] (.*)", done.stdout + done.stderr) or ["no times printed"]
        raise BackendError(f"trtexec ended with code {done.returncode}: {'; '.join(lines[:3])}")

    def ms(words: str, found: str) -> float | None:
        number = re.search(rf"{re.escape(words)} = ([\d.e+-]+) ms", found)
        return None if number is None else float(number[1])

    return {
        "p50_ms": ms("median", compute[1]),
        "p90_ms": ms("percentile(90%)", compute[1]),
        "p99_ms": ms("percentile(99%)", compute[1]),
        "host_ms": ms("median", queued[1]),
    }
