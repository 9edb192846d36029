"""Images and captions for ``upperson parity``, and the training's own way to read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from upperson.data.batches import ImageDataset, pad_ids, tokenize
from upperson.data.records import Record, read_dataset
from upperson.data.synthetic import LOOKS, SyntheticSpec, describe, generate_people, write_dataset
from upperson.data.transforms import evaluation_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.encoder import UPPerson
from upperson_rt.preprocess import iter_image_files

if TYPE_CHECKING:
    from upperson_export.parity.inputs import ParityInputs
    from upperson_export.parity.subjects import Subject, Tolerance
    from upperson_rt.towers import Tower

_LOOK = "street"


class Material(NamedTuple):
    """What a parity check is made from."""

    source: str
    files: list[Path]
    image_names: list[str]
    captions: list[str]


def gather_material(images: Path | None, count: int, folder: Path) -> Material:
    """Take images from a file or folder, evenly, or render people into ``folder``.

    Captions are those of synthetic people in both cases.

    Raises:
        InputError: There is no image at ``images``.
    """
    spec = SyntheticSpec(
        look=_LOOK, train_ids=0, val_ids=0, test_ids=count, views=1, captions_per_image=1
    )
    if images is None:
        records = read_dataset("jsonl", write_dataset(folder, spec))["test"]
        return Material(
            source=f"{count} synthetic people",
            files=[record.image for record in records],
            image_names=[f"synthetic/{record.image.name}" for record in records],
            captions=[record.captions[0] for record in records],
        )
    found = list(iter_image_files([images]))
    chosen = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    files = [found[index] for index in chosen]
    captions = [
        describe(person, LOOKS[_LOOK], np.random.default_rng(number))
        for number, person in enumerate(generate_people(spec, "test"))
    ]
    return Material(
        source=f"{len(files)} of {len(found)} images at {images}, {count} synthetic captions",
        files=files,
        image_names=[str(file) for file in files],
        captions=captions,
    )


def training_pixels(
    files: Sequence[Path], image_size: tuple[int, int], model: UPPerson | None
) -> npt.NDArray[Any]:
    """Read files through the data set of training: levels of 0 to 255, [N, H, W, 3].

    With a model they go through its normalisation, which is then undone.
    """
    records = _records(files)
    if model is None:
        plain = ImageDataset(records, image_size, lambda pixels_3HW: pixels_3HW)
        pixels_N3HW = torch.stack([plain[index] for index in range(len(plain))])
    else:
        mean = torch.tensor(model.image_mean)[:, None, None]
        std = torch.tensor(model.image_std)[:, None, None]
        pixels_N3HW = (_normalised(model, records) * std + mean) * 255
    pixels_NHW3: npt.NDArray[Any] = pixels_N3HW.permute(0, 2, 3, 1).numpy()
    return pixels_NHW3


def run_subject(model: UPPerson, tolerance: "Tolerance") -> "Subject":
    """Return a trained model as it is, with everything unfolded, in torch."""
    from upperson_export.parity.subjects import Subject, torch_backend

    normalise = evaluation_transform((model.image_mean, model.image_std))
    tokenizer = clip_tokenizer(model.text.context_length)

    @torch.inference_mode()
    def run(tower: "Tower", inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        prepared = torch.from_numpy(inputs)
        if tower == "text":
            embeds = model.encode_text(prepared.long())
        else:
            embeds = model.encode_image(normalise(prepared.permute(0, 3, 1, 2)))
        found: npt.NDArray[np.float32] = embeds.numpy()
        return found

    @torch.inference_mode()
    def encode(tower: "Tower", inputs: "ParityInputs", batch_size: int) -> npt.NDArray[np.float32]:
        if tower == "image":
            image_N3HW = _normalised(model, _records(inputs.files))
            embeds = [model.encode_image(batch) for batch in torch.split(image_N3HW, batch_size)]
        else:
            ids = tokenize(tokenizer, inputs.sentences)
            starts = range(0, len(ids), batch_size)
            embeds = [model.encode_text(pad_ids(ids[i : i + batch_size])) for i in starts]
        found: npt.NDArray[np.float32] = torch.cat(embeds).numpy()
        return found

    return Subject(
        variant="run", backend=torch_backend(), tolerance=tolerance, run=run, encode=encode
    )


def _normalised(model: UPPerson, records: Sequence[Record]) -> torch.Tensor:
    """Read images as training evaluates them: float32 [N, 3, H, W]."""
    transform = evaluation_transform((model.image_mean, model.image_std))
    images = ImageDataset(records, model.image_size, transform)
    return torch.stack([images[index] for index in range(len(images))])


def _records(files: Sequence[Path]) -> list[Record]:
    return [Record(image=file, pid=0, captions=("",)) for file in files]
