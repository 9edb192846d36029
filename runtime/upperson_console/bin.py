"""The bin: its page, its routes of the API, and its retention."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, TypeAlias

from fastapi import APIRouter, Form, Query, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_console import models
from upperson_console.accounts import Access, Account
from upperson_console.api import PROBLEM, UNCACHED_HEADERS, file_of
from upperson_console.bounds import BoundedRoute
from upperson_console.models import Id
from upperson_console.pictures import Size
from upperson_console.problems import ProblemError, missing
from upperson_console.rendering import render
from upperson_console.search import read_id
from upperson_console.service import ConsoleService
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite.bin import BinEntry
from upperson_rt.printable import count_of, get_logger

_LOG = get_logger(__name__)
_EMPTIED_EVERY_S = 600.0
_MOST = 48
"""Pictures on a page."""
_Start: TypeAlias = Annotated[int, Query(ge=0, le=2**31)]


def require_no_loss(gallery: Gallery, bin_s: float) -> None:
    """Refuse to serve a gallery without its bin while that holds pictures.

    Raises:
        InputError: ``bin_s`` is 0 and the bin is not empty (``bin_not_empty``).
    """
    if bin_s or gallery.bin is None or gallery.is_read_only:
        return
    if entries := gallery.bin.entries():
        age = f"{max(0, math.ceil((time.time() - entries[-1].deleted) / 86400)) + 7}d"
        raise InputError(
            f"the bin of {gallery.location} holds {count_of(len(entries), 'picture')}: start with  "
            f"--bin {age}  and restore or delete them on the page Bin, then start with  --bin 0",
            code="bin_not_empty",
            path=gallery.location,
            pictures=len(entries),
        )


@contextmanager
def emptying(service: ConsoleService) -> Iterator[None]:
    """Empty the bin of what is older than its retention, now and every ten minutes.

    Also delete old query pictures.
    """
    has_ended = threading.Event()

    def attempt(what: str, delete: Callable[[], None]) -> None:
        try:
            delete()
        except (UppersonError, ProblemError, OSError) as error:  # Such as a full disk.
            _LOG.warning("%s: not deleted: %s", what, error)

    def empty() -> None:
        while True:
            attempt("what is in the bin", service.empty_bin)
            attempt("old query pictures", service.forget_query_pictures)
            if has_ended.wait(_EMPTIED_EVERY_S):
                return

    thread = threading.Thread(target=empty, name="bin")
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def bin_routes(service: ConsoleService, access: Access) -> list[APIRouter]:
    """Return the routes of the API and of the page, all for administrators."""
    api = APIRouter(
        prefix="/api/v1/bin", responses=PROBLEM, route_class=BoundedRoute, tags=["delete"]
    )
    pages = APIRouter(
        prefix="/bin",
        include_in_schema=False,
        default_response_class=HTMLResponse,
        route_class=BoundedRoute,
    )
    admin = access.needs("admin")

    def shown(account: Account, start: int, most: int) -> tuple[list[tuple[int, BinEntry]], bool]:
        """Return and log a page; also return whether there is a next one."""
        found = service.binned(start=start, most=most + 1)
        has_more, found = len(found) > most, found[:most]
        items = [(id_, entry.item) for id_, entry in found]
        service.note_items(account, "view", items, {"page": "bin"})
        return found, has_more

    @api.get("", summary="What is in the bin, last deleted first")
    def entries(
        start: _Start = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 24,
        account: Account = admin,
    ) -> list[models.BinItemOut]:
        pictures, items = service.current.last.binned, []
        for id_, one in shown(account, start, limit)[0]:
            about = {"deleted": one.deleted, "user": one.user, "reason": one.reason}
            fields = models.item_fields(account, id_, one.item, False) | about
            if pictures.file(one.item) is not None:
                fields["picture"] = f"/api/v1/bin/{id_}/picture"
            items.append(models.BinItemOut.model_validate(fields))
        return items

    @api.get(
        "/{id}/picture",
        summary="The picture as JPEG",
        response_class=Response,
        responses={200: {"content": file_of("image/jpeg"), "description": "The picture."}},
    )
    def picture(id: Id, size: Size = "view", account: Account = admin) -> Response:
        for id_, one in service.binned([int(id)]):
            made = service.current.last.binned.jpeg(one.item, size, service.blur)
            if made is not None:
                service.note_view(account, id_, one.item, "frame" if size == "frame" else "picture")
                return Response(made[0], media_type="image/jpeg", headers=UNCACHED_HEADERS)
        raise missing(f"no picture of {id} is in the bin")

    @api.post("/restore", summary="Restore pictures")
    def restore(request: models.BinIn, account: Account = admin) -> models.RestoredOut:
        restored = service.restore(account, [int(id_) for id_ in request.ids])
        return models.RestoredOut(restored=restored)

    @api.post("/delete", summary="Delete pictures of the bin permanently")
    def delete(request: models.BinIn, account: Account = admin) -> models.DeletedOut:
        ids = [int(id_) for id_ in request.ids]
        deleted = service.delete(account, ids, request.reason, {}, from_bin=True)
        return models.DeletedOut(deleted=deleted)

    @pages.get("")
    def page(start: _Start = 0, account: Account = admin) -> Response:
        entries, has_more = shown(account, start, _MOST)
        return render(
            "bin",
            account,
            entries=entries,
            has_more=has_more,
            start=start,
            most=_MOST,
            pictures=service.current.last.binned,
            bin_s=service.bin and service.bin_s,
        )

    @pages.post("/{act}")
    def change(
        act: Literal["restore", "delete"],
        ids: Annotated[list[str], Form()] = [],  # noqa: B006
        reason: Annotated[str, Form()] = "",
        account: Account = admin,
    ) -> Response:
        chosen = [read_id(one) for part in ids for one in part.split()]
        if not chosen:
            return RedirectResponse("/bin", 303)
        if act == "restore":
            count = service.restore(account, chosen)
        else:
            count = service.delete(account, chosen, reason, {"what": "bin"}, from_bin=True)
        done = {"deleted": count, "chosen": len(chosen), "restored": act == "restore"}
        return render("deleted", account, 200, undo=None, **done)

    return [api, pages]
