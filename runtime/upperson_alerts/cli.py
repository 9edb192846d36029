"""`upperson-rt alert`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from upperson_alerts.promise import describe_rate, read_rate
from upperson_rt.cli.app import Command, ending_gently, new_app
from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.opening import open_store
from upperson_rt.cli.options import Model, Output, Place, unix_seconds
from upperson_rt.cli.output import (
    print_columns,
    print_json,
    print_line,
    print_note,
    print_notices,
    print_result,
)
from upperson_rt.printable import count_of, local_time

if TYPE_CHECKING:
    from upperson_alerts.alerts import AlertReport
    from upperson_alerts.delivery import DeliveryOptions
    from upperson_alerts.outbox import Message, Outbox
    from upperson_alerts.replay import PastVisit, Replay
    from upperson_rt.gallery import Gallery

app = new_app("Standing queries: raise an alert when a new picture matches a sentence.")

Reference: TypeAlias = Annotated[
    str, typer.Argument(metavar="ALERT", help="Id or name of an alert, see `alert list`.")
]
MessageId: TypeAlias = Annotated[
    str, typer.Argument(metavar="ID", help="Id of a message, see `alert messages`.")
]


@dataclass(frozen=True)
class New(OptionGroup, panel="Alert"):
    """A new alert."""

    camera: list[str] | None = option(
        None, "Only pictures of this camera; may be given again.", show_default="all"
    )
    max_false: str = option(
        "1/day", "False alarms that it may raise, such as 2/day or 1/week.", metavar="N/PERIOD"
    )
    name: str | None = option(None, "Its name.", show_default="the sentence")
    cap: int = advanced(10, "Most messages in an hour; more are kept for review.", min=1, max=1000)


@app.command(cls=Command)
@grouped
def add(
    words: Annotated[
        list[str], typer.Argument(metavar="SENTENCE", help="What the person looks like.")
    ],
    *,
    new: New,
    model: Model,
    place: Place,
    output: Output,
) -> None:
    """Raise an alert when a new picture matches a sentence better than chance allows.

    `index` and `watch` compare each person that they add. How well a picture must match follows
    from the pictures that are there, so that no more than --max-false are raised by chance. Until
    there are enough, a visit that scores higher than all before it is kept for review.

    Example: `upperson-rt alert add "man with a red backpack" --camera gate --max-false 1/day`
    """
    from upperson_alerts.alerts import add_alert

    rate = read_rate(new.max_false)
    with open_store(model, place.gallery, "text") as (opened, _, store):
        report, notices = add_alert(
            store,
            opened.encoder(),
            " ".join(words),
            rate=rate,
            cameras=new.camera or (),
            cap=new.cap,
            name=new.name,
        )
    print_notices(notices)
    _print_one(report, output, notices=[notice.as_json() for notice in notices])


@app.command("list", cls=Command)
@grouped
def list_all(*, place: Place, output: Output) -> None:
    """List the alerts, with the state and the messages of each. Changes nothing.

    Example: `upperson-rt alert list`
    """
    from upperson_alerts.alerts import list_alerts

    with _outbox_of(place) as (store, outbox):
        waiting, dead = outbox.waiting(), len(outbox.dead())
        reports = list_alerts(store)
    found = {"alerts": [_json_from(one) for one in reports], "waiting": waiting, "dead": dead}
    none = 'no alerts: add one with  upperson-rt alert add "man with a red backpack"'
    print_result(
        found,
        output.as_json,
        lambda _: _print_reports(reports) if reports else print_line(none),
    )
    for name, count in waiting.items():
        if count:
            print_note(f"{count_of(count, 'message')} for {name} not delivered yet")
    if dead:
        print_note(f"{count_of(dead, 'dead letter')}: see  upperson-rt alert letters")
    if not waiting and any(one.delivered for one in reports):
        print_note(
            "nothing delivers what is raised yet: run  upperson-rt alert deliver --to ADDRESS"
        )


@dataclass(frozen=True)
class Period(OptionGroup, panel="Alert"):
    """What an alert is tried on."""

    since: Any = option(
        "7d",
        "Begin of the period: ISO 8601 (local), unix seconds, or how long ago.",
        parser=unix_seconds,
        metavar="TIME",
    )


@app.command("test", cls=Command)
@grouped
def would_raise(
    alert: Reference, *, period: Period, model: Model, place: Place, output: Output
) -> None:
    """Show what an alert that was added would have raised in the last week. Changes nothing.

    Example: `upperson-rt alert test "man with a red backpack" --since 7d`
    """
    from upperson_alerts.replay import replay_alert

    with open_store(model, place.gallery, "text") as (opened, _, store):
        replay = replay_alert(store, opened.encoder(), alert, period.since)
    found = {
        "alert": asdict(replay.alert),
        "standing": asdict(replay.standing),
        "since": period.since,
        "visits": replay.visits,
        "against": replay.against,
        "raised": [_json_from_visit(one) for one in replay.raised],
        "best": [_json_from_visit(one) for one in replay.best],
    }
    print_result(found, output.as_json, lambda _: _print_replay(replay, period.since))


@app.command(cls=Command)
@grouped
def pause(alert: Reference, *, place: Place, output: Output) -> None:
    """Compare no pictures with an alert until it is resumed.

    Example: `upperson-rt alert pause "man with a red backpack"`
    """
    _change("pause_alert", alert, place, output)


@app.command(cls=Command)
@grouped
def resume(alert: Reference, *, place: Place, output: Output) -> None:
    """Resume an alert that was paused, or demoted to review; its promise counts from now.

    Example: `upperson-rt alert resume "man with a red backpack"`
    """
    _change("resume_alert", alert, place, output)


@app.command(cls=Command)
@grouped
def remove(alert: Reference, *, place: Place, output: Output) -> None:
    """Remove an alert and its messages, also those that are not delivered yet.

    Example: `upperson-rt alert remove "man with a red backpack"`
    """
    from upperson_alerts.alerts import remove_alert

    with _opened(place) as store:
        removed = remove_alert(store, alert)
    print_result(
        {"removed": asdict(removed)},
        output.as_json,
        lambda _: print_line(f"removed {removed.id}: {removed.name}"),
    )


@app.command(cls=Command)
@grouped
def messages(
    alert: Annotated[
        str | None, typer.Argument(metavar="ALERT", help="Only of this alert, by id or name.")
    ] = None,
    *,
    review: Annotated[
        bool, typer.Option("--review", help="Only what is kept for review, and not delivered.")
    ] = False,
    most: Annotated[int, typer.Option("-k", "--top", min=1, help="Most messages.")] = 20,
    place: Place,
    output: Output,
) -> None:
    """List what was raised or kept for review, newest first. Changes nothing.

    Example: `upperson-rt alert messages --review`
    """
    from upperson_alerts.alerts import recent_messages

    with _opened(place) as store:
        found = recent_messages(store, alert, "review" if review else None, most)
    rows = [
        {**one.body, "state": one.state, "verdict": one.label or None, "seq": one.seq}
        for one in found
    ]
    print_result(
        {"messages": rows},
        output.as_json,
        lambda _: _print_messages(found) if found else print_line("no messages"),
    )


@app.command(cls=Command)
@grouped
def dismiss(message: MessageId, *, place: Place, output: Output) -> None:
    """Mark a message as a false alarm; an alert with too many of them is demoted to review.

    Example: `upperson-rt alert dismiss 5f0c2a9be1d34476`
    """
    _change("dismiss", message, place, output)


@app.command(cls=Command)
@grouped
def confirm(message: MessageId, *, place: Place, output: Output) -> None:
    """Mark a message as right: later pictures are no longer compared with that visit.

    Example: `upperson-rt alert confirm 5f0c2a9be1d34476`
    """
    _change("confirm", message, place, output)


@dataclass(frozen=True)
class Destination(OptionGroup, panel="Destination"):
    """Where messages go."""

    to: str = option(
        "stdout",
        "mqtt:// or mqtts://host/topic, http:// or https:// address of a webhook, "
        "command:PROGRAM ARGUMENT..., or stdout.",
        metavar="ADDRESS",
    )
    once: bool = option(False, "End when nothing is due.")
    snapshot: bool = option(False, "Attach the picture, as JPEG in Base64.")
    discovery: bool = option(False, "Announce the alerts to Home Assistant, by MQTT.")
    forget: bool = advanced(False, "Forget the destination and what it has not accepted, and end.")
    secret_file: Path | None = option(
        None,
        "File with the secret of the webhook, or user:password of the broker; others must not be "
        "able to read it.",
        metavar="FILE",
        show_default="$UPPERSON_ALERT_SECRET",
    )
    log_json: bool = option(False, "Stderr as JSON lines.", rich_help_panel="Output")
    ca: Path | None = advanced(
        None, "Certificates (PEM) to trust, instead of the system's.", metavar="FILE"
    )
    timeout: float = advanced(15.0, "Seconds that an answer may take.", min=0.1, max=600.0)
    attempts: int = advanced(
        40, "Refusals after which a message is a dead letter: about a day.", min=1, max=1000
    )

    def as_options(self) -> "DeliveryOptions":
        """Return the options, with the secret."""
        from upperson_alerts.delivery import DeliveryOptions, read_secret

        return DeliveryOptions(
            timeout_s=self.timeout,
            secret=read_secret(self.secret_file),
            ca_file=self.ca,
            discovery=self.discovery,
        )


@app.command(cls=Command)
@grouped
def deliver(*, destination: Destination, place: Place, output: Output) -> None:
    """Deliver alerts as they are raised, until Ctrl-C or SIGTERM.

    Each message is delivered at least once, and has the same id whenever it is sent again. What is
    refused is tried again, less and less often. Run one such command for each destination; the
    first one of a gallery also gets what was raised before.

    Example: `upperson-rt alert deliver --to mqtt://broker/upperson/alerts --discovery`
    """
    from upperson_alerts.delivery import Deliverer, destination_name

    if destination.forget:
        name = destination_name(destination.to)
        with _outbox_of(place, write=True) as (_, outbox):
            outbox.end(name)
        print_result({"forgotten": name}, output.as_json, lambda _: print_line(f"forgot {name}"))
        return
    options = destination.as_options()
    with (
        _opened(place) as store,
        Deliverer(
            store,
            destination.to,
            options,
            attempts=destination.attempts,
            snapshot=destination.snapshot,
        ) as deliverer,
    ):
        if destination.once:
            deliverer.run_once()
        else:
            print_note(f"delivering to {deliverer.destination}; Ctrl-C ends it")
            with ending_gently() as stopped:
                deliverer.run(lambda: bool(stopped))
        report = {"destination": deliverer.destination, **asdict(deliverer.report)}
    if output.as_json and destination.to != "stdout":
        print_json(report)
    else:
        print_note("{delivered} delivered, {refused} refused, {dead} dead letters".format(**report))


@app.command(cls=Command)
@grouped
def letters(*, place: Place, output: Output) -> None:
    """List dead letters: messages that a destination refused too often. Changes nothing.

    Example: `upperson-rt alert letters`
    """
    with _outbox_of(place) as (_, outbox):
        found = outbox.dead()
    rows = [
        {"id": one.key, "destination": name, "time": one.time, **asdict(failure)}
        for name, one, failure in found
    ]

    def show(_: dict[str, Any]) -> None:
        columns = {
            "id": [one.key for _, one, _ in found],
            "destination": [name for name, _, _ in found],
            "raised": [local_time(one.time) for _, one, _ in found],
            "attempts": [str(failure.attempts) for _, _, failure in found],
            "error": [failure.error for _, _, failure in found],
        }
        print_columns(columns, ("attempts",), "error")

    print_result(
        {"letters": rows},
        output.as_json,
        show if found else lambda _: print_line("no dead letters"),
    )


@app.command(cls=Command)
@grouped
def replay(
    message: Annotated[
        str | None, typer.Argument(metavar="ID", help="Only this message.", show_default="all")
    ] = None,
    *,
    place: Place,
    output: Output,
) -> None:
    """Try dead letters again; a running `alert deliver` sends them.

    Example: `upperson-rt alert replay`
    """
    with _outbox_of(place, write=True) as (_, outbox):
        count = outbox.replay(message)
    done = f"{count_of(count, 'message')} will be tried again"
    print_result({"replayed": count}, output.as_json, lambda _: print_line(done))


@contextmanager
def _opened(place: Place) -> "Iterator[Gallery]":
    from upperson_rt.gallery import Gallery

    with Gallery.open(place.gallery) as store:
        yield store


@contextmanager
def _outbox_of(place: Place, write: bool = False) -> "Iterator[tuple[Gallery, Outbox]]":
    from upperson_alerts.outbox import outbox_of

    with _opened(place) as store, outbox_of(store, write) as outbox:
        yield store, outbox


def _change(action: str, reference: str, place: Place, output: Output) -> None:
    """Call a function of `alerts`, and print the alert."""
    from upperson_alerts import alerts

    with _opened(place) as store:
        report = getattr(alerts, action)(store, reference)
    _print_one(report, output)


def _print_one(report: "AlertReport", output: Output, **more: Any) -> None:
    found = _json_from(report) | more
    print_result(found, output.as_json, lambda _: _print_reports([report]))


def _json_from(report: "AlertReport") -> dict[str, Any]:
    found = asdict(report)
    alert = found.pop("alert")
    return {name: alert[name] for name in alert if name not in ("from_seq", "from_visits")} | found


def _print_reports(reports: "Sequence[AlertReport]") -> None:
    from upperson_alerts.alerts import describe_record, describe_state

    columns = {
        "id": [one.alert.id for one in reports],
        "alert": [one.alert.name for one in reports],
        "cameras": [", ".join(one.alert.cameras or ("all",)) for one in reports],
        "state": [describe_state(one) for one in reports],
        "promise": [describe_rate(one.alert.rate) for one in reports],
        "dismissed": [describe_record(one) for one in reports],
        "raised": [str(one.delivered) for one in reports],
        "review": [str(one.review) for one in reports],
    }
    print_columns(columns, ("raised", "review"), "alert")


def _print_messages(found: "Sequence[Message]") -> None:
    bodies = [one.body["data"] for one in found]
    states = [
        one.label or data.get("reason") or ("raised" if "visit" in data else "cap reached")
        for one, data in zip(found, bodies, strict=True)
    ]
    columns = {
        "id": [one.key for one in found],
        "alert": [one["alert"]["name"] for one in bodies],
        "camera": [one.get("camera") or "" for one in bodies],
        "taken": [one.get("time") or one.get("hour") or "" for one in bodies],
        "score": [f"{one['score']:.3f}" if "score" in one else "" for one in bodies],
        "p": [f"{one['p_value']:.2g}" if "p_value" in one else "" for one in bodies],
        "state": states,
    }
    print_columns(columns, ("score", "p"), "alert")


def _json_from_visit(visit: "PastVisit") -> dict[str, Any]:
    item = visit.item
    found = {"camera": item.camera, "track": item.track, "time": item.time}
    return found | {name: value for name, value in vars(visit).items() if name != "item"}


def _print_replay(replay: "Replay", since: float) -> None:
    standing, visits = replay.standing, count_of(replay.visits, "visit")
    period = f"since {local_time(since)}"
    if not replay.visits:
        why = "choose an earlier time with  --since"
        if standing.per_day is None and standing.visits:
            why = "no picture has a time: index them with  --time-from name  or  mtime"
        print_line(f"there are no visits {period}: {why}")
        return
    if standing.is_ready:
        compared = "earlier visits" if replay.against == "earlier" else "all other visits"
        print_line(
            f"it would have raised {len(replay.raised)} of {visits} {period}, compared with "
            f"{compared}"
        )
    else:
        needed = "pictures with times"
        if standing.required is not None:
            needed = f"{standing.required:,} visits, there are {standing.visits:,}"
        print_line(
            f"it would have raised nothing: its false-alarm rate needs {needed}; the best of "
            f"{visits} {period}:"
        )
    shown = replay.raised or replay.best
    columns = {
        "time": [local_time(one.item.time) for one in shown],
        "camera": [one.item.camera or "" for one in shown],
        "track": [one.item.track or "" for one in shown],
        "score": [f"{one.score:.3f}" for one in shown],
        "p": [f"{one.p_value:.2g}" for one in shown],
        "picture": [str(one.picture) for one in shown],
    }
    print_columns(columns, ("score", "p", "picture"), "track")
