"""Time of exported towers against the literal model: every contender in one process, in turns.

All contenders embed the same batch, and their embeddings must agree with the literal model's.
Matrix products of the tower's own shapes run in the same turns; they say what the machine can do.

Shapes: N batch, H image height, W image width, L tokens, E embedding.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from upperson.bench import literal
from upperson.bench.gemm import gemm_contenders, own_products, peaks
from upperson.bench.training_step import StepSpec, random_base, random_batch, random_model
from upperson.data.synthetic import SyntheticSpec, iter_samples
from upperson.data.transforms import evaluation_transform
from upperson.model.encoder import UPPerson
from upperson_rt.agreement import compare_embeds, exchanged_item
from upperson_rt.backends import open_backend
from upperson_rt.errors import IntegrityError
from upperson_rt.preprocess import resize_image
from upperson_rt.timing import Timing, time_in_turns
from upperson_rt.towers import Backend, Tower, run_tower

LITERAL = "literal torch fp32"
FOLDED = "folded torch fp32"
ORT_FP32 = "ONNX Runtime fp32"
ORT_INT8 = "ONNX Runtime int8"
OPENVINO_FP32 = "OpenVINO fp32"
OPENVINO_INT8 = "OpenVINO int8"
WITH_BF16 = ", floats bf16"
PADDED = ", padded"
OWN_PRODUCTS = "own products"

FASTEST_INT8 = (OPENVINO_INT8 + WITH_BF16, OPENVINO_INT8, ORT_INT8)
"""What the runtime's fastest backend makes of int8: the first of these that took part."""

MIN_COSINE_FP32 = 0.9999
MIN_COSINE_LOW = 0.99
"""As a bundle's canaries demand of fp32, and of int8; bf16 is held to the latter."""

CALIBRATION_SAMPLES = 8

ENOUGH_ROWS = 1024
"""Products of fewer rows are bound by reading weights, and would be no peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerGraphs:
    """One tower in the forms that run on a CPU."""

    folded: nn.Module
    fp32: Path
    int8: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to embed the batch."""

    run: Callable[[], NDArray[np.float32]]
    """Returns unit-norm embeddings [N, E]."""

    min_cosine: float
    """Lowest cosine to the literal model's."""

    flop: int
    """Of the folded tower's matrix products for one item, whatever the contender computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerBench:
    """One tower's measurements."""

    timings: dict[str, Timing]
    """Of a run of the batch, by the contender's name."""
    contenders: dict[str, Contender]
    cosines: dict[str, float]
    """The lowest of the batch."""
    peaks: dict[str, dict[str, float]]
    """See :func:`upperson.bench.gemm.peaks`."""
    own: Timing
    """Of :func:`upperson.bench.gemm.own_products`."""
    own_flop: int
    batch_size: int


def random_tower_model(spec: StepSpec) -> UPPerson:
    """Build a model in evaluation mode with no trained tensor at its start."""
    return random_model(spec, random_base(spec)).eval()


def random_samples(spec: StepSpec) -> dict[Tower, NDArray[Any]]:
    """Return the batch: rendered people uint8 [N, H, W, 3], random captions int32 [N, L]."""
    return _samples(spec, seed=spec.seed)


def calibration_samples(spec: StepSpec) -> dict[Tower, NDArray[Any]]:
    """Return other people and captions than those of the batch, to set int8 ranges."""
    count = StepSpec(
        base=spec.base,
        height_px=spec.height_px,
        width_px=spec.width_px,
        batch_size=CALIBRATION_SAMPLES,
        seed=spec.seed + 1,
    )
    return _samples(count, seed=count.seed)


def bench_image_tower(
    model: UPPerson,
    graphs: TowerGraphs,
    pixels: NDArray[np.uint8],
    *,
    rounds: int,
    warmup: int,
    threads: int,
    progress: Callable[[int, int], None],
) -> TowerBench:
    """Measure the image tower.

    Args:
        model: In evaluation mode; gets normalised pixels, which are not timed.
        graphs: Of the same model.
        pixels: The batch, uint8 [N, H, W, 3].
        rounds: Timed runs of each contender.
        warmup: Runs of each before that.
        threads: CPU threads of every contender.
        progress: Told the rounds that are over, and of how many.

    Raises:
        IntegrityError: A contender embeds something else than the literal model.
    """
    torch.set_num_threads(threads)
    image_N3HW = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    normalised_N3HW = evaluation_transform()(image_N3HW)
    runs: dict[str, Callable[[], Any]] = {
        LITERAL: partial(_literal, literal.encode_image, model, normalised_N3HW),
        FOLDED: partial(_folded, graphs.folded, torch.from_numpy(pixels)),
    }
    for name, backend in _backends(graphs, threads).items():
        runs[name] = partial(run_tower, backend, "image", pixels)
    flop = _flop(graphs.folded, pixels[:1])
    rows = len(pixels) * len(model.image.positional_embedding)
    return _measure(
        {name: _contender(name, run, flop) for name, run in runs.items()},
        model.image.blocks,
        rows,
        flop * len(pixels),
        len(pixels),
        rounds=rounds,
        warmup=warmup,
        progress=progress,
    )


def bench_text_tower(
    model: UPPerson,
    graphs: TowerGraphs,
    input_ids: NDArray[np.int32],
    *,
    rounds: int,
    warmup: int,
    threads: int,
    progress: Callable[[int, int], None],
) -> TowerBench:
    """Measure the text tower, on captions as they are and padded to the context length.

    Args and errors are those of :func:`bench_image_tower`, with int32 ``input_ids`` [N, L] padded
    to the longest caption. The literal model pads to the context length itself, as always.
    """
    torch.set_num_threads(threads)
    length = model.text.context_length
    padded = np.pad(input_ids, ((0, 0), (0, length - input_ids.shape[1])))
    ids_NL = torch.from_numpy(input_ids).long()
    flop, padded_flop = (_flop(graphs.folded, ids[:1]) for ids in (input_ids, padded))
    literal_run = partial(_literal, literal.encode_text, model, ids_NL)
    contenders = {LITERAL: _contender(LITERAL, literal_run, padded_flop)}
    folded = partial(_folded, graphs.folded)
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        FOLDED: (
            partial(folded, torch.from_numpy(input_ids)),
            partial(folded, torch.from_numpy(padded)),
        )
    }
    for name, backend in _backends(graphs, threads).items():
        embed = partial(run_tower, backend, "text")
        runs[name] = (partial(embed, input_ids), partial(embed, padded))
    for name, (short, long) in runs.items():
        contenders[name] = _contender(name, short, flop)
        contenders[name + PADDED] = _contender(name, long, padded_flop)
    return _measure(
        contenders,
        model.text.blocks,
        input_ids.size,
        flop * len(input_ids),
        len(input_ids),
        rounds=rounds,
        warmup=warmup,
        progress=progress,
    )


def as_dict(found: TowerBench) -> dict[str, Any]:
    """Return a tower's measurements as plain values.

    A contender's ``gemm_share`` is what its best run achieves of the best run of bf16 products;
    ``p50_gemm_share`` compares median runs, and ``own_share`` does so with the tower's own products
    in bf16, one after another. ``padded_ratio`` is how much faster it is than on padded captions.
    Keys with ``cpu_`` are by processor time.
    """
    literal_timing = found.timings[LITERAL]
    rows = {}
    for name, timing in found.timings.items():
        flop = found.contenders[name].flop * found.batch_size
        bf16 = found.peaks["bf16"]
        rows[name] = {
            **timing.as_dict(found.batch_size),
            "speedup": literal_timing.median_s / timing.median_s,
            "cpu_speedup": literal_timing.median_cpu_s / timing.median_cpu_s,
            "gflop_per_item": found.contenders[name].flop / 1e9,
            "gemm_share": flop / min(timing.seconds) / bf16["flops"],
            "cpu_gemm_share": flop / min(timing.cpu_seconds) / bf16["cpu_flops"],
            "p50_gemm_share": flop / timing.median_s / bf16["p50_flops"],
            "own_share": flop / timing.median_s / (found.own_flop / found.own.median_s),
            "min_cosine": found.cosines[name],
            "seconds": list(timing.seconds),
            "cpu_seconds": list(timing.cpu_seconds),
        }
    for name, row in rows.items():
        long = found.timings.get(name + PADDED)
        if long is not None:
            row["padded_ratio"] = long.median_s / found.timings[name].median_s
            row["cpu_padded_ratio"] = long.median_cpu_s / found.timings[name].median_cpu_s
    own = {**found.own.as_dict(found.batch_size), "flops": found.own_flop / found.own.median_s}
    return {"peaks": found.peaks, "own_products": own, "contenders": rows}


def _samples(spec: StepSpec, seed: int) -> dict[Tower, NDArray[Any]]:
    people = SyntheticSpec(
        look="street",
        train_ids=spec.batch_size,
        val_ids=0,
        test_ids=0,
        views=1,
        captions_per_image=1,
        seed=seed,
    )
    images = [
        resize_image(np.asarray(image), spec.height_px, spec.width_px)
        for image, _, _ in islice(iter_samples(people, "train"), spec.batch_size)
    ]
    _, ids_NL, _ = random_batch(spec)
    return {"image": np.stack(images), "text": ids_NL.numpy().astype(np.int32)}


def _backends(graphs: TowerGraphs, threads: int) -> dict[str, Backend]:
    """Open the graphs; OpenVINO, where installed, with each float type that the CPU has."""
    backends = {
        ORT_FP32: open_backend(graphs.fp32, "onnxruntime", threads=threads),
        ORT_INT8: open_backend(graphs.int8, "onnxruntime", threads=threads),
    }
    if find_spec("openvino") is None:
        return backends
    from upperson_rt.backends.openvino import OpenVinoBackend

    openvino = partial(OpenVinoBackend, device="cpu", threads=threads)
    chosen = openvino(graphs.int8)
    backends[OPENVINO_FP32] = openvino(graphs.fp32)
    if chosen.float_type == "bf16":
        backends[OPENVINO_FP32 + WITH_BF16] = openvino(graphs.fp32, float_type="bf16")
        backends[OPENVINO_INT8] = openvino(graphs.int8, float_type="f32")
        backends[OPENVINO_INT8 + WITH_BF16] = chosen
    else:
        backends[OPENVINO_INT8] = chosen
    return backends


def _contender(name: str, run: Callable[[], NDArray[np.float32]], flop: int) -> Contender:
    low = "int8" in name or WITH_BF16 in name
    return Contender(run=run, min_cosine=MIN_COSINE_LOW if low else MIN_COSINE_FP32, flop=flop)


@torch.inference_mode()
def _literal(
    encode: Callable[[UPPerson, Tensor], Tensor], model: UPPerson, inputs: Tensor
) -> NDArray[np.float32]:
    embeds: NDArray[np.float32] = encode(model, inputs).numpy()
    return embeds


@torch.inference_mode()
def _folded(tower: nn.Module, inputs: Tensor) -> NDArray[np.float32]:
    embeds: NDArray[np.float32] = tower(inputs).numpy()
    return embeds


@torch.no_grad()
def _flop(tower: nn.Module, item: NDArray[Any]) -> int:
    """Count the matrix products of one item: 2 FLOP for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        tower(torch.from_numpy(item))
    return int(counter.get_total_flops())


def _measure(
    contenders: dict[str, Contender],
    blocks: Iterable[Any],
    rows: int,
    flop: int,
    batch_size: int,
    *,
    rounds: int,
    warmup: int,
    progress: Callable[[int, int], None],
) -> TowerBench:
    embeds = {name: contender.run() for name, contender in contenders.items()}
    cosines = {
        name: _min_cosine(name, found, embeds[LITERAL], contenders[name].min_cosine)
        for name, found in embeds.items()
    }
    weights = [weight for block in blocks for weight in _weights(block)]
    gemm = gemm_contenders(
        max(rows, ENOUGH_ROWS), ((weight.shape[1], weight.shape[0]) for weight in weights), flop
    )
    own, own_flop = own_products(rows, weights)
    everyone: dict[Any, Callable[[], object]] = {
        **{name: contender.run for name, contender in contenders.items()},
        **gemm,
        OWN_PRODUCTS: own,
    }
    timings: dict[Any, Timing] = time_in_turns(
        everyone,
        warmup=warmup,
        rounds=rounds,
        progress=lambda done: progress(done, warmup + rounds),
    )
    return TowerBench(
        timings={name: timings[name] for name in contenders},
        contenders=contenders,
        cosines=cosines,
        peaks=peaks({key: timings[key] for key in gemm}, flop),
        own=timings[OWN_PRODUCTS],
        own_flop=own_flop,
        batch_size=batch_size,
    )


def _weights(block: Any) -> Iterator[Tensor]:
    """Yield those of the block's Linears, in order."""
    yield from (block.attn.in_proj_weight, block.attn.out_proj.weight)
    yield from (block.mlp.c_fc.weight, block.mlp.c_proj.weight)


def _min_cosine(
    name: str, found: NDArray[np.float32], expected: NDArray[np.float32], floor: float
) -> float:
    agreement = compare_embeds(expected, found)
    # Random weights embed all items alike: what tells them apart is left without their mean.
    mean = expected.mean(axis=0)
    exchanged = exchanged_item(expected - mean, found - mean, np.arange(len(found)))
    if exchanged or not agreement.agrees(min_cosine=floor).all():
        raise IntegrityError(
            f"'{name}' does not embed as '{LITERAL}': expected a cosine of at least {floor} and "
            f"every item nearest to itself, found {agreement.min_cosine:.6f}"
            f"{', and items exchanged' if exchanged else ''}"
            f"{', and rows that are not finite' if agreement.not_finite else ''}: its times "
            "mean nothing; please report this with the versions"
        )
    return agreement.min_cosine
