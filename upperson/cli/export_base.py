"""A base as an export takes it, without any run: a plain CLIP that finds people zero-shot.

Without captions of people nobody can say how well it finds them. What an export can do to it, it
can: sentences of our own rank the pictures in float32 and in every other form, and the rankings
are compared.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upperson.cli.export_run import (
    calibration_samples,
    calibration_to_reuse,
    measured_split,
    render_people,
)
from upperson.data.synthetic import LOOKS, describe
from upperson.data.synthetic.people import sample_people
from upperson.model.base import load_base
from upperson.model.configs import base_config
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_calibration.samples import Captions, Pictures, choose_samples
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_export.calibrator import StageProgress
from upperson_export.ladder import RetrievalSplit
from upperson_export.report import ExportReport
from upperson_rt.agreement import TOP_K
from upperson_rt.errors import InputError
from upperson_rt.manifest import NO_ADAPTER
from upperson_rt.preprocess import iter_image_files

_MOST_RANKED = 500
"""Pictures that sentences rank, and sentences that rank them."""

_RENDERED_TO_RANK = 200

_SEED = 1


def export_base(
    name: str,
    pretrained: str | None,
    image_size: tuple[int | None, int | None],
    output: Path,
    options: ExportOptions,
    *,
    root: Path | None = None,
    dataset: str = "jsonl",
    gate: bool = True,
    calib_size: int,
    calib_data: Path | None = None,
    calibration: Path | None = None,
    progress: StageProgress,
) -> ExportReport:
    """Export a base as it was published, and return the report.

    Args:
        name: See `load_base`.
        pretrained: See `load_base`.
        image_size: (height_px, width_px) of the person crops; None: see `BaseConfig.crop_size`.
        output: Bundle to write.
        options: What to export.
        root: Folder of a data set to measure on; None: there are no captions, and rankings are
            compared.
        dataset: Its format.
        gate: Whether anything is measured.
        calib_size: Pictures, and captions, that set ranges.
        calib_data: Folder of pictures: some set ranges and, without ``root``, others are ranked.
        calibration: Calibration file of an earlier export to take over.
        progress: Told what goes on.

    Raises:
        InputError: The folder has too few pictures to rank; and what `load_base`, `choose_samples`
            and `export_bundle` raise.
    """
    reused = calibration_to_reuse(calibration, options, calib_data)
    progress("loading the base", 0, 1)
    own = base_config(name).crop_size
    height_px, width_px = (given or usual for given, usual in zip(image_size, own, strict=True))
    base = load_base(name, pretrained, (height_px, width_px))
    model = UPPerson(base.clip, PLAIN_CLIP, (height_px, width_px), base.statistics).eval()
    progress("loading the base", 1, 1)
    tokenizer = base.tokenizer()
    choosing: dict[str, Any] = {
        "height_px": height_px,
        "width_px": width_px,
        "count": calib_size,
        "seed": _SEED,
        "progress": lambda done, total: progress("choosing calibration images", done, total),
    }
    with tempfile.TemporaryDirectory() as rendered:
        split = None
        if gate and root is not None:
            split, train = measured_split(dataset, root)
            source = f"{root.resolve().name}, train"
            samples = calibration_samples(train, source, tokenizer, folder=calib_data, **choosing)
        else:
            if calib_data is None:
                wanted = calib_size + (_RENDERED_TO_RANK if gate else 0)
                people = render_people(Path(rendered) / "people", wanted)
                files, source = [person.image for person in people], "synthetic renderer"
            else:
                files = list(iter_image_files([calib_data]))
                source = f"folder {calib_data.resolve().name}"
            if gate:
                split, files = _share_out(files, source)
            texts = _sentences(calib_size, seed=_SEED)
            samples = choose_samples(
                Pictures(files=files, source=source),
                Captions(texts=texts, source="sentences of the exporter"),
                tokenizer,
                **choosing,
            )
        identity = ModelIdentity(
            name=base.name,
            base=base.name,
            base_sha256=base.sha256,
            adapter_sha256=NO_ADAPTER,
            embed_dim=model.embed_dim,
        )
        return export_bundle(
            model,
            identity,
            base.tokenizer_json,
            samples,
            split,
            output,
            options,
            progress,
            reused,
        )


def _share_out(files: Sequence[Path], source: str) -> tuple[RetrievalSplit, list[Path]]:
    """Take pictures to rank out of those that set ranges: every other one, evenly up to a limit."""
    every_other = files[1::2]
    places = np.linspace(0, len(every_other) - 1, min(len(every_other), _MOST_RANKED))
    ranked = [every_other[place] for place in places.astype(int)]
    if len(ranked) < 2 * TOP_K:
        raise InputError(
            f"rankings need {4 * TOP_K} pictures, half of which set ranges, found {len(files)} in "
            f"{source}: name a folder with more, or export with --no-gate"
        )
    split = RetrievalSplit(
        name=source, image_files=ranked, captions=_sentences(_MOST_RANKED, seed=_SEED + 1)
    )
    taken = set(ranked)
    return split, [file for file in files if file not in taken]


def _sentences(count: int, seed: int) -> list[str]:
    """Describe people as witnesses of street cameras do, none of whom is on a picture."""
    rng = np.random.default_rng(seed)
    return [describe(person, LOOKS["street"], rng) for person in sample_people(count, rng)]
