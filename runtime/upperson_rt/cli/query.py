"""`upperson-rt query`, and `upperson-rt log` over the log of queries."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import ADVANCED, OptionGroup, grouped
from upperson_rt.cli.opening import open_retriever
from upperson_rt.cli.options import (
    Debug,
    Json,
    Model,
    Output,
    Searched,
    Where,
    require_sheet,
)
from upperson_rt.cli.output import (
    json_from_hit,
    path_or_none,
    print_hits,
    print_json,
    print_labelled,
    print_line,
    print_note,
    print_notices,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.printable import count_of, shown

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter
    from upperson_rt.phrases.evidence import Explanation
    from upperson_rt.search.request import SearchRequest
    from upperson_rt.search.service import SearchResult
    from upperson_rt.towers import Tower

__all__ = [
    "log_app",
    "query",
]


@dataclass(frozen=True)
class Search(OptionGroup, panel="Search"):
    """What is searched for, and how hits are shown."""

    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="Search with a picture of the person instead."
        ),
    ] = None
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Number of hits.")] = 10
    by_track: Annotated[
        bool,
        typer.Option("--by-track", help="One hit a track, with its best picture and its period."),
    ] = False
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show the evidence for each phrase in each hit, 0 to 1."),
    ] = False
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE.png", help="Also write a contact sheet."),
    ] = None
    paraphrases: Annotated[
        int,
        typer.Option(
            "--paraphrases",
            min=1,
            max=16,
            metavar="N",
            help="Wordings of the sentence whose embeddings are averaged, 1 to 16.",
            rich_help_panel=ADVANCED,
        ),
    ] = 1

    def as_request(self, words: list[str] | None, where: "Filter") -> "SearchRequest":
        """Return the request.

        Raises:
            UsageError: There is neither sentence nor picture, or both.
            InputError: The picture cannot be used.
        """
        from upperson_rt.search.request import SearchRequest

        sentence = " ".join(words) if words else None  # Quotes are easily forgotten.
        if sentence is not None and self.image is not None:
            raise UsageError("a sentence and --image exclude each other: give one of them")
        if sentence is None and self.image is None:
            raise UsageError(
                'describe the person, such as  upperson-rt query "woman in red coat" , or name a '
                "picture with  --image FILE"
            )
        if sentence is not None and not sentence.strip():
            raise UsageError("the sentence is empty: describe the person in a few words")
        if self.image is not None:
            if self.explain or self.paraphrases > 1:
                raise UsageError("--explain and --paraphrases need a sentence, not --image")
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
    print_notices(result.notices)
    if search.sheet is not None:
        _save_sheet(search.sheet, request, result, crops_dir)
    if output.as_json:
        print_json(
            {
                "query": request.sentence,
                "image": path_or_none(search.image),
                "truncated": any(one.code == "sentence_truncated" for one in result.notices),
                "notices": [notice.as_json() for notice in result.notices],
                **_json_from_phrases(result.explanation),
                "by_track": search.by_track,
                "filter": _json_from_filter(conditions),
                "hits": [
                    json_from_hit(rank, hit, crops_dir)
                    | _json_from_evidence(result.explanation, rank)
                    for rank, hit in enumerate(result.hits, start=1)
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
        )
    elif result.hits:
        print_hits(result.hits, crops_dir, _columns_of(result.explanation))


def _save_sheet(
    sheet: Path, request: "SearchRequest", result: "SearchResult", crops_dir: Path | None
) -> None:
    from upperson_rt.gallery.crops import picture_file
    from upperson_rt.sheet import save_sheet

    hits = result.hits
    title = request.sentence or f"like {Path(str(request.picture)).name}"
    save_sheet(sheet, title, hits, crops_dir=crops_dir, explanation=result.explanation)
    print_note(f"contact sheet: {sheet}")
    missing = [hit.item for hit in hits if picture_file(hit.item, crops_dir) is None]
    first = missing[0].source or missing[0].key if missing else ""
    warn_of_pictures_out_of_reach(len(missing), len(hits), first)


def _columns_of(explained: "Explanation | None") -> dict[str, list[str]]:
    if explained is None:
        return {}
    names = [
        f'"{phrase.text}"{" denied" if phrase.negated else ""}' for phrase in explained.phrases
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


# --- `upperson-rt log`

log_app = new_app("Look after query logs.")


@log_app.callback()
def options() -> None:
    """Look after query logs."""


@log_app.command(cls=Command)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="CHAIN",
            help="A chain that the log had, noted elsewhere: it must still have it; may be given "
            "again.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell whether a line was changed, removed or added; exit code 6 if so.

    Whoever may write the log can make all of it anew. The last chain stands for the whole log: note
    it now and then where he cannot write, and pass it with --expect.

    Example: `upperson-rt log verify console/query.log`
    """
    from upperson_rt.log_chain import verify_log

    expected = [chain.strip().lower() for chain in expect or ()]
    for chain in expected:
        if not re.fullmatch("[0-9a-f]{64}", chain):
            raise UsageError(
                f"--expect takes a chain as  upperson-rt log verify  prints it, 64 digits, found "
                f"{shown(chain)}"
            )
    report = verify_log(file, expected)
    if as_json:
        print_json({"file": str(file), "ok": not report.problems, **asdict(report)})
    else:
        for problem in report.problems:
            print_labelled("wrong", typer.colors.RED, problem)
        if not report.problems:
            rest = (
                f", {report.unchained} of them of older releases, not chained"
                if report.unchained
                else ""
            )
            total = report.lines + report.unchained
            print_line(f"{count_of(total, 'line')} as they were written{rest}")
        if report.previous:
            print_line(f"it continues a broken log, whose last known chain is {report.previous}")
        if report.cut_off:
            print_line(f"{count_of(report.cut_off, 'line')} cut off by a full disk or a crash")
        for number in report.expected.values():
            print_line(f"the expected chain is that of line {number}: up to it nothing has changed")
        print_line(f"last chain: {report.chain or 'none'}")
    if report.problems:
        raise IntegrityError(f"{file} is not as it was written: {report.problems[0]}")


@log_app.command(cls=Command)
def acknowledge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the log.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Acknowledge that a log was cut, changed or removed, and goes on in a new file.

    The log gets a line with time, user and reason. Warnings end, and what was broken stays beside
    the log as FILE.broken-1. Run it as the user who writes the log.

    Example: `upperson-rt log acknowledge console/query.log --reason "disk was full"`
    """
    from upperson_rt.log_chain import head_of
    from upperson_rt.query_log import QueryLog

    if not file.exists() and not head_of(file).exists():
        raise InputError(f"there is no query log {file}: name another file")
    with QueryLog(file) as log:
        problem = log.problem
        if problem:
            log.acknowledge(reason)
    if as_json:
        print_json({"file": str(file), "acknowledged": problem or None})
    else:
        print_line(f"acknowledged: {problem}" if problem else f"nothing to acknowledge in {file}")
