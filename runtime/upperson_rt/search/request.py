"""What one search looks for, and how many hits it returns."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_count, is_finite
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter
from upperson_rt.phrases.evidence import MOST_PARAPHRASES
from upperson_rt.printable import shown

if TYPE_CHECKING:  # Loads Pillow, which sentences do without.
    from PIL import Image

    from upperson_rt.preprocess import Channels

__all__ = ["Picture", "SearchRequest"]

Picture: TypeAlias = (
    "str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | NDArray[np.float32]"
)
"""A picture as for `Encoder.encode_images`, or its embedding: float32 (D,) of unit length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """One search: a sentence, a picture or both, moved by relevance feedback.

    Raises:
        UsageError: It has neither sentence nor picture, or a number is out of range.
    """

    sentence: str | None = None
    picture: "Picture | None" = None
    picture_share: float = 0.5
    """Weight of the picture where there is a sentence as well, 0 to 1."""
    channels: "Channels" = "rgb"
    """Colour order of a picture that is an array; ``bgr`` for frames of OpenCV."""
    relevant_ND: NDArray[np.float32] | None = None
    """Embeddings (N, D) of hits that a user marked as right, see `feedback.refine`."""
    not_relevant_ND: NDArray[np.float32] | None = None
    """Embeddings (N, D) of hits that a user marked as wrong."""
    where: Filter | None = None
    k: int = 10
    by_track: bool = False
    """One hit a track, with its best picture; items without a track stand alone."""
    paraphrases: int = 1
    """Wordings of the sentence whose embeddings are averaged, 1 to `MOST_PARAPHRASES`."""
    explain: bool = False
    """Also compute the evidence of each phrase in each hit."""
    calibrate: bool = False
    """Also compute a likelihood and a match label for each hit. Reads a sample of the gallery."""
    notices: bool = False
    """Also report how the sentence was read. Embeds words that this model was not tried on yet."""

    def __post_init__(self) -> None:
        if self.sentence is None and self.picture is None:
            raise UsageError("a search needs a sentence or a picture: give one of them")
        if not (is_finite(self.picture_share) and 0 <= self.picture_share <= 1):
            raise UsageError(
                f"picture_share must be a number from 0 to 1, found {shown(self.picture_share)}"
            )
        object.__setattr__(self, "k", check_count(self.k, "k"))
        paraphrases = check_count(self.paraphrases, "paraphrases", most=MOST_PARAPHRASES)
        object.__setattr__(self, "paraphrases", paraphrases)

    @property
    def has_both(self) -> bool:
        """Whether it has a sentence and a picture."""
        return self.sentence is not None and self.picture is not None

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """The picture if it is an embedding (D,), else None."""
        picture: Any = self.picture
        is_one = isinstance(picture, np.ndarray) and picture.dtype == np.float32
        return picture if is_one and picture.ndim == 1 else None
