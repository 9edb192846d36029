"""Writes a run folder and its model card during training; `upperson.run` says what is in it."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from upperson.config import TrainConfig
from upperson.data.annotations import PLAIN_FORMATS
from upperson.data.records import Record, Split
from upperson.evaluate import Evaluation
from upperson.losses import TEMPERATURE
from upperson.model.base import Base
from upperson.plan import count_split
from upperson.run import ADAPTER, CARD, CONFIG, CURVES, METRICS_CSV, RESULTS, pack_adapter
from upperson_rt.errors import InputError
from upperson_rt.files import make_folder, remove_unfinished, unfinished, write_atomically
from upperson_rt.locks import lock_until_closed
from upperson_rt.printable import code_span, show_text

_TEMPLATES = Path(__file__).parent / "templates"


def model_card(config: TrainConfig, results: dict[str, Any]) -> str:
    """Render a run's ``README.md``, in Markdown with a YAML header.

    ``results`` is the content of ``results.json`` (see `RunWriter.finish`); what is missing in it
    is left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=show_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    published = config.dataset not in PLAIN_FORMATS
    measured = {split: results[split] for split in ("val", "test") if results.get(split)}
    metrics = list(dict.fromkeys(name for values in measured.values() for name in values))
    return environment.get_template("model_card.md.j2").render(
        config=config,
        base=results.get("base", config.base),
        base_sha256=results.get("base_sha256"),
        # Names only: a card is passed on, and folders of the machine it was made on are not.
        weights=Path(config.pretrained or "").name,
        data=config.dataset if published else Path(config.root).name or config.dataset,
        temperature=None if config.temperature == TEMPERATURE else config.temperature,
        start=Path(config.init_from or "").name,
        metrics=metrics,
        rows=[
            [split, *(f"{values[name]:.2f}" if name in values else "-" for name in metrics)]
            for split, values in measured.items()
        ],
        selection=_selection(config, results),
        seed=results.get("seed"),
        splits=[
            f"{name} {size['images']:,} images and {size['captions']:,} captions of "
            f"{size['people']:,} people"
            for name, size in results.get("splits", {}).items()
        ],
        parameters=_parameters(results),
        parts=_parts(config),
        teacher="" if config.student is None else Path(config.student.teacher).name,
    )


def _selection(config: TrainConfig, results: dict[str, Any]) -> str:
    if "best_epoch" not in results:
        return "Which epoch was kept is not recorded."
    epoch = f"Epoch {results['best_epoch']} of {config.epochs}"
    match results.get("selected_on"):
        case "val":
            return f"{epoch}, the best by R@1 on the validation split."
        case "test":
            return (
                f"{epoch}, **selected on the test split**: its test result is optimistic, and not "
                "comparable with one selected on a validation split."
            )
        case "last epoch":
            return f"{epoch}, the last one; no split chose it."
    return f"{epoch}; how it was chosen is not recorded."


def _parameters(results: dict[str, Any]) -> str | None:
    match results:
        case {"trained_parameters": trained, "parameters": total}:
            return f"{trained:,} trained of {total:,} ({100 * trained / total:.2f} %)"
    return None


def _parts(config: TrainConfig) -> list[str]:
    model = config.model
    parts = []
    if model.prefix_length:
        parts.append(
            f"S-Prefix of {model.prefix_length} rows, initial scale {model.prefix_scale}, "
            f"blocks {model.prefix_blocks}"
        )
    if model.lora_rank:
        parts.append(f"LoRA of rank {model.lora_rank}, blocks {model.lora_blocks}")
    if model.adapter_reduction:
        parts.append(
            f"L-Adapter of width / {model.adapter_reduction}, blocks {model.adapter_blocks}"
        )
    if config.learn_words:
        parts.append("embeddings of tokens that the base had never seen")
    return parts


class RunWriter:
    """Writes one run folder; every file is replaced atomically, and nothing before :meth:`begin`.

    ``trained`` is everything with parameters, for their counts. InputError if the folder is not
    empty and not of a run to ``resume``.
    """

    def __init__(
        self, path: Path, config: TrainConfig, base: Base, trained: nn.Module, *, resume: bool
    ) -> None:
        if not resume and path.is_dir() and set(path.iterdir()) - unfinished(path, CONFIG):
            raise InputError(
                f"{path} is not empty: choose another --output for the new run, or go on with "
                f"the run in it:  --resume {path}",
                code="run_not_empty",
                path=path,
            )
        self._path = path
        self._config = config
        self._base = base
        self._events: SummaryWriter | None = None
        self._locked: BinaryIO | None = None
        parameters = list(trained.parameters())
        self._counts = {
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def begin(self, best: dict[str, Tensor], first_step: int) -> None:
        """Write what a run starts with, or bring its folder back to a checkpoint's state.

        ``best`` are the trained tensors of the best epoch, empty before the first; ``first_step``
        is the next step, counted from 1 over all epochs.
        """
        try:
            make_folder(self._path)
        except OSError as error:
            raise InputError(
                f"cannot make the run folder {self._path}: {error.strerror}",
                code="run_not_writable",
                path=self._path,
            ) from error
        if not (self._path / CONFIG).exists():
            write_atomically(self._path / CONFIG, self._config.to_yaml())
        # One writer a run; the lock goes with this process.
        self._locked = (self._path / CONFIG).open("rb")
        try:
            lock_until_closed(self._locked.fileno())
        except BlockingIOError as error:
            raise InputError(
                f"{self._path} is being written by another process",
                code="run_locked",
                path=self._path,
            ) from error
        for name in (CONFIG, ADAPTER, METRICS_CSV, CURVES, RESULTS, CARD):
            remove_unfinished(self._path, name)
        if best:
            self.save_adapter(best)
        else:
            (self._path / ADAPTER).unlink(missing_ok=True)
        with self._events_written():
            self._events = SummaryWriter(str(self._path), purge_step=first_step)

    def close(self) -> None:
        """Close the event file and let other processes write the run."""
        try:
            if self._events is not None:
                with self._events_written():
                    self._events.close()
        finally:
            if self._locked is not None:
                self._locked.close()

    def save_adapter(self, state: dict[str, Tensor]) -> None:
        """Write the trained tensors."""
        write_atomically(self._path / ADAPTER, pack_adapter(state, self._base))

    def log_step(self, step: int, loss: float, lr: float, images_per_s: float) -> None:
        """Add a step, counted from 1 over all epochs, to TensorBoard."""
        for name, value in (("loss", loss), ("lr", lr), ("images per s", images_per_s)):
            self._add_scalar(f"step/{name}", value, step)

    def log_epoch(self, rows: list[dict[str, float]], step: int) -> None:
        """Write all epochs to metrics.csv and the curves; the last, ended by a step, to events."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_atomically(self._path / METRICS_CSV, text.getvalue())
        for name, value in rows[-1].items():
            self._add_scalar(f"epoch/{name}", value, step)
        write_atomically(self._path / CURVES, draw_curves(rows))

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        if self._events is not None:
            with self._events_written():
                self._events.add_scalar(name, value, step)

    @contextmanager
    def _events_written(self) -> Iterator[None]:
        """Name what could not be written, which TensorBoard's own errors do not."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write TensorBoard's events in {self._path}: {error.strerror or error}; "
                f"repair it, then go on with --resume {self._path}",
                code="events_not_written",
                path=self._path,
            ) from error

    def finish(
        self,
        best_epoch: int,
        selected_on: str,
        measured: Mapping[Split, Evaluation],
        splits: Mapping[Split, Sequence[Record]],
        seconds: float,
        distilled: Mapping[str, Any] | None = None,
    ) -> None:
        """Write results.json and the model card; ``distilled`` rates a student by its teacher."""
        val, test = measured.get("val"), measured.get("test")
        results = {
            "best_epoch": best_epoch,
            "selected_on": selected_on,
            "val": val and val.text_to_image.as_dict(),
            "test": test and test.text_to_image.as_dict(),
            "image_to_text": {
                "val": val and val.image_to_text.as_dict(),
                "test": test and test.image_to_text.as_dict(),
            },
            "seed": self._config.seed,
            "base": self._base.name,
            "base_sha256": self._base.sha256,
            **self._counts,
            "splits": {name: asdict(count_split(records)) for name, records in splits.items()},
            "seconds": round(seconds, 1),
            **({} if distilled is None else {"distilled": distilled}),
        }
        write_atomically(self._path / RESULTS, json.dumps(results, indent=2) + "\n")
        write_atomically(self._path / CARD, model_card(self._config, results))


def draw_curves(rows: list[dict[str, float]]) -> bytes:
    """Draw loss and R@1/5/10 of the selecting split over epochs; return a PNG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_axes, recall_axes = figure.subplots(1, 2)
    points = [(row["epoch"], row["loss"]) for row in rows]
    loss_axes.plot(*zip(*points, strict=True), color="#c0392b", marker=_marker(points))
    loss_axes.set(title="Training loss", xlabel="epoch", ylim=(0, None))
    split = "test" if any("test R@1" in row for row in rows) else "val"
    for name, color in (("R@1", "#1f4e79"), ("R@5", "#2e86c1"), ("R@10", "#85c1e9")):
        column = f"{split} {name}"
        if points := [(row["epoch"], row[column]) for row in rows if column in row]:
            marker = _marker(points)
            recall_axes.plot(*zip(*points, strict=True), color=color, label=name, marker=marker)
    recall_axes.set(title=f"Text to image, {split} split (%)", xlabel="epoch", ylim=(0, 102))
    if recall_axes.lines:
        recall_axes.legend(frameon=False)
    else:
        recall_axes.text(0.5, 0.5, "not measured", ha="center", transform=recall_axes.transAxes)
    for axes in (loss_axes, recall_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(rows) == 1:  # Around one number it would still choose fractions.
            axes.set_xticks([rows[0]["epoch"]])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _marker(points: Sequence[object]) -> str:
    """Return a dot for a single point, which makes no line."""
    return "o" if len(points) == 1 else ""
