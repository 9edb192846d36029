"""An adapter file of real size: its bytes, and what a box needs to make the bundle of it.

Weights and inputs are random, shapes are a base's. Every file of the bundle is compared with the
exported one; where the processor allows it, a second bundle is made as on AVX2 alone.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import avx2
from benchmarks.random_model import (
    BaseOption,
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
    random_model,
    tower_inputs,
)
from benchmarks.report import Column, conditions, print_report, table
from upperson.data.vocabulary import clip_tokenizer_json
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_calibration.samples import CalibrationSet
from upperson_export.adapter import AdapterBase, round_trained, write_adapter
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_export.variants import VariantName
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.files import sha256_of_file
from upperson_rt.manifest import NO_ADAPTER

app = new_app("Export an adapter of real size, apply it as a box does, and compare the bundles.")

_APPLY = """
import atexit, pathlib
from upperson_rt.cli import main
from upperson_machine.description import resident_bytes
atexit.register(lambda: pathlib.Path("peak").write_text(str(resident_bytes("VmHWM") or "")))
main()
"""
"""Writes its own peak into a file: the maximum that `os.wait4` returns begins with the parent's."""
_VARIANTS: tuple[VariantName, ...] = ("int8", "fp16")


@app.command(cls=Command)
def adapter(
    base: BaseOption = ModelSpec.base,
    height: HeightOption = ModelSpec.height_px,
    width: WidthOption = ModelSpec.width_px,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the box.")] = 2,
) -> None:
    """Export an adapter of random weights, apply it, and compare the bundle with the export.

    Example: python -m benchmarks.adapter --base ViT-B-16-quickgelu
    """
    spec = ModelSpec(base=base, height_px=height, width_px=width)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _export(spec, folder)
        rows = {"this processor": _applied(folder, threads)}
        lacking = avx2.missing()
        if lacking is None:
            rows["AVX2 alone"] = _applied(folder, threads, "-m", "benchmarks.avx2", sys.executable)
        size_bytes = (folder / "site.adapter").stat().st_size
    result = conditions("adapter", "numpy", "onnxruntime", threads=threads, batch_size=0, warmup=0)
    result |= {"base": base, "adapter_bytes": size_bytes, "applied": rows, "avx2": lacking}
    facts = [f"{base} at {height}x{width}, adapter of {size_bytes / 1e6:.1f} MB in float16"]
    if lacking is not None:
        facts.append(f"not on AVX2 alone: {lacking}")
    columns = {
        "s": Column("seconds", "{:.1f}"),
        "peak MB": Column("peak_bytes", "{:.0f}", 1e-6),
        "files": Column("files", "{:.0f}"),
        "files that differ": Column("different", "{:.0f}"),
    }
    print_report(result, facts, [table("apply on", rows, columns)])


def _export(spec: ModelSpec, folder: Path) -> None:
    clip = random_base(spec)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim == 1:  # Equal norms and biases would be merged in the graph.
                parameter.add_(0.02 * torch.randn_like(parameter))
    size = (spec.height_px, spec.width_px)
    _write(UPPerson(clip, PLAIN_CLIP, size), spec, folder / "base", ExportOptions(variants=()))
    model = random_model(spec, clip).eval()
    round_trained(model, "float16")
    onto = AdapterBase.open(folder / "base")
    options = ExportOptions(variants=_VARIANTS, onto=onto)
    _write(model, spec, folder / "exported", options, "1" * 64)
    write_adapter(folder / "exported", onto, model, "float16", folder / "site.adapter")


def _write(
    model: UPPerson,
    spec: ModelSpec,
    output: Path,
    options: ExportOptions,
    adapter_sha256: str = NO_ADAPTER,
) -> None:
    inputs = tower_inputs(spec)
    export_bundle(
        model.eval(),
        ModelIdentity(
            name=spec.base,
            base=spec.base,
            base_sha256="0" * 64,
            adapter_sha256=adapter_sha256,
            embed_dim=model.embed_dim,
        ),
        clip_tokenizer_json(),
        CalibrationSet(inputs["image"], inputs["text"], "rendered people", "random tokens"),
        None,
        output,
        options,
        lambda work, done, total: None,
    )


def _applied(folder: Path, threads: int, *runner: str) -> dict[str, Any]:
    """Apply in a process of its own; return its figures."""
    program = [sys.executable, *runner, "-c", _APPLY]
    arguments = ["apply", "site.adapter", "-b", "base", "-o", "bundle", "--json"]
    limited = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    start = time.perf_counter()
    done = subprocess.run(
        [*program, *arguments],
        cwd=folder,
        env=os.environ | limited,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: apply ended with {done.returncode}")
    seconds = time.perf_counter() - start
    peak_bytes = (folder / "peak").read_text()
    names = [path.name for path in (folder / "exported").iterdir()]
    different = [
        name
        for name in names
        if sha256_of_file(folder / "exported" / name) != sha256_of_file(folder / "bundle" / name)
    ]
    return {
        "seconds": seconds,
        "peak_bytes": int(peak_bytes) if peak_bytes else None,
        "files": len(names),
        "different": len(different),
    }


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.adapter")
