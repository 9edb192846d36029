"""The option ``--shard`` of `upperson-rt index`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upperson_rt.cli.output import print_note
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.files import IndexReport
from upperson_rt.printable import count_of
from upperson_shards.indexing import choose_files, index_shard, record_of
from upperson_shards.records import Shard, ShardRecord


class ShardPart:
    """The part ``--shard`` of `upperson-rt index`."""

    def __init__(self, shard: Shard, location: str) -> None:
        self._shard, self._record = shard, record_of(location)

    def choose(self, paths: Iterable[Path], others: Counter[str]) -> list[Path]:
        """Return the pictures of the shard, and say how many they are."""
        self._chosen = choose_files(paths, self._shard, others)
        whole = count_of(self._chosen.whole.count, "picture")
        print_note(f"shard {self._shard}: {self._chosen.own.count} of {whole}")
        return self._chosen.files

    def index(self, encoder: Encoder, gallery: Gallery, **options: Any) -> IndexReport:
        """Index them and write the record."""
        return index_shard(encoder, gallery, self._chosen, self._record, **options)[0]


def open_part(text: str | None, location: str) -> ShardPart | None:
    """Return the shard of ``--shard``; without it refuse a gallery that is a shard."""
    if text is not None:
        return ShardPart(Shard.parse(text), location)
    file = record_of(location)
    if file is not None and file.exists():
        raise InputError(
            f"gallery {location} is shard {ShardRecord.read(file).shard}: index with  --shard, or "
            "into another gallery"
        )
    return None
