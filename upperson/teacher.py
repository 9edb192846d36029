"""What a teacher makes of the pictures that its student learns from.

Pictures that are augmented are new at every step, and so it is asked at every step. Those that are
only flipped are two each: it is asked once, before the first step, and half of the work is saved.

Shapes: P pictures, N of a batch, E embedding width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from upperson.data.batches import LoadedBatch
from upperson.data.pictures import PictureBatches, Pictures, pixels_of
from upperson.data.transforms import PixelStatistics, flips_only, prepare_pixels
from upperson.model.encoder import ImageEncoder
from upperson_rt.errors import UppersonError

Progress = Callable[[int, int], None]


class AskedAtEveryStep:
    """Embeds the very pictures that the student sees."""

    def __init__(self, tower: ImageEncoder, statistics: PixelStatistics) -> None:
        self._tower = tower
        self._statistics = statistics

    @torch.no_grad()
    def lesson(self, loaded: LoadedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the pictures of a batch, [N, 3, H, W] and normalised, and what to make of them.

        The latter is [N, E] and unit norm.
        """
        image_N3HW = loaded.to(device, self._statistics).image_N3HW
        return image_N3HW, F.normalize(self._tower(image_N3HW).float(), dim=-1)


class AskedOnce:
    """Remembers what the teacher made of every picture and of its mirror image.

    Args:
        tower: The teacher, on its device.
        statistics: Of its pixels.
        pictures: All of them; a batch's labels are places in them.
        batch_size: How many it is asked of at a time.
        progress: Is told of how many it has been asked.

    Raises:
        InputError: A picture cannot be decoded.
    """

    @torch.no_grad()
    def __init__(
        self,
        tower: ImageEncoder,
        statistics: PixelStatistics,
        pictures: Pictures,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._statistics = statistics
        device = tower.positional_embedding.device
        count = len(pictures)
        places = torch.split(torch.arange(count), batch_size)
        assert tower.proj is not None  # No student is built for a tower without.
        # Filled in place: autocast of a CPU joins no float16.
        self._made_2PE = torch.empty(
            2, count, tower.proj.shape[1], dtype=torch.float16, device=device
        )
        batches = PictureBatches(pictures, [each.tolist() for each in places])
        for number, place in enumerate(places):
            item = batches[number]
            if isinstance(item, UppersonError):
                raise item
            image_N3HW = prepare_pixels(pixels_of(item).to(device), None, statistics)
            for side, image in enumerate((image_N3HW, image_N3HW.flip(3))):
                made_NE = F.normalize(tower(image).float(), dim=-1)
                self._made_2PE[side, place] = made_NE.half()
            progress(int(place[-1]) + 1, count)

    def lesson(self, loaded: LoadedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """As of `AskedAtEveryStep`."""
        assert loaded.moves_N7 is not None
        batch = loaded._replace(moves_N7=flips_only(loaded.moves_N7)).to(device, self._statistics)
        flipped_N = loaded.moves_N7[:, 0].to(device)
        return batch.image_N3HW, self._made_2PE[flipped_N, batch.labels_N].float()
