"""What the console can do: the one place that pages and API share, over retriever and gallery.

Whatever is asked, looked at, exported, marked or deleted is in the log before it is shown.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_console.accounts import Account
from upperson_console.current import CurrentGallery
from upperson_console.memory import Memory
from upperson_console.pictures import Pictures
from upperson_console.problems import ProblemError
from upperson_console.queries import QueryPictures, QueuedEncoder
from upperson_console.search import Search
from upperson_console.turns import Turns
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import CameraInfo, Filter, Gallery, Hit, Item, TrackSpan
from upperson_rt.query_log import QueryLog
from upperson_rt.retriever import find_alike
from upperson_rt.search.calibration import MatchLabel
from upperson_rt.search.query import QueryEncoder
from upperson_rt.search.service import SearchService

__all__ = ["Desk", "Person", "span_of"]

MOST_VIEWS = 500
_MOST_OTHERS = 24


@dataclass(frozen=True, kw_only=True)
class Person:
    """An item with all views of its track."""

    id: int
    item: Item
    views: list[tuple[int, Item]]
    """By time; the item alone where it has no track."""
    total: int
    """Views there are; `views` holds 500 at most."""


class Desk:
    """A bundle's encoder and a gallery, with the log and the memory. Safe for several threads."""

    def __init__(
        self,
        encoder: Encoder,
        open_gallery: Callable[[], Gallery],
        log: QueryLog,
        memory: Memory,
        background_KD: NDArray[np.float32],
    ) -> None:
        """Serve a gallery.

        Args:
            encoder: Of the bundle; its towers are loaded when they are first needed.
            open_gallery: Opens the gallery for the encoder, and again if it was replaced.
            log: Gets a line for whatever is done.
            memory: Keeps what belongs to the console alone.
            background_KD: (K, D) of pictures that are not in the gallery: a bundle's canaries.
        """
        self.encoder = encoder
        self.memory = memory
        self.turns = Turns()
        queued = QueuedEncoder(encoder, self.turns)
        self.query_pictures = QueryPictures(queued, memory)
        queries = QueryEncoder(queued)
        self.searches = 0
        """Searches that were answered."""
        self.current = CurrentGallery(
            open_gallery, lambda gallery: SearchService(queries, gallery, background_KD)
        )
        """The gallery, with what was learned of it."""
        self._log = log

    def close(self) -> None:
        """Close gallery, memory and log."""
        self.current.last.gallery.close()
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
        return self.current.now().gallery

    @property
    def log_file(self) -> Path:
        """The file of the query log."""
        return self._log.path

    @property
    def log_problem(self) -> str:
        """What to say of a break of the query log that is not acknowledged; empty without one."""
        return self._log.problem

    @property
    def pictures(self) -> Pictures:
        """Pictures of the gallery."""
        return self.current.last.pictures

    def cameras(self, account: Account) -> dict[str, CameraInfo]:
        """Return the cameras that somebody may see; as it was some seconds ago at most."""
        cameras = self.current.now().cameras()
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

    def elsewhere(self, account: Account, person: Person) -> list[tuple[Hit, MatchLabel]]:
        """Return the nearest tracks in other cameras, best first, with a match label.

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
        calibration = self.current.last.search.calibration
        labels = calibration.labels(1.0, [hit.score for hit in hits])
        self.note(account, "view", hits, {"elsewhere": str(person.id)}, Filter(camera=others))
        return list(zip(hits, labels, strict=True))

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
        self.note_search(account, search, hits, len(hits), {}, action="mark")
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
        self.current.last.has_changed()
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
        self.current.last.has_changed()
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
                gallery=self.current.last.gallery.location,
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

    def note_search(
        self,
        account: Account,
        search: Search,
        hits: Sequence[Hit],
        limit: int,
        more: Mapping[str, Any],
        action: str = "query",
    ) -> None:
        """Write a line about a search and what of it is about to be shown, see `note`."""
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

    def _views(self, id_: int, item: Item) -> list[tuple[int, Item]]:
        if item.track is None:
            return [(id_, item)]
        where = Filter(camera=item.camera, track=item.track)
        views = [one for one in self.gallery.items(where) if one.camera == item.camera]
        ids = self.gallery.ids([view.key for view in views])
        there = [(ids[view.key], view) for view in views if view.key in ids]
        return sorted(there, key=lambda pair: (pair[1].time or 0.0, pair[0]))


def span_of(views: Sequence[tuple[int, Item]]) -> TrackSpan:
    """Return the span of some views."""
    times = [item.time for _, item in views if item.time is not None]
    return TrackSpan(
        first_time=min(times, default=None), last_time=max(times, default=None), pictures=len(views)
    )
