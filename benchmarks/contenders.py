"""The ways to embed a batch that are timed against one another, on a CPU and on a GPU.

A run begins with an array in the host's memory and ends with embeddings there. That of trtexec is
the engine alone: its input lies on the GPU already.

Shapes: N batch, L tokens, E embedding.
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import literal
from benchmarks.gpu_libraries import find_trtexec
from benchmarks.tower_graphs import TowerGraphs
from upperson.data.transforms import evaluation_transform
from upperson.model.encoder import UPPerson
from upperson_export.plain import PlainImageTower, PlainTower
from upperson_export.variants import VARIANTS, VariantName
from upperson_rt.backends import open_backend
from upperson_rt.errors import BackendError
from upperson_rt.towers import GRAPH_NAMES, SHORTEST_TEXT, Tower, run_tower
from upperson_tensorrt.bindings import import_tensorrt, open_gpu
from upperson_tensorrt.builder import DEFAULT_WORKSPACE_MIB, InputProfile, build_engine
from upperson_tensorrt.session import EngineSession

Rows: TypeAlias = NDArray[Any]
"""Pictures uint8 [N, H, W, 3] or token ids int32 [N, L]."""
Embeds: TypeAlias = NDArray[np.float32]
"""Unit-norm, [N, E]."""

FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Those of torch. fp32 is no TF32: torch uses it only on request."""

LITERAL = "literal torch fp32"
FOLDED = "torch fp32"
ORT_FP32, ORT_INT8 = "ONNX Runtime fp32", "ONNX Runtime int8"
OPENVINO = "OpenVINO "
WITH_BF16 = ", floats bf16"
GRAPHS = ", CUDA graphs"
TENSORRT, TRTEXEC = "TensorRT ", "trtexec "
"""Before the variant: an engine as we run it, and alone."""

MIN_COSINE_LOW = 0.99
"""Of int8 and bf16 to float32; a bundle compares int8 with itself, hence its higher floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to embed a batch of any size."""

    run: Callable[[Rows], Embeds]
    min_cosine: float
    """Lowest cosine to the reference that counts as the same embedding."""
    start: Callable[[Rows], object] | None = None
    """Queue the work without waiting for it, where that is timed separately."""
    alone: Callable[[Rows], dict[str, Any]] | None = None
    """Return the times of the same engine in trtexec."""


Named: TypeAlias = tuple[str, Contender]
Makers: TypeAlias = Mapping[str, Iterator[Named]]
"""Contenders by the library that runs them."""


def cpu_contenders(
    tower: Tower, graphs: TowerGraphs, batch: Rows, model: UPPerson, threads: int
) -> Makers:
    """Return all of the CPU: the literal model, the folded one, ONNX Runtime and OpenVINO.

    Args:
        tower: Which one.
        graphs: It, folded and as files in fp32 and int8.
        batch: What is embedded.
        model: The same towers, not folded.
        threads: Of the libraries; torch's are set by the caller.
    """
    return {
        "literal": iter([literal_contender(tower, model, batch)]),
        "torch": torch_contenders(graphs.folded, ("fp32",), "cpu"),
        "ONNX Runtime": onnxruntime_contenders(tower, graphs, ("fp32", "int8"), "cpu", threads),
        "OpenVINO": openvino_contenders(tower, graphs, threads),
    }


def gpu_contenders(
    tower: Tower,
    graphs: TowerGraphs,
    batches: Sequence[Rows],
    *,
    device: str,
    missing: Mapping[str, str],
    longest: int,
    folder: Path,
) -> Makers:
    """Return all of a GPU whose library is there.

    Args:
        tower: Which one.
        graphs: It, folded and as files in fp32 and what TensorRT builds.
        batches: The smallest first.
        device: Of torch and ONNX Runtime.
        missing: Why a library (see `gpu_libraries.LIBRARIES`) is not there; "" where it is.
        longest: Tokens that texts may have.
        folder: Where engines go, for trtexec.
    """
    alone = None if missing["trtexec"] else partial(run_trtexec, GRAPH_NAMES[tower][0])
    makers = {
        "torch": torch_contenders(graphs.folded, tuple(FLOAT_TYPES), device, queued=True),
        # ONNX Runtime has no int8 kernels for GPUs worth the name.
        "ONNX Runtime": onnxruntime_contenders(tower, graphs, ("fp32", "fp16"), device),
        "TensorRT": tensorrt_contenders(tower, graphs, batches, longest, folder, alone),
    }
    return {library: maker for library, maker in makers.items() if not missing[library]}


def literal_contender(tower: Tower, model: UPPerson, batch: Rows) -> Named:
    """Return the literal model; it gets normalised pixels, and always pads text itself."""
    inputs = torch.from_numpy(batch)
    if tower == "image":
        inputs = evaluation_transform()(inputs.permute(0, 3, 1, 2))
        encode = partial(literal.encode_image, model)
    else:
        inputs, encode = inputs.long(), partial(literal.encode_text, model)

    @torch.inference_mode()
    def run(rows: Rows) -> Embeds:
        embeds: Embeds = encode(inputs).numpy()
        return embeds

    return LITERAL, Contender(run=run, min_cosine=VARIANTS["fp32"].canary_min_cosine)


def torch_contenders(
    tower: PlainTower, float_types: Sequence[str], device: str, *, queued: bool = False
) -> Iterator[Named]:
    """Yield the folded tower itself in some float types."""
    for float_type in float_types:
        start = partial(_start_in_torch, in_float_type(tower, float_type, device), device)
        variant: VariantName = "fp16" if float_type == "fp16" else "fp32"
        floor = MIN_COSINE_LOW if float_type == "bf16" else VARIANTS[variant].canary_min_cosine
        yield (
            f"torch {float_type}",
            Contender(
                run=partial(_run_in_torch, start),
                min_cosine=floor,
                start=start if queued else None,
            ),
        )


def in_float_type(tower: PlainTower, float_type: str, device: str) -> PlainTower:
    """Return a tower that computes in a float type, its norms included, from the same inputs."""
    dtype = FLOAT_TYPES[float_type]
    if (float_type, device) == ("fp32", "cpu"):
        return tower
    copy = deepcopy(tower).to(device, dtype)
    if isinstance(copy, PlainImageTower) and dtype != torch.float32:
        # Pixels become float32 first, as ONNX has it.
        cast = torch.autocast(torch.device(device).type, dtype)
        copy.patch.forward = cast(copy.patch.forward)  # type: ignore[method-assign]
    return copy


@torch.inference_mode()
def _start_in_torch(tower: PlainTower, device: str, rows: Rows) -> Tensor:
    embeds: Tensor = tower(torch.from_numpy(rows).to(device))
    return embeds


def _run_in_torch(start: Callable[[Rows], Tensor], rows: Rows) -> Embeds:
    embeds: Embeds = start(rows).float().cpu().numpy()
    return embeds


def onnxruntime_contenders(
    tower: Tower,
    graphs: TowerGraphs,
    variants: Sequence[VariantName],
    device: str,
    threads: int | None = None,
) -> Iterator[Named]:
    """Yield the files of some variants in ONNX Runtime."""
    for variant in variants:
        backend = open_backend(graphs.files[variant], "onnxruntime", device, threads)
        yield f"ONNX Runtime {variant}", _contender(partial(run_tower, backend, tower), variant)


def openvino_contenders(tower: Tower, graphs: TowerGraphs, threads: int) -> Iterator[Named]:
    """Yield fp32 and int8 in OpenVINO as the runtime has them, where it is installed."""
    if find_spec("openvino") is None:
        return
    variants: tuple[VariantName, ...] = ("fp32", "int8")
    for variant in variants:
        backend = open_backend(graphs.files[variant], "openvino", threads=threads)
        floats = WITH_BF16 if getattr(backend, "float_type", "f32") == "bf16" else ""
        run = partial(run_tower, backend, tower)
        yield f"{OPENVINO}{variant}{floats}", _contender(run, variant)


def tensorrt_contenders(
    tower: Tower,
    graphs: TowerGraphs,
    batches: Sequence[Rows],
    longest: int,
    folder: Path,
    alone: Callable[[Path, Rows], dict[str, Any]] | None,
) -> Iterator[Named]:
    """Build the engine of every variant, and yield it without and with CUDA graphs."""
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
            run_alone = partial(alone, plan) if alone and not suffix else None
            yield f"{TENSORRT}{row.name}{suffix}", _contender(session.run, row.name, run_alone)


def _contender(
    run: Callable[[Rows], Rows],
    variant: VariantName,
    alone: Callable[[Rows], dict[str, Any]] | None = None,
) -> Contender:
    return Contender(
        run=lambda rows: run(rows).astype(np.float32, copy=False),
        min_cosine=MIN_COSINE_LOW if "int8" in variant else VARIANTS[variant].canary_min_cosine,
        alone=alone,
    )


def run_trtexec(input_name: str, plan: Path, rows: Rows) -> dict[str, Any]:
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
