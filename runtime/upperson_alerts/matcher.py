"""Compares rows with all alerts before they are committed; what is raised is committed with them.

Nothing here reads the gallery as a whole after it was opened: each commit reads the rows that were
added since, and an alert that was added meanwhile reads some of the older ones at each commit.
"""

import datetime
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_alerts.alerts import (
    CONFIRMED,
    VERSION,
    Alert,
    background_of,
    copy_alerts,
    count_visits,
    note_background,
    note_uncalibrated,
    read_alerts,
)
from upperson_alerts.background import Background, Comparison, Decision
from upperson_alerts.outbox import Message, Outbox, State, outbox_of
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.protocol import Within
from upperson_rt.search.query import QueryEncoder


@dataclass(frozen=True, kw_only=True)
class Found:
    """A visit that is raised, or kept for review."""

    alert: Alert
    item: Item
    visit: int
    score: float
    p_value: float
    reason: str
    """Why it is only kept for review, or empty."""


class AlertMatcher:
    """Compares the rows of each commit with the alerts of a gallery."""

    def __init__(self, encoder: Encoder, gallery: Gallery) -> None:
        self._gallery = gallery
        self._encoder = encoder
        self._queries: QueryEncoder | None = None
        self._version: Any = None
        self._alerts: dict[str, Alert] = {}
        self._backgrounds: list[Background] = []
        self._unread: list[Background] = []
        self._refresh()
        while self._unread:
            self._read_older()

    copy = staticmethod(copy_alerts)

    def match(self, items: Sequence[Item], embeds_ND: NDArray[np.float32]) -> Within | None:
        """Compare rows that are about to be committed; return what writes the messages."""
        last_id = self._refresh()
        if not self._alerts:
            return None
        self._read_older()
        # As stored: the background was computed from those.
        images_ND = embeds_ND.astype(np.float16).astype(np.float32)
        found: list[Found] = []
        uncalibrated: dict[str, bool] = {}
        for background in self._backgrounds:
            background.follow(self._gallery, last_id)
            compared = background.compare(items, images_ND)
            decision = background.decide(compared)
            found += self._found(background, items, compared, decision)
            uncalibrated |= zip(background.alerts, decision.uncalibrated_S.tolist(), strict=True)
        changed = {
            alert.id: is_so
            for alert in self._alerts.values()
            if alert.state == ("active" if (is_so := uncalibrated[alert.id]) else "uncalibrated")
        }
        # The first background has seen all visits that the others have.
        new = self._backgrounds[0].new_of(items)

        def write(outbox: Outbox, ids: Mapping[str, int], replaced: Sequence[str]) -> None:
            before = set(replaced)
            for one in found:
                if one.item.key not in before:
                    _raise(outbox, one, ids[one.item.key])
            note_uncalibrated(outbox, changed)
            count_visits(outbox, new)
            for background in self._backgrounds:
                note_background(outbox, background.counted())

        return write

    def _refresh(self) -> int:
        """Read the alerts again if they were changed; return the highest id of a row."""
        with outbox_of(self._gallery) as outbox:
            last_id = outbox.last_id
            version = outbox.document(VERSION)
            if version == self._version:
                return last_id
            alerts = read_alerts(outbox)
            confirmed: dict[str, set[int]] = {}
            for topic, visit in outbox.visits(label=CONFIRMED):
                confirmed.setdefault(topic, set()).add(int(visit, 16))
        frozen = {alert: frozenset(visits) for alert, visits in confirmed.items()}
        known: set[str] = set()
        for background in self._backgrounds:
            for alert in background.alerts:
                known.add(alert)
                background.confirm(alert, frozen.get(alert, frozenset()))
                self._follow_state(background, alerts.get(alert))
        new = {id_: one for id_, one in alerts.items() if id_ not in known}
        if new:
            self._queries = self._queries or QueryEncoder(self._encoder)
            background = background_of(self._queries, self._gallery, new, frozen, last_id)
            for one in new.values():
                self._follow_state(background, one)
            self._backgrounds.append(background)
            self._unread.append(background)
        self._alerts, self._version = alerts, version
        return last_id

    def _read_older(self) -> None:
        self._unread = [one for one in self._unread if one.step(self._gallery)]

    @staticmethod
    def _follow_state(background: Background, alert: Alert | None) -> None:
        if alert is not None and alert.state in ("active", "uncalibrated"):
            background.set_uncalibrated(alert.id, alert.state == "uncalibrated")

    def _found(
        self,
        background: Background,
        items: Sequence[Item],
        compared: Comparison,
        decision: Decision,
    ) -> list[Found]:
        ids, found = list(background.alerts), []
        for row, column in zip(*np.nonzero(decision.raised_VS | decision.best_VS), strict=True):
            alert = self._alerts.get(ids[column])
            if alert is None or alert.state == "paused":
                continue
            reason = "uncalibrated" if decision.uncalibrated_S[column] else ""
            reason = "collecting" if decision.best_VS[row, column] else reason
            one = Found(
                alert=alert,
                item=items[compared.visits.best_picture(int(row), int(column))],
                visit=compared.visits.ids[row],
                score=float(compared.scores_VS[row, column]),
                p_value=float(compared.p_VS[row, column]),
                reason=reason,
            )
            found.append(one)
        return found


def message_id(alert: str, visit: int) -> str:
    """Return the id of the one message of an alert for a visit."""
    return hashlib.blake2b(f"{alert}\0{visit:016x}".encode(), digest_size=8).hexdigest()


def _raise(outbox: Outbox, found: Found, picture: int) -> None:
    """Write the message of a visit, unless there is one; more than the cap are kept for review."""
    alert, item, now = found.alert, found.item, time.time()
    key = message_id(alert.id, found.visit)
    current = _state_now(outbox, alert.id)
    if current in (None, "paused") or outbox.count(key=key):
        return
    reason = "demoted" if current == "review" else found.reason
    hour = now // 3600
    if not reason:
        since, until = hour * 3600, (hour + 1) * 3600
        count = outbox.count(topic=alert.id, state="ready", since=since, until=until)
        if count >= alert.cap:
            reason = "cap"
            about = {"cap": alert.cap, "hour": _iso(since)}
            capped = message_id(alert.id, int(hour))
            outbox.put(_message(capped, alert, now, "alert.capped", about, "ready"))
    about = {
        "visit": f"{found.visit:016x}",
        "camera": item.camera,
        "track": item.track,
        "time": None if item.time is None else _iso(item.time),
        "score": round(found.score, 4),
        "p_value": found.p_value,
        "picture": picture,
        **({"reason": reason} if reason else {}),
    }
    state: State = "review" if reason else "ready"
    outbox.put(_message(key, alert, now, "alert.raised", about, state))


def _state_now(outbox: Outbox, alert: str) -> str | None:
    """Return the state of an alert as it is now; None if it was removed."""
    content = outbox.document(f"alert/{alert}")
    return content.get("state") if isinstance(content, dict) else None


def _message(
    key: str, alert: Alert, now: float, kind: str, about: Mapping[str, Any], state: State
) -> Message:
    data = {
        "id": key,
        "alert": {"id": alert.id, "name": alert.name},
        "sentence": alert.sentence,
        **about,
    }
    body = {"type": kind, "timestamp": _iso(now), "data": data}
    return Message(key=key, topic=alert.id, time=now, body=body, state=state)


def _iso(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
