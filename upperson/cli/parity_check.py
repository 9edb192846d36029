"""The parity check of a run and of a bundle, put together from the export package's parts."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from upperson.cli.parity_inputs import gather_material, run_subject, training_pixels
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.encoder import UPPerson
from upperson.run import ADAPTER, load_run
from upperson_export.parity.backend_choice import BackendChoice, choose_backends
from upperson_export.parity.bundle_subjects import bundle_reference, iter_bundle_subjects
from upperson_export.parity.check import count_comparisons, iter_comparisons, make_reference
from upperson_export.parity.inputs import ParityInputs, read_inputs
from upperson_export.parity.pixel_paths import compare_pixels
from upperson_export.parity.report import ParityReport
from upperson_export.parity.subjects import (
    FP32_TOLERANCE,
    NotRun,
    Subject,
    Tolerance,
    export_towers,
    folded_towers,
    open_subject,
    torch_subject,
)
from upperson_export.parity.verdict import Judged, judge
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.files import sha256_of_file
from upperson_rt.manifest import Manifest
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import Tower

Progress = Callable[[str, int, int], None]
"""Called with (what is compared, done, total)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityOptions:
    """The options of the command."""

    backends: list[str]
    batch_sizes: list[int]
    images: Path | None
    count: int
    max_error: float | None
    min_cosine: float | None
    threads: int | None

    @property
    def fp32(self) -> Tolerance:
        """What fp32 is held to."""
        return FP32_TOLERANCE if self.max_error is None else Tolerance(max_error=self.max_error)


def check_run(path: Path, options: ParityOptions, progress: Progress) -> ParityReport:
    """Compare a run with its folded towers and with a fresh fp32 export on each backend."""
    backends = choose_backends(options.backends)
    _, _, model = load_run(path)
    tokenizer = clip_tokenizer(model.text.context_length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, source = _read(options, tokenizer, model.image_size, folder)
        towers = folded_towers(model)
        progress("exporting", 0, 1)
        paths = export_towers(towers, inputs, folder)
        graphs = [_open_export(paths, choice, options) for choice in backends]
        run = run_subject(model, options.fp32)
        folded = torch_subject("folded", towers, options.fp32)
        return _compare(run, [run, folded, *graphs], inputs, source, model, options, progress)


def check_bundle(
    root: Path, run: Path | None, options: ParityOptions, progress: Progress
) -> ParityReport:
    """Compare every variant of a bundle on each backend, with its fp32 or with its run."""
    backends = choose_backends(options.backends)
    bundle = Bundle.open(root)
    bundle.check_files()  # Damage is told as damage, not as a difference.
    manifest, tokenizer = bundle.manifest, bundle.tokenizer
    subjects = iter_bundle_subjects(
        root,
        backends,
        threads=options.threads,
        max_error=options.max_error,
        min_cosine=options.min_cosine,
    )
    model = None if run is None else _load_run_of(run, manifest)
    size = (manifest.image.height_px, manifest.image.width_px)
    with tempfile.TemporaryDirectory() as name:
        inputs, source = _read(options, tokenizer, size, Path(name))
        if model is None:
            reference = bundle_reference(root, options.threads)
            return _compare(reference, subjects, inputs, source, None, options, progress)
        _require_equal_tokens(inputs, tokenizer, clip_tokenizer(model.text.context_length))
        torch_run = run_subject(model, options.fp32)
        folded = torch_subject("folded", folded_towers(model), options.fp32)
        everyone = chain([torch_run, folded], subjects)
        return _compare(torch_run, everyone, inputs, source, model, options, progress)


def _open_export(
    paths: Mapping[Tower, Path], choice: BackendChoice, options: ParityOptions
) -> Subject | NotRun:
    try:
        return open_subject("fp32", paths, choice, options.fp32, options.threads)[0]
    except BackendError as error:
        if choice.asked:
            raise
        return NotRun(variant="fp32", backend=choice.place, reason=str(error))


def _read(
    options: ParityOptions, tokenizer: Tokenizer, size: tuple[int, int], folder: Path
) -> tuple[ParityInputs, str]:
    """Gather and prepare the inputs; return them and where they come from."""
    material = gather_material(options.images, options.count, folder / "people")
    inputs = read_inputs(
        material.files,
        material.captions,
        tokenizer,
        height_px=size[0],
        width_px=size[1],
        image_names=material.image_names,
    )
    return inputs, material.source


def _compare(
    reference_subject: Subject,
    subjects: Iterable[Subject | NotRun],
    inputs: ParityInputs,
    source: str,
    model: UPPerson | None,
    options: ParityOptions,
    progress: Progress,
) -> ParityReport:
    size = (inputs.pixels_NHW3.shape[1], inputs.pixels_NHW3.shape[2])
    pixel_paths = compare_pixels(
        training_pixels(inputs.files, size, model), inputs.pixels_NHW3, inputs.image_names
    )
    reference = make_reference(reference_subject, inputs)
    judged: list[Judged] = []
    not_run: list[NotRun] = []
    for subject in subjects:
        if isinstance(subject, NotRun):
            not_run.append(subject)
            continue
        total = count_comparisons(inputs, options.batch_sizes)
        for done, found in enumerate(
            iter_comparisons(subject, reference, inputs, options.batch_sizes), start=1
        ):
            judged.append(judge(found, subject.tolerance, inputs))
            progress(subject.name, done, total)
    if not judged:
        raise BackendError(f"no variant runs on any backend here: {not_run[0].reason}")
    return ParityReport(
        reference=reference.name,
        source=source,
        inputs=inputs,
        batch_sizes=options.batch_sizes,
        pixel_paths=pixel_paths,
        judged=judged,
        not_run=not_run,
    )


def _load_run_of(run: Path, manifest: Manifest) -> UPPerson:
    """Load the run that a bundle was exported from."""
    _, base, model = load_run(run)
    found = (base.sha256, sha256_of_file(run / ADAPTER), model.image_size)
    image = manifest.image
    expected = (
        manifest.model.base_sha256,
        manifest.model.adapter_sha256,
        (image.height_px, image.width_px),
    )
    if found != expected:
        raise InputError(
            f"the bundle was not exported from the run {run}: it has base {expected[0][:12]}, "
            f"adapter {expected[1][:12]}, image size {expected[2]}, the run {found[0][:12]}, "
            f"{found[1][:12]}, {found[2]}. Name its own run with --run, or leave --run out"
        )
    return model


def _require_equal_tokens(inputs: ParityInputs, bundle: Tokenizer, training: Tokenizer) -> None:
    """Raise IntegrityError if a caption has other token ids in the bundle than in training."""
    for sentence in inputs.sentences:
        found = bundle.encode([sentence]).input_ids[0].tolist()
        expected = training.encode([sentence]).input_ids[0].tolist()
        if found != expected:
            raise IntegrityError(
                f'the bundle\'s tokenizer.json gives the caption "{sentence}" the ids {found}, '
                f"training gave it {expected}: export the bundle again"
            )
