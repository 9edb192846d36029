"""``upperson demo``: the whole path on synthetic people, from crops and captions to an answer."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import require_extra
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import backend_line, new_table, print_json, print_line, print_table
from upperson_rt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upperson.cli.progress import Display
    from upperson.data.records import Record
    from upperson_rt.gallery import Gallery

QUESTION = "woman in red coat"
SUMMARY = "summary.json"
PEOPLE = "people"
BUILDING = "building"
PARTS = ("run", "bundle", "gallery", "answer.png", "report.html", SUMMARY)
"""What the demo puts into its folder beside the people; the summary comes last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How large the demo is."""

    train_ids: int
    val_ids: int
    test_ids: int
    views: int
    epochs: int
    calib_size: int


FULL = DemoSize(train_ids=900, val_ids=50, test_ids=300, views=4, epochs=1, calib_size=512)
QUICK = DemoSize(train_ids=40, val_ids=0, test_ids=40, views=2, epochs=2, calib_size=32)


@grouped
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny version for tests; its accuracy means nothing.")
    ] = False,
    *,
    report: Output,
) -> None:
    """Render people, fine-tune, export, index, and answer "woman in red coat".

    Needs no download. Writes the run, the bundle, the gallery, a contact sheet of the answer,
    report.html and summary.json; earlier results in the folder are replaced at the very end.

    Example: `upperson demo --output demo`
    """
    require_extra("train", "the demo")
    require_extra("export", "the demo")
    _require_own_folder(output)
    from upperson.cli.progress import Display
    from upperson.demo_page import STAGES

    with Display() as display:
        summary = run_demo(output, QUICK if quick else FULL, display)
    if report.as_json:
        print_json(summary)
        return
    columns = ("R@1", "R@5", "R@10", "mAP", "mINP")
    table = new_table("", *columns, right=columns)
    for key, name in STAGES.items():
        table.add_row(name, *(f"{value:.2f}" for value in summary[key].values()))
    print_table(table)
    words = summary["short_questions"]
    table = new_table("short questions, R@1", *words["chance"], right=tuple(words["chance"]))
    for key, shares in words.items():
        table.add_row(STAGES.get(key, key), *(f"{value:.2f}" for value in shares.values()))
    print_table(table)
    if quick:
        print_line("a quick demo: these numbers mean nothing")
    seconds = summary["seconds"]
    print_line("seconds: " + ", ".join(f"{stage} {seconds[stage]:.0f}" for stage in seconds))
    print_line(f"open {output / 'report.html'} and {output / 'answer.png'}; ask more:")
    print_line(f'  upperson-rt query -b {output}/bundle -g {output}/gallery "woman in green coat"')
    print_line(
        f"or search in a browser:  upperson-rt serve -b {output}/bundle -g {output}/gallery --open"
    )


def run_demo(output: Path, size: DemoSize, display: "Display") -> dict[str, Any]:
    """Run all stages and return the summary; ``output`` changes only at the end."""
    from upperson.attributes import measure_attributes, measure_short
    from upperson.cli.exportable import ExportData, export_run
    from upperson.cli.progress import TrainingDisplay
    from upperson.config import read_recipe
    from upperson.data.records import read_dataset
    from upperson.data.vocabulary import clip_tokenizer
    from upperson.demo_page import TEMPLATES, render_page, sample_queries, short_questions
    from upperson.evaluate import embed_records, embed_texts, pids_of
    from upperson.model.base import load_base
    from upperson.model.encoder import UPPerson
    from upperson.model.parts import PLAIN_CLIP
    from upperson.run import load_run
    from upperson.train import train
    from upperson_export.bundle import ExportOptions
    from upperson_export.made_files import templates
    from upperson_rt.bundle import Bundle
    from upperson_rt.files import put_in_place, scratch_folder
    from upperson_rt.gallery import Gallery
    from upperson_rt.ingest.files import index_images
    from upperson_rt.metrics import retrieval_metrics
    from upperson_rt.retriever import Retriever
    from upperson_rt.search.query import SearchRequest
    from upperson_rt.sheet import save_sheet

    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    with stage("render"):
        people = _render_people(output / PEOPLE, size, display)
    test = read_dataset("jsonl", people)["test"]
    pids = pids_of(test)
    config = replace(
        read_recipe("synthetic", {"root": str(people), "epochs": size.epochs}),
        shorten_captions=0.5,
        wrong_captions=True,
        kept_share=0.5,
        eval_every=size.epochs,  # So few people of val would choose an epoch by chance.
    )
    tokenizer = clip_tokenizer()

    with scratch_folder(output / BUILDING) as building:
        with stage("zero_shot"):
            base = load_base(config.base, config.pretrained)
            image_size = (config.height_px, config.width_px)
            plain = UPPerson(base.clip, PLAIN_CLIP, image_size, base.statistics)
            before = embed_records(
                plain,
                tokenizer,
                test,
                progress=lambda done, total: display.update("base, zero-shot", done, total),
            )
            zero_shot = retrieval_metrics(*before, *pids)
            display.say(f"zero-shot R@1 {zero_shot.r1:.2f} on {len(pids[0])} queries")
        with stage("train"):
            result = train(config, building / "run", TrainingDisplay(display, config.epochs))
        with stage("export"):
            exported = export_run(
                building / "run",
                building / "bundle",
                ExportOptions(),
                ExportData(calib_size=size.calib_size),
                display.update,
            ).as_dict()["variants"]
        bundle = Bundle.open(building / "bundle", "int8")
        encoder = bundle.encoder()
        with (
            stage("index"),
            Gallery.open(
                building / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
            ) as gallery,
        ):
            display.say(backend_line(bundle, "image"))
            for camera in sorted({record.camera or "" for record in test}):
                files = [record.image for record in test if (record.camera or "") == camera]
                index_images(encoder, gallery, files, camera=camera or None)
                display.say(f"indexed {len(files)} pictures of {camera}")
        with (
            stage("query"),
            Gallery.open(building / "gallery", encoder.fingerprint, encoder.embed_dim) as gallery,
        ):
            request = SearchRequest(sentence=QUESTION, k=10, calibrate=True)
            found = Retriever(encoder, gallery).search(request)
            hits = found.hits
            save_sheet(building / "answer.png", QUESTION, hits, result=found)
            int8_GE = _vectors_of(gallery, test)
        assert result.test is not None  # the demo's data set has a test split
        summary: dict[str, Any] = {
            "zero_shot": zero_shot.as_dict(),
            "fine_tuned": result.test.as_dict(),
            "onnx_fp32": exported["fp32"]["metrics"],
            "onnx_int8": exported["int8"]["metrics"],
            "int8_r1_drop": exported["int8"]["r1_drop"],
            "seconds": seconds,
            "size": asdict(size),
        }
        with stage("report"):
            tuned = load_run(building / "run").model
            after = embed_records(tuned, tokenizer, test)
            words = {
                "zero_shot": measure_attributes(
                    test, *before, partial(embed_texts, plain, tokenizer)
                ),
                "fine_tuned": measure_attributes(
                    test, *after, partial(embed_texts, tuned, tokenizer)
                ),
            }
            asked = {key: report.short["person"] for key, report in words.items()}
            asked["onnx_int8"] = measure_short(test, int8_GE, encoder.encode_texts)["person"]
            summary["short_questions"] = short_questions(asked)
            html = render_page(
                summary,
                templates(TEMPLATES),
                question=QUESTION,
                run=building / "run",
                answer=building / "answer.png",
                queries=sample_queries(test, before, after),
                words=words,
                quick=size == QUICK,
            )
            (building / "report.html").write_text(html, "utf-8")
        (building / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        for part in PARTS:
            put_in_place(building / part, output / part)
    return summary


def _vectors_of(gallery: "Gallery", records: "Sequence[Record]") -> "NDArray[np.float32]":
    """Return what a gallery has of the pictures of records, in their order."""
    import numpy as np

    found = {
        item.source: vector_E
        for items, vectors_NE in gallery.vectors()
        for item, vector_E in zip(items, vectors_NE, strict=True)
    }
    return np.stack([found[str(record.image.absolute())] for record in records])


def _render_people(folder: Path, size: DemoSize, display: "Display") -> Path:
    """Render the data set, or find it there from a demo of the same size and version."""
    from upperson_synthetic import SyntheticSpec, write_dataset

    spec: SyntheticSpec = SyntheticSpec(
        look="street",
        train_ids=size.train_ids,
        val_ids=size.val_ids,
        test_ids=size.test_ids,
        views=size.views,
    )
    root = folder / f"{spec.look}-{size.train_ids}-{size.val_ids}-{size.test_ids}x{size.views}"
    return write_dataset(
        root,
        spec,
        lambda done, total: display.update("rendering people", done, total),
        replace_older=True,
    )


def _require_own_folder(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, finished or not."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(
            f"{output} is a file: choose a folder with --output", code="not_a_folder", path=output
        )
    names = {path.name for path in output.iterdir() if not path.name.startswith(f".{BUILDING}.")}
    if SUMMARY in names:
        try:
            summary = json.loads((output / SUMMARY).read_text("utf-8"))
        except (OSError, ValueError):
            summary = None
        finished = isinstance(summary, dict) and "zero_shot" in summary
    else:
        # Stopped before its end: the people may be there, and nothing else, unless it was putting
        # its results in place: then the summary, which comes last, waits to be.
        placing = any(output.glob(f".{BUILDING}.*.tmp/{SUMMARY}"))
        finished = names <= {PEOPLE, *(PARTS if placing else ())} and all(
            (people / "dataset.json").is_file() for people in (output / PEOPLE).glob("[!.]*")
        )
    if not finished:
        raise InputError(
            f"{output} exists and is not an earlier demo (no {SUMMARY} of one in it): "
            "choose another --output",
            code="not_a_demo",
            path=output,
        )
