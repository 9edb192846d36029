"""Loading training batches: from files as usual, from files as here, and from the cache.

Every contender gives batches of the same pictures and captions to one process, in turns.
"""

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.random_model import HeightOption, WidthOption
from benchmarks.report import (
    SPEEDS,
    TIMES,
    Column,
    conditions,
    print_report,
    table,
    timed_rows,
)
from upperson.data.batches import BatchSampler, LoadedBatch, PairDataset, pair_loader
from upperson.data.pictures import Pictures, cached_pictures, pixels_of
from upperson.data.records import Record, read_dataset
from upperson.data.transforms import CLIP_STATISTICS, PixelStatistics
from upperson.data.vocabulary import clip_tokenizer
from upperson_rt.backends.autotune import time_in_turns
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import show_progress
from upperson_rt.image_file import open_image
from upperson_synthetic import SyntheticSpec, write_dataset

LITERAL = "torchvision, a picture at a time"
FILES = "ours, from files"
CACHE = "ours, from the cache"
CONTENDERS = (LITERAL, FILES, CACHE)

_VIEWS = 4
WARMUP = 1

COLUMNS = (
    {"pictures/s": Column("items_per_s", "{:,.0f}")}
    | TIMES
    | SPEEDS
    | {
        "CPU ms a picture": Column("cpu_ms_per_picture", "{:.3f}"),
        "MB a batch": Column("batch_bytes", "{:.1f}", 1e-6),
    }
)

app = new_app("Time the loading of training batches against torchvision's transforms.")


@app.command(cls=Command)
def loader(
    pictures: Annotated[int, typer.Option(min=8, help="JPEG files, of rendered people.")] = 256,
    times: Annotated[int, typer.Option(min=1, help="How often an epoch shows each.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs of a batch.")] = 128,
    height: HeightOption = 384,
    width: WidthOption = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load; 0: this one.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed epochs of every contender.")] = 2,
    debug: Debug = False,
) -> None:
    """Time the loading of training batches against torchvision's transforms.

    Pictures are read, decoded, resized, augmented and put into batches, captions are masked.
    torchvision's transforms give float32 from a worker; ours give bytes, which are moved and
    normalised where the model is: that time, on this CPU, is told apart. Files lie in memory;
    the start of the workers counts, hence long epochs.

    Example: `python -m benchmarks.loader --workers 2`
    """
    with show_progress() as progress, tempfile.TemporaryDirectory() as name:
        root = Path(name) / "people"
        people = SyntheticSpec(
            look="street",
            train_ids=-(-pictures // _VIEWS),
            val_ids=0,
            test_ids=0,
            views=_VIEWS,
            captions_per_image=1,
        )
        progress("rendering people", 0, 1)
        records = read_dataset("jsonl", write_dataset(root, people))["train"][:pictures] * times
        measured = measure(
            records,
            root,
            (height, width),
            batch_size=batch_size,
            workers=workers,
            rounds=rounds,
            progress=lambda done, total: progress("loading in turns", done, total),
        )
    result = conditions(
        "loader", "torch", "torchvision", "pillow",
        threads=torch.get_num_threads(), batch_size=batch_size, warmup=WARMUP,
    ) | {
        "pictures": pictures,
        "times": times,
        "height_px": height,
        "width_px": width,
        "workers": workers,
        **measured,
    }  # fmt: skip
    facts = (
        f"{pictures} JPEG files, each {times} times an epoch, to {height}x{width}, batches of "
        f"{batch_size}, {workers} workers; {WARMUP} + {rounds} epochs in turns",
        f"augmenting and normalising on this CPU: {measured['moving_ms']:.3f} ms a picture",
        f"a spawned worker gets {measured['handed_bytes'] / 1e6:.2f} MB for {len(records):,} pairs",
    )
    print_report(result, facts, [table("an epoch", measured["contenders"], COLUMNS)])


class LiteralPairs(Dataset[tuple[Tensor, Tensor]]):
    """A picture and a caption at a time, as torchvision's transforms have it."""

    def __init__(self, records: Sequence[Record], image_size: tuple[int, int]) -> None:
        self._records = records
        augmentation = literal_augmentation(image_size, CLIP_STATISTICS)
        self._transform = v2.Compose([v2.Resize(image_size), v2.PILToTensor(), augmentation])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a normalised picture, and the number of its caption."""
        with open_image(self._records[index].image) as image:
            return self._transform(image.convert("RGB")), torch.tensor(index)


def literal_augmentation(image_size: tuple[int, int], statistics: PixelStatistics) -> v2.Compose:
    """Return the paper's augmentation by torchvision, for one uint8 picture [3, H, W] at a time."""
    mean, std = (list(values) for values in statistics)
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(image_size, padding=10),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            v2.RandomErasing(scale=(0.02, 0.4), value=mean),
        ]
    )


def measure(
    records: Sequence[Record],
    root: Path,
    image_size: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    rounds: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Load epochs with all contenders in turns; return plain values.

    Args:
        records: Pictures with a caption each.
        root: Folder of their data set; the cache goes beside it.
        image_size: (height_px, width_px) of what is loaded.
        batch_size: Pairs of a batch.
        workers: Processes that load.
        rounds: Timed epochs.
        progress: Is told of epochs that are done.
    """
    files = [record.image for record in records]
    sources = {
        FILES: Pictures(files, image_size),
        CACHE: cached_pictures(
            root.parent / "cache", root, [files], image_size, lambda done, total: None
        )[0],
    }
    tokenizer = clip_tokenizer()
    pairs = {
        name: PairDataset(records, pictures, tokenizer, augment=True, mask_captions=True)
        for name, pictures in sources.items()
    }
    sampler = BatchSampler(len(records), batch_size, seed=0)
    literal = LiteralPairs(records, image_size)
    batch_bytes: dict[str, int] = {}

    def load(name: str) -> None:
        """Load an epoch; the workers end with it."""
        if name == LITERAL:
            loading: Any = DataLoader(literal, batch_size, shuffle=True, num_workers=workers)
        else:
            sampler.start_at(0, 0)
            loading = pair_loader(pairs[name], sampler, torch.device("cpu"), workers)
        for batch in loading:
            tensors = [part for part in batch if isinstance(part, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            batch_bytes[name] = max(size, batch_bytes.get(name, 0))
            if isinstance(batch, LoadedBatch):
                pixels_of(batch.pixels_NHW3)

    timings = time_in_turns(
        {name: partial(load, name) for name in CONTENDERS},
        warmup=WARMUP,
        rounds=rounds,
        cpu_clock=_cpu_with_workers,
        progress=lambda done: progress(done, WARMUP + rounds),
    )
    rows = timed_rows(timings, LITERAL, len(records))
    for name, row in rows.items():
        row["batch_bytes"] = batch_bytes[name]
        row["cpu_ms_per_picture"] = row["cpu_ms"] / len(records)
    return {
        "contenders": rows,
        "moving_ms": _moving_s(pairs[CACHE], sampler) * 1000,
        "handed_bytes": _handed_bytes(pairs[CACHE]),
    }


def _moving_s(pairs: PairDataset, sampler: BatchSampler) -> float:
    """Return the processor seconds for augmenting and normalising a picture on this CPU."""
    batch = pairs[next(iter(sampler))]
    assert isinstance(batch, LoadedBatch)  # It was read before.
    cpu = torch.device("cpu")
    batch.to(cpu, CLIP_STATISTICS)
    started = time.process_time()
    for _ in range(3):
        batch.to(cpu, CLIP_STATISTICS)
    return (time.process_time() - started) / 3 / len(batch.labels_N)


def _handed_bytes(pairs: PairDataset) -> int:
    """Return what a worker that is spawned is handed: captions, and where the pictures are."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(pairs, protocol=5, buffer_callback=buffers.append)
    return len(pickled) + sum(buffer.raw().nbytes for buffer in buffers)


def _cpu_with_workers() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.loader")
