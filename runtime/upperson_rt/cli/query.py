"""`upperson-rt query`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.opening import open_retriever
from upperson_rt.cli.options import Model, Output, Searched, Where, require_sheet
from upperson_rt.cli.output import (
    json_from_hit,
    path_or_none,
    print_hits,
    print_line,
    print_note,
    print_notices,
    print_result,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import UsageError
from upperson_rt.extensions import load_service

if TYPE_CHECKING:
    from upperson_phrases.evidence import Explanation
    from upperson_rt.gallery import Filter
    from upperson_rt.search.query import SearchRequest
    from upperson_rt.search.service import SearchResult
    from upperson_rt.towers import Tower


@dataclass(frozen=True)
class Search(OptionGroup, panel="Search"):
    """The query, and what is shown of the result."""

    image: Path | None = option(
        None, "Search with a picture of the person instead.", metavar="FILE"
    )
    k: int = option(10, "Number of hits.", "-k", "--top", min=1)
    by_track: bool = option(False, "One hit a track, with its best picture and its period.")
    explain: bool = option(False, "Show the evidence for each phrase in each hit, 0 to 1.")
    sheet: Path | None = option(None, "Also write a contact sheet.", metavar="FILE.png")
    paraphrases: int = advanced(
        1,
        "Wordings of the sentence whose embeddings are averaged, 1 to 16.",
        min=1,
        max=16,
        metavar="N",
    )

    def as_request(self, words: list[str] | None, where: "Filter") -> "SearchRequest":
        """Return the request."""
        from upperson_rt.search.query import SearchRequest

        sentence = " ".join(words) if words else None  # Quotes are optional.
        if sentence is not None and self.image is not None:
            raise UsageError(
                "a sentence and --image exclude each other: give one of them",
                code="sentence_and_picture",
            )
        if sentence is None and self.image is None:
            raise UsageError(
                'describe the person, such as  upperson-rt query "woman in red coat" , or name a '
                "picture with  --image FILE",
                code="sentence_missing",
            )
        if sentence is not None and not sentence.strip():
            raise UsageError(
                "the sentence is empty: describe the person in a few words", code="sentence_empty"
            )
        if self.image is not None:
            if self.explain or self.paraphrases > 1:
                raise UsageError(
                    "--explain and --paraphrases need a sentence, not --image",
                    code="sentence_missing",
                )
            from upperson_rt.image_file import open_image

            with open_image(self.image):  # Before a model is loaded for it.
                pass
        return SearchRequest(
            sentence=sentence,
            picture=self.image,
            where=where,
            k=self.k,
            by_track=self.by_track,
            paraphrases=self.paraphrases,
            explain=self.explain,
            calibrate=True,
            notices=True,
        )


@grouped
def query(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="SENTENCE", help="What the person looks like.")
    ] = None,
    *,
    search: Search,
    where: Where,
    model: Model,
    searched: Searched,
    output: Output,
) -> None:
    """Find the pictures that a sentence describes, best match first.

    Scores are cosines; compare them within one query only. Those of --image are higher than those
    of sentences. "without a ...", "no ..." and "not wearing a ..." lower the score of hits with it.

    Example: `upperson-rt query "woman in red coat" -k 5 --camera gate --since 24h`
    """
    conditions = where.as_filter()
    request = search.as_request(words, conditions)
    if search.sheet is not None:
        require_sheet(search.sheet)
    tower: Tower = "image" if request.sentence is None else "text"
    with open_retriever(model, searched, tower) as (opened, running, retriever):
        result = retriever.search(request)
        total, crops_dir = retriever.gallery.count(), retriever.gallery.crops_dir
    print_notices(result.notices_beside_verdict)
    if search.sheet is not None:
        _save_sheet(search.sheet, request, result, crops_dir)
    found = {
        "query": request.sentence,
        "image": path_or_none(search.image),
        "truncated": any(one.code == "sentence_truncated" for one in result.notices),
        "notices": [notice.as_json() for notice in result.notices],
        "verdict": None if result.verdict is None else result.verdict.as_json(),
        **_json_from_phrases(result.explanation),
        "by_track": search.by_track,
        "filter": _json_from_filter(conditions),
        "hits": [
            json_from_hit(rank, hit, crops_dir)
            | {"likelihood": likelihood and round(likelihood, 4), "match": label}
            | _json_from_evidence(result.explanation, rank)
            for rank, (hit, likelihood, label) in enumerate(
                zip(result.hits, result.likelihoods, result.labels, strict=True), start=1
            )
        ],
        "gallery": searched.gallery,
        "items": total,
        "sheet": path_or_none(search.sheet),
        "query_log": path_or_none(searched.query_log),
        "bundle": str(model.bundle),
        "variant": opened.variant,
        "backend": running.name,
        "device": running.device,
    }
    print_result(found, output.as_json, lambda _: _print_result(result, crops_dir))


def _print_result(result: "SearchResult", crops_dir: Path | None) -> None:
    verdict = result.verdict
    if verdict is not None and result.hits:
        (print_note if verdict.word == "uncalibrated" else print_line)(verdict.text)
    likely = ["" if one is None else f"{one:.2f}" for one in result.likelihoods]
    print_hits(result.hits, crops_dir, likely, _columns_of(result.explanation))


def _save_sheet(
    sheet: Path, request: "SearchRequest", result: "SearchResult", crops_dir: Path | None
) -> None:
    from upperson_rt.gallery.crops import picture_file

    hits = result.hits
    title = request.sentence or f"like {Path(str(request.picture)).name}"
    load_service("sheet")(
        sheet, title, hits, crops_dir=crops_dir, explanation=result.explanation, result=result
    )
    print_note(f"contact sheet: {sheet}")
    missing = [hit.item for hit in hits if picture_file(hit.item, crops_dir) is None]
    first = missing[0].source or missing[0].key if missing else ""
    warn_of_pictures_out_of_reach(len(missing), len(hits), first)


def _columns_of(explained: "Explanation | None") -> dict[str, list[str]]:
    if explained is None:
        return {}
    names = [
        f'"{phrase.text}"{" excluded" if phrase.negated else ""}' for phrase in explained.phrases
    ]
    cells = [["" if x != x else f"{x:.2f}" for x in row] for row in explained.evidence_HP.T]
    return dict(zip(names, cells, strict=True))


def _json_from_phrases(explained: "Explanation | None") -> dict[str, Any]:
    if explained is None:
        return {}
    return {
        "phrases": [
            {
                "text": phrase.text,
                "kind": phrase.kind,
                "noun": phrase.noun or None,
                "colours": list(phrase.colours),
                "negated": phrase.negated,
                "start": phrase.start,
                "end": phrase.end,
            }
            for phrase in explained.phrases
        ],
        "read_as": explained.parsed.read_as,
        "contradictions": list(explained.parsed.contradictions),
    }


def _json_from_evidence(explained: "Explanation | None", rank: int) -> dict[str, Any]:
    """Return a hit's evidence in the order of the phrases; null if it has left the gallery."""
    if explained is None:
        return {}
    row = explained.evidence_HP[rank - 1].tolist()
    return {"evidence": [None if value != value else round(value, 4) for value in row]}


def _json_from_filter(where: "Filter") -> dict[str, Any]:
    cameras = where.cameras
    return {
        "cameras": None if cameras is None else list(cameras),
        "since": where.since,
        "until": where.until,
        "track": where.track,
        "attributes": dict(where.attributes),
    }
