"""The stages of ``upperson demo``."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson.cli.demo_folder import BUILDING, PARTS, PEOPLE, SUMMARY
from upperson.cli.exportable import AdapterOptions, ExportData, export_adapter, export_base
from upperson.cli.progress import Display, TrainingDisplay
from upperson.config import TrainConfig, read_recipe
from upperson.data.records import Record, read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.demo_figures import Scores, Searched, measure, searched_split
from upperson.demo_page import TEMPLATES, SampleQuery, draw_sites, render_page, sample_queries
from upperson.evaluate import Embeds, embed_records, embed_texts
from upperson.model.base import SMALL, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.run import RESULTS, load_run
from upperson.train import train
from upperson_adapter.apply import apply_adapter
from upperson_export.bundle import ExportOptions
from upperson_export.made_files import templates
from upperson_export.precision_search import paired_drop
from upperson_rt.bundle import Bundle
from upperson_rt.cli.output import backend_line
from upperson_rt.encoder import Encoder
from upperson_rt.files import put_in_place, scratch_folder
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.files import index_images
from upperson_rt.retriever import Retriever
from upperson_rt.search.query import SearchRequest
from upperson_sheet.sheet import save_sheet
from upperson_synthetic import SyntheticSpec, write_dataset
from upperson_synthetic.look import SITES, TARGET, Look

FRESH_SEED = 111
"""Of the first site: no recipe or camera was chosen on people of this seed or a later one."""

QUESTION = "woman in red coat"
QUESTIONS = {"station": "woman in orange steward vest", "campus": "man in navy school blazer"}
"""By site, a search with its own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How large the demo is."""

    train_ids: int
    """People of each site to learn from."""
    street_train_ids: int
    """People of the street whose pictures set activation ranges, and on whom adapters rehearse."""
    val_ids: int
    test_ids: int
    views: int
    epochs: int | None
    """None: as many as the recipe has."""
    calib_size: int
    max_r1_drop: float
    """See `ExportOptions`; one query of a quick demo is worth more than the usual limit."""


FULL = DemoSize(
    train_ids=300,
    street_train_ids=64,
    val_ids=50,
    test_ids=300,
    views=4,
    epochs=None,
    calib_size=256,
    max_r1_drop=0.5,
)
QUICK = DemoSize(
    train_ids=24,
    street_train_ids=40,
    val_ids=0,
    test_ids=40,
    views=2,
    epochs=1,
    calib_size=32,
    max_r1_drop=25.0,
)


def run_demo(output: Path, size: DemoSize, display: Display) -> dict[str, Any]:
    """Run all stages and return the summary; ``output`` changes only at the end."""
    with scratch_folder(output / BUILDING) as building:
        summary = _Demo(output / PEOPLE, building, size, display).run()
        (building / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        for part in PARTS:
            put_in_place(building / part, output / part)
    return summary


@dataclass
class _Site:
    """One look with the data set of its people."""

    look: Look
    people: Path

    @cached_property
    def test(self) -> Searched:
        return searched_split(read_dataset("jsonl", self.people)["test"], self.look)


@dataclass
class _Demo:
    people: Path
    building: Path
    size: DemoSize
    display: Display
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Build everything but the summary into the folder, and return that."""
        with self.stage("render"):
            street = self.render(TARGET, 0)
            sites = [self.render(look, seed) for seed, look in enumerate(SITES, FRESH_SEED)]
        base = load_base(SMALL, None)
        plain = UPPerson(base.clip, PLAIN_CLIP, self.image_size, base.statistics).eval()
        with self.stage("export"):
            self.export_base(street)
        with self.stage("index"):
            int8 = {TARGET.name: self.index(street, self.building)}
            self.search(QUESTION, self.building)
        models, recipes = {}, {}
        for site in sites:
            name, folder = site.look.name, self.folder(site)
            with self.stage("train"):
                adapter = replace(self.recipe(site), rehearse=str(street.people))
                train(adapter, folder / "run", self.training(site, "adapter"))
            models[name] = load_run(folder / "run").model
            with self.stage("sdm_recipe"):
                run = self.building / "sdm_recipe" / name
                train(self.sdm_recipe(site), run, self.training(site, "SDM recipe"))
                recipes[name] = load_run(run).model
            with self.stage("export"):
                self.export_site(site)
            with self.stage("index"):
                int8[name] = self.index(site, folder)
                self.search(QUESTIONS[name], folder)
        with self.stage("measure"):
            summary, queries = self.measure(street, sites, plain, models, recipes, int8)
        with self.stage("report"):
            (self.building / "sites.png").write_bytes(draw_sites(summary))
            html = render_page(
                summary,
                templates(TEMPLATES),
                folder=self.building,
                question=QUESTION,
                queries=queries,
                quick=self.size == QUICK,
            )
            (self.building / "report.html").write_text(html, "utf-8")
        return summary

    @property
    def image_size(self) -> tuple[int, int]:
        config = read_recipe("site", {"root": "unused"})
        return config.height_px, config.width_px

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(max_r1_drop=self.size.max_r1_drop)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what is done to the seconds of a stage."""
        started = time.perf_counter()
        yield
        taken = time.perf_counter() - started
        self.seconds[name] = round(self.seconds.get(name, 0.0) + taken, 1)

    def folder(self, site: _Site) -> Path:
        """Return where a site's run, bundle and gallery are built."""
        return self.building / "sites" / site.look.name

    def render(self, look: Look, seed: int) -> _Site:
        """Render a data set, or find it there from a demo of the same size and version."""
        size = self.size
        train_ids = size.train_ids if look.things else size.street_train_ids
        root = self.people / (
            f"{look.name}-{train_ids}-{size.val_ids}-{size.test_ids}x{size.views}"
        )
        spec = SyntheticSpec(
            look=look.name,
            train_ids=train_ids,
            val_ids=size.val_ids,
            test_ids=size.test_ids,
            views=size.views,
            seed=seed,
        )
        shown = partial(self.display.update, f"rendering people of the {look.name}")
        return _Site(look, write_dataset(root, spec, shown, replace_older=True))

    def recipe(self, site: _Site) -> TrainConfig:
        """Return what a site's adapter is trained with, beside people to rehearse."""
        return read_recipe("site", {"root": str(site.people), "epochs": self.size.epochs})

    def sdm_recipe(self, site: _Site) -> TrainConfig:
        """Return the paper's recipe over the same base, for as many steps."""
        own = self.recipe(site)
        return TrainConfig(
            root=own.root,
            base=own.base,
            height_px=own.height_px,
            width_px=own.width_px,
            batch_size=own.batch_size,
            epochs=own.epochs,
            warmup_epochs=0,
            eval_every=own.epochs,
        )

    def training(self, site: _Site, what: str) -> TrainingDisplay:
        """Announce a run, and show it."""
        self.display.say(f"training the {what} of the {site.look.name}")
        return TrainingDisplay(self.display, self.recipe(site).epochs)

    def export_base(self, street: _Site) -> None:
        """Export the base as it is."""
        data = ExportData(root=street.people, calib_size=self.size.calib_size)
        export_base(
            SMALL,
            None,
            self.image_size,
            self.building / "bundle",
            self.options,
            data,
            self.display.update,
        )

    def export_site(self, site: _Site) -> None:
        """Write a site's adapter file, and make its bundle of that, as a box does."""
        folder, base = self.folder(site), self.building / "bundle"
        file = folder / f"{site.look.name}.adapter"
        export_adapter(
            folder / "run",
            file,
            AdapterOptions(base=base, site=site.look.name),
            self.options,
            ExportData(calib_size=self.size.calib_size),
            self.display.update,
        )
        apply_adapter(file, base, folder / "bundle", progress=self.display.update)

    def index(self, site: _Site, folder: Path) -> Scores:
        """Index a site's test pictures with the bundle of a folder, and measure it."""
        bundle = Bundle.open(folder / "bundle", "int8")
        encoder = bundle.encoder()
        self.display.say(backend_line(bundle, "image"))
        records = site.test.records
        with Gallery.open(
            folder / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
        ) as gallery:
            for camera in sorted({record.camera or "" for record in records}):
                files = [record.image for record in records if (record.camera or "") == camera]
                index_images(encoder, gallery, files, camera=camera or None)
            self.display.say(f"indexed {len(records)} pictures of the {site.look.name}")
            image_GE = _vectors_of(gallery, records)
        texts = [text for record in records for text in record.captions]
        return measure(site.test, encoder.encode_texts(texts), image_GE, encoder.encode_texts)

    def search(self, question: str, folder: Path) -> None:
        """Draw the contact sheet of a search."""
        encoder: Encoder = Bundle.open(folder / "bundle", "int8").encoder()
        with Gallery.open(folder / "gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            request = SearchRequest(sentence=question, k=10, calibrate=True)
            found = Retriever(encoder, gallery).search(request)
            save_sheet(folder / "answer.png", question, found.hits, result=found)

    def measure(
        self,
        street: _Site,
        sites: Sequence[_Site],
        plain: UPPerson,
        models: Mapping[str, UPPerson],
        recipes: Mapping[str, UPPerson],
        int8: Mapping[str, Scores],
    ) -> tuple[dict[str, Any], dict[str, list[SampleQuery]]]:
        """Measure every model on the people it is shown with; return the summary and samples."""
        base = self.scores(street, plain)[0]
        on_street = {
            kind: {name: self.scores(street, model)[0] for name, model in trained.items()}
            for kind, trained in (("adapters", models), ("sdm_recipes", recipes))
        }
        summary: dict[str, Any] = {
            "sites": {},
            "street": {
                **_figures({"base": base, "int8": int8[TARGET.name]}),
                **{kind: _figures(found) for kind, found in on_street.items()},
                "gains": {
                    "int8": gains(int8[TARGET.name], base),
                    **{
                        kind: {name: gains(scores, base) for name, scores in found.items()}
                        for kind, found in on_street.items()
                    },
                },
            },
            "seconds": self.seconds,
            "size": asdict(self.size),
        }
        queries = {}
        for site in sites:
            name = site.look.name
            frozen, before = self.scores(site, plain)
            adapted, after = self.scores(site, models[name])
            (other,) = (model for key, model in models.items() if key != name)
            rows = {
                "base": frozen,
                "adapter": adapted,
                "other_adapter": self.scores(site, other)[0],
                "int8": int8[name],
                "sdm_recipe": self.scores(site, recipes[name])[0],
            }
            results = json.loads((self.folder(site) / "run" / RESULTS).read_text("utf-8"))
            summary["sites"][name] = {
                **_figures(rows),
                "gains": {
                    key: gains(scores, frozen) for key, scores in rows.items() if key != "base"
                },
                "int8_drop": gains(adapted, int8[name]),
                "question": QUESTIONS[name],
                "things": [thing.value for thing in site.look.things],
                "trained_parameters": results["trained_parameters"],
                "parameters": results["parameters"],
            }
            embed = (
                partial(embed_texts, model, clip_tokenizer()) for model in (plain, models[name])
            )
            queries[name] = sample_queries(site.test, before, after, *embed)
        return summary, queries

    def scores(self, site: _Site, model: UPPerson) -> tuple[Scores, tuple[Embeds, Embeds]]:
        """Measure a model on a site's test people; return its embeddings, too."""
        tokenizer, records = clip_tokenizer(), site.test.records
        shown = partial(self.display.update, f"measuring on the {site.look.name}")
        embeds = embed_records(model, tokenizer, records, progress=shown)
        return measure(site.test, *embeds, partial(embed_texts, model, tokenizer)), embeds


def gains(after: Scores, before: Scores) -> dict[str, dict[str, float]]:
    """Return points gained on the same queries by figure, with 95 % intervals.

    The paired bootstrap resamples people, with all their captions, and short queries, which all
    their people share.
    """
    return {
        name: asdict(paired_drop(found - before.found[name], after.groups[name]))
        for name, found in after.found.items()
    }


def _figures(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    return {name: each.figures() for name, each in scores.items()}


def _vectors_of(gallery: Gallery, records: Sequence[Record]) -> NDArray[np.float32]:
    """Return what a gallery has of the pictures of records, in their order."""
    found = {
        item.source: vector_E
        for items, vectors_NE in gallery.vectors()
        for item, vector_E in zip(items, vectors_NE, strict=True)
    }
    return np.stack([found[str(record.image.absolute())] for record in records])
