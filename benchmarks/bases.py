"""Bases at their real sizes with random weights: does each form of both towers embed alike?

Our model without trained parts is compared with open_clip, on pictures of the base's own size and,
where open_clip can change it, of crops. With trained parts that all matter, our model is compared
with the literal formulas, the folded towers and the exported files.

Shapes: N batch, L tokens, E embedding.
"""

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.contenders import Embeds, cpu_contenders
from benchmarks.random_model import (
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
    random_batch,
    random_model,
    spread,
    tower_inputs,
)
from benchmarks.report import Column, conditions, print_report, table
from benchmarks.tower_graphs import write_graphs
from upperson.data.transforms import evaluation_transform
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.agreement import compare_embeds
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Threads
from upperson_rt.cli.output import show_progress
from upperson_rt.towers import TOWERS, Tower

COLUMNS = {
    "largest difference": Column("max_error", "{:.1e}"),
    "lowest cosine": Column("min_cosine", "{:.7f}"),
}

_PE_CORE = ["PE-Core-T-16-384", "PE-Core-S-16-384", "PE-Core-B-16"]

app = new_app("Compare bases with open_clip, the literal formulas and their exports.")


@app.command(cls=Command)
def bases(
    names: Annotated[
        list[str], typer.Option("--base", help="Bases: names of open_clip, or files.")
    ] = _PE_CORE,
    height: HeightOption = ModelSpec.height_px,
    width: WidthOption = ModelSpec.width_px,
    batch_size: Annotated[int, typer.Option(min=2, help="Images and captions.")] = 4,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compare bases with open_clip, the literal formulas and their exports.

    Weights are random, pictures are rendered people.

    Example: `python -m benchmarks.bases --base PE-Core-T-16-384`
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    tables = []
    with show_progress() as progress:
        for name in names:
            spec = ModelSpec(base=name, height_px=height, width_px=width, batch_size=batch_size)
            started = time.perf_counter()
            rows = _measure(spec, threads, partial(_of_base, progress, name))
            found[name] = {"seconds": time.perf_counter() - started, "towers": rows}
            seconds = f"{name}, {found[name]['seconds']:.0f} s"
            tables += [table(f"{seconds}: {kind} tower", rows[kind], COLUMNS) for kind in TOWERS]
            gc.collect()  # Graphs are cyclic, and hold their weights until they are collected.
    packages = ("torch", "open_clip_torch", "timm", "onnxruntime", "openvino")
    result = conditions("bases", *packages, threads=threads, batch_size=batch_size, warmup=0)
    result |= {"spec": asdict(spec) | {"base": None}, "bases": found}
    print_report(result, [f"at {height}x{width}, random weights, batch {batch_size}"], tables)


def _of_base(progress: Any, name: str, what: str, done: int, total: int) -> None:
    progress(f"{name}: {what}", done, total)


def _measure(spec: ModelSpec, threads: int, progress: Any) -> dict[Tower, dict[str, Any]]:
    clip = random_base(spec)
    spread(clip)
    found: dict[Tower, dict[str, Any]] = {kind: {} for kind in TOWERS}
    model = random_model(spec, clip).eval()
    inputs = tower_inputs(spec)
    with tempfile.TemporaryDirectory() as folder:
        graphs = write_graphs(model, inputs, Path(folder), threads=threads, progress=progress)
        for kind in TOWERS:
            rows = inputs[kind]
            expected = _embed(model, kind, torch.from_numpy(rows))
            for makers in cpu_contenders(kind, graphs[kind], rows, model, threads).values():
                for name, one in makers:
                    label = "folded" if name == "torch fp32" else name
                    found[kind][label] = _agreement(expected, one.run(rows))
    del model, graphs
    for kind, label, expected, embeds in beside_open_clip(spec, clip):
        found[kind] = {label: _agreement(expected, embeds)} | found[kind]
    return found


@torch.inference_mode()
def _embed(model: UPPerson, kind: Tower, rows: Tensor) -> Embeds:
    if kind == "image":
        rows = evaluation_transform()(rows.permute(0, 3, 1, 2))
        return model.encode_image(rows).numpy()
    return model.encode_text(rows.long()).numpy()


@torch.no_grad()
def beside_open_clip(spec: ModelSpec, clip: Any) -> Iterator[tuple[Tower, str, Embeds, Embeds]]:
    """Yield embeddings of open_clip and ours without trained parts; the base is changed."""
    images, ids_NL, _ = random_batch(spec)
    visual = clip.visual
    native = visual.image_size
    plain = UPPerson(clip, PLAIN_CLIP, native).eval()
    padded_NL = F.pad(ids_NL, (0, plain.text.context_length - ids_NL.shape[1]))
    theirs = F.normalize(clip.encode_text(padded_NL), dim=-1)
    yield "text", "open_clip", theirs.numpy(), plain.encode_text(ids_NL).numpy()
    if hasattr(visual, "set_input_size"):
        crops = UPPerson(clip, PLAIN_CLIP, (spec.height_px, spec.width_px)).eval()
    squares = F.interpolate(images, native)
    theirs = F.normalize(clip.encode_image(squares), dim=-1)
    label = "open_clip, {}x{}".format(*native)
    yield "image", label, theirs.numpy(), plain.encode_image(squares).numpy()
    if hasattr(visual, "set_input_size"):
        visual.set_input_size((spec.height_px, spec.width_px))
        # timm interpolates positions in another way than the paper.
        count = visual.trunk.pos_embed.shape[1]
        visual.trunk.pos_embed = nn.Parameter(crops.image.positional_embedding[None, -count:])
        theirs = F.normalize(clip.encode_image(images), dim=-1)
        label = f"open_clip, {spec.height_px}x{spec.width_px}"
        yield "image", label, theirs.numpy(), crops.encode_image(images).numpy()


def _agreement(expected: Embeds, found: Embeds) -> dict[str, float]:
    agreement = compare_embeds(expected, found)
    return {"max_error": agreement.max_error, "min_cosine": agreement.min_cosine}


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.bases")
