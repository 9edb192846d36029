"""`search`: the one path from a request to a result.

Requests are embedded, candidates come from the gallery, excluded phrases lower scores, then come
likelihoods, evidence and notices. Library, command line, pages and API translate to a
`SearchRequest` and from a `SearchResult`, and do nothing of it themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import ParsedSentence, Phrase
from upperson_phrases.evidence import Evidence, Explanation, weighable
from upperson_phrases.spelling import with_corrections
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.gallery.records import EARLIEST_S, check_hits, track_of_hit
from upperson_rt.score_calibration import (
    MatchLabel,
    calibration_in_use,
    site_calibration_stamp,
)
from upperson_rt.search.background import BackgroundScores, is_vague
from upperson_rt.search.features import CANDIDATES
from upperson_rt.search.notices import Notice, unknown_cameras
from upperson_rt.search.query import EmbeddedQuery, QueryEncoder, QuerySentence, SearchRequest
from upperson_rt.search.verdict import Candidates, Judge, Judged, Verdict

_CANDIDATES = 40
"""Hits that are looked at where phrases are excluded, at least: up to 20 do not depend on k."""
CERTAIN = 50
"""Hits, of those that are put in order of likelihood: a page of the console, and `COMPARED`."""
_MOST_CANDIDATES = 4000
_FOREIGN = 0.75
"""A sentence with this share of words that are unknown or misspelt is not corrected: it is probably
in another language."""
_MOST_TOKENS_PER_LETTER = 0.75
"""English has 0.3, German 0.4, Turkish 0.6; scripts that CLIP's tokenizer takes apart by bytes have
more than 1."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hits, and what the request wanted to know about them."""

    hits: list[Hit]
    """Best first: by score or, if the request is a sentence and is calibrated, by likelihood; one
    without a likelihood keeps its place."""
    parsed: ParsedSentence | None
    """The sentence's phrases; None without a sentence."""
    labels: list[MatchLabel]
    """One a hit; empty unless `SearchRequest.calibrate`."""
    likelihoods: list[float | None]
    """0 to 1, one a hit, None where its label is empty; empty unless `SearchRequest.calibrate`."""
    verdict: Verdict | None
    """Whether some picture matches; None unless `SearchRequest.calibrate`."""
    explanation: Explanation | None
    """None without a sentence, or unless `SearchRequest.explain`."""
    notices: list[Notice]
    """Warnings first; empty unless `SearchRequest.notices`."""
    ranked: int = 0
    """So many of the first hits are in order of likelihood."""

    @property
    def notices_beside_verdict(self) -> list[Notice]:
        """The notices that the text of the verdict does not repeat."""
        return self.notices if self.verdict is None else self.verdict.without_repeated(self.notices)


@dataclass(frozen=True)
class PictureMatch:
    """How well one picture matches a search."""

    score: float
    likelihood: float | None
    """0 to 1; None where the label is empty."""
    label: MatchLabel


class SearchService:
    """Searches one gallery. Safe to use from several threads."""

    def __init__(
        self,
        encoder: Encoder | QueryEncoder,
        gallery: Gallery,
        background_KD: NDArray[np.float32] | None = None,
    ) -> None:
        """Search a gallery that was opened with the encoder's fingerprint."""
        self.queries = encoder if isinstance(encoder, QueryEncoder) else QueryEncoder(encoder)
        self.gallery = gallery
        if background_KD is None:
            background_KD = np.empty((0, gallery.embed_dim), np.float32)
        self.background = BackgroundScores(gallery, background_KD, self.queries.background)
        self._judge = self._made_judge()

    @property
    def judge(self) -> Judge:
        """Judges by the calibration in use, as it is now: a site may have made one since."""
        if self._judge[0] != site_calibration_stamp(self.gallery.location):
            self._judge = self._made_judge()
        return self._judge[1]

    def _made_judge(self) -> tuple[object, Judge]:
        own, location = self.queries.encoder, self.gallery.location
        stamp = site_calibration_stamp(location)  # Before it is read: a later one is seen later.
        bundled = getattr(own, "calibration", None)  # An encoder that is not ours has none.
        calibration = calibration_in_use(location, bundled, own.fingerprint)
        return stamp, Judge(self.gallery, self.background, self.queries.evidence, calibration)

    def search(self, request: SearchRequest) -> SearchResult:
        """Run one search."""
        return self.search_all([request])[0]

    def search_all(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Run several searches, as `search`; their sentences and pictures share batches."""
        queries = self.queries.embed(requests)
        found = self._find(requests, queries)
        return list(map(self._result, requests, queries, found))

    def match(
        self, request: SearchRequest, id_: int, item: Item, vector_D: NDArray[np.float32]
    ) -> PictureMatch:
        """Return score, likelihood and label of a picture of the gallery with a (D,) embedding."""
        (query,) = self.queries.embed([request])
        score = float((query.vectors_AD.astype(np.float64) @ vector_D.astype(np.float64)).max())
        if query.excluded:
            score -= float(self.queries.evidence.against(query.excluded, vector_D[None])[0])
        hit = Hit(id=id_, score=score, item=item)
        return PictureMatch(
            score,
            *self.judge.judge_picture(
                query, request.where, hit, vector_D, self._words(query.sentence).all
            ),
        )

    def explain(self, parsed: ParsedSentence, hits: Sequence[Hit]) -> Explanation:
        """Compute the evidence of each phrase of a sentence in hits of the gallery."""
        phrases = weighable(parsed)
        evidence_HP = np.full((len(check_hits(hits)), len(phrases)), np.nan, dtype=np.float32)
        vectors = self.gallery.vectors_of(hits)
        there = [row for row, hit in enumerate(hits) if hit.id in vectors]
        if there:
            images_ND = np.stack([vectors[hits[row].id] for row in there])
            for column, phrase in enumerate(phrases):
                evidence_HP[there, column] = self.queries.evidence.of(phrase, images_ND)
        return Explanation(parsed=parsed, phrases=phrases, evidence_HP=evidence_HP)

    def _find(
        self, requests: Sequence[SearchRequest], queries: Sequence[EmbeddedQuery]
    ) -> list["_Found"]:
        found = [_Found()] * len(requests)
        together: dict[tuple[int, int, bool], list[int]] = {}
        for row, (one, query) in enumerate(zip(requests, queries, strict=True)):
            is_ranked = one.calibrate and query.is_sentence and self.judge.calibration is not None
            k = max(one.k, CANDIDATES) if is_ranked else one.k
            # The rest of those that are ranked may lack some: that takes less time.
            certain = max(one.k, CERTAIN) if is_ranked else None
            if query.excluded:
                rest = query.excluded, k, one.where, one.by_track, certain
                own = [
                    search_excluding(self.gallery, self.queries.evidence, vector_D, *rest)
                    for vector_D in query.vectors_AD
                ]
                ranked = CANDIDATES if is_ranked else 0
                found[row] = _Found(hits=_merged(own, k, one.by_track), ranked=ranked)
            elif certain is not None:
                found[row] = self._find_ranked(one, query, k, certain)
            else:  # Requests that share a filter object are searched together.
                together.setdefault((one.k, id(one.where), one.by_track), []).append(row)
        for rows in together.values():
            one = requests[rows[0]]
            queries_QD = np.concatenate([queries[row].vectors_AD for row in rows])
            hits = iter(self.gallery.search(queries_QD, one.k, one.where, one.by_track))
            for row in rows:
                own = [next(hits) for _ in queries[row].vectors_AD]
                found[row] = _Found(hits=_merged(own, one.k, one.by_track))
        return found

    def _find_ranked(
        self, request: SearchRequest, query: EmbeddedQuery, k: int, certain: int
    ) -> "_Found":
        """Find those with the highest scores that are put in order of likelihood."""
        own = [
            self.gallery.search_with_vectors(vector_D, k, request.where, request.by_track, certain)
            for vector_D in query.vectors_AD
        ]
        best = [(hits[:CANDIDATES], found_ND[:CANDIDATES]) for hits, found_ND in own]
        return _Found(
            hits=_merged([hits for hits, _ in own], k, request.by_track),
            ranked=CANDIDATES,
            vectors={
                hit.id: vector_D
                for hits, found_ND in own
                for hit, vector_D in zip(hits, found_ND, strict=True)
            },
            candidates=() if request.by_track else best,
        )

    def _result(
        self, request: SearchRequest, query: EmbeddedQuery, found: "_Found"
    ) -> SearchResult:
        hits = found.hits
        parsed = None if query.sentence is None else query.sentence.parsed
        if request.notices and parsed is not None and is_vague(parsed):
            self.background.refresh()
        words = self._words(query.sentence) if request.calibrate or request.notices else _Words()
        judged: Judged | None = None
        ranked, rows = 0, [*range(len(hits))]
        if request.calibrate:
            judged = self.judge.judge(
                query, request.where, hits, words.all, found.vectors, found.candidates
            )
            ranked, rows = _order(judged, found.ranked, request.k)
            hits = [hits[row] for row in rows]
        explanation = None if parsed is None or not request.explain else self.explain(parsed, hits)
        notices: list[Notice] = []
        if request.notices:
            notices = self._notices(request.where or Filter(), query, hits, words)
            few = None if judged is None else judged.not_compared
            if few is not None and few.pictures:
                notices.insert(0, Notice("cameras_not_compared", few.fields))
        return SearchResult(
            hits=hits,
            ranked=ranked,
            parsed=parsed,
            labels=[] if judged is None else [judged.labels[row] for row in rows],
            likelihoods=[] if judged is None else [judged.likelihoods[row] for row in rows],
            verdict=None if judged is None else judged.verdict,
            explanation=explanation,
            notices=notices,
        )

    def _words(self, sentence: QuerySentence | None) -> "_Words":
        if sentence is None:
            return _Words()
        unknown = self.queries.vocabulary.unknown(sentence.words)
        return _Words(unknown, self.queries.vocabulary.corrections(sentence.words, unknown))

    def _is_indistinct(self, query: EmbeddedQuery) -> bool:
        sentence = query.sentence
        return (
            sentence is not None
            and query.is_sentence_only
            and self.background.is_indistinct(sentence.parsed, query.vectors_AD[0])
        )

    def _notices(
        self, where: Filter, query: EmbeddedQuery, hits: Sequence[Hit], words: "_Words"
    ) -> list[Notice]:
        notices = [] if query.sentence is None else self._of_sentence(query.sentence, words)
        if not query.excluded and self._is_indistinct(query):
            notices.append(Notice("indistinct"))
        notices += unknown_cameras(self.gallery, where)
        if not hits:
            notices.append(self._why_nothing(where))
        return sorted(notices, key=lambda notice: not notice.is_warning)

    def _of_sentence(self, sentence: QuerySentence, words: "_Words") -> list[Notice]:
        """Report how a sentence was read where that is not what its words suggest."""
        parsed, tokenizer = sentence.parsed, self.queries.encoder.tokenizer
        notices = []
        if sentence.is_truncated:
            length = tokenizer.context_length
            notices.append(Notice("sentence_truncated", {"context_length": length}))
        letters = sum(letter.isalnum() for letter in parsed.wanted)
        tokens = sentence.token_count
        if letters > 2 and tokens > _MOST_TOKENS_PER_LETTER * letters:
            notices.append(Notice("language_unfamiliar", {"letters": letters, "tokens": tokens}))
        else:
            meant = words.meant
            rest = [word for word in words.unknown if word not in meant]
            if len(rest) > 1 and len(words.all) >= _FOREIGN * len(sentence.words):
                meant, rest = {}, words.all
            if meant:
                fields = {"words": meant, "sentence": with_corrections(parsed.sentence, meant)}
                notices.append(Notice("did_you_mean", fields))
            if rest:
                notices.append(Notice("words_unknown", {"words": rest}))
        if parsed.unread:
            notices.append(Notice("words_unread", {"words": [*parsed.unread]}))
        if len(parsed.readings) > 1:
            notices.append(Notice("either", {"sentences": [*parsed.readings]}))
        elif parsed.read_as != parsed.sentence.lower():
            notices.append(Notice("rewritten", {"sentence": parsed.read_as}))
        notices += [
            Notice("contradiction", {"contradiction": one}) for one in parsed.contradictions
        ]
        for phrase in parsed.unjoined:
            fields = {"phrase": phrase.text, "noun": phrase.noun, "colours": [*phrase.colours]}
            notices.append(Notice("colours_joined", fields))
        if parsed.excluded:
            notices.append(Notice("excluded", {"phrases": [one.text for one in parsed.excluded]}))
        if not parsed.phrases and not {one.code for one in notices} & _SAY_MORE:
            notices.append(Notice("not_understood"))
        return notices

    def _why_nothing(self, where: Filter) -> Notice:
        total = self.gallery.count()
        if not total:
            return Notice("gallery_empty", {"gallery": self.gallery.location})
        given = {
            "camera": where.camera,
            "since": where.since,
            "until": where.until,
            "track": where.track,
            "where": where.attributes,
        }
        is_timed = where.since is not None or where.until is not None
        fields = {
            "pictures": total,
            "by": [name for name, value in given.items() if value not in (None, {}, ())],
            "without_time": total - self.gallery.count(Filter(since=EARLIEST_S)) if is_timed else 0,
        }
        return Notice("filter_matches_nothing", fields)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a search found, before it is judged."""

    hits: list[Hit] = field(default_factory=list)
    """Highest score first, more than were requested if they are ranked."""
    ranked: int = 0
    """So many of them are put in order of likelihood."""
    vectors: Mapping[int, NDArray[np.float32]] | None = None
    """Embeddings (D,) of the hits by `Hit.id`; None if they were not read."""
    candidates: Sequence[Candidates] = ()
    """See `Judge.judge`."""


def _order(judged: Judged, ranked: int, k: int) -> tuple[int, list[int]]:
    """Return the rows of the first k hits, and how many of them are in order of likelihood.

    These are the first ``ranked`` hits. One whose likelihood is not known stays where it is.
    """
    rows = [*range(len(judged.labels))]
    known = [row for row in rows[:ranked] if judged.order[row] is not None]
    best = sorted(known, key=lambda row: -(judged.order[row] or 0.0))
    for place, row in zip(known, best, strict=True):
        rows[place] = row
    return min(ranked, len(rows), k) if known else 0, rows[:k]


@dataclass(frozen=True)
class _Words:
    """Words of a sentence that a model has not learned."""

    unknown: Sequence[str] = ()
    meant: Mapping[str, str] = field(default_factory=dict)
    """What misspelt ones may mean, see `Vocabulary.corrections`."""

    @property
    def all(self) -> list[str]:
        """Those that it does not know, or that are probably misspelt."""
        return [*dict.fromkeys([*self.unknown, *self.meant])]


_SAY_MORE = frozenset({"language_unfamiliar", "words_unknown"})
"""Notices beside which `not_understood` says nothing new."""


def _merged(found: Sequence[list[Hit]], k: int, by_track: bool) -> list[Hit]:
    """Return the best k hits of a sentence's readings, each picture or track once."""
    if len(found) == 1:
        return found[0]
    best: dict[object, Hit] = {}
    for hit in sorted(chain(*found), key=lambda hit: (-hit.score, hit.id)):
        best.setdefault((by_track and track_of_hit(hit)) or hit.id, hit)
    return list(best.values())[:k]


def search_excluding(
    gallery: Gallery,
    evidence: Evidence,
    query_D: NDArray[np.float32],
    excluded: Sequence[Phrase],
    k: int,
    where: Filter | None,
    by_track: bool,
    certain: int | None = None,
) -> list[Hit]:
    """Search, and lower the scores of hits with evidence for an excluded phrase.

    A bounded number of candidates, searched away from what is excluded, is rescored. For
    ``certain`` see `Gallery.search_with_vectors`.
    """
    candidates = max(k, _CANDIDATES, min(2 * k, _MOST_CANDIDATES))
    hits, images_ND = gallery.search_with_vectors(
        evidence.away(query_D, excluded), candidates, where, by_track, certain
    )
    if not hits:
        return []
    own_N = (images_ND.astype(np.float64) @ query_D.astype(np.float64)).astype(np.float32)
    scores_N = own_N - evidence.against(excluded, images_ND)
    best = sorted(range(len(hits)), key=lambda row: (-scores_N[row], hits[row].id))[:k]
    return [replace(hits[row], score=float(scores_N[row])) for row in best]
