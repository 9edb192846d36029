"""The range of input shapes that an engine is built for."""

from dataclasses import dataclass

from upperson_rt.errors import UsageError
from upperson_rt.manifest import Manifest
from upperson_rt.towers import Tower

__all__ = ["InputProfile", "tower_profile"]

_TYPICAL_BATCH = 8  # What a camera's micro-batches come to; engines are fastest there.
_TYPICAL_TOKENS = 32  # Sentences of about 25 words.


@dataclass(frozen=True)
class InputProfile:
    """Smallest, typical and largest shape of a tower's one input."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @property
    def label(self) -> str:
        """The ranges of the axes that vary, for file names, such as ``1.8.32x1.32.77``."""
        axes = zip(self.min, self.opt, self.max, strict=True)
        return "x".join(f"{a}.{b}.{c}" for a, b, c in axes if a != c) or "fixed"


def tower_profile(tower: Tower, manifest: Manifest, max_batch: int) -> InputProfile:
    """Return the profile of a tower: any batch up to the largest, texts of any length.

    Args:
        tower: ``image``: uint8 [N, H, W, 3]; ``text``: int32 [N, L].
        manifest: Gives H, W and the longest L.
        max_batch: Largest N that runs in one go; larger inputs are split.

    Raises:
        UsageError: The batch is below 1.
    """
    if max_batch < 1:
        raise UsageError(f"max_batch must be at least 1, got {max_batch}")
    typical = min(_TYPICAL_BATCH, max_batch)
    if tower == "image":
        size = (manifest.image.height_px, manifest.image.width_px, 3)
        return InputProfile("image", (1, *size), (typical, *size), (max_batch, *size))
    longest = manifest.text.context_length
    return InputProfile(
        "input_ids", (1, 1), (typical, min(_TYPICAL_TOKENS, longest)), (max_batch, longest)
    )
