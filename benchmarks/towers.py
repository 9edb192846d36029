"""Exported towers against the literal model: every contender in one process, in turns.

All contenders embed the same batch, and their embeddings must agree with the literal model's.
Matrix products of the tower's own shapes run in the same turns; they say what the machine can do.

Shapes: N batch, H image height, W image width, L tokens, E embedding.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import literal
from benchmarks.gemm import float_types, gemm_contenders, own_products, peaks
from benchmarks.random_model import (
    BaseOption,
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
    random_model,
    tower_inputs,
)
from benchmarks.tower_graphs import TowerGraphs, write_graphs
from upperson.data.transforms import evaluation_transform
from upperson.model.encoder import UPPerson
from upperson_rt.agreement import compare_embeds, exchanged_item
from upperson_rt.backends import open_backend
from upperson_rt.backends.measurement import Timing, time_in_turns
from upperson_rt.backends.openvino import import_openvino, same_signal_stack
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import IntegrityError
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.towers import Tower, run_tower

Embeds: TypeAlias = NDArray[np.float32]
"""Unit-norm, [N, E]."""

LITERAL = "literal torch fp32"
FOLDED = "folded torch fp32"
ORT_FP32 = "ONNX Runtime fp32"
ORT_INT8 = "ONNX Runtime int8"
OPENVINO_FP32 = "OpenVINO fp32"
OPENVINO_INT8 = "OpenVINO int8"
WITH_BF16 = ", floats bf16"
PADDED = ", padded"
OWN_PRODUCTS = "own products"

ORDER = (
    FOLDED, ORT_FP32, ORT_INT8, OPENVINO_FP32, OPENVINO_FP32 + WITH_BF16, OPENVINO_INT8,
    OPENVINO_INT8 + WITH_BF16,
)  # fmt: skip

FASTEST_INT8 = (OPENVINO_INT8 + WITH_BF16, OPENVINO_INT8, ORT_INT8)
"""What the runtime's fastest backend makes of int8: the first of these that took part."""

MIN_COSINE_FP32 = 0.9999
MIN_COSINE_LOW = 0.99
"""As a bundle's canaries demand of fp32, and of int8; bf16 is held to the latter."""

CALIBRATION_SAMPLES = 8  # Other people and captions than those of the batch.

ENOUGH_ROWS = 1024
"""Products of fewer rows are bound by reading weights, and would be no peak."""

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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time exported towers on the CPU against a literal implementation of the formulas.

    A model with random weights is folded, exported and quantized as `upperson export` does it, and
    embeds rendered people and random captions of 20 to 30 tokens. Contenders take turns in one
    process, and must give equal embeddings. Matrix products of a block's shapes run in the same
    turns, as many as come to the work of the tower: the best run of any is the peak, and shares are
    what the best run of a contender achieves of it. Beside them run the tower's own products in
    bf16, one after another, each with a weight that is not in the cache. int8 may exceed both,
    since its own peak is twice as high. Where the processor has no instructions for bf16, what is
    in bf16 is left out, and fp32 is the peak.

    Example: `python -m benchmarks.towers --threads 1`
    """
    spec = ModelSpec(base=base, height_px=height, width_px=width, batch_size=batch_size)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model = random_model(spec, random_base(spec)).eval()
    batch = tower_inputs(spec)
    others = tower_inputs(replace(spec, batch_size=CALIBRATION_SAMPLES, seed=spec.seed + 1))
    with tempfile.TemporaryDirectory() as folder, show_progress() as progress:
        graphs = write_graphs(model, others, Path(folder), threads=threads, progress=progress)
        turns = {"rounds": rounds, "warmup": warmup}
        measured = {
            "image": measure(
                image_contenders(model, graphs["image"], batch["image"], threads),
                block_weights(model.image.blocks),
                rows=len(batch["image"]) * len(model.image.positional_embedding),
                batch_size=batch_size,
                progress=partial(progress, "image tower, in turns"),
                **turns,
            ),
            "text": measure(
                text_contenders(model, graphs["text"], batch["text"], threads),
                block_weights(model.text.blocks),
                rows=batch["text"].size,
                batch_size=batch_size,
                progress=partial(progress, "text tower, in turns"),
                **turns,
            ),
        }
    machine = describe_machine("torch", "open_clip_torch", "onnxruntime", "openvino")
    shapes = {"tokens": batch["text"].shape[1], "context_length": model.text.context_length}
    result = {
        "benchmark": "towers",
        "spec": asdict(spec) | shapes | turns | {"threads": threads},
        "machine": machine | {"torch_kernels": torch.backends.cpu.get_cpu_capability()},
        "summary": summarize(measured),
        "towers": measured,
    }
    print_result(result, as_json, _show)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to embed the batch."""

    run: Callable[[], Embeds]
    flop: int
    """Work of the folded tower's matrix products for one item, whatever the contender computes."""


def image_contenders(
    model: UPPerson, graphs: TowerGraphs, pixels: NDArray[np.uint8], threads: int
) -> dict[str, Contender]:
    """Return the image tower's contenders for uint8 [N, H, W, 3].

    The literal model gets normalised pixels; normalising them is not timed.
    """
    image_N3HW = evaluation_transform()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    flop = flop_of(graphs.folded, pixels[:1])
    contenders = {
        LITERAL: Contender(
            run=partial(_in_torch, partial(literal.encode_image, model), image_N3HW), flop=flop
        )
    }
    for name, embed in exported(graphs, "image", pixels, threads).items():
        contenders[name] = Contender(run=partial(embed, pixels), flop=flop)
    return contenders


def text_contenders(
    model: UPPerson, graphs: TowerGraphs, ids: NDArray[np.int32], threads: int
) -> dict[str, Contender]:
    """Return the text tower's for int32 [N, L], padded to the longest caption, and to the context.

    The literal model pads to the context length itself, as always.
    """
    padded = np.pad(ids, ((0, 0), (0, model.text.context_length - ids.shape[1])))
    flop, padded_flop = (flop_of(graphs.folded, rows[:1]) for rows in (ids, padded))
    contenders = {
        LITERAL: Contender(
            run=partial(
                _in_torch, partial(literal.encode_text, model), torch.from_numpy(ids).long()
            ),
            flop=padded_flop,
        )
    }
    for name, embed in exported(graphs, "text", ids, threads).items():
        contenders[name] = Contender(run=partial(embed, ids), flop=flop)
        contenders[name + PADDED] = Contender(run=partial(embed, padded), flop=padded_flop)
    return contenders


def exported(
    graphs: TowerGraphs, tower: Tower, batch: NDArray[Any], threads: int
) -> dict[str, Callable[[NDArray[Any]], Embeds]]:
    """Return what embeds a batch with a tower that was folded; OpenVINO where it is installed."""
    found: dict[str, Callable[[NDArray[Any]], Embeds]] = {
        FOLDED: lambda rows: _in_torch(graphs.folded, torch.from_numpy(rows))
    }
    backends = {
        ORT_FP32: open_backend(graphs.files["fp32"], "onnxruntime", threads=threads),
        ORT_INT8: open_backend(graphs.files["int8"], "onnxruntime", threads=threads),
    }
    if find_spec("openvino") is not None:
        backends[OPENVINO_FP32] = open_backend(graphs.files["fp32"], "openvino", threads=threads)
        int8 = open_backend(graphs.files["int8"], "openvino", threads=threads)
        if getattr(int8, "float_type", "f32") == "bf16":  # The CPU has it: compare both.
            backends[OPENVINO_INT8 + WITH_BF16] = int8
            compiled = partial(openvino_in, batch=batch, threads=threads)
            found[OPENVINO_FP32 + WITH_BF16] = compiled(graphs.files["fp32"], "bf16")
            found[OPENVINO_INT8] = compiled(graphs.files["int8"], "f32")
        else:
            backends[OPENVINO_INT8] = int8
    found |= {name: partial(run_tower, backend, tower) for name, backend in backends.items()}
    return {name: found[name] for name in ORDER if name in found}


def openvino_in(
    path: Path, float_type: str, *, batch: NDArray[Any], threads: int
) -> Callable[[NDArray[Any]], Embeds]:
    """Compile a graph with OpenVINO as the runtime does, but in a float type of our choice.

    Pictures get a graph for batches of just this size: the runtime has one for eight.
    """
    core = import_openvino().Core()
    with same_signal_stack():
        model = core.read_model(path)
        if batch.ndim == 4:
            model.reshape(batch.shape)
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": float_type,
        }
        request = core.compile_model(model, "CPU", config).create_infer_request()

    def embed(rows: NDArray[Any]) -> Embeds:
        request.start_async([rows])
        request.wait()
        return np.array(request.get_output_tensor().data)

    return embed


def measure(
    contenders: Mapping[str, Contender],
    weights: Sequence[Tensor],
    *,
    rows: int,
    batch_size: int,
    rounds: int,
    warmup: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Time a tower's contenders and its matrix products in turns; return plain values.

    A contender's ``gemm_share`` is what its best run achieves of the best run of products in the
    fastest of `float_types`; ``p50_gemm_share`` compares median runs, and ``own_share`` does so
    with the tower's own products, one after another. ``padded_ratio`` is how much faster it is
    than on padded captions. Keys with ``cpu_`` are by processor time.

    Args:
        contenders: The literal model among them.
        weights: [outputs, inputs] of the tower's Linears, in order.
        rows: Tokens of the batch.
        batch_size: N.
        rounds: Timed runs of each contender.
        warmup: Runs of each before that.
        progress: Told the rounds that are over, and of how many.

    Raises:
        IntegrityError: A contender embeds something else than the literal model.
    """
    embeds = {name: contender.run() for name, contender in contenders.items()}
    cosines = {name: min_cosine(name, rows, embeds[LITERAL]) for name, rows in embeds.items()}
    work = batch_size * min(contender.flop for contender in contenders.values())
    shapes = [(weight.shape[1], weight.shape[0]) for weight in weights]
    gemm = gemm_contenders(max(rows, ENOUGH_ROWS), shapes, work)
    own, own_flop = own_products(rows, weights)
    runs: dict[Any, Callable[[], object]] = {name: one.run for name, one in contenders.items()}
    timings: dict[Any, Timing] = time_in_turns(
        runs | dict(gemm) | {OWN_PRODUCTS: own},
        warmup=warmup,
        rounds=rounds,
        progress=lambda done: progress(done, warmup + rounds),
    )
    peak = peaks({key: timings[key] for key in gemm}, work)
    own_flops = own_flop / timings[OWN_PRODUCTS].median_s
    base, fastest = timings[LITERAL], peak[float_types()[-1]]
    found = {}
    for name, contender in contenders.items():
        timing, flop = timings[name], contender.flop * batch_size
        found[name] = timing.as_dict(batch_size) | {
            "speedup": base.median_s / timing.median_s,
            "cpu_speedup": base.median_cpu_s / timing.median_cpu_s,
            "gflop_per_item": contender.flop / 1e9,
            "gemm_share": flop / min(timing.seconds) / fastest["flops"],
            "cpu_gemm_share": flop / min(timing.cpu_seconds) / fastest["cpu_flops"],
            "p50_gemm_share": flop / timing.median_s / fastest["p50_flops"],
            "own_share": flop / timing.median_s / own_flops,
            "min_cosine": cosines[name],
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu_seconds,
        }
        if long := timings.get(name + PADDED):
            found[name]["padded_ratio"] = long.median_s / timing.median_s
            found[name]["cpu_padded_ratio"] = long.median_cpu_s / timing.median_cpu_s
    products = timings[OWN_PRODUCTS].as_dict(batch_size) | {"flops": own_flops}
    return {"peaks": peak, "own_products": products, "contenders": found}


def block_weights(blocks: Iterable[Any]) -> list[Tensor]:
    """Return the weights of all blocks' Linears, in order."""
    return [
        weight
        for block in blocks
        for weight in (
            block.attn.in_proj_weight,
            block.attn.out_proj.weight,
            block.mlp.c_fc.weight,
            block.mlp.c_proj.weight,
        )
    ]


@torch.no_grad()
def flop_of(tower: nn.Module, item: NDArray[Any]) -> int:
    """Count the matrix products of one item: 2 FLOP for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        tower(torch.from_numpy(item))
    return int(counter.get_total_flops())


@torch.inference_mode()
def _in_torch(embed: Callable[[Tensor], Tensor], inputs: Tensor) -> Embeds:
    embeds: Embeds = embed(inputs).numpy()
    return embeds


def min_cosine(
    name: str,
    found: Embeds,
    expected: Embeds,
    *,
    floor: float | None = None,
    reference: str = LITERAL,
) -> float:
    """Return the lowest cosine of a contender's embeddings to a reference's.

    Args:
        name: Of the contender.
        found: Its embeddings.
        expected: The reference's.
        floor: What the cosine must reach; None goes by the contender's name.
        reference: Name of the reference.

    Raises:
        IntegrityError: It is too low, or an item is nearer to another's embedding than to its own.
    """
    if floor is None:
        floor = MIN_COSINE_LOW if "int8" in name or WITH_BF16 in name else MIN_COSINE_FP32
    agreement = compare_embeds(expected, found)
    # Random weights embed all items alike: what tells them apart is left without their mean.
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


def summarize(towers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratios that matter, of the fastest int8; keys with ``cpu_`` by processor time."""
    image, text = towers["image"]["contenders"], towers["text"]["contenders"]
    best = next(name for name in FASTEST_INT8 if name in image)
    kind = float_types()[-1]
    summary: dict[str, Any] = {
        "image_int8": best,
        f"p50_image_int8_share_of_{kind}_peak": image[best]["p50_gemm_share"],
        f"image_int8_share_of_own_{kind}_products": image[best]["own_share"],
    }
    for prefix, time in (("", "p50_ms"), ("cpu_", "cpu_ms")):
        summary |= {
            f"{prefix}image_int8_over_literal": image[LITERAL][time] / image[best][time],
            f"{prefix}image_int8_over_onnxruntime_fp32": image[ORT_FP32][time] / image[best][time],
            f"{prefix}image_int8_share_of_{kind}_peak": image[best][f"{prefix}gemm_share"],
            f"{prefix}text_fp32_over_padded": text[ORT_FP32][f"{prefix}padded_ratio"],
            f"{prefix}text_int8_over_padded": text[best][f"{prefix}padded_ratio"],
            f"{prefix}text_int8_over_literal": text[LITERAL][time] / text[best][time],
        }
    return summary


def _show(result: dict[str, Any]) -> None:
    spec, machine = result["spec"], result["machine"]
    typer.echo(
        f"towers of {spec['base']} at {spec['height_px']}x{spec['width_px']}, random weights, "
        f"batch {spec['batch_size']}; captions of {spec['tokens']} tokens, padded ones of "
        f"{spec['context_length']}; {spec['warmup']} + {spec['rounds']} rounds in turns"
    )
    typer.echo(machine_lines(machine, spec["threads"]))
    if not (machine["instruction_sets"] or {}).get("amx_bf16"):
        typer.echo("no AMX here: int8 and bf16 gain several times as much on a CPU that has it")
    if "bf16" not in float_types():
        typer.echo("no instructions for bf16 here: what is in bf16 is left out, fp32 is the peak")
    for name, tower in result["towers"].items():
        typer.echo("")
        _show_tower(name, tower)


def _show_tower(name: str, tower: dict[str, Any]) -> None:
    typer.echo(
        f"{name} tower; peak of matrix products, by wall and by CPU time: "
        + ", ".join(
            f"{kind} {peak['flops'] / 1e9:.0f} and {peak['cpu_flops'] / 1e9:.0f} GFLOP/s"
            for kind, peak in tower["peaks"].items()
        )
        + f"; its own products in {float_types()[-1]} {tower['own_products']['p50_ms']:.1f} ms, "
        f"{tower['own_products']['flops'] / 1e9:.0f} GFLOP/s"
    )
    right = (
        "items/s", "p50 ms", "p90 ms", "speed", "CPU ms", "CPU speed",
        f"of {float_types()[-1]} peak", "of own products", "lowest cosine",
        *(("over padded",) if name == "text" else ()),
    )  # fmt: skip
    table = new_table("", *right, right=right)
    for contender, row in tower["contenders"].items():
        cells = (
            f"{row['items_per_s']:.1f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p90_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['cpu_ms']:.1f}",
            f"{row['cpu_speedup']:.2f}x",
            f"{100 * row['gemm_share']:.0f} %",
            f"{100 * row['own_share']:.0f} %",
            f"{row['min_cosine']:.6f}",
            f"{row['padded_ratio']:.2f}x" if "padded_ratio" in row else "",
        )
        table.add_row(contender, *cells[: len(right)])
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.towers")
