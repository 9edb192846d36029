"""What an alert would have raised: the `test` of an alert, which reads only."""

from dataclasses import dataclass

import numpy as np

from upperson_alerts.alerts import CONFIRMED, Alert, find_alert
from upperson_alerts.background import (
    STEP_ROWS,
    WINDOW_ROWS,
    Counts,
    Standing,
    read_visits,
)
from upperson_alerts.outbox import outbox_of
from upperson_alerts.scoring import scorer_of
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.search.query import QueryEncoder


@dataclass(frozen=True, kw_only=True)
class PastVisit:
    """A visit and how it compares with the others."""

    item: Item
    """Its best picture."""
    picture: int
    """`Hit.id` of it."""
    score: float
    p_value: float
    would_raise: bool


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What an alert would have raised in a period."""

    alert: Alert
    standing: Standing
    visits: int
    """In the period."""
    against: str
    """Their background: ``earlier`` visits or, if those are too few, all ``others``."""
    raised: list[PastVisit]
    """What it would have raised, in the order of time."""
    best: list[PastVisit]
    """Up to five with the highest scores, raised or not."""


def replay_alert(gallery: Gallery, encoder: Encoder, reference: str, since: float) -> Replay:
    """Return what an alert (id or name) would have raised since a time, in unix seconds.

    Raises:
        InputError: There is no such alert, or the gallery has no outbox.
    """
    with outbox_of(gallery) as outbox:
        alert, last_id = find_alert(outbox, reference), outbox.last_id
        marked = outbox.visits(topic=alert.id, label=CONFIRMED)
        confirmed = {int(visit, 16) for _, visit in marked}
    scorer = scorer_of(QueryEncoder(encoder), gallery, [alert.sentence])
    best: dict[int, tuple[float, int, Item]] = {}
    first_id = max(0, last_id - WINDOW_ROWS)
    for end in range(last_id, first_id, -STEP_ROWS):
        ids, items, visits = read_visits(
            gallery, max(first_id, end - STEP_ROWS), end, scorer.scores
        )
        for row, visit in enumerate(visits.ids):
            number = visits.best_picture(row, 0)
            one = (float(visits.scores_VS[row, 0]), ids[number], items[number])
            if alert.cameras is None or one[2].camera in alert.cameras:
                best[visit] = max(best.get(visit, one), one, key=lambda pair: pair[0])
    return _compared(alert, best, confirmed, since)


def _compared(
    alert: Alert, best: dict[int, tuple[float, int, Item]], confirmed: set[int], since: float
) -> Replay:
    counts = Counts()
    for _, _, item in best.values():
        counts.add(item.time)
    standing = Standing.of(counts.visits - len(confirmed & best.keys()), counts.per_day, alert.rate)
    new = {
        visit: one
        for visit, one in best.items()
        if one[2].time is not None and one[2].time >= since
    }
    background = [
        one[0] for visit, one in best.items() if visit not in new | dict.fromkeys(confirmed)
    ]
    is_earlier = standing.required is not None and len(background) >= standing.required
    if not is_earlier:
        background = [one[0] for visit, one in best.items() if visit not in confirmed]
    scores = np.sort(np.array(background, np.float64))
    visits = []
    for visit, (score, number, item) in new.items():
        # Among all others a visit must not count against itself.
        own = not is_earlier and visit not in confirmed
        above = len(scores) - int(np.searchsorted(scores, score)) - own
        p_value = (1 + above) / (len(scores) - own + 1)
        raises = standing.is_ready and p_value <= (standing.allowed_p or 0.0)
        visits.append(
            PastVisit(item=item, picture=number, score=score, p_value=p_value, would_raise=raises)
        )
    raised = [one for one in visits if one.would_raise]
    return Replay(
        alert=alert,
        standing=standing,
        visits=len(new),
        against="earlier" if is_earlier else "others",
        raised=sorted(raised, key=lambda one: one.item.time or 0.0),
        best=sorted(visits, key=lambda one: -one.score)[:5],
    )
