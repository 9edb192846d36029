"""`upperson-rt query`, and `upperson-rt log` over the log of queries."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.opening import open_retriever, read_filter, warn_of_unknown_cameras
from upperson_rt.cli.options import (
    Attributes,
    BackendOption,
    BundleOption,
    Cameras,
    Debug,
    DeviceOption,
    GalleryOption,
    Json,
    QueryLogOption,
    Since,
    Threads,
    Track,
    TrustOption,
    Until,
    VariantOption,
    default_bundle,
    default_gallery,
    require_sheet,
)
from upperson_rt.cli.output import (
    json_from_hit,
    print_hits,
    print_json,
    print_labelled,
    print_line,
    print_note,
    print_warning,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.printable import count_of, shown

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.phrases.evidence import Explanation
    from upperson_rt.retriever import Retriever
    from upperson_rt.tokenizer import Tokenizer

__all__ = [
    "log_app",
    "query",
]

_MOST_TOKENS_PER_LETTER = 0.75
"""English has 0.3, German 0.4, Turkish 0.6; scripts that CLIP's tokenizer takes apart by bytes have
more than 1."""
_MOST_WORDS = 5


def query(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="SENTENCE", help="What the person looks like.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="Search with a picture of the person instead."
        ),
    ] = None,
    bundle: BundleOption = default_bundle,
    trust: TrustOption = None,
    gallery: GalleryOption = default_gallery,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Hits to return.")] = 10,
    by_track: Annotated[
        bool,
        typer.Option("--by-track", help="One hit a track, with its best picture and its period."),
    ] = False,
    camera: Cameras = None,
    since: Since = None,
    until: Until = None,
    track: Track = None,
    where: Attributes = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE.png", help="Also write a contact sheet."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Also weigh each phrase of the sentence in each hit, 0 to 1."
        ),
    ] = False,
    paraphrases: Annotated[
        int,
        typer.Option(
            "--paraphrases",
            min=1,
            max=16,
            metavar="N",
            help="Wordings of the sentence whose embeddings are averaged, 1 to 16.",
        ),
    ] = 1,
    allow_distilled: Annotated[
        bool,
        typer.Option(
            "--allow-distilled",
            help="Also search a gallery that the model's student or teacher made.",
        ),
    ] = False,
    query_log: QueryLogOption = None,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pictures that a sentence describes, best match first.

    Scores are cosines, less what speaks for something that the sentence denies; compare them within
    one query only. Those of --image are higher than those of sentences. "without a ...", "no ..."
    and "not wearing a ..." lower the score of what has it.

    Example: `upperson-rt query "woman in red coat" -k 5 --camera gate --since 24h`
    """
    sentence = " ".join(words) if words else None  # Quotes are easily forgotten.
    asked = _one_of(sentence, image)
    if image is not None and (explain or paraphrases > 1):
        raise UsageError("--explain and --paraphrases need a sentence, not --image")
    if image is not None:
        from upperson_rt.image_file import open_image

        with open_image(image):  # Before a model is loaded for it.
            pass
    if sheet is not None:
        require_sheet(sheet)
    conditions = read_filter(camera, since, until, track, where)
    with open_retriever(
        bundle,
        gallery,
        "text" if isinstance(asked, str) else "image",
        query_log,
        trust=trust,
        variant=variant,
        backend=backend,
        device=device,
        threads=threads,
        allow_distilled=allow_distilled,
    ) as (opened, running, retriever):
        store, tokenizer = retriever.gallery, retriever.encoder.tokenizer
        warn_of_unknown_cameras(store, conditions)
        truncated = isinstance(asked, str) and bool(tokenizer.encode([asked]).truncated)
        hits = retriever.query(asked, k, conditions, by_track, paraphrases=paraphrases)
        unclear = isinstance(asked, str) and _is_unclear(asked, retriever)
        unknown = _unknown_words(asked, retriever) if isinstance(asked, str) else []
        explained = retriever.explain(asked, hits) if isinstance(asked, str) and explain else None
        total = store.count()
        nothing = "" if hits else _why_nothing(store, total, conditions)
        crops_dir = store.crops_dir
    if truncated:
        print_warning(
            f"the sentence is longer than the model's {tokenizer.context_length} tokens; "
            "its end was cut off"
        )
    if isinstance(asked, str):
        _tell_reading(asked, tokenizer, explained, unknown)
    if unclear:
        print_warning(
            "the model hardly tells people apart by this sentence: name clothes and their colours"
        )
    if sheet is not None:
        from upperson_rt.gallery.crops import picture_file
        from upperson_rt.sheet import save_sheet

        title = asked if isinstance(asked, str) else f"like {asked.name}"
        save_sheet(sheet, title, hits, crops_dir=crops_dir, explanation=explained)
        print_note(f"contact sheet: {sheet}")
        missing = [hit.item for hit in hits if picture_file(hit.item, crops_dir) is None]
        first = missing[0].source or missing[0].key if missing else ""
        warn_of_pictures_out_of_reach(len(missing), len(hits), first)
    if as_json:
        print_json(
            {
                "query": sentence,
                "image": None if image is None else str(image),
                "truncated": truncated,
                **({} if explained is None else _json_from_phrases(explained)),
                "by_track": by_track,
                "filter": _json_from_filter(conditions),
                "hits": [
                    json_from_hit(rank, hit, crops_dir) | _json_from_evidence(explained, rank)
                    for rank, hit in enumerate(hits, start=1)
                ],
                "gallery": gallery,
                "items": total,
                "sheet": None if sheet is None else str(sheet),
                "query_log": None if query_log is None else str(query_log),
                "bundle": str(bundle),
                "variant": opened.variant,
                "backend": running.name,
                "device": running.device,
            }
        )
    elif hits:
        print_hits(hits, crops_dir, _columns_of(explained))
    else:
        print_note(f"nothing found: {nothing}")


def _one_of(sentence: str | None, image: Path | None) -> str | Path:
    if sentence is not None and image is not None:
        raise UsageError("a sentence and --image exclude each other: give one of them")
    if image is not None:
        return image
    if sentence is None:
        raise UsageError(
            'describe the person, such as  upperson-rt query "woman in red coat" , or name a '
            "picture with  --image FILE"
        )
    if not sentence.strip():
        raise UsageError("the sentence is empty: describe the person in a few words")
    return sentence


def _why_nothing(store: "Gallery", total: int, where: "Filter") -> str:
    from upperson_rt.gallery import Filter
    from upperson_rt.gallery.records import EARLIEST_S

    if not total:
        return f"gallery '{store.location}' is empty"
    given = {
        "--camera": where.camera,
        "--since": where.since,
        "--until": where.until,
        "--track": where.track,
        "--where": where.attributes,
    }
    named = [option for option, value in given.items() if value not in (None, {}, ())]
    why = f"of {count_of(total, 'picture')} none passes {' and '.join(named)}"
    is_timed = where.since is not None or where.until is not None
    if is_timed and (timeless := total - store.count(Filter(since=EARLIEST_S))):
        why += f"; {timeless} have no time: index them with  --time-from name  or  mtime"
    return why


def _is_unclear(sentence: str, retriever: "Retriever") -> bool:
    """Whether a sentence hardly tells people apart, as the console says it of the same gallery."""
    import numpy as np

    from upperson_rt.phrases import parse
    from upperson_rt.serve.scale import ORDINARY, Scale

    encoder, gallery = retriever.encoder, retriever.gallery
    nobody_KD = np.empty((0, gallery.embed_dim), np.float32)  # They are for words only.
    scale = Scale(gallery, nobody_KD, lambda: encoder.encode_texts(ORDINARY))
    parsed = parse(sentence)
    return scale.is_unclear(parsed, lambda: encoder.encode_texts([parsed.wanted])[0])


def _unknown_words(sentence: str, retriever: "Retriever") -> list[str]:
    """Return the words that the model hardly can have learned, as the console tells them."""
    from upperson_rt.serve.scale import Vocabulary

    return Vocabulary(retriever.encoder).unfamiliar(sentence)


def _tell_reading(
    sentence: str,
    tokenizer: "Tokenizer",
    explained: "Explanation | None",
    unknown: Sequence[str],
) -> None:
    """Say how a sentence was understood where that is not what its words suggest.

    Args:
        sentence: What was asked.
        tokenizer: The model's.
        explained: What its phrases found, if that was asked for.
        unknown: Words that the model has not learned.
    """
    from upperson_rt.phrases import parse

    parsed = parse(sentence)
    letters = sum(letter.isalnum() for letter in sentence)
    tokens = len(tokenizer.encode([sentence]).input_ids[0]) - 2
    is_foreign = letters > 2 and tokens > _MOST_TOKENS_PER_LETTER * letters
    if is_foreign:
        print_warning(
            f"the model breaks these {letters} letters into {tokens} pieces: it was hardly trained "
            "on this language; describe the person in English"
        )
    elif unknown:
        words = ", ".join(map(shown, unknown[:_MOST_WORDS]))
        print_warning(f"the model may not know {words}: try a plainer word")
    for contradiction in parsed.contradictions:
        print_warning(f"the sentence contradicts itself: {contradiction}")
    for phrase in parsed.unjoined:
        print_note(f"'{phrase.text}' counts as one {phrase.noun}, {' or '.join(phrase.colours)}")
    if parsed.denied:
        print_note("must not be there: " + ", ".join(phrase.text for phrase in parsed.denied))
    if explained is None:
        is_whole = not (parsed.phrases or is_foreign or unknown)  # Those lines say more.
    else:
        is_whole = not explained.phrases  # And no column of phrases is there.
    if is_whole:
        print_note("no phrase of the sentence was understood: it counts as a whole")


def _columns_of(explained: "Explanation | None") -> dict[str, list[str]]:
    if explained is None:
        return {}
    names = [
        f'"{phrase.text}"{" denied" if phrase.negated else ""}' for phrase in explained.phrases
    ]
    cells = [["" if x != x else f"{x:.2f}" for x in row] for row in explained.evidence_HP.T]
    return dict(zip(names, cells, strict=True))


def _json_from_phrases(explained: "Explanation") -> dict[str, Any]:
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
