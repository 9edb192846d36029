"""Sentences in, pictures out."""

from typing import overload

from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Filter, Gallery, Hit

__all__ = ["Retriever"]


class Retriever:
    """Finds the pictures of a gallery that a sentence describes.

    encoder = upperson_rt.open("bundle")
    with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
        hits = Retriever(encoder, gallery).query("a woman in a red coat", k=5)
    """

    def __init__(self, encoder: Encoder, gallery: Gallery) -> None:
        """Put the two together; the gallery was opened with the encoder's fingerprint."""
        self.encoder = encoder
        self.gallery = gallery

    @overload
    def query(self, text: str, k: int = 10, where: Filter | None = None) -> list[Hit]: ...

    @overload
    def query(
        self, text: list[str] | tuple[str, ...], k: int = 10, where: Filter | None = None
    ) -> list[list[Hit]]: ...

    def query(
        self, text: str | list[str] | tuple[str, ...], k: int = 10, where: Filter | None = None
    ) -> list[Hit] | list[list[Hit]]:
        """Find the k best pictures.

        Args:
            text: One sentence, or several.
            k: Hits per sentence.
            where: Only items that pass.

        Returns:
            The hits of the sentence, best first; for several sentences a list of such lists.

        Raises:
            InputError: A sentence is empty.
            UsageError: k is below 1.
            BackendError: The text tower cannot be loaded or fails.
            IntegrityError: The text tower gives wrong results, or the gallery is damaged.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            return []
        found = self.gallery.search(self.encoder.encode_texts(texts), k, where)
        return found[0] if isinstance(text, str) else list(found)
