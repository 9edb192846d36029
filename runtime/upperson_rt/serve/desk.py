"""What the console can do: the one place that pages and API share, over retriever and gallery.

Whatever is asked, looked at, exported, marked or deleted is in the log before it is shown.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import CameraInfo, Filter, Gallery, Hit, Item, TrackSpan
from upperson_rt.phrases import parse
from upperson_rt.phrases.evidence import Evidence
from upperson_rt.query_log import QueryLog
from upperson_rt.retriever import find_alike, search_without
from upperson_rt.serve.accounts import Account
from upperson_rt.serve.marks import refined
from upperson_rt.serve.memory import AskedPicture, Memory
from upperson_rt.serve.pictures import Pictures, as_jpeg, read_upload
from upperson_rt.serve.problems import ProblemError
from upperson_rt.serve.scale import Scale, Word
from upperson_rt.serve.search import Page, Search, page_of
from upperson_rt.serve.turns import Turns

__all__ = ["Answer", "Desk", "Person", "span_of"]

_KEPT_SENTENCES = 2000
_CAMERAS_FOR_S = 5.0
_LOOK_FOR_CHANGES_S = 1.0
MOST_VIEWS = 500
_MOST_OTHERS = 24
_COUNTED = 100_000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A page of a search, and what there is to say about it."""

    page: Page
    matches: list[Word]
    """A word for each hit, see `Scale`."""
    total: int | None
    """Items that pass the filter; None where counting them would take longer than the search."""
    is_cut: bool
    """Whether the end of the sentence was cut off."""
    unfamiliar: list[str]
    """Words of the sentence that the model hardly can know."""
    unclear: bool
    """Whether the model tells nobody apart by this sentence."""
    lost: int
    """Marks on items that are not there any more."""
    denied: list[str]
    """What the sentence does not want: pictures lose for what speaks for it."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """An item with all views of its track."""

    id: int
    item: Item
    views: list[tuple[int, Item]]
    """By time; the item alone where it has no track."""
    total: int
    """Views there are; `views` holds 500 at most."""


@dataclass
class _Opened:
    """A gallery, and what was learned of it."""

    gallery: Gallery
    pictures: Pictures
    identity: tuple[int, int] | None
    cameras: tuple[float, dict[str, CameraInfo]] = (float("-inf"), {})
    lock: threading.Lock = field(default_factory=threading.Lock)


class Desk:
    """A bundle's encoder and a gallery, with the log and the memory. Safe for several threads."""

    def __init__(
        self,
        encoder: Encoder,
        open_gallery: Callable[[], Gallery],
        log: QueryLog,
        memory: Memory,
    ) -> None:
        """Serve a gallery.

        Args:
            encoder: Of the bundle; its towers are loaded when they are first needed.
            open_gallery: Opens the gallery for the encoder, and again if it was replaced.
            log: Gets a line for whatever is done.
            memory: Keeps what belongs to the console alone.
        """
        self.encoder = encoder
        self.memory = memory
        self.turns = Turns()
        self.scale = Scale()
        self._evidence = Evidence(encoder.encode_texts)
        self.searches = 0
        """Searches that were answered."""
        self._open_gallery = open_gallery
        self._log = log
        self._sentences: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._opened = self._open()

    def close(self) -> None:
        """Close gallery, memory and log."""
        self._opened.gallery.close()
        self.memory.close()
        self._log.close()

    # What is there.

    @property
    def gallery(self) -> Gallery:
        """The gallery that lies at the location now.

        Raises:
            IntegrityError: One of another model was put there.
            InputError: It is gone.
        """
        return self._current().gallery

    @property
    def log_file(self) -> Path:
        """The file of the query log."""
        return self._log.path

    @property
    def pictures(self) -> Pictures:
        """Pictures of the gallery."""
        return self._opened.pictures

    def cameras(self, account: Account) -> dict[str, CameraInfo]:
        """Return the cameras that somebody may see; as it was some seconds ago at most."""
        opened = self._current()
        with opened.lock:
            now = time.monotonic()
            if now - opened.cameras[0] > _CAMERAS_FOR_S:
                opened.cameras = now, opened.gallery.by_camera()
            cameras = opened.cameras[1]
        return {name: info for name, info in cameras.items() if account.sees(name)}

    def count(self, account: Account, where: Filter) -> int:
        """Return how many items pass that somebody may see."""
        visible = account.visible(where)
        return 0 if visible is None else self.gallery.count(visible)

    def item(self, account: Account, id_: int) -> tuple[Item, NDArray[np.float32]]:
        """Return an item and its (D,) vector.

        Raises:
            ProblemError: There is none, or none that somebody may see.
        """
        found = self.gallery.get([id_]).get(id_)
        if found is None or not account.sees(found[0].camera):
            raise ProblemError(404, f"there is no picture {id_}; it may have been deleted")
        return found

    def person(self, account: Account, id_: int) -> Person:
        """Return an item with the views of its track, and note that somebody looked.

        Raises:
            ProblemError: There is no such item.
        """
        item, _ = self.item(account, id_)
        views = self._views(id_, item)
        hits = [Hit(id=one, score=0.0, item=view) for one, view in views]
        self.note(account, "view", hits[:MOST_VIEWS], {"picture": str(id_)})
        return Person(id=id_, item=item, views=views[:MOST_VIEWS], total=len(views))

    def track(self, account: Account, camera: str | None, track: str) -> Person:
        """Return the views of a track, see `person`.

        Raises:
            ProblemError: There is no such track.
        """
        where = account.visible(Filter(camera=camera, track=track))
        first = None if where is None else next(self.gallery.items(where), None)
        if first is None or first.camera != camera:
            raise ProblemError(404, "there is no such track; it may have been deleted")
        return self.person(account, self.gallery.ids([first.key])[first.key])

    def track_ids(self, account: Account, camera: str | None, track: str) -> list[int]:
        """Return the ids of all views of a track, as many as there are.

        Raises:
            ProblemError: There is no such track.
        """
        where = account.visible(Filter(camera=camera, track=track))
        items = [] if where is None else [*self.gallery.items(where)]
        ids = self.gallery.ids([item.key for item in items if item.camera == camera])
        if not ids:
            raise ProblemError(404, "there is no such track; it may have been deleted")
        return [*ids.values()]

    def elsewhere(self, account: Account, person: Person) -> list[tuple[Hit, Word]]:
        """Return the nearest tracks in other cameras, best first, with a word for the match.

        Looks are no identity: the nearest are shown, whoever they are; the log has their ids.

        Raises:
            ProblemError: Nothing can be logged.
        """
        others = [name for name in self.cameras(account) if name != person.item.camera]
        if not others:
            return []
        found = self.gallery.get([id_ for id_, _ in person.views])
        if not found:
            return []
        mean_D = np.mean([vector for _, vector in found.values()], axis=0)
        mean_D /= np.linalg.norm(mean_D)
        (hits,) = self.gallery.search(
            mean_D[None].astype(np.float32), _MOST_OTHERS, Filter(camera=others), by_track=True
        )
        words = self.scale.words(mean_D, [hit.score for hit in hits], self._opened.gallery)
        self.note(account, "view", hits, {"elsewhere": str(person.id)}, Filter(camera=others))
        return list(zip(hits, words, strict=True))

    # What is asked.

    def search(
        self, account: Account, search: Search, limit: int, cursor: str | None = None
    ) -> Answer:
        """Answer a search, and note who asked.

        Raises:
            UsageError: Nothing is asked, or the filter cannot hold.
            InputError: The sentence cannot be used.
            ProblemError: The picture or the cursor is none, or nothing can be logged.
            BusyError: Too many wait for the encoder.
        """
        if search.is_empty:
            raise UsageError("describe the person in a few words, or give a picture")
        query_D, is_cut, lost = self._question(account, search)
        where = account.visible(search.filter_at(time.time()))
        gallery = self.gallery

        def best(count: int) -> list[Hit]:
            if where is None:
                return []
            return self._hits(gallery, search, query_D, count, where)

        page = page_of(search, limit, cursor, best)
        unclear = bool(search.sentence.strip()) and not search.has_both and self._unclear(query_D)
        words = self.scale.words(query_D, [hit.score for hit in page.hits], gallery)
        if unclear:  # Somebody stands out by chance; no word shall say that it is a match.
            words = [""] * len(words)
        self._note_search(account, search, page.hits, limit, {"from": page.first})
        self.searches += 1
        return Answer(
            page=page,
            matches=words,
            total=0 if where is None else _counted(gallery, where),
            is_cut=is_cut,
            unfamiliar=self.encoder.tokenizer.unfamiliar(search.sentence),
            unclear=unclear,
            lost=lost,
            denied=[phrase.text for phrase in parse(search.sentence).denied],
        )

    def best(self, account: Account, search: Search, count: int) -> list[Hit]:
        """Return the best hits of a search for its timeline, and note who asked.

        Raises:
            ProblemError: The picture is none, or nothing can be logged.
        """
        query_D, _, _ = self._question(account, search)
        where = account.visible(search.filter_at(time.time()))
        hits: list[Hit] = []
        if where is not None:
            hits = self._hits(self.gallery, search, query_D, count, where)
        self._note_search(account, search, hits, count, {}, action="timeline")
        return hits

    def ask_with(self, content: bytes) -> AskedPicture:
        """Embed a picture that was sent, and keep it to ask with.

        Raises:
            InputError: It is no picture.
            BusyError: Too many wait for the encoder.
        """
        with self.turns.turn():
            upload = read_upload(content)
            vector_D = self.encoder.encode_images([upload.pixels])[0]
        jpeg, size = as_jpeg(upload.pixels, "thumb")
        picture = AskedPicture(
            id=upload.sha256[:32], sha256=upload.sha256, vector_D=vector_D, jpeg=jpeg, size=size
        )
        self.memory.keep_picture(picture, self.encoder.fingerprint)
        return picture

    def asked_picture(self, id_: str) -> AskedPicture:
        """Return a picture that was given to ask with.

        Raises:
            ProblemError: There is none.
        """
        picture = self.memory.picture(id_, self.encoder.fingerprint)
        if picture is None:
            raise ProblemError(
                404, "the picture of this search is not kept any more: give it again"
            )
        return picture

    def embed(self, inputs: Sequence[str | bytes]) -> NDArray[np.float32]:
        """Return (N, D) embeddings of sentences and files of pictures, mixed.

        Raises:
            InputError: One cannot be used.
            BusyError: Too many wait for the encoder.
        """
        embeds_ND = np.empty((len(inputs), self.encoder.embed_dim), np.float32)
        texts = [place for place, one in enumerate(inputs) if isinstance(one, str)]
        with self.turns.turn():
            pictures = {
                place: read_upload(one).pixels
                for place, one in enumerate(inputs)
                if isinstance(one, bytes)
            }
            if texts:
                embeds_ND[texts] = self.encoder.encode_texts([str(inputs[n]) for n in texts])
            if pictures:
                embeds_ND[[*pictures]] = self.encoder.encode_images([*pictures.values()])
        return embeds_ND

    # What is done.

    def mark(self, account: Account, search: Search) -> None:
        """Keep the marks that a search carries.

        Raises:
            ProblemError: An item is none that somebody may see.
        """
        found = self.gallery.get([*search.yes, *search.no])
        if any(not account.sees(item.camera) for item, _ in found.values()):
            raise ProblemError(404, "there is no such picture")
        hits = [Hit(id=id_, score=0.0, item=item) for id_, (item, _) in found.items()]
        self._note_search(account, search, hits, len(hits), {}, action="mark")
        self.memory.set_marks(account.name, search.question, [*search.yes], [*search.no])

    def alike(self, account: Account, id_: int, min_score: float) -> list[Hit]:
        """Return every item that looks like one, best first, compared exactly; note who asked.

        Raises:
            UsageError: ``min_score`` is out of range.
            ProblemError: There is no such item, or nothing can be logged.
        """
        _, vector_D = self.item(account, id_)
        where = account.visible(Filter())
        hits = [] if where is None else find_alike(self.gallery, vector_D, min_score, where)
        self.note(account, "alike", hits, {"like": str(id_), "min_score": min_score})
        return hits

    def delete(
        self, account: Account, ids: Sequence[int], reason: str, details: Mapping[str, Any]
    ) -> int:
        """Delete items and their pictures, with a reason; return how many were there.

        Raises:
            UsageError: There is no reason.
            InputError: The gallery cannot be written to.
            ProblemError: Nothing can be logged.
        """
        reason = reason.strip()
        if not reason:
            raise UsageError("a deletion needs a reason: say in a few words why")
        if len(reason) > 500:
            raise UsageError("the reason may have 500 letters at most")
        found = self.gallery.get(ids)
        hits = [
            Hit(id=one, score=0.0, item=item)
            for one, (item, _) in found.items()
            if account.sees(item.camera)
        ]
        self.note(account, "delete", hits, {"reason": reason, **details})
        deleted = self.gallery.delete([hit.item.key for hit in hits])
        self.pictures.forget()
        self._forget_cameras()
        return deleted

    def prune(
        self,
        account: Account,
        older_than: float | None,
        keep_newest: int | None,
        camera: str | None,
        reason: str,
        dry_run: bool,
    ) -> int:
        """Delete old items as `Gallery.prune` does; return how many went, or would go."""
        gallery = self.gallery
        if dry_run:
            return gallery.count_prunable(older_than, keep_newest, camera)
        if not reason.strip():
            raise UsageError("a deletion needs a reason: say in a few words why")
        details = {"reason": reason.strip(), "older_than": older_than, "keep": keep_newest}
        self.note(account, "prune", [], details, Filter(camera=camera))
        pruned = gallery.prune(older_than, keep_newest, camera)
        self.pictures.forget()
        self._forget_cameras()
        return pruned

    def note(
        self,
        account: Account,
        action: str,
        hits: Sequence[Hit],
        details: Mapping[str, Any],
        where: Filter | None = None,
        sentence: str = "",
        k: int | None = None,
        by_track: bool = False,
    ) -> None:
        """Write a line into the log.

        Raises:
            ProblemError: It cannot be written: what was asked is not done.
        """
        try:
            self._log.write(
                sentence,
                hits,
                k=len(hits) if k is None else k,
                where=where,
                by_track=by_track,
                gallery=self._opened.gallery.location,
                action=action,
                user=account.name,
                details=details,
            )
        except InputError as error:
            raise ProblemError(507, str(error)) from error

    def note_items(
        self,
        account: Account,
        action: str,
        items: Sequence[tuple[int, Item]],
        details: Mapping[str, Any],
    ) -> None:
        """Write a line about items, see `note`."""
        self.note(account, action, [Hit(id=i, score=0.0, item=item) for i, item in items], details)

    def _note_search(
        self,
        account: Account,
        search: Search,
        hits: Sequence[Hit],
        limit: int,
        more: Mapping[str, Any],
        action: str = "query",
    ) -> None:
        given = {
            "picture": search.picture,
            "like": search.like,
            "share": search.share if search.has_both else None,
            "yes": list(search.yes),
            "no": list(search.no),
        }
        told = {name: value for name, value in given.items() if value not in (None, [])}
        details = {"order": search.order, **more, **told}
        where = search.filter_at(time.time())
        self.note(account, action, hits, details, where, search.sentence, limit, search.by_track)

    # What that takes.

    def _question(self, account: Account, search: Search) -> tuple[NDArray[np.float32], bool, int]:
        """Return the (D,) query, whether its sentence was cut, and how many marks are lost."""
        parts: list[NDArray[np.float32]] = []
        is_cut = False
        if search.sentence.strip():
            vector_D, is_cut = self._of_sentence(search.sentence)
            parts.append((1 - search.share) * vector_D if search.has_both else vector_D)
        if search.picture is not None or search.like is not None:
            picture_D = (
                self.asked_picture(search.picture).vector_D
                if search.picture is not None
                else self.item(account, search.like or 0)[1]
            )
            parts.append(search.share * picture_D if search.has_both else picture_D)
        query_D = parts[0] if len(parts) == 1 else _unit(parts[0] + parts[1])
        marked = self.gallery.get([*search.yes, *search.no])
        seen = {id_: vector for id_, (item, vector) in marked.items() if account.sees(item.camera)}

        def vectors(ids: Sequence[int]) -> NDArray[np.float32]:
            # In one order, whoever marked what first: the same marks give the same bits.
            there = [seen[id_] for id_ in sorted(ids) if id_ in seen]
            return np.array(there, np.float32).reshape(-1, len(query_D))

        lost = sum(id_ not in seen for id_ in (*search.yes, *search.no))
        return refined(query_D, vectors(search.yes), vectors(search.no)), is_cut, lost

    def _of_sentence(self, sentence: str) -> tuple[NDArray[np.float32], bool]:
        is_cut = bool(self.encoder.tokenizer.encode([sentence]).truncated)
        with self._lock:
            if sentence in self._sentences:
                self._sentences.move_to_end(sentence)
                return self._sentences[sentence], is_cut
        with self.turns.turn():
            # What it denies is no part of what it asks for, as everywhere in the runtime.
            vector_D = self.encoder.encode_texts([parse(sentence).wanted])[0]
        with self._lock:
            self._sentences[sentence] = vector_D
            while len(self._sentences) > _KEPT_SENTENCES:
                self._sentences.popitem(last=False)
        return vector_D, is_cut

    def _hits(
        self, gallery: Gallery, search: Search, query_D: NDArray[np.float32], k: int, where: Filter
    ) -> list[Hit]:
        denied = parse(search.sentence).denied
        if not denied:
            return gallery.search(query_D[None], k, where, search.by_track)[0]
        with self.turns.turn():
            against = self._evidence
            return search_without(gallery, against, query_D, denied, k, where, search.by_track)

    def _unclear(self, query_D: NDArray[np.float32]) -> bool:
        if not self.scale.is_calibrated:
            with self.turns.turn():
                self.scale.calibrate(self.encoder.encode_texts)
        return self.scale.is_unclear(query_D, self._opened.gallery)

    def _views(self, id_: int, item: Item) -> list[tuple[int, Item]]:
        if item.track is None:
            return [(id_, item)]
        where = Filter(camera=item.camera, track=item.track)
        views = [one for one in self.gallery.items(where) if one.camera == item.camera]
        ids = self.gallery.ids([view.key for view in views])
        there = [(ids[view.key], view) for view in views if view.key in ids]
        return sorted(there, key=lambda pair: (pair[1].time or 0.0, pair[0]))

    def _forget_cameras(self) -> None:
        self._opened.cameras = float("-inf"), {}

    def _open(self) -> _Opened:
        gallery = self._open_gallery()
        return _Opened(gallery, Pictures(gallery.crops_dir), _identity(gallery.location))

    def _current(self) -> _Opened:
        """Return the gallery, opened again if another one lies at its place."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_FOR_CHANGES_S:
                return self._opened
            if _identity(self._opened.gallery.location) != self._opened.identity:
                # The one before is left open: searches of other threads may be in it.
                self._opened = self._open()
                self.scale.forget()
            self._looked = now
            return self._opened


def _counted(gallery: Gallery, where: Filter) -> int | None:
    """Return how many items pass: metadata stand in no index, every row would be read."""
    return None if where.attributes and gallery.count() > _COUNTED else gallery.count(where)


def span_of(views: Sequence[tuple[int, Item]]) -> TrackSpan:
    """Return the span of some views."""
    times = [item.time for _, item in views if item.time is not None]
    return TrackSpan(
        first_time=min(times, default=None), last_time=max(times, default=None), pictures=len(views)
    )


def _identity(location: str) -> tuple[int, int] | None:
    """Return what tells a gallery's database from another one at its place."""
    try:
        found = Path(location, "gallery.sqlite").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _unit(vector_D: NDArray[np.float32]) -> NDArray[np.float32]:
    length = float(np.linalg.norm(vector_D))
    if not length:
        raise IntegrityError("sentence and picture cancel each other out: move the slider")
    unit: NDArray[np.float32] = (vector_D / length).astype(np.float32)
    return unit
