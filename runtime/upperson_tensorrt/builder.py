"""From an ONNX file to an engine, with what TensorRT 10.3 to 11 have in common, and a comparison.

Networks are strongly typed: the precision of every operation is the one written in the graph.
There are no precision flags and no calibrators, which TensorRT 11 no longer has.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.agreement import require_agreement
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.golden_samples import GoldenSamples
from upperson_rt.manifest import Manifest
from upperson_rt.strict import Positive
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import SHORTEST_TEXT, Tower
from upperson_tensorrt.bindings import TensorRtLog, trt_log

DEFAULT_WORKSPACE_MIB = 1024

BuildProgress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(phase, step, steps)``, from any thread; phases are nested."""

_TYPICAL_BATCH = 8  # What a camera's micro-batches come to; engines are fastest there.
_TYPICAL_TOKENS = 32  # Sentences of about 25 words.

_ADVICE = "export the bundle again with this version of upperson, or compile another --variant"


@dataclass(frozen=True)
class InputProfile:
    """Smallest, typical and largest shape of a tower's one input."""

    name: str
    min: tuple[Positive, ...]
    opt: tuple[Positive, ...]
    max: tuple[Positive, ...]

    @property
    def label(self) -> str:
        """The ranges of the axes that vary, for file names, such as ``1.8.32x1.32.77``."""
        axes = zip(self.min, self.opt, self.max, strict=True)
        return "x".join(f"{a}.{b}.{c}" for a, b, c in axes if a != c) or "fixed"


def tower_profile(tower: Tower, manifest: Manifest, max_batch: int) -> InputProfile:
    """Return the profile of a tower: any batch up to the largest, texts of any length."""
    if max_batch < 1:
        message = f"max_batch must be at least 1, got {max_batch}"
        raise UsageError(message, code="out_of_range", what="max_batch")
    typical = min(_TYPICAL_BATCH, max_batch)
    if tower == "image":
        size = (manifest.image.height_px, manifest.image.width_px, 3)
        return InputProfile("image", (1, *size), (typical, *size), (max_batch, *size))
    longest = manifest.text.context_length
    return InputProfile(
        "input_ids",
        (1, SHORTEST_TEXT),
        (typical, min(_TYPICAL_TOKENS, longest)),
        (max_batch, longest),
    )


@dataclass(frozen=True)
class BuiltEngine:
    """What a build gave."""

    plan: bytes
    timing_cache: bytes | None
    """Measured kernels, for the next build on the same GPU; None if none was given."""
    timing_cache_used: bool
    """False if the one given did not fit or could not be read."""
    seconds: float
    layers: str
    """What was fused, a line a layer; only with ``targets``."""


def build_engine(
    trt: ModuleType,
    onnx_file: str | os.PathLike[str],
    profile: InputProfile,
    *,
    workspace_bytes: int,
    timing_cache: bytes | None = None,
    targets: Sequence[str] = (),
    progress: BuildProgress | None = None,
) -> BuiltEngine:
    """Build the engine of one tower. Ctrl-C and SIGTERM cancel it at its next step.

    ``trt`` is `tensorrt`, or `tensorrt_rtx` with ``targets``: compute capabilities such as ``SM86``
    to build for without a GPU. ``timing_cache`` has the measured kernels of earlier builds, ``b""``
    to begin; None for no cache.
    """
    log = trt_log(trt, layers=bool(targets))
    log.take_errors()
    log.layers = ""
    about = f"TensorRT{' for RTX' if targets else ''} {trt.__version__}"
    start = time.perf_counter()
    try:
        builder = trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # How pybind11 reports a null pointer.
        message = f"{about} does not start;  upperson-rt doctor  says why"
        raise BackendError(message, code="tensorrt_not_started") from error
    network = _parse(trt, builder, log, onnx_file, profile, about)
    # Not earlier: a parser of a network that has a recorder crashes when it goes.
    builder.error_recorder = log.recorder
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # Else fp32 is computed with 10 bits of mantissa.
    _add_profile(builder, config, profile, about)
    cache_used = timing_cache is not None and _set_timing_cache(config, timing_cache)
    if targets:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # It names the ONNX nodes.
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)

    with _signals_wait() as received:
        monitor = _new_monitor(trt, progress, received)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if received:
        signal.raise_signal(received[0])
        raise KeyboardInterrupt  # For handlers that do not raise.
    if plan is None:
        raise BackendError(
            f"{about} cannot build {os.fspath(onnx_file)}: {log.take_errors()}. If memory ran out, "
            f"use a smaller --max-batch or --workspace-mib; else {_ADVICE}",
            code="engine_not_built",
        )
    grown = None if timing_cache is None else bytes(config.get_timing_cache().serialize())
    seconds = time.perf_counter() - start
    return BuiltEngine(bytes(plan), grown, cache_used, seconds, log.layers)


def _parse(
    trt: ModuleType,
    builder: Any,
    log: TensorRtLog,
    onnx_file: str | os.PathLike[str],
    profile: InputProfile,
    about: str,
) -> Any:
    # TensorRT 10 has to be asked for strong typing; 11 always does it and ignores the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(os.fspath(onnx_file)):
        errors = []
        for error in map(parser.get_error, range(parser.num_errors)):
            node, operator = error.node_name(), error.node_operator()
            where = f"node '{node}' ({operator}): " if node or operator else ""
            errors.append(where + " ".join(error.desc().split()))
        raise BackendError(
            f"{about} cannot parse {os.fspath(onnx_file)}: "
            f"{'; '.join(errors) or log.take_errors()}; {_ADVICE}",
            code="graph_not_parsed",
            path=os.fspath(onnx_file),
        )
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    wanted = tuple(
        -1 if low != high else low for low, high in zip(profile.min, profile.max, strict=True)
    )
    found = shapes.get(profile.name)
    if (
        len(shapes) != 1
        or found is None
        or len(found) != len(wanted)
        or any(have not in (-1, want) for have, want in zip(found, wanted, strict=True))
        or network.num_outputs != 1
    ):
        raise IntegrityError(
            f"{os.fspath(onnx_file)} is not the tower it should be: expected one input "
            f"'{profile.name}' {wanted} and one output, found inputs {shapes} and "
            f"{network.num_outputs} outputs; {_ADVICE}",
            code="no_tower",
        )
    return network


def _add_profile(builder: Any, config: Any, profile: InputProfile, about: str) -> None:
    shapes = builder.create_optimization_profile()
    try:
        shapes.set_shape(profile.name, profile.min, profile.opt, profile.max)
        refused = config.add_optimization_profile(shapes) < 0
    except ValueError:
        refused = True
    if refused:
        raise BackendError(
            f"{about} refuses the shapes {profile.min} to {profile.max} (typical {profile.opt}) "
            f"for the input '{profile.name}': use another --max-batch",
            code="shapes_refused",
        )


def _set_timing_cache(config: Any, content: bytes) -> bool:
    """Give the builder a timing cache; say whether it was the one given and not an empty one."""
    empty = config.create_timing_cache(b"")
    if content:
        cache = config.create_timing_cache(content)
        # What it cannot read it replaces by an empty one, with a line in its log.
        unread = cache is None or bytes(cache.serialize()) == bytes(empty.serialize())
        if not unread and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    config.set_timing_cache(empty, ignore_mismatch=False)
    return False


def _new_monitor(trt: ModuleType, progress: BuildProgress | None, received: list[int]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if progress is not None:
                progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None:
                steps = self.steps.get(phase_name, step + 1)
                progress(phase_name, step + 1, steps)
            return not received

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


@contextmanager
def _signals_wait() -> Iterator[list[int]]:
    """Give a list of signals (Ctrl-C, a handled SIGTERM) that end a build: none may unwind C++."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Signals never arrive here.
        return

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- An engine against ONNX Runtime: the same file, the same inputs, several batch sizes and
# lengths
#
# A build can go wrong without an error: some releases of TensorRT computed transformers wrongly on
# some GPUs or at some batch sizes. So no engine is used before it has been compared.

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""(N, ...) inputs to (N, D) embeddings."""

_MOST_INPUTS = 16
"""Different inputs per length; larger batches repeat them, because the reference runs on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """One shape on which engine and ONNX Runtime agree."""

    batch_size: Positive
    inputs: str
    """What went in, such as ``images`` or ``3 to 77 tokens``."""
    min_cosine: float
    max_error: float
    """Largest difference of two numbers."""


def compare_engine(
    tower: Tower,
    engine: Run,
    reference: Run,
    golden: GoldenSamples,
    profile: InputProfile,
    min_cosine: float,
    subject: str,
) -> list[Comparison]:
    """Compare at batch 1, 2, 7 and the largest; texts short, typical, long, and of mixed length."""
    count = min(profile.max[0], _MOST_INPUTS)
    found = []
    for name, inputs in _inputs(tower, golden, profile, count):
        expected = reference(inputs)
        for batch_size in sorted({1, 2, 7, profile.max[0]}):
            if batch_size > profile.max[0]:
                continue
            # Rows change places from batch to batch: one that is right only in its place shows.
            rows = (np.arange(batch_size) + batch_size) % count
            where = f"{subject}, {tower} tower at batch {batch_size} ({name})"
            fields = {"tower": tower, "batch_size": batch_size}
            errors = _compare(engine(inputs[rows]), expected[rows], min_cosine, where, **fields)
            found.append(Comparison(batch_size, name, *errors))
    return found


def _inputs(
    tower: Tower, golden: GoldenSamples, profile: InputProfile, count: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    if tower == "image":
        images = golden.images
        step = max(1, images.shape[2] // 5)
        shifted = [
            np.roll(images[i % len(images)], i // len(images) * step, axis=1) for i in range(count)
        ]
        yield "images", np.stack(shifted)
        return
    longest = profile.max[1]
    for length in sorted({min(4, longest), profile.opt[1], longest}):
        yield f"{length} tokens", _texts(golden.input_ids, [length] * count, length)
    shortest = min(3, longest)
    lengths = np.linspace(shortest, longest, count).round().astype(int).tolist()
    yield f"{shortest} to {longest} tokens", _texts(golden.input_ids, lengths, longest)


def _texts(golden_ids: NDArray[np.int32], lengths: list[int], padded: int) -> NDArray[np.int32]:
    """Make (N, padded) token ids: texts of these lengths, from the words of the golden samples."""
    ids = np.zeros((len(lengths), padded), np.int32)
    for row, length in enumerate(lengths):
        source = golden_ids[row % len(golden_ids)]
        source = source[: token_lengths(source[None])[0]]
        start, words, end = source[:1], source[1:-1], source[-1:]
        words = np.roll(np.resize(words if len(words) else start, length - 2), row)
        # The end token comes last and stays: the tower looks for it.
        ids[row, :length] = np.concatenate([start, words, end])
    return ids


def _compare(
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    min_cosine: float,
    where: str,
    **fields: object,
) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise IntegrityError(
            f"{where}: TensorRT gives embeddings of shape {found.shape}, ONNX Runtime "
            f"{expected.shape}; nothing was written",
            code="shape_differs",
            **fields,
        )
    advice = (
        "nothing was written. This TensorRT computes the graph wrongly on this GPU: update "
        "TensorRT, or compile another --variant, such as fp32"
    )
    agreement = require_agreement(
        expected,
        found,
        min_cosine,
        where=where,
        row="row",
        reference="ONNX Runtime's embedding",
        advice=advice,
        **fields,
    )
    return agreement.min_cosine, agreement.max_error
