"""The models to compare: a run in torch, its folded towers, and ONNX files on each backend.

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
from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.backends import auto_order, open_backend
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.manifest import VariantEntry
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import TOWERS, Backend, Tower, run_tower

RunTower = Callable[[Tower, npt.NDArray[Any]], npt.NDArray[np.float32]]
"""Embeds prepared inputs, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""

TOLERANCE = 1e-5
"""Maximum absolute difference of unit-norm embeddings by rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Tolerance of a comparison: ``max_error`` for fp32, ``min_cosine`` for all else."""

    max_error: float | None = None
    """Maximum absolute difference of a component."""
    min_cosine: float | None = None


FP32_TOLERANCE = Tolerance(max_error=TOLERANCE)

AS_USUAL = Tolerance()
"""No tolerance is given."""


class EndToEnd(Protocol):
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
    end_to_end: EndToEnd | None = None
    """None: `run` over prepared inputs."""

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.variant}, {self.backend}"


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRun:
    """A variant that a backend cannot run."""

    variant: str
    backend: str
    reason: str


# --- in torch ---

_TORCH = f"torch {torch.__version__} on cpu"


class TrainedRun(EndToEnd, Protocol):
    """A trained model with everything unfolded, as training embeds with it."""

    @property
    def model(self) -> TrainedModel:
        """The model to fold."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training."""

    def run(self, tower: Tower, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Embed prepared inputs; see `RunTower`."""


def run_subject(run: TrainedRun, tolerance: Tolerance = FP32_TOLERANCE) -> Subject:
    """Return a run as it is."""
    return Subject(variant="run", backend=_TORCH, tolerance=tolerance, run=run.run, end_to_end=run)


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
    named: bool = True
    """Whether the user named it; then it is an error if it runs nothing."""

    @property
    def place(self) -> str:
        """The name in messages before the version is known."""
        return f"{self.name} on {self.device}"


def choose_backends(names: Sequence[str]) -> list[BackendChoice]:
    """Return the backends to compare, such as ``onnxruntime`` or ``openvino:GPU``.

    Without names these are all that are installed here.

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
                "leave --backend out to compare all that are installed",
                code="backend_not_single",
                found=given,
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
    return [BackendChoice(name, _usual_device(name), named=False) for name in dict.fromkeys(names)]


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

    ONNX Runtime on a CPU would compute a float16 variant in float32, so the range and rounding of
    float16 are simulated there, as in the gate.
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
    """Write plain towers as fp32 ONNX files into a folder, and load them on each backend."""
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
        if choice.named:
            raise
        return NotRun(variant=EXACT, backend=choice.place, reason=str(error))


# --- in a bundle ---


def bundle_reference(root: Path, threads: int | None = None) -> Subject:
    """Check the golden samples of a bundle's fp32, and return it on ONNX Runtime as reference."""
    if EXACT not in read_manifest(root).variants:
        raise UsageError(
            f"bundle {root} has no variant {EXACT} to compare with: name the run that it was "
            "exported from with  --run RUN"
        )
    bundle = Bundle.open(root, EXACT, "onnxruntime", threads=threads)
    bundle.check_golden_samples()
    return _bundle_subject(bundle, BackendChoice("onnxruntime", "cpu"), FP32_TOLERANCE, threads)


def iter_bundle_subjects(
    root: Path,
    backends: Sequence[BackendChoice],
    given: Tolerance = AS_USUAL,
    threads: int | None = None,
) -> Iterator[Subject | NotRun]:
    """Yield every variant of a bundle on each backend, loaded one after the other.

    Hashes are checked; golden samples are not, since all differences are to be shown. A tolerance
    that is given replaces the usual one; see `tolerance_of`.
    """
    variants = list(read_manifest(root).variants)
    for choice in backends:
        if choice.named:
            _require_backend(root, variants, choice, threads)
    for variant in variants:
        bundle = Bundle.open(root, variant)
        tolerance = tolerance_of(bundle.entry, given)
        for choice in backends:
            yield _try_to_open(bundle, choice, tolerance, threads)


def tolerance_of(entry: VariantEntry, given: Tolerance) -> Tolerance:
    """Return a variant's tolerance against float32: the one given, or that of its `VARIANTS` row.

    An unknown variant, of a later release, has the floor of its golden samples.
    """
    if entry.precision == EXACT:
        return FP32_TOLERANCE if given.max_error is None else Tolerance(max_error=given.max_error)
    row = VARIANTS.get(entry.precision)
    floor = entry.canary_min_cosine if row is None else row.min_cosine
    return Tolerance(min_cosine=floor if given.min_cosine is None else given.min_cosine)


def _require_backend(
    root: Path, variants: Sequence[str], choice: BackendChoice, threads: int | None
) -> None:
    """Raise BackendError if no variant loads: before minutes of work, not after."""
    bundles = [Bundle.open(root, variant) for variant in variants]
    opened = (_try_to_open(bundle, choice, FP32_TOLERANCE, threads) for bundle in bundles)
    if not any(isinstance(one, Subject) for one in opened):
        _bundle_subject(bundles[0], choice, FP32_TOLERANCE, threads)  # Raises its error.


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
    return replace(subject, end_to_end=encoder)
