"""Text alerts in the console: what an account sees of them, and what it may change.

An account that is limited to cameras has the alerts that name only cameras of its own; any other
alert is reported as missing. Each change is in the query log before it is made, and messages are
before they are shown.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from upperson_alerts.alerts import (
    Alert,
    AlertReport,
    add_alert,
    confirm,
    dismiss,
    list_alerts,
    pause_alert,
    remove_alert,
    resume_alert,
)
from upperson_alerts.outbox import Message, outbox_of
from upperson_alerts.promise import read_rate
from upperson_alerts.replay import PastVisit, Replay, replay_alert
from upperson_console.accounts import Account
from upperson_console.limits import RequestQueue
from upperson_console.problems import invalid, missing
from upperson_console.service import ConsoleService
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.printable import safe_repr
from upperson_rt.search.notices import Notice

Change: TypeAlias = Literal["pause", "resume", "remove"]
Verdict: TypeAlias = Literal["confirm", "dismiss"]
AlertMessage: TypeAlias = tuple[Message, tuple[int, Item] | None]
"""A message, and id and item of its picture; None if that was deleted, or there never was one."""
_MOST_WAITING = 2
MOST_RAISED = 200
"""Visits of a test that are shown."""


class ConsoleAlerts:
    """The alerts of the console's gallery. Safe for several threads.

    All methods raise InputError if the gallery has no outbox.
    """

    def __init__(self, service: ConsoleService) -> None:
        self.service = service
        self._scans = RequestQueue(waiting=_MOST_WAITING)
        """Comparing a sentence with all pictures has a queue of its own."""

    @property
    def _rows(self) -> Gallery:
        """The gallery with its row ids, which alerts read in order."""
        return self.service.current.now().rows

    @property
    def obstacle(self) -> str:
        """Code of what keeps alerts from being changed; empty if nothing does."""
        gallery = self._rows
        if not gallery.has_outbox:
            return "outbox_unsupported"
        return "gallery_read_only" if gallery.is_read_only else ""

    def reports(self, account: Account) -> list[AlertReport]:
        """Return the alerts that an account may see, in the order in which they were added."""
        found = list_alerts(self._rows)
        return [one for one in found if _sees(account, one.alert)]

    def report(self, account: Account, id_: str) -> AlertReport:
        """Return an alert by its id."""
        for one in self.reports(account):
            if one.alert.id == id_:
                return one
        raise missing(f"there is no alert {id_}; it may have been removed", "alert_not_found")

    def messages(
        self, account: Account, alert: str | None, state: str | None, most: int
    ) -> list[AlertMessage]:
        """Return and log messages of an alert or of all that an account may see, newest first."""
        topics = [None] if account.cameras is None else self._topics(account)
        if alert is not None:
            topics = [self.report(account, alert).alert.id]
        gallery = self._rows
        with outbox_of(gallery) as outbox:
            found = [
                one for topic in topics for one in outbox.messages(most, topic=topic, state=state)
            ]
        found = sorted(found, key=lambda one: -one.seq)[:most]
        pictures = self._pictures(account, found)
        self.service.note_items(account, "view", pictures.values(), {"alerts": alert or "all"})
        return [(one, pictures.get(self._picture(one))) for one in found]

    def add(
        self,
        account: Account,
        sentence: str,
        rate: str,
        cameras: Sequence[str],
        name: str | None = None,
        cap: int = 10,
    ) -> tuple[AlertReport, list[Notice]]:
        """Add and log an alert; without cameras it is for all that the account may see."""
        per_day = read_rate(rate)
        self.service.require_allowed(account, sentence)
        cameras, gallery = cameras or account.cameras or (), self._rows
        for camera in cameras:  # The core's error names other cameras, which may be hidden.
            if not (account.sees(camera) and gallery.count(Filter(camera=camera))):
                what = (
                    f"there are no pictures of a camera {safe_repr(camera)}:  watch  it once first"
                )
                raise invalid(what, "camera_unknown")
        arguments = {
            "sentence": sentence,
            "rate": rate,
            "cameras": cameras,
            "name": name,
            "cap": cap,
        }
        self.service.approvals.require(account, "alert", 0, **arguments)
        where = Filter(camera=cameras or None)
        self.service.note(account, "alert-add", [], {"rate": rate}, where, sentence)
        with self._scans.slot():
            return add_alert(
                gallery,
                self.service.queued,
                sentence,
                rate=per_day,
                cameras=cameras,
                cap=cap,
                name=name,
            )

    def change(self, account: Account, id_: str, change: Change) -> None:
        """Pause, resume or remove an alert, and log it."""
        alert = self.report(account, id_).alert
        where = Filter(camera=alert.cameras)
        self.service.note(account, f"alert-{change}", [], {"alert": id_}, where, alert.sentence)
        changes = {"pause": pause_alert, "resume": resume_alert, "remove": remove_alert}
        changes[change](self._rows, id_)

    def judge(self, account: Account, message: str, verdict: Verdict) -> AlertReport:
        """Confirm or dismiss a message by its id, log it, and return its alert."""
        with outbox_of(self._rows) as outbox:
            found = outbox.messages(key=message)
        if not (
            found and "visit" in found[0].body["data"] and found[0].topic in self._topics(account)
        ):
            raise missing(
                f"there is no message {message} of a visit; its alert may have been removed",
                "message_not_found",
            )
        details = {"alert": found[0].topic, "message": message}
        pictures = self._pictures(account, found)
        self.service.note_items(account, f"alert-{verdict}", pictures.values(), details, None)
        return {"confirm": confirm, "dismiss": dismiss}[verdict](self._rows, message)

    def test(self, account: Account, id_: str, days: float) -> tuple[AlertReport, Replay, float]:
        """Return and log what an alert would have raised in the last days, and since when."""
        report, since = self.report(account, id_), time.time() - days * 86400
        self.service.require_allowed(account, report.alert.sentence)
        with self._scans.slot():
            replay = replay_alert(self._rows, self.service.queued, id_, since)
        replay = replace(replay, raised=self._opaque(replay.raised), best=self._opaque(replay.best))
        shown = [*replay.raised[-MOST_RAISED:], *replay.best]
        pictures = {one.picture: one.item for one in shown}
        self.service.note_items(account, "alert-test", pictures.items(), {"alert": id_})
        return report, replay, since

    def _opaque(self, visits: Sequence[PastVisit]) -> list[PastVisit]:
        return [replace(one, picture=self.service.ids.opaque(one.picture)) for one in visits]

    def _topics(self, account: Account) -> list[str]:
        return [one.alert.id for one in self.reports(account)]

    def _pictures(
        self, account: Account, messages: Sequence[Message]
    ) -> dict[int | None, tuple[int, Item]]:
        ids = [id_ for one in messages if (id_ := self._picture(one)) is not None]
        found = self.service.gallery.get(ids)
        return {id_: (id_, item) for id_, (item, _) in found.items() if account.sees(item.camera)}

    def _picture(self, message: Message) -> int | None:
        row: int | None = message.body["data"].get("picture")
        return None if row is None else self.service.ids.opaque(row)


def _sees(account: Account, alert: Alert) -> bool:
    """Return whether an account may see all cameras of an alert."""
    return account.cameras is None or (
        alert.cameras is not None and all(map(account.sees, alert.cameras))
    )
