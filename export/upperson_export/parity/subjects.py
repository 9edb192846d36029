"""What is compared: a run in torch, its folded towers, and ONNX files on every backend.

Shapes: N items, E embedding width, H image height, W image width, L tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.graphs import export_onnx, open_simulated
from upperson_export.parity.inputs import ParityInputs
from upperson_export.plain import PlainTower
from upperson_export.variants import EXACT, VARIANTS, is_half
from upperson_rt.backends import auto_order, open_backend
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.cuda_driver import probe_cuda_driver
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.manifest import VariantEntry
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import TOWERS, Backend, Tower, run_tower

RunTower = Callable[[Tower, npt.NDArray[Any]], npt.NDArray[np.float32]]
"""Embeds prepared inputs, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""

TOLERANCE = 1e-5
"""Largest absolute difference of unit-norm embeddings that still is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What still counts as alike: the one or the other, fp32 having the first."""

    max_error: float | None = None
    """Largest absolute difference of a component."""
    min_cosine: float | None = None


FP32_TOLERANCE = Tolerance(max_error=TOLERANCE)

AS_USUAL = Tolerance()
"""Where tolerances may be asked for: none is."""


class WholeWay(Protocol):
    """Embeds files and sentences as applications do: a bundle's encoder, or a run's."""

    def encode_images(self, images: Sequence[Path], batch_size: int) -> npt.NDArray[np.float32]:
        """Embed the pictures of N files: [N, E]."""

    def encode_texts(self, texts: Sequence[str], batch_size: int) -> npt.NDArray[np.float32]:
        """Embed N sentences: [N, E]."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model as it was trained, folded, or in one variant, on one backend."""

    variant: str
    """``run``, ``folded``, or a variant such as ``int8``."""
    backend: str
    """Such as ``onnxruntime 1.23.2 on cpu``."""
    tolerance: Tolerance
    run: RunTower
    whole_way: WholeWay | None = None
    """None if that is `run` over prepared inputs."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant}, {self.backend}"


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRun:
    """A variant that a backend cannot run."""

    variant: str
    backend: str
    reason: str


# --- in torch ---

_TORCH = f"torch {torch.__version__} on cpu"


class TrainedRun(WholeWay, Protocol):
    """A trained model with everything unfolded, as training embeds with it."""

    @property
    def model(self) -> TrainedModel:
        """What to fold."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that it was trained with."""

    def run(self, tower: Tower, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Embed prepared inputs; see `RunTower`."""


def run_subject(run: TrainedRun, tolerance: Tolerance = FP32_TOLERANCE) -> Subject:
    """Return a run as it is."""
    return Subject(variant="run", backend=_TORCH, tolerance=tolerance, run=run.run, whole_way=run)


def torch_subject(
    variant: str, towers: Mapping[Tower, nn.Module], tolerance: Tolerance = FP32_TOLERANCE
) -> Subject:
    """Return plain towers in torch, which read what the graphs read."""

    @torch.inference_mode()
    def run(tower: Tower, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        embeds: npt.NDArray[np.float32] = towers[tower](torch.from_numpy(inputs)).numpy()
        return embeds

    return Subject(variant=variant, backend=_TORCH, tolerance=tolerance, run=run)


def folded_towers(model: TrainedModel) -> dict[Tower, PlainTower]:
    """Fold both towers; raises as `fold_image_tower`."""
    return {"image": fold_image_tower(model), "text": fold_text_tower(model)}


# --- on backends ---


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A backend on a device."""

    name: str
    device: str
    asked: bool = True
    """Whether it was named; then it is an error if it runs nothing."""

    @property
    def place(self) -> str:
        """What messages call it before its version is known."""
        return f"{self.name} on {self.device}"


def choose_backends(names: Sequence[str]) -> list[BackendChoice]:
    """Return the backends to compare.

    Args:
        names: ``onnxruntime``, ``openvino`` or ``tensorrt``, each with ``:device`` behind it if not
            on its usual one; empty for all that are installed here.

    Raises:
        UsageError: ``auto`` is no single backend, or a name is empty.
        BackendError: None is named and none is installed.
    """
    choices = []
    for given in dict.fromkeys(names):
        name, _, device = given.strip().partition(":")
        if name in ("", "auto"):
            raise UsageError(
                f"'{given}' is no backend to compare: name onnxruntime, openvino or tensorrt, or "
                "leave --backends out to compare all that are installed"
            )
        choices.append(BackendChoice(name, device or _usual_device(name)))
    return choices or _installed_backends()


def _installed_backends() -> list[BackendChoice]:
    names = [name for name in auto_order("cpu") if find_spec(name) is not None]
    # TensorRT can crash a process on a machine without a driver.
    if find_spec("tensorrt") is not None and probe_cuda_driver().version is not None:
        names.append("tensorrt")
    if not names:
        raise BackendError("no backend is installed: run  pip install 'upperson[cpu]'")
    return [BackendChoice(name, _usual_device(name), asked=False) for name in dict.fromkeys(names)]


def _usual_device(name: str) -> str:
    return "cuda" if name == "tensorrt" else "cpu"


def open_subject(
    variant: str,
    paths: Mapping[Tower, Path],
    choice: BackendChoice,
    tolerance: Tolerance = FP32_TOLERANCE,
    threads: int | None = None,
) -> tuple[Subject, dict[Tower, Backend]]:
    """Load two ONNX files and return them also as they were loaded.

    ONNX Runtime on a CPU would compute a float16 variant in float32, which says nothing about what
    float16 does to it: its range and rounding are simulated there, as in the gate.

    Raises:
        UsageError: There is no such backend.
        BackendError: The backend is missing or cannot run them.
    """
    on_half = is_half(variant) and (choice.name, choice.device) == ("onnxruntime", "cpu")
    towers = {
        tower: open_simulated(path, threads)
        if on_half
        else open_backend(path, choice.name, choice.device, threads)
        for tower, path in paths.items()
    }
    backend = towers["image"]
    subject = Subject(
        variant=variant,
        backend=f"{backend.name} {backend.version} on {backend.device}"
        + (", float16 simulated" if on_half else ""),
        tolerance=tolerance,
        run=lambda tower, inputs: run_tower(towers[tower], tower, inputs),
    )
    return subject, towers


def export_subjects(
    towers: Mapping[Tower, PlainTower],
    inputs: ParityInputs,
    folder: Path,
    backends: Sequence[BackendChoice],
    tolerance: Tolerance = FP32_TOLERANCE,
    threads: int | None = None,
) -> list[Subject | NotRun]:
    """Write plain towers as fp32 ONNX files into a folder, and load them on each backend.

    Raises:
        BackendError: A backend that was asked for cannot run them.
    """
    paths: dict[Tower, Path] = {}
    for tower in TOWERS:
        rows = np.resize(np.arange(inputs.count(tower)), 4)
        example = inputs.batch(tower, rows, width=inputs.context_length)
        if tower == "text":
            example = example[:, :-1]  # The context's own length would become a constant.
        paths[tower] = folder / f"{tower}.fp32.onnx"
        export_onnx(towers[tower], tower, paths[tower], example=torch.from_numpy(example))
    return [_open_export(paths, choice, tolerance, threads) for choice in backends]


def _open_export(
    paths: Mapping[Tower, Path], choice: BackendChoice, tolerance: Tolerance, threads: int | None
) -> Subject | NotRun:
    try:
        return open_subject(EXACT, paths, choice, tolerance, threads)[0]
    except BackendError as error:
        if choice.asked:
            raise
        return NotRun(variant=EXACT, backend=choice.place, reason=str(error))


# --- in a bundle ---


def bundle_reference(root: Path, threads: int | None = None) -> Subject:
    """Return a bundle's fp32 on ONNX Runtime, which the rest is compared with.

    Its canaries are checked: nothing else says whether the reference itself is right.

    Raises:
        UsageError: The bundle has no such variant.
        BackendError: ONNX Runtime is missing or cannot run it.
        IntegrityError: A file differs from its hash, or a canary comes out wrong.
    """
    if EXACT not in read_manifest(root).variants:
        raise UsageError(
            f"bundle {root} has no variant {EXACT} to compare with: name the run that it was "
            "exported from with  --run RUN"
        )
    bundle = Bundle.open(root, EXACT, "onnxruntime", threads=threads)
    bundle.check_canaries()
    return _bundle_subject(bundle, BackendChoice("onnxruntime", "cpu"), FP32_TOLERANCE, threads)


def iter_bundle_subjects(
    root: Path,
    backends: Sequence[BackendChoice],
    asked: Tolerance = Tolerance(),  # Frozen.
    threads: int | None = None,
) -> Iterator[Subject | NotRun]:
    """Yield every variant of a bundle on each backend, loaded one after the other.

    Hashes are checked; canaries are not, since all that differs is to be shown.

    Args:
        root: The bundle.
        backends: See `choose_backends`.
        asked: What replaces the usual tolerances; see `tolerance_of`.
        threads: CPU threads a tower; None lets the library choose.

    Raises:
        BackendError: A backend that was asked for runs no variant.
        IntegrityError: A file differs from its hash.
    """
    variants = list(read_manifest(root).variants)
    for choice in backends:
        if choice.asked:
            _require_backend(root, variants, choice, threads)
    for variant in variants:
        bundle = Bundle.open(root, variant)
        tolerance = tolerance_of(bundle.entry, asked)
        for choice in backends:
            yield _try_to_open(bundle, choice, tolerance, threads)


def tolerance_of(entry: VariantEntry, asked: Tolerance) -> Tolerance:
    """Return what a variant is held to beside float32: as its row of `VARIANTS` says, or as asked.

    A variant that is not known here, from a later release, is held to its canaries' floor.
    """
    if entry.precision == EXACT:
        return FP32_TOLERANCE if asked.max_error is None else Tolerance(max_error=asked.max_error)
    row = VARIANTS.get(entry.precision)
    floor = entry.canary_min_cosine if row is None else row.min_cosine
    return Tolerance(min_cosine=floor if asked.min_cosine is None else asked.min_cosine)


def _require_backend(
    root: Path, variants: Sequence[str], choice: BackendChoice, threads: int | None
) -> None:
    """Raise BackendError if no variant loads: before minutes of work, not after."""
    reasons = []
    for variant in variants:
        opened = _try_to_open(Bundle.open(root, variant), choice, FP32_TOLERANCE, threads)
        if isinstance(opened, Subject):
            return
        reasons.append(opened.reason)
    raise BackendError(reasons[0])


def _try_to_open(
    bundle: Bundle, choice: BackendChoice, tolerance: Tolerance, threads: int | None
) -> Subject | NotRun:
    try:
        return _bundle_subject(bundle, choice, tolerance, threads)
    except BackendError as error:
        return NotRun(variant=bundle.variant, backend=choice.place, reason=str(error))


def _bundle_subject(
    bundle: Bundle, choice: BackendChoice, tolerance: Tolerance, threads: int | None
) -> Subject:
    paths = {tower: bundle.path / bundle.entry.file(tower).file for tower in TOWERS}
    subject, towers = open_subject(bundle.variant, paths, choice, tolerance, threads)
    encoder = Encoder(bundle.manifest, bundle.variant, bundle.tokenizer, towers.__getitem__)
    return replace(subject, whole_way=encoder)
