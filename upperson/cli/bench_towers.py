"""``upperson bench towers``."""

import tempfile
from importlib import metadata
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson.cli.extras import require_extra
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_json, print_table

_ENGINES = ("onnxruntime", "openvino")


def towers(
    base: Annotated[
        str, typer.Option(help="Shapes to run: upperson-small or a ViT CLIP of open_clip.")
    ] = "ViT-B-16-quickgelu",
    height: Annotated[int, typer.Option(min=1, help="Image height, px.")] = 384,
    width: Annotated[int, typer.Option(min=1, help="Image width, px.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Images and captions at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of every contender.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them, not timed.")] = 1,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time exported towers on the CPU against a literal implementation of the formulas.

    A model with random weights is folded, exported and quantized as `upperson export` does it, and
    embeds rendered people and random captions of 20 to 30 tokens. Contenders take turns in one
    process, and must give equal embeddings. Matrix products of a block's shapes run in the same
    turns, as many as come to the work of the tower: the best run of any is the peak, and shares are
    what the best run of a contender achieves of it. Beside them run the tower's own products in
    bf16, one after another, each with a weight that is not in the cache. int8 may exceed both,
    since its own peak is twice as high.

    Example: `upperson bench towers --threads 1`
    """
    require_extra("train", "the benchmark of towers")
    require_extra("export", "the benchmark of towers")
    import torch

    from upperson.bench.training_step import StepSpec
    from upperson.cli.progress import Display

    spec = StepSpec(base=base, height_px=height, width_px=width, batch_size=batch_size)
    with Display() as display:
        result = _run(spec, rounds, warmup, threads or torch.get_num_threads(), display.update)
    if json:
        print_json(result)
    else:
        _print_result(result)


def _run(spec: Any, rounds: int, warmup: int, threads: int, progress: Any) -> dict[str, Any]:
    import torch

    from upperson.bench.hardware import describe_hardware
    from upperson.bench.towers import (
        as_dict,
        bench_image_tower,
        bench_text_tower,
        calibration_samples,
        random_samples,
        random_tower_model,
    )
    from upperson.cli.tower_graphs import write_graphs

    torch.set_num_threads(threads)
    model = random_tower_model(spec)
    samples = random_samples(spec)
    with tempfile.TemporaryDirectory() as folder:
        graphs = write_graphs(
            model, calibration_samples(spec), Path(folder), threads=threads, progress=progress
        )
        options = {"rounds": rounds, "warmup": warmup, "threads": threads}
        image = bench_image_tower(
            model,
            graphs["image"],
            samples["image"],
            progress=lambda done, total: progress("image tower, in turns", done, total),
            **options,
        )
        text = bench_text_tower(
            model,
            graphs["text"],
            samples["text"],
            progress=lambda done, total: progress("text tower, in turns", done, total),
            **options,
        )
    measured = {"image": as_dict(image), "text": as_dict(text)}
    return {
        "benchmark": "towers",
        "spec": {
            "base": spec.base,
            "height_px": spec.height_px,
            "width_px": spec.width_px,
            "batch_size": spec.batch_size,
            "tokens": samples["text"].shape[1],
            "context_length": model.text.context_length,
            "seed": spec.seed,
            **options,
        },
        "machine": describe_hardware() | {name: _version(name) for name in _ENGINES},
        "summary": _summary(measured),
        "towers": measured,
    }


def _summary(towers: dict[str, Any]) -> dict[str, float]:
    """Return the ratios that matter, by wall time and by processor time: of the fastest int8.

    Keys that begin with ``cpu_`` are by processor time.
    """
    from upperson.bench.towers import FASTEST_INT8, LITERAL, ORT_FP32

    image, text = towers["image"]["contenders"], towers["text"]["contenders"]
    best = next(name for name in FASTEST_INT8 if name in image)
    summary: dict[str, Any] = {
        "image_int8": best,
        "p50_image_int8_share_of_bf16_peak": image[best]["p50_gemm_share"],
        "image_int8_share_of_own_bf16_products": image[best]["own_share"],
    }
    for prefix, time in (("", "p50_ms"), ("cpu_", "cpu_ms")):
        summary |= {
            f"{prefix}image_int8_over_literal": image[LITERAL][time] / image[best][time],
            f"{prefix}image_int8_over_onnxruntime_fp32": image[ORT_FP32][time] / image[best][time],
            f"{prefix}image_int8_share_of_bf16_peak": image[best][f"{prefix}gemm_share"],
            f"{prefix}text_fp32_over_padded": text[ORT_FP32][f"{prefix}padded_ratio"],
            f"{prefix}text_int8_over_padded": text[best][f"{prefix}padded_ratio"],
            f"{prefix}text_int8_over_literal": text[LITERAL][time] / text[best][time],
        }
    return summary


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print_result(result: dict[str, Any]) -> None:
    """Print what ran on what, a table for each tower, and the whole result as one line of JSON."""
    spec, machine = result["spec"], result["machine"]
    sets = machine["instruction_sets"] or {}
    typer.echo(
        f"towers of {spec['base']} at {spec['height_px']}x{spec['width_px']}, random weights, "
        f"batch {spec['batch_size']}; captions of {spec['tokens']} tokens, padded ones of "
        f"{spec['context_length']}; {spec['warmup']} + {spec['rounds']} rounds in turns"
    )
    typer.echo(
        f"{machine['cpu']}, {machine['threads']} of {machine['cpus_available']} CPUs, load "
        f"{machine['load_average']}; "
        + ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in sets.items())
    )
    if not sets.get("amx_bf16"):
        typer.echo("no AMX here: int8 and bf16 gain several times as much on a CPU that has it")
    typer.echo(
        f"torch {machine['torch']} ({machine['torch_kernels']} kernels), "
        + "".join(f"{name} {machine[name] or 'absent'}, " for name in _ENGINES)
        + f"upperson {machine['upperson']}"
    )
    for name, tower in result["towers"].items():
        typer.echo("")
        _print_tower(name, tower)
    typer.echo(dumps(result, separators=(",", ":")))


def _print_tower(name: str, tower: dict[str, Any]) -> None:
    peaks = tower["peaks"]
    typer.echo(
        f"{name} tower; peak of matrix products, by wall and by CPU time: "
        + ", ".join(
            f"{kind} {peak['flops'] / 1e9:.0f} and {peak['cpu_flops'] / 1e9:.0f} GFLOP/s"
            for kind, peak in peaks.items()
        )
        + f"; its own products in bf16 {tower['own_products']['p50_ms']:.1f} ms, "
        f"{tower['own_products']['flops'] / 1e9:.0f} GFLOP/s"
    )
    right = (
        "items/s", "p50 ms", "p90 ms", "speed", "CPU ms", "CPU speed", "of bf16 peak",
        "of own products", "lowest cosine",
    )  # fmt: skip
    last = ("over padded",) if name == "text" else ()
    table = new_table("", *right, *last, right=(*right, *last))
    for contender, row in tower["contenders"].items():
        cells = [
            contender,
            f"{row['items_per_s']:.1f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p90_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['cpu_ms']:.1f}",
            f"{row['cpu_speedup']:.2f}x",
            f"{100 * row['gemm_share']:.0f} %",
            f"{100 * row['own_share']:.0f} %",
            f"{row['min_cosine']:.6f}",
        ]
        if last:
            ratio = row.get("padded_ratio")
            cells.append("" if ratio is None else f"{ratio:.2f}x")
        table.add_row(*cells)
    print_table(table)
