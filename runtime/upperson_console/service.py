"""The console's use cases, which pages and API share, over a search service and a gallery.

Each search, view, export, mark and deletion is in the query log before its result is shown. Errors
are those of `problems`; what an account may not see is reported as missing.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_console.access_log import AccessLog
from upperson_console.accounts import BIN_USER, Account
from upperson_console.approvals import Approvals
from upperson_console.clip_blur import LONGEST_GAP_S
from upperson_console.current import CurrentGallery
from upperson_console.evidence_check import Seal
from upperson_console.limits import RequestQueue
from upperson_console.models import item_fields
from upperson_console.oversight import Oversight
from upperson_console.pictures import GalleryPictures, QueryPictures, QueuedEncoder
from upperson_console.problems import ProblemError, missing, withheld
from upperson_console.search import MOST_MARKS, Search
from upperson_console.user_state import UserState
from upperson_console.view_log import USUAL_QUOTA, Part, QuotaExceededError, ViewLog
from upperson_log.query_log import QueryLog
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import CameraInfo, Filter, Gallery, Hit, Item, TrackSpan
from upperson_rt.gallery.clips import ClipFile
from upperson_rt.gallery.snapshots import Snapshot, picture_path, read_snapshots, snapshot_folder
from upperson_rt.gallery.sqlite.bin import Bin, BinEntry, empty_bin
from upperson_rt.printable import visible_text
from upperson_rt.retriever import find_alike
from upperson_rt.search.query import QueryEncoder, SearchRequest
from upperson_rt.search.service import SearchResult, SearchService

_Details: TypeAlias = Mapping[str, Any]
_NO_SEARCH = Search()
_MOST_VIEWS = 500
_MOST_OTHERS = 24
_LONGEST_REASON = 500
_QUERY_PICTURES_S = 30 * 86_400.0
BLURRING_S = 30.0
"""For the clips of one request."""


@dataclass(frozen=True, kw_only=True)
class TrackViews:
    """An item with all views of its track."""

    id: int
    item: Item
    views: list[tuple[int, Item]]
    """By time; the item alone if it has no track."""
    total: int
    """Number of views; `views` holds 500 at most."""


class ConsoleService:
    """An encoder and a gallery, with query log and user state. Safe for several threads."""

    def __init__(
        self,
        encoder: Encoder,
        open_gallery: Callable[[], Gallery],
        log: QueryLog,
        user_state: UserState,
        background_KD: NDArray[np.float32],
        seal: Seal | None = None,
        blur: bool = False,
        view_quota: int = USUAL_QUOTA,
        oversight: Oversight | None = None,
        bin_s: float = 0.0,
    ) -> None:
        """Serve a gallery, which is opened again after it was replaced.

        ``background_KD`` are (K, D) embeddings of the background set: a bundle's golden samples.
        With ``blur``, others in frames and clips are shown for a reason, see `shows_all`.
        ``view_quota`` is that of `ViewLog`. What is deleted can be restored for ``bin_s`` seconds.
        """
        self.bin_s = bin_s
        self.seal = seal or Seal()
        self.blur = blur
        self.encoder = encoder
        self.user_state = user_state
        self.queue = RequestQueue()
        self.log = log
        self.access_log = AccessLog(log)
        self.oversight = oversight or Oversight()
        self.approvals = Approvals(user_state, self.oversight, self.note)
        self.queued = QueuedEncoder(encoder, self.queue)
        """The encoder, whose calls wait in the queue."""
        self.query_pictures = QueryPictures(self.queued, user_state)
        queries = QueryEncoder(self.queued)
        self.searches = 0
        """Number of searches."""
        self._deleting = threading.Lock()
        self.view_log = ViewLog(view_quota)
        self.ids = user_state.id_permutation()
        """From row ids to those of `gallery` and back."""
        self.current = CurrentGallery(
            open_gallery, self.ids, lambda gallery: SearchService(queries, gallery, background_KD)
        )

    def close(self) -> None:
        """Close gallery, user state and log."""
        self.current.last.gallery.close()
        self.user_state.close()
        self.log.close()

    def check_ready(self) -> None:
        """Raise UppersonError if searches cannot be answered, or not be logged."""
        self.gallery.count()
        self.log.check()

    # Reads.

    @property
    def gallery(self) -> Gallery:
        """The gallery at its location, with opaque ids."""
        return self.current.now().gallery

    @property
    def pictures(self) -> GalleryPictures:
        """Pictures of the gallery."""
        return self.current.last.pictures

    def cameras(self, account: Account) -> dict[str, CameraInfo]:
        """Return the cameras that an account may see, some seconds old at most."""
        cameras = self.current.now().cameras()
        return {name: info for name, info in cameras.items() if account.sees(name)}

    def snapshots(self, account: Account) -> dict[str, Snapshot]:
        """Return the newest frames that are kept, by the cameras that an account may see."""
        folder = snapshot_folder(self.gallery)
        found = {} if folder is None else read_snapshots(folder)
        return {name: one for name, one in found.items() if account.sees(name)}

    def snapshot(self, account: Account, camera: str) -> tuple[Snapshot, Path]:
        """Return the newest frame of a camera and its file."""
        found, folder = self.snapshots(account).get(camera), snapshot_folder(self.gallery)
        if found is None or folder is None:
            raise missing("no picture of this camera is kept now", "snapshot_not_found")
        return found, picture_path(folder, camera)

    def count(self, account: Account, where: Filter) -> int:
        """Count the items that pass a filter and that an account may see."""
        visible = account.visible(where)
        return 0 if visible is None else self.gallery.count(visible)

    def item(self, account: Account, id_: int) -> tuple[Item, NDArray[np.float32]]:
        """Return an item and its (D,) vector."""
        found = self.gallery.get([id_]).get(id_)
        if found is None or not account.sees(found[0].camera):
            raise missing(f"there is no picture {id_}; it may have been deleted")
        return found

    def fields(self, account: Account, id_: int, item: Item) -> dict[str, Any]:
        """Return the fields of an `ItemOut`."""
        return item_fields(account, id_, item, self.pictures.file(item) is not None)

    def person(self, account: Account, id_: int, search: Search = _NO_SEARCH) -> TrackViews:
        """Return an item with the views of its track, and log the view.

        The line has the sentence and the filter of a ``search`` that the item is compared with.
        """
        item, _ = self.item(account, id_)
        views = [(id_, item)]
        if item.track is not None:
            views = self.views(account, item.camera, item.track)
            views.sort(key=lambda view: (view[1].time or 0.0, view[0]))
        shown = views[:_MOST_VIEWS]
        details = {"picture": str(id_)}
        if search.like is not None:
            details["like"] = str(search.like)
        where = None if search.is_empty else search.filter_at(time.time())
        self.note(account, "view", _unscored(shown), details, where, search.sentence)
        return TrackViews(id=id_, item=item, views=shown, total=len(views))

    def track(self, account: Account, camera: str | None, track: str) -> TrackViews:
        """Return the views of a track, see `person`."""
        where = account.visible(Filter(camera=camera, track=track))
        first = None if where is None else next(self.gallery.items(where), None)
        if first is None or first.camera != camera:
            raise _no_track()
        return self.person(account, self.gallery.ids([first.key])[first.key])

    def track_ids(self, account: Account, camera: str | None, track: str) -> list[int]:
        """Return the ids of all views of a track."""
        ids = [id_ for id_, _ in self.views(account, camera, track)]
        if not ids:
            raise _no_track()
        return ids

    def views(
        self, account: Account, camera: str | None, track: str, where: Filter | None = None
    ) -> list[tuple[int, Item]]:
        """Return the visible items of a track that pass a filter.

        Without a camera, those that have none.
        """
        of_track = replace(where or Filter(), camera=camera, track=track)
        visible = account.visible(of_track)
        found = [] if visible is None else [*self.gallery.items(visible)]
        items = [item for item in found if item.camera == camera]
        ids = self.gallery.ids([item.key for item in items])
        return [(ids[item.key], item) for item in items if item.key in ids]

    def elsewhere(self, account: Account, person: TrackViews) -> SearchResult | None:
        """Return the nearest tracks in other cameras, calibrated, and log them; None without any.

        They look most alike; they need not show the same person.
        """
        others = [name for name in self.cameras(account) if name != person.item.camera]
        if not others:
            return None
        found = self.gallery.get([id_ for id_, _ in person.views])
        if not found:  # All were deleted meanwhile.
            return None
        mean_D = np.mean([vector for _, vector in found.values()], axis=0)
        mean_D /= np.linalg.norm(mean_D)
        request = SearchRequest(
            picture=mean_D.astype(np.float32),
            k=_MOST_OTHERS,
            where=Filter(camera=others),
            by_track=True,
            calibrate=True,
        )
        found_there = self.current.last.search.search(request)
        details = {"elsewhere": str(person.id)}
        self.note(account, "view", found_there.hits, details, Filter(camera=others))
        return found_there

    def shows_all(self, account: Account, reason: str) -> bool:
        """Return whether frames and clips are shown as they are: with blur only for a reason.

        The caller logs the reason (action ``unblur``). Raises ProblemError for a viewer with one.
        """
        if not self.blur or not visible_text(reason):
            return not self.blur
        if not account.may("operator"):
            raise withheld("only operators and administrators may see what is blurred")
        _require_reason(reason)
        return True

    def blurred_clip(
        self, account: Account, item: Item, clip: ClipFile, until: float | None = None
    ) -> bytes:
        """Return an item's clip in which it alone can be recognised, see `clip_blur`.

        It is given up at ``until`` on `time.monotonic`, by default after 30 s.
        """
        until = time.monotonic() + BLURRING_S if until is None else until
        views = [(0, item)]
        if item.track is not None and item.camera is not None:
            since, last = clip.begin - LONGEST_GAP_S, clip.end + LONGEST_GAP_S
            during = Filter(since=since, until=last)
            views += self.views(account, item.camera, item.track, during)
        known = {(one.time, one.box) for _, one in views if one.time is not None and one.box}
        return self.pictures.blurred_clip(clip, sorted(known), until)

    # Actions.

    def mark(
        self, account: Account, search: Search, changes: Mapping[int, bool | None]
    ) -> dict[int, bool]:
        """Set or remove (None) marks of a search; return all that are kept of it.

        A missing item loses its mark alone, and a hidden one is as missing.
        """
        search.require_query()
        items = dict(self.seen(account, [*changes]))
        if any(right is not None and id_ not in items for id_, right in changes.items()):
            raise missing("there is no such picture; it may have been deleted")
        hits = _unscored(items.items())
        marks = tuple((id_, right) for id_, right in changes.items() if right is not None)
        removed = [id_ for id_, right in changes.items() if right is None]
        more = {"removed": removed} if removed else {}
        changed = replace(search, marks=marks[:MOST_MARKS])
        self.note_search(account, changed, hits, len(hits), more, action="mark", shown=None)
        self.user_state.change_marks(account.name, self._marks_key(search), changes)
        return self.marks(account, search)

    def marks(self, account: Account, search: Search) -> dict[int, bool]:
        """Return the marked items of a search, and whether as right, in the order of marking."""
        return self.user_state.marks(account.name, self._marks_key(search))

    def _marks_key(self, search: Search) -> str:
        """Return the key of a search's marks: by row id, as releases before opaque ids made it."""
        like = None if search.like is None else self.ids.row(search.like)
        return replace(search, like=like).marks_key

    def alike(
        self, account: Account, id_: int, min_score: float, shown: Part | None = None
    ) -> list[Hit]:
        """Return and log all items that score at least ``min_score`` against one, best first."""
        _, vector_D = self.item(account, id_)
        where = account.visible(Filter())
        hits = [] if where is None else find_alike(self.gallery, vector_D, min_score, where)
        details = {"like": str(id_), "min_score": min_score}
        self.note(account, "alike", hits, details, shown=shown)
        return hits

    def delete(
        self,
        account: Account,
        ids: Sequence[int],
        reason: str,
        details: _Details,
        permanent: bool = False,
        from_bin: bool = False,
    ) -> int:
        """Move items and their pictures into the bin, with a reason; return how many there were.

        Without a bin, or if ``permanent``, they are deleted; ``from_bin`` deletes what is there.
        Deletions of the same items take turns: the log names each one once.
        """
        reason = _require_reason(reason)
        arguments: dict[str, Any] = {"ids": [*ids], "reason": reason, "details": details}
        flags = {"permanent": permanent, "from_bin": from_bin}
        arguments |= {name: True for name, is_set in flags.items() if is_set}
        if from_bin:  # A request ends with the deletion that it was made for.
            last = max((entry.deleted for _, entry in self.binned(ids)), default=None)
            arguments["details"] = details = {**details, "deleted": last}

        def chosen() -> list[tuple[int, Item]]:
            if not from_bin:
                return self.seen(account, ids)
            return [(id_, entry.item) for id_, entry in self.binned(ids)]

        self.approvals.require(account, "delete", len(chosen()), **arguments)
        with self._deleting:
            items, own_bin = chosen(), self.bin
            if ids and not items:
                raise missing("none of these pictures is there; they may have been deleted")
            is_final = permanent or from_bin or own_bin is None
            action = "delete" if is_final else "bin"
            self.note_items(account, action, items, {"reason": reason, **details}, None)
            keys = [item.key for _, item in items]
            if own_bin is not None and from_bin:
                deleted = own_bin.delete([self.ids.row(id_) for id_, _ in items])
            elif own_bin is not None and not permanent:
                deleted = own_bin.add(keys, account.name, reason)
            else:
                deleted = self.gallery.delete(keys)
            self.current.last.has_changed()
        return deleted

    @property
    def bin(self) -> Bin | None:
        """The bin, which has row ids; None if deletions are final."""
        found: Bin | None = getattr(self.gallery, "bin", None)
        return found if self.bin_s else None

    def binned(
        self, ids: Sequence[int] | None = None, start: int = 0, most: int = -1
    ) -> list[tuple[int, BinEntry]]:
        """Return what is in the bin by id, see `Bin.entries`."""
        rows = None if ids is None else [self.ids.row(id_) for id_ in ids if 0 <= id_ < 1 << 63]
        found = [] if self.bin is None else self.bin.entries(rows, start=start, most=most)
        return [(self.ids.opaque(entry.id), entry) for entry in found]

    def restore(self, account: Account, ids: Sequence[int]) -> int:
        """Move items from the bin back into the gallery; return how many there were.

        One person may. The log has who deleted them, when and why.
        """
        with self._deleting:
            found, own_bin = self.binned(ids), self.bin
            if own_bin is None or not found:
                raise missing("none of these pictures is in the bin; restored or deleted since")
            items = [(id_, entry.item) for id_, entry in found]
            deletions: dict[tuple[str, float, str], list[str]] = {}
            for id_, one in found:
                deletions.setdefault((one.user, one.deleted, one.reason), []).append(str(id_))
            names = ("user", "deleted", "reason", "ids")
            of = [dict(zip(names, (*one, own), strict=True)) for one, own in deletions.items()]
            self.note_items(account, "restore", items, {"deletions": of}, None)
            restored = own_bin.restore([entry.id for _, entry in found])
            self.current.last.has_changed()
        return restored

    def empty_bin(self) -> None:
        """Log and delete permanently what was in the bin for its retention, if it has one."""
        gallery, before = self.gallery, time.time() - self.bin_s
        if (own_bin := getattr(gallery, "bin", None)) is None or gallery.is_read_only:
            return
        with self._deleting:
            own_bin.tidy()
            found = own_bin.entries(before=before) if self.bin_s else []
            if old := [(self.ids.opaque(one.id), one.item) for one in found]:
                server = Account(name=BIN_USER, role="admin")
                details = {"reason": "the retention of the bin", "deleted_before": before}
                self.note_items(server, "delete", old, details, None)
                empty_bin(gallery, before)
                self.current.last.has_changed()

    def forget_query_pictures(self) -> None:
        """Delete query pictures that were last sent more than 30 days ago."""
        self.user_state.forget_pictures(time.time() - _QUERY_PICTURES_S)

    def seen(self, account: Account, ids: Sequence[int]) -> list[tuple[int, Item]]:
        """Return those items of some ids that an account may see."""
        found = [(id_, item) for id_, (item, _) in self.gallery.get(ids).items()]
        return [(id_, item) for id_, item in found if account.sees(item.camera)]

    def prune(
        self,
        account: Account,
        older_than: float | None,
        keep_newest: int | None,
        camera: str | None,
        reason: str,
        dry_run: bool,
    ) -> int:
        """Delete old items, see `Gallery.prune`; return how many were or would be deleted."""
        gallery = self.gallery
        if dry_run:
            return gallery.count_prunable(older_than, keep_newest, camera)
        reason = _require_reason(reason)
        arguments = {"older_than": older_than, "keep_newest": keep_newest, "camera": camera}
        if "delete" in self.oversight.two_persons:
            count = gallery.count_prunable(older_than, keep_newest, camera)
            self.approvals.require(account, "delete", count, **arguments, reason=reason)
        details = {"reason": reason, "older_than": older_than, "keep": keep_newest}
        self.note(account, "prune", [], details, Filter(camera=camera))
        pruned = gallery.prune(older_than, keep_newest, camera)
        self.current.last.has_changed()
        return pruned

    def note(
        self,
        account: Account,
        action: str,
        hits: Sequence[Hit],
        details: _Details,
        where: Filter | None = None,
        sentence: str = "",
        k: int | None = None,
        by_track: bool = False,
        shown: Part | None = "picture",
    ) -> None:
        """Write a line of the query log; ``shown`` is what is shown of the hits, if anything.

        Raises:
            ProblemError: The log cannot be written, or the account's quota is exceeded.
        """
        context = {"model": self.encoder.fingerprint, **asdict(account.context)}
        context = {name: value for name, value in context.items() if value}
        place = self.current.last.gallery.location

        def write(action: str, hits: Sequence[Hit], details: _Details) -> None:
            with _log_errors():
                self.log.write(
                    sentence,
                    hits,
                    k=len(hits) if k is None else k,
                    where=where,
                    by_track=by_track,
                    gallery=place if "://" in place else os.path.abspath(place),
                    action=action,
                    user=account.name,
                    details=details,
                    context=context,
                )

        if shown is None:
            return write(action, hits, details)
        try:
            with self.view_log.logging(account.name, shown, [hit.id for hit in hits]):
                write(action, hits, details)
        except QuotaExceededError as error:
            if error.is_first:
                write("quota", [], {"refused": action, "quota": self.view_log.quota})
            raise

    def last_chain(self) -> str:
        """Return the last chain of the query log, see `QueryLog.last_chain`."""
        with _log_errors():
            return self.log.last_chain()

    def require_allowed(self, account: Account, sentence: str) -> None:
        """Refuse and log a sentence that may not be asked, see `Oversight`."""
        try:
            self.oversight.require_allowed(sentence)
        except ProblemError as refusal:
            self.note(account, "refused", [], refusal.fields, sentence=sentence)
            raise

    def note_items(
        self,
        account: Account,
        action: str,
        items: Iterable[tuple[int, Item]],
        details: _Details,
        shown: Part | None = "picture",
    ) -> None:
        """Log an action on items, see `note`."""
        self.note(account, action, _unscored(items), details, shown=shown)

    def note_view(self, account: Account, id_: int, item: Item, part: Part) -> None:
        """Log a view of an item, unless a line of the last hour covers it, see `note`."""
        if self.view_log.uncovered(account.name, part, [id_]):
            part = "picture" if part == "thumbnail" else part
            self.note_items(account, "view", [(id_, item)], {part: str(id_)}, part)

    def note_live(self, account: Account, items: Sequence[tuple[int, Item]]) -> None:
        """Log those thumbnails of the live page that no line of the last hour covers."""
        new = {*self.view_log.uncovered(account.name, "thumbnail", [id_ for id_, _ in items])}
        if new:
            fresh = [(id_, item) for id_, item in items if id_ in new]
            self.note_items(account, "view", fresh, {"page": "live"}, "thumbnail")

    def note_snapshot(self, account: Account, snapshot: Snapshot) -> None:
        """Log a view of the newest frame of a camera, unless a line of the last hour covers it."""
        frame = [(snapshot.camera, snapshot.time)]
        if self.view_log.uncovered(account.name, "snapshot", frame):
            where = Filter(camera=snapshot.camera)
            with self.view_log.logging(account.name, "snapshot", frame):
                self.note(account, "view", [], {"snapshot": snapshot.camera}, where, shown=None)

    def note_clip(self, account: Account, id_: int, item: Item, reason: str) -> None:
        """Log a view of an item's clip once an hour, unblurred once for each reason."""
        given = [("clip", id_, reason)]
        if not self.blur or not visible_text(reason):
            self.note_view(account, id_, item, "clip")
        elif self.view_log.uncovered(account.name, "snapshot", given):
            details = {"clip": str(id_), "reason": reason}
            self.note_items(account, "unblur", [(id_, item)], details, "clip")
            with self.view_log.logging(account.name, "snapshot", given):
                pass

    def note_search(
        self,
        account: Account,
        search: Search,
        hits: Sequence[Hit],
        limit: int,
        more: _Details,
        action: str = "query",
        shown: Part | None = "picture",
    ) -> None:
        """Log a search and the hits that are about to be shown, see `note`."""
        given = {
            "picture": search.picture,
            "like": search.like,
            "share": search.share if search.has_both else None,
            "yes": list(search.yes),
            "no": list(search.no),
        }
        used = {name: value for name, value in given.items() if value not in (None, [])}
        details = {"order": search.order, **more, **used}
        where = search.filter_at(time.time())
        self.note(
            account, action, hits, details, where, search.sentence, limit, search.by_track, shown
        )


@contextmanager
def _log_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        reason = getattr(error.__cause__, "strerror", None) or "its values"  # No path.
        what = f"the query log cannot be written ({reason}): nothing is done without it"
        raise ProblemError(507, what, code="log_not_writable") from error


def _unscored(items: Iterable[tuple[int, Item]]) -> list[Hit]:
    return [Hit(id=id_, score=0.0, item=item) for id_, item in items]


def _no_track() -> ProblemError:
    return missing("there is no such track; it may have been deleted", "track_not_found")


def _require_reason(reason: str) -> str:
    reason = visible_text(reason)
    if not reason:
        raise UsageError("this needs a reason: say in a few words why", code="reason_missing")
    if len(reason) > _LONGEST_REASON:
        raise UsageError(
            f"the reason may have {_LONGEST_REASON} letters at most", code="reason_too_long"
        )
    return reason


def span_of(views: Sequence[tuple[int, Item]]) -> TrackSpan:
    """Return the time span of views."""
    times = [item.time for _, item in views if item.time is not None]
    first, last = min(times, default=None), max(times, default=None)
    return TrackSpan(first_time=first, last_time=last, pictures=len(views))
