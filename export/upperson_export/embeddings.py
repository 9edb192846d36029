"""Embeddings of a retrieval split for any form of a tower: from its file, through the runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path

from upperson_export.accuracy import RetrievalSplit
from upperson_export.candidates import TowerCandidates
from upperson_export.float_types import float_type_of, open_simulated
from upperson_export.ladder import REFERENCE, SIMULATED, Embeds
from upperson_export.variants import Variant
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.encoder import Encoder
from upperson_rt.towers import Tower

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


class FormEmbeddings:
    """Embeds a split with any form of a tower: a `upperson_export.ladder.Source`.

    Args:
        folder: A bundle with the fp32 variant, whose tokenizer and sizes are used.
        towers: Build the forms.
        split: What is embedded.
        progress: Called with (what is being done, done, total).
    """

    def __init__(
        self,
        folder: Path,
        towers: Mapping[Tower, TowerCandidates],
        split: RetrievalSplit,
        progress: Report,
    ) -> None:
        self._exact = Bundle.open(folder, "fp32")
        self._towers = towers
        self._split = split
        self._progress = progress
        self._known: dict[tuple[Path, str], Embeds] = {}

    def __call__(self, tower: Tower, variant: Variant, rung: str, backend: str) -> Embeds:
        """Embed the split; see `upperson_export.ladder.Source`."""
        path = self._towers[tower].build(variant, rung)
        if backend == SIMULATED and rung == "fp32":
            backend = REFERENCE  # Nothing in it is float16.
        if (path, backend) not in self._known:
            on_half = backend == SIMULATED
            loaded = open_simulated(path) if on_half else open_backend(path, backend)
            encoder = Encoder(
                self._exact.manifest, variant, self._exact.tokenizer, lambda _: loaded
            )
            work = f"measuring the {tower} tower, {variant} {rung} on {backend}"
            if tower == "image":
                embeds = encoder.encode_images(
                    list(self._split.image_files),
                    progress=lambda done, total: self._progress(work, done, total),
                )
            else:
                self._progress(work, 0, 1)
                embeds = encoder.encode_texts(list(self._split.captions))
                self._progress(work, 1, 1)
            self._known[path, backend] = Embeds(embeds, "f16" if on_half else float_type_of(loaded))
        return self._known[path, backend]
