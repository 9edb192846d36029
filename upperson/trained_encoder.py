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

from upperson.data.batches import pad_ids, tokenize
from upperson.data.pictures import Pictures
from upperson.data.transforms import prepare_pixels
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.encoder import UPPerson
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import Tower


class TrainedEncoder:
    """Embeds in torch with everything unfolded, and reads files and captions as training does.

    Without a tokenizer of the model's base it takes CLIP's.
    """

    def __init__(self, model: UPPerson, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer or clip_tokenizer(model.text.context_length)

    @torch.inference_mode()
    def run(self, tower: Tower, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Embed what a graph reads, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""
        prepared = torch.from_numpy(inputs)
        if tower == "text":
            embeds_NE = self.model.encode_text(prepared.long())
        else:
            embeds_NE = self.model.encode_image(self._normalise(prepared))
        return _array(embeds_NE)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Path], batch_size: int) -> NDArray[np.float32]:
        """Embed N files: [N, E]."""
        image_N3HW = self._read(images)
        embeds = [self.model.encode_image(batch) for batch in torch.split(image_N3HW, batch_size)]
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
        return _array(((self._read(files) * std + mean) * 255).permute(0, 2, 3, 1))

    def _read(self, files: Sequence[Path]) -> Tensor:
        return self._normalise(torch.from_numpy(read_pixels(files, self.model.image_size)))

    def _normalise(self, pixels_NHW3: Tensor) -> Tensor:
        return prepare_pixels(pixels_NHW3, None, self.model.statistics)


def read_pixels(files: Sequence[Path], image_size: tuple[int, int]) -> NDArray[Any]:
    """Read files through the data set of training, without a model: uint8 [N, H, W, 3]."""
    return Pictures(files, image_size).read(range(len(files)))


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array
