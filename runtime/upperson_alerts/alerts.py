"""Alerts of a gallery: added, listed, paused, removed, and judged by an operator.

All of it stands in the gallery's own database, as documents of its outbox. Every change raises a
version, by which running matchers see it.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from upperson_alerts.background import Background, Cameras, Standing, Watched, scope_of
from upperson_alerts.outbox import Message, Outbox, outbox_of
from upperson_alerts.promise import DEMOTE_AT, e_value, upper_bound
from upperson_alerts.scoring import scorer_of
from upperson_phrases import parse_query
from upperson_rt.arguments import check_count, check_name, check_number, check_text
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Gallery
from upperson_rt.printable import count_of, get_logger, safe_repr
from upperson_rt.search.notices import Notice
from upperson_rt.search.query import QueryEncoder, SearchRequest
from upperson_rt.search.service import SearchService
from upperson_rt.strict import read_fields

VERSION, VISITS, BACKGROUND = "alerts/version", "alerts/visits", "alerts/background"
_ALERT = "alert/"
DISMISSED, CONFIRMED = "dismissed", "confirmed"
_MOST_CAP = 1000
_OF_THE_GALLERY = frozenset({"camera_unknown", "filter_matches_nothing", "gallery_empty"})
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A standing query."""

    id: str
    name: str
    sentence: str
    cameras: Cameras
    """Only these cameras; None for all."""
    rate: float
    """False alarms a day that it may raise."""
    cap: int
    """Most messages in an hour."""
    state: Literal["active", "paused", "review", "uncalibrated"]
    """``review``: it broke its promise, and what it finds is kept, not delivered.
    ``uncalibrated``: so is it until visits score as they did before, as more of them lately score
    as high as its promise allows than chance explains."""
    created: float
    """Unix seconds."""
    from_seq: int = 0
    """Messages after this one count as kept or broken promise."""
    from_visits: int = 0
    """Visits of its cameras that were compared before that."""


@dataclass(frozen=True, kw_only=True)
class AlertReport:
    """An alert and how it fares."""

    alert: Alert
    state: Literal["active", "collecting", "paused", "review", "uncalibrated"]
    """``collecting``: too few visits for its promise; new highest scores are kept for review."""
    standing: Standing
    missing: int | None
    """Visits that its promise still needs; None if that is unknown."""
    delivered: int
    """Messages that were or will be delivered."""
    review: int
    """Messages that are kept for review."""
    dismissed: int
    """Delivered alerts that an operator dismissed as false, since it was added or resumed."""
    confirmed: int
    unjudged: int
    """Delivered alerts since then that no operator dismissed or confirmed."""
    days: float
    """For which it was compared since it was added or resumed: visits by those of a day."""
    dismissed_per_day: float | None
    upper_bound: float | None
    """Rate a day that is excluded at 95 % where none was false, nor is unjudged: 3 / days."""
    e_value: float
    """Evidence against its promise; at 20 it is demoted to ``review``."""


# --- Reading


def read_alerts(outbox: Outbox) -> dict[str, Alert]:
    """Return the alerts by id; one that cannot be read is left out, with a warning."""
    found = {id_: _read(id_, content) for id_, content in outbox.documents(_ALERT).items()}
    return {id_: one for id_, one in found.items() if one is not None}


def _read(id_: str, content: object) -> Alert | None:
    try:
        return read_fields(Alert, content, f"alert {id_}")
    except InputError as error:
        _LOG.warning("alert %s is not used: %s", id_, error)
        return None


def find_alert(outbox: Outbox, reference: str) -> Alert:
    """Return the alert with that id or name.

    Raises:
        InputError: There is none, or several have that name.
    """
    alerts = read_alerts(outbox)
    found = [one for one in alerts.values() if reference in (one.id, one.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{len(found)} alerts are called {safe_repr(reference)}: name one by its id, "
            f"{' or '.join(one.id for one in found)}",
            code="alert_ambiguous",
            found=reference,
        )
    known = ", ".join(f"{one.id} ({safe_repr(one.name)})" for one in [*alerts.values()][:5])
    raise InputError(
        f"there is no alert {safe_repr(reference)}: expected an id or a name of  upperson-rt alert "
        f"list  ({known or 'which lists none'})",
        code="alert_not_found",
        found=reference,
    )


def list_alerts(gallery: Gallery) -> list[AlertReport]:
    """Return all alerts, in the order in which they were added. Reads only.

    Raises:
        InputError: The gallery has no outbox.
    """
    with outbox_of(gallery) as outbox:
        alerts = sorted(read_alerts(outbox).values(), key=lambda one: (one.created, one.id))
        return [_report(outbox, alert) for alert in alerts]


def recent_messages(
    gallery: Gallery, alert: str | None = None, state: str | None = None, most: int = 50
) -> list[Message]:
    """Return messages of an alert (id or name) or of all, newest first. Reads only.

    Args:
        gallery: With an outbox.
        alert: None for all.
        state: ``ready`` for those that are delivered, ``review`` for those that are kept.
        most: At most so many.
    """
    with outbox_of(gallery) as outbox:
        topic = None if alert is None else find_alert(outbox, alert).id
        return outbox.messages(most, topic=topic, state=state)


def describe_state(report: AlertReport) -> str:
    """Return the state of an alert, and what its rate of false alarms still needs."""
    if report.state == "uncalibrated":
        return "uncalibrated: visits score higher than before; look at those for review"
    if report.state != "collecting":
        return report.state
    if report.missing is None:
        return "collecting: its false-alarm rate needs pictures with times"
    visits = f"{report.missing:,} more visit{'s' * (report.missing != 1)}"
    per_day = report.standing.per_day or 0.0
    return f"collecting: its false-alarm rate needs {visits} at {per_day:,.0f} a day"


def describe_record(report: AlertReport) -> str:
    """Return how many messages were dismissed, in how many days, and which rate that shows."""
    text = f"{report.dismissed or 'none'}"
    if report.days >= 1:  # Of less, the visits of a day are only estimated.
        text += f" in {report.days:.3g} days"
    if report.days >= 1 and report.upper_bound is not None:
        text += f": below {report.upper_bound:.2g} a day"
    elif report.days >= 1 and report.dismissed_per_day:
        text += f": {report.dismissed_per_day:.2g} a day"
    return f"{text}, {report.unjudged} not judged" if report.unjudged else text


def _report(outbox: Outbox, alert: Alert) -> AlertReport:
    confirmed = outbox.count(topic=alert.id, label=CONFIRMED)
    visits, per_day = (outbox.document(BACKGROUND) or {}).get(scope_of(alert.cameras), (0, None))
    standing = Standing.of(visits - confirmed, per_day, alert.rate)
    missing = None if standing.required is None else max(0, standing.required - standing.visits)
    dismissed, unjudged = (
        len(outbox.visits(topic=alert.id, state="ready", label=label, after=alert.from_seq))
        for label in (DISMISSED, "")
    )
    days = (_visits(outbox, alert) - alert.from_visits) / per_day if per_day else 0.0
    return AlertReport(
        alert=alert,
        state="collecting" if alert.state == "active" and missing != 0 else alert.state,
        standing=standing,
        missing=missing,
        delivered=outbox.count(topic=alert.id, state="ready"),
        review=outbox.count(topic=alert.id, state="review"),
        dismissed=dismissed,
        confirmed=confirmed,
        unjudged=unjudged,
        days=days,
        dismissed_per_day=dismissed / days if days > 0 else None,
        upper_bound=upper_bound(dismissed + unjudged, days),
        e_value=e_value(dismissed, alert.rate * days),
    )


def _visits(outbox: Outbox, alert: Alert) -> int:
    """Return how many visits were compared with an alert of these cameras so far."""
    visits: dict[str, int] = outbox.document(VISITS) or {}
    return sum(visits.get(camera, 0) for camera in alert.cameras or ("",))


def count_visits(outbox: Outbox, cameras: Sequence[str | None]) -> None:
    """Note the cameras of visits that are compared for the first time, a name for each."""
    if cameras:
        visits: dict[str, int] = outbox.document(VISITS) or {}
        for camera in (*(one for one in cameras if one), *[""] * len(cameras)):
            visits[camera] = visits.get(camera, 0) + 1
        outbox.write(VISITS, visits)


# --- Changing


def add_alert(
    gallery: Gallery,
    encoder: Encoder,
    sentence: str,
    *,
    rate: float,
    cameras: Sequence[str] = (),
    cap: int = 10,
    name: str | None = None,
) -> tuple[AlertReport, list[Notice]]:
    """Add an alert, and compare it with the pictures that are there.

    Args:
        gallery: With an outbox, opened with the encoder's fingerprint.
        encoder: Embeds the sentence.
        sentence: What the person looks like.
        rate: False alarms a day that it may raise, see `promise.read_rate`.
        cameras: Only these; empty for all.
        cap: Most messages in an hour, 1 to 1000.
        name: For people; the sentence if None.

    Returns:
        The alert, and what should be known about its sentence.

    Raises:
        UsageError: A number is out of range.
        InputError: The gallery has no outbox, the sentence describes no person, or a camera is
            unknown.
    """
    rate = check_number(rate, "the rate of an alert", UsageError, least=1e-6)
    cap = check_count(cap, "the cap of an alert", most=_MOST_CAP)
    sentence = " ".join(check_name(sentence, "the sentence of an alert").split())
    _check_cameras(gallery, cameras)
    with outbox_of(gallery) as outbox:  # Refuses before any work is done.
        last_id = outbox.last_id
    queries = QueryEncoder(encoder)
    notices = _check_sentence(gallery, queries, sentence)
    alert = Alert(
        id=secrets.token_hex(4),
        name=check_name(name, "the name of an alert") if name is not None else sentence,
        sentence=sentence,
        cameras=tuple(dict.fromkeys(cameras)) or None,
        rate=rate,
        cap=cap,
        state="active",
        created=time.time(),
    )
    background = background_of(queries, gallery, {alert.id: alert}, {}, last_id)
    while background.step(gallery):
        pass
    with outbox_of(gallery, write=True) as outbox:
        alert = _restarted(outbox, alert)
        _write(outbox, alert)
        note_background(outbox, background.counted())
        return _report(outbox, alert), notices


def copy_alerts(sources: Sequence[Gallery], target: Gallery) -> int:
    """Copy the alerts of galleries into one that has their pictures; return how many.

    Their promises count from now. Alerts with the same name, sentence, cameras and rate are one.
    Messages are not copied: they name pictures by row, and have their destinations.
    """
    found: dict[tuple[object, ...], Alert] = {}
    messages = 0
    for source in sources:
        with outbox_of(source) as outbox:
            messages += len(outbox.messages(state="ready"))
            for one in read_alerts(outbox).values():
                found[one.name, one.sentence, one.cameras, one.rate] = one
    if messages:
        _LOG.warning(
            "%s of alerts stay in the shards: run  upperson-rt alert deliver  there for those that "
            "wait",
            count_of(messages, "message"),
        )
    if found:
        with outbox_of(target, write=True) as outbox:
            for alert in found.values():
                _write(outbox, _restarted(outbox, alert))
    return len(found)


def pause_alert(gallery: Gallery, reference: str) -> AlertReport:
    """Stop comparing pictures with an alert (id or name) until it is resumed."""
    with outbox_of(gallery, write=True) as outbox:
        alert = replace(find_alert(outbox, reference), state="paused")
        _write(outbox, alert)
        return _report(outbox, alert)


def resume_alert(gallery: Gallery, reference: str) -> AlertReport:
    """Deliver an alert again that was paused or demoted; its promise counts from now."""
    with outbox_of(gallery, write=True) as outbox:
        alert = _restarted(outbox, replace(find_alert(outbox, reference), state="active"))
        _write(outbox, alert)
        return _report(outbox, alert)


def remove_alert(gallery: Gallery, reference: str) -> Alert:
    """Remove an alert and its messages, delivered or not."""
    with outbox_of(gallery, write=True) as outbox:
        alert = find_alert(outbox, reference)
        outbox.remove(topic=alert.id)
        outbox.write(f"{_ALERT}{alert.id}", None)
        _raise_version(outbox)
        return alert


def dismiss(gallery: Gallery, message: str) -> AlertReport:
    """Mark a message, by its id, as a false alarm; an alert that broke its promise is demoted.

    Raises:
        InputError: There is no such message, or it is not of a visit.
    """
    return _judge(gallery, message, DISMISSED)


def confirm(gallery: Gallery, message: str) -> AlertReport:
    """Mark a message, by its id, as right: its visit leaves the background of the alert."""
    return _judge(gallery, message, CONFIRMED)


def _judge(gallery: Gallery, key: str, label: str) -> AlertReport:
    with outbox_of(gallery, write=True) as outbox:
        found = outbox.messages(key=key)
        alerts = read_alerts(outbox)
        if not found or found[0].topic not in alerts:
            raise InputError(
                f"there is no message {safe_repr(key)}: expected an id of  upperson-rt alert "
                "messages",
                code="message_not_found",
                found=key,
            )
        if "visit" not in found[0].body["data"]:
            raise InputError(
                f"the message {safe_repr(key)} says that an hour's cap was reached: only those of "
                "visits are right or false",
                code="message_of_no_visit",
                found=key,
            )
        outbox.label(key, label)
        report = _report(outbox, alerts[found[0].topic])
        if report.e_value >= DEMOTE_AT and report.alert.state in ("active", "uncalibrated"):
            _write(outbox, replace(report.alert, state="review"))
        elif CONFIRMED in (label, found[0].label):
            _raise_version(outbox)
        return _report(outbox, read_alerts(outbox)[report.alert.id])


def _restarted(outbox: Outbox, alert: Alert) -> Alert:
    """Return an alert whose promise counts from now."""
    return replace(alert, from_seq=outbox.last_seq, from_visits=_visits(outbox, alert))


def _write(outbox: Outbox, alert: Alert) -> None:
    outbox.write(f"{_ALERT}{alert.id}", asdict(alert))
    _raise_version(outbox)


def note_uncalibrated(outbox: Outbox, changed: Mapping[str, bool]) -> None:
    """Note alerts, by id, whose visits score higher than before (True), or no longer do."""
    if not changed:
        return
    alerts = read_alerts(outbox)
    for id_, is_so in changed.items():
        if id_ in alerts and alerts[id_].state == ("active" if is_so else "uncalibrated"):
            state: Literal["active", "uncalibrated"] = "uncalibrated" if is_so else "active"
            _write(outbox, replace(alerts[id_], state=state))


def note_background(outbox: Outbox, counted: Mapping[str, tuple[int, float | None]]) -> None:
    """Note how many visits there are, and a day, by `scope_of` cameras, for `list_alerts`."""
    before = outbox.document(BACKGROUND) or {}
    if (after := before | {scope: [*counts] for scope, counts in counted.items()}) != before:
        outbox.write(BACKGROUND, after)


def _raise_version(outbox: Outbox) -> None:
    outbox.write(VERSION, (outbox.document(VERSION) or 0) + 1)


def background_of(
    queries: QueryEncoder,
    gallery: Gallery,
    alerts: Mapping[str, Alert],
    confirmed: Mapping[str, frozenset[int]],
    last_id: int,
) -> Background:
    """Return an unread background for alerts, by id; see `Background`."""
    scorer = scorer_of(queries, gallery, [one.sentence for one in alerts.values()])
    watched = {
        id_: Watched(rate=one.rate, cameras=one.cameras, confirmed=confirmed.get(id_, frozenset()))
        for id_, one in alerts.items()
    }
    return Background(watched, scorer.scores, last_id)


# --- Checks


def _check_cameras(gallery: Gallery, cameras: Sequence[str]) -> None:
    known = gallery.cameras()
    unknown = [name for name in cameras if check_name(name, "a camera") not in known]
    if unknown and gallery.count():  # An empty gallery will have them.
        names = ", ".join(map(safe_repr, known[:5])) or "none of its pictures has one"
        raise InputError(
            f"no picture of the camera {safe_repr(unknown[0])}:  watch  it once first, or name a "
            f"camera of the gallery ({names})",
            code="camera_unknown",
            found=unknown[0],
        )


def _check_sentence(gallery: Gallery, queries: QueryEncoder, sentence: str) -> list[Notice]:
    """Refuse a sentence of which nothing is understood: it would be raised by anything."""
    parsed = parse_query(check_text(sentence, "the sentence"))
    if not parsed.understood and not parsed.excluded:
        raise InputError(
            f"{safe_repr(sentence)} describes no person: name what the person wears or carries, "
            "such as  man with a red backpack",
            code="sentence_not_understood",
            sentence=sentence,
        )
    request = SearchRequest(sentence=sentence, k=1, notices=True)
    notices = SearchService(queries, gallery).search(request).notices
    return [notice for notice in notices if notice.code not in _OF_THE_GALLERY]
