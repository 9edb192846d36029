"""A trained model behind the calls of the runtime's encoder: what exports of it are compared with.

Shapes: N items, L tokens, H image height, W image width, E embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upperson.data.batches import ImageDataset, pad_ids, tokenize
from upperson.data.records import Record
from upperson.data.transforms import ImageTransform, evaluation_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.encoder import UPPerson
from upperson_rt.towers import Tower


class TrainedEncoder:
    """Embeds in torch with everything unfolded, and reads files and captions as training does."""

    def __init__(self, model: UPPerson) -> None:
        self.model = model
        self.tokenizer = clip_tokenizer(model.text.context_length)
        self._normalise = evaluation_transform(model.statistics)

    @torch.inference_mode()
    def run(self, tower: Tower, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Embed what a graph reads, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""
        prepared = torch.from_numpy(inputs)
        if tower == "text":
            embeds_NE = self.model.encode_text(prepared.long())
        else:
            embeds_NE = self.model.encode_image(self._normalise(prepared.permute(0, 3, 1, 2)))
        return _array(embeds_NE)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Path], batch_size: int) -> NDArray[np.float32]:
        """Embed N files: [N, E]."""
        pixels_N3HW = _read(images, self.model.image_size, self._normalise)
        embeds = [self.model.encode_image(batch) for batch in torch.split(pixels_N3HW, batch_size)]
        return _array(torch.cat(embeds))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Embed N captions: [N, E]."""
        ids = tokenize(self.tokenizer, texts)
        starts = range(0, len(ids), batch_size)
        embeds = [self.model.encode_text(pad_ids(ids[i : i + batch_size])) for i in starts]
        return _array(torch.cat(embeds))

    def read_pixels(self, files: Sequence[Path]) -> NDArray[Any]:
        """Read files and undo the normalisation: float levels of 0 to 255, [N, H, W, 3]."""
        mean = torch.tensor(self.model.image_mean)[:, None, None]
        std = torch.tensor(self.model.image_std)[:, None, None]
        normalised_N3HW = _read(files, self.model.image_size, self._normalise)
        return _array(((normalised_N3HW * std + mean) * 255).permute(0, 2, 3, 1))


def read_pixels(files: Sequence[Path], image_size: tuple[int, int]) -> NDArray[Any]:
    """Read files through the data set of training, without a model: uint8 [N, H, W, 3]."""
    return _array(_read(files, image_size, lambda pixels_3HW: pixels_3HW).permute(0, 2, 3, 1))


def _read(files: Sequence[Path], image_size: tuple[int, int], transform: ImageTransform) -> Tensor:
    records = [Record(image=file, pid=0, captions=("",)) for file in files]
    images = ImageDataset(records, image_size, transform)
    return torch.stack([images[index] for index in range(len(images))])


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array
