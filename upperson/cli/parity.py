"""``upperson parity``: the command, its inputs, and its table."""

import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson.cli.options import require_extra, require_no_trust
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output, Threads, TrustOption, read_batch_sizes
from upperson_rt.cli.output import (
    PlainTable,
    new_table,
    print_error,
    print_json,
    print_line,
    print_note,
    print_table,
)
from upperson_rt.errors import InputError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from upperson.run import TrainedEncoder
    from upperson_export.parity.check import Judged, ParityOptions, ParityResult
    from upperson_export.parity.inputs import ParityInputs
    from upperson_rt.agreement import Agreement
    from upperson_rt.manifest import Manifest
    from upperson_rt.tokenizer import Tokenizer

_LOOK = "street"

_WIDTHS = {
    "tower": 5, "batch": 5, "inputs": 9, "min cos": 8, "1 %": 8, "50 %": 8, "max error": 9,
    "alone": 7, "top-10": 6, "tau": 6, "": 7,
}  # fmt: skip
"""Columns of the table: 100 characters with what is between them."""


@dataclass(frozen=True)
class Compared(OptionGroup, panel="What is compared"):
    """The reference, the backends, and the inputs."""

    run: Path | None = option(
        None,
        "With a bundle: the run it was exported from. Then torch is the reference.",
        show_default="fp32 on onnxruntime is the reference",
    )
    backend: str | None = option(
        None,
        "onnxruntime, openvino or tensorrt, with commas between them; :DEVICE behind one "
        "puts it there, such as onnxruntime:cuda.",
        show_default="all that are installed",
    )
    batch_size: str = option("1,2,8,32", "Batch sizes, with commas between them.")
    images: Path | None = option(
        None, "Image, or folder of images.", show_default="rendered people"
    )
    count: int = option(35, "Images and captions to compare.", min=2)
    threads: Threads = None
    trust: TrustOption = None


@dataclass(frozen=True)
class Tolerances(OptionGroup, panel="Tolerance"):
    """Maximum differences of embeddings."""

    max_error: float | None = option(
        None, "Maximum difference of a component for fp32.", show_default="1e-5"
    )
    min_cosine: float | None = option(
        None, "Minimum cosine for the other variants.", show_default="the bundle's own floor"
    )

    def require_usable(self) -> None:
        """Raise UsageError if one is out of range."""
        if self.max_error is not None and not 0 < self.max_error < float("inf"):
            raise UsageError(
                f"--max-error must be above 0, found {self.max_error}",
                code="option_out_of_range",
                option="--max-error",
            )
        if self.min_cosine is not None and not 0 < self.min_cosine <= 1:
            raise UsageError(
                f"--min-cosine must be above 0 and at most 1, found {self.min_cosine}",
                code="option_out_of_range",
                option="--min-cosine",
            )


@grouped
def parity(
    target: Annotated[
        Path, typer.Argument(help="Run folder or bundle.", metavar="RUN|BUNDLE", show_default=False)
    ],
    *,
    compared: Compared,
    tolerances: Tolerances,
    output: Output,
) -> None:
    """Compare embeddings between torch, variants, backends, batch sizes and text lengths.

    Every item is embedded alone and in batches of every size; texts also among others of any length
    and with padding; images also from file to embedding. Exit code 6 if something differs.

    A row has cosines to the reference (the lowest, that of the lowest 1 %, the median) and the
    largest difference of a component; `alone`: that to the item embedded alone; `top-10` and `tau`:
    how alike the rankings are, by overlap of the first ten and Kendall's tau.

    Example: `upperson parity bundle --backend onnxruntime,openvino`
    """
    batch_sizes = read_batch_sizes(compared.batch_size)
    tolerances.require_usable()
    require_extra("export", "parity")
    from upperson.cli.progress import Display
    from upperson_export.parity.check import ParityOptions
    from upperson_export.parity.subjects import Tolerance, choose_backends

    names = [] if compared.backend is None else compared.backend.split(",")
    options = ParityOptions(
        backends=choose_backends(names),
        batch_sizes=batch_sizes,
        given=Tolerance(max_error=tolerances.max_error, min_cosine=tolerances.min_cosine),
        threads=compared.threads,
    )
    with Display() as display:
        result = _check(target, compared, options, display.update)
    error = None if result.ok else IntegrityError(result.message(), code="embeddings_differ")
    if not output.as_json:
        _print_result(result)
        if error is not None:
            raise error
        return
    # One object has the result and the error.
    found = {"target": str(target), **result.as_dict()}
    print_json(found if error is None else found | {"error": error.as_json()})
    if error is not None:
        print_error(str(error))
        raise typer.Exit(error.exit_code)


def _check(
    target: Path,
    compared: Compared,
    options: "ParityOptions",
    progress: "Callable[[str, int, int], None]",
) -> "ParityResult":
    from upperson.run import TrainedEncoder, load_run, read_pixels
    from upperson_export.parity.check import check_bundle, check_run
    from upperson_export.parity.inputs import compare_pixels
    from upperson_rt.bundle import MANIFEST_FILE, Bundle

    with tempfile.TemporaryDirectory() as folder:
        if not (target / MANIFEST_FILE).is_file():
            _require_run(target, compared)
            loaded = load_run(target)
            trained = TrainedEncoder(loaded.model, loaded.base.tokenizer())
            size = trained.model.image_size
            inputs = _read_inputs(compared, Path(folder), trained.tokenizer, size)
            pixels = compare_pixels(trained.read_pixels(inputs.files), inputs)
            return check_run(trained, inputs, pixels, options, progress)
        bundle = Bundle.open(target, trust=compared.trust)
        bundle.check_files()  # Damage is reported as damage, not as a difference.
        own_run = None if compared.run is None else _load_run_of(compared.run, bundle.manifest)
        size = (bundle.manifest.image.height_px, bundle.manifest.image.width_px)
        inputs = _read_inputs(compared, Path(folder), bundle.tokenizer, size)
        files = inputs.files
        read = read_pixels(files, size) if own_run is None else own_run.read_pixels(files)
        pixels = compare_pixels(read, inputs)
        return check_bundle(bundle, own_run, inputs, pixels, options, progress)


def _require_run(target: Path, compared: Compared) -> None:
    """Raise if the target is no folder, or if options are given that go with a bundle."""
    if not target.is_dir():
        raise InputError(
            f"expected a run folder or a bundle at {target}, found no folder: pass one that  "
            "upperson train  or  upperson export  made",
            code="target_not_found",
            path=target,
        )
    if compared.run is not None:
        raise UsageError(
            f"--run goes with a bundle, and {target} is none: leave it out",
            code="run_without_bundle",
            path=target,
        )
    require_no_trust(compared.trust, target)


def _load_run_of(run: Path, manifest: "Manifest") -> "TrainedEncoder":
    """Load the run that a bundle was exported from; InputError if it is another one."""
    from upperson.run import ADAPTER, TrainedEncoder, load_run
    from upperson_rt.files import sha256_of_file

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
            f"{found[1][:12]}, {found[2]}. Name its own run with --run, or leave --run out",
            code="bundle_of_other_run",
            path=run,
        )
    return TrainedEncoder(model, base.tokenizer())


def _read_inputs(
    compared: Compared, folder: Path, tokenizer: "Tokenizer", size: tuple[int, int]
) -> "ParityInputs":
    """Take images from a file or folder, evenly, or render people into `folder`.

    Captions are those of synthetic people in both cases.
    """
    import numpy as np

    from upperson.data.records import read_dataset
    from upperson_export.parity.inputs import read_inputs
    from upperson_rt.preprocess import iter_image_files
    from upperson_synthetic import LOOKS, SyntheticSpec, describe, generate_people, write_dataset

    images, count = compared.images, compared.count
    spec = SyntheticSpec(
        look=_LOOK, train_ids=0, val_ids=0, test_ids=count, views=1, captions_per_image=1
    )
    if images is None:
        records = read_dataset("jsonl", write_dataset(folder / "people", spec))["test"]
        files = [record.image for record in records]
        names = [f"synthetic/{file.name}" for file in files]
        captions = [record.captions[0] for record in records]
        source = f"{count} synthetic people"
    else:
        found = list(iter_image_files([images]))
        chosen = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
        files = [found[index] for index in chosen]
        names = [str(file) for file in files]
        captions = [
            describe(person, LOOKS[_LOOK], np.random.default_rng(number))
            for number, person in enumerate(generate_people(spec, "test"))
        ]
        source = f"{len(files)} of {len(found)} images at {images}, {count} synthetic captions"
    return read_inputs(
        files,
        captions,
        tokenizer,
        height_px=size[0],
        width_px=size[1],
        source=source,
        image_names=names,
    )


def _print_result(result: "ParityResult") -> None:
    """Print a line about what was compared, and a table for each variant and backend.

    A row is the worst of all ways to fill batches of one size; ``--json`` has them all.
    """
    print_line(f"reference  {result.reference}, one item a batch")
    lengths = result.inputs.lengths
    print_line(
        f"inputs     {result.inputs.source}; texts of {lengths.min()} to {lengths.max()} tokens"
    )
    paths = result.pixel_paths
    verdict = "equal in training and runtime" if paths.are_equal else f"FAIL: {paths.message()}"
    print_line(f"pixels     {verdict}")
    for (variant, backend), group in groupby(
        result.judged, lambda one: (one.comparison.variant, one.comparison.backend)
    ):
        judged = list(group)
        failing = sum(one.fault is not None for one in judged)
        verdict = f"{failing} of {len(judged)} comparisons FAIL" if failing else "ok"
        print_line("", f"{variant} on {backend}: {verdict}, expected {_tolerance(judged[0])}")
        print_table(_table(judged, result.worst))
    for absent in result.not_run:
        print_note(f"not run: {absent.variant} on {absent.backend}: {absent.reason}")
    if result.ok:
        print_line("", f"ok: {len(result.judged)} comparisons agree")


def _table(judged: "list[Judged]", worst: "Judged | None") -> PlainTable:
    table = new_table(*_WIDTHS, right=tuple(name for name in _WIDTHS if name not in ("tower", "")))
    table.widen(list(_WIDTHS.values()))
    for (tower, batch), group in groupby(
        judged, lambda one: (one.comparison.tower, one.comparison.batch_size)
    ):
        row = max(group, key=lambda one: one.badness)
        found, ranking = row.comparison, row.comparison.ranking
        mark = "WORST" if row is worst else "fails" if row.fault else ""
        table.add_row(
            tower,
            str(batch),
            found.inputs,
            *_cosines_and_error(found.to_reference),
            "" if found.to_alone is None else f"{found.to_alone.max_error:.0e}",
            "" if ranking is None else f"{ranking.mean_overlap:.3f}",
            "" if ranking is None else f"{ranking.mean_tau:.3f}",
            mark,
        )
    return table


def _cosines_and_error(found: "Agreement | None") -> list[str]:
    if found is None:
        return [""] * 4
    values = (found.min_cosine, found.p1_cosine, found.median_cosine)
    return [*(f"{value:.6f}" for value in values), f"{found.max_error:.1e}"]


def _tolerance(judged: "Judged") -> str:
    tolerance = judged.tolerance
    if tolerance.max_error is not None:
        return f"max error {tolerance.max_error:g}"
    return f"cosine {tolerance.min_cosine:g}"
