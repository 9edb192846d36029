"""Checks the language of documents, help texts, messages and docstrings' first lines.

``python -m tests.helpers.prose`` lists words that the glossary replaces and sentences that are too
long; ``--table`` prints the words, sentence lengths and findings of each page instead.
"""

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("upperson", "upperson_synthetic", "calibration", "export", "runtime", "benchmarks", "tests"),
)
HISTORY = {"docs/dev/log.md"}
"""Dated notes stay as they were written; so does the changelog."""
WORD_LISTS = {"runtime/upperson_phrases/lexicon.py"}
"""Words of queries, not of messages."""
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "runtime/README.md")

AVERAGE_WORDS, LONG_WORDS, MOST_WORDS, LONG_SHARE = 20, 30, 45, 0.08
"""Of a page: words in an average sentence, in a long one and in the longest; share of long ones."""

WORDS = {
    r"strangers?": "background set, or untrusted",
    r"rungs?|ladders?": "candidate, precision search",
    r"canar(?:y|ies)": "golden samples",
    r"somebody|someone|anybody|whoever|no one": "the user, the caller, if any",
    r"nobody": "no X (`nobody` in code style is the verdict)",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"vouch\w*|facets?": "check, checksum",
    r"ledgers?": "counters, metrics",
    r"desks?": "the name of the use case",
    r"followers?": "tracker",
    r"tells?|told|telling": "report, warn, print, distinguish",
    r"sayings?": "caption attributes",
    r"den(?:ial|ials|ies)": "excluded phrase, refuse",
    r"harms?|harmed": "damage, layer sensitivity",
    r"half sums": "fp16 accumulation",
    r"hardly|barely": "a number",
    r"speaks? for|spoke for": "phrase evidence",
    r"left behind|leave behind": "abandon",
    r"comes? to life|lives? in|lives? beside": "is in",
    r"by halves|for good|in vain": "plain words",
}
_GLOSSARY = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): use for word, use in WORDS.items()}


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each paragraph, list item and table cell, without code."""
    text = re.sub(r"\A---\n.*?^---\n", _blank, text, flags=re.M | re.S)
    text = re.sub(r"^ *```.*?^ *```$", _blank, text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|<[a-z/][^>]*>", _blank, text, flags=re.S)
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        begins = re.match(r"\s*(?:[-*+] |\d+\. |#|\||!!!|\?\?\?|>)", line)
        if (begins or not line.strip()) and lines:
            yield start, " ".join(lines)
            lines = []
        if re.match(r"\s*(?:#|\|)", line):
            yield from (
                (number, cell) for cell in line.strip(" #|").split("|") if cell.strip(" -:")
            )
        elif line.strip():
            start = start if lines else number
            lines.append(line.strip(" -*+>"))


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def plain(paragraph: str) -> str:
    """Return a paragraph with a link's text for a link, and a word for each piece of code."""
    paragraph = re.sub(r"!?\[((?:[^\]`]|`[^`]*`)*)\]\([^)]*\)", r"\1", paragraph)
    paragraph = re.sub(r"``.*?``|`[^`]*`", "code", paragraph)
    return re.sub(r"[*_]{1,2}(?=\w)|(?<=[\w.!?])[*_]{1,2}", "", paragraph)


def sentences(paragraph: str) -> list[list[str]]:
    """Return the words of each sentence of a plain paragraph."""
    parts = re.split(r"(?<=[.!?:;])\s+(?=[A-Z0-9*_\"(]|code)", paragraph)
    words = [re.findall(r"[A-Za-z0-9][\w'.,%/+-]*", part) for part in parts]
    return [found for found in words if len(found) > 2]


def measure(text: str) -> tuple[list[int], list[tuple[int, str]]]:
    """Return the lengths of a page's sentences, in words, and its findings by line number."""
    lengths, found = list[int](), list[tuple[int, str]]()
    for number, paragraph in paragraphs(text):
        prose = plain(paragraph)
        found += ((number, finding) for finding in glossary_findings(prose))
        if text.split("\n")[number - 1].lstrip().startswith(("#", "|")):
            continue
        for words in sentences(prose):
            lengths.append(len(words))
            if len(words) > MOST_WORDS:
                found.append((number, f"{len(words)} words: {' '.join(words[:8])} ..."))
    if lengths and statistics.mean(lengths) > AVERAGE_WORDS:
        found.append((1, f"{statistics.mean(lengths):.1f} words in an average sentence"))
    if sum(n > LONG_WORDS for n in lengths) > max(1, LONG_SHARE * len(lengths)):
        long = sum(n > LONG_WORDS for n in lengths)
        found.append((1, f"{long} of {len(lengths)} sentences have more than {LONG_WORDS} words"))
    return lengths, found


def glossary_findings(prose: str) -> list[str]:
    """Return what to write instead of the glossary's left-hand words."""
    return [
        f'"{match[0]}": write {use}'
        for pattern, use in _GLOSSARY.items()
        for match in pattern.finditer(prose)
    ]


def pages() -> list[str]:
    """Return the documents that are checked, relative to the repository."""
    docs = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("**/*.md"))
    return [*TOP, *(page for page in docs if page not in HISTORY)]


def first_lines() -> Iterator[tuple[str, int, str]]:
    """Yield file, line number and first line of each docstring."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
            for node in nodes:
                if text := ast.get_docstring(node):
                    yield str(path.relative_to(ROOT)), node.body[0].lineno, text.split("\n\n")[0]
            for node in ast.walk(tree):  # Docstrings of attributes.
                for one, two in pairwise(
                    getattr(node, "body", None) or [] if _has_body(node) else []
                ):
                    if isinstance(one, (ast.Assign, ast.AnnAssign)) and isinstance(two, ast.Expr):
                        value = getattr(two.value, "value", None)
                        if isinstance(value, str):
                            yield str(path.relative_to(ROOT)), two.lineno, value.split("\n\n")[0]


def messages() -> Iterator[tuple[str, int, str]]:
    """Yield file, line number and text of each string of four words or more that is no docstring.

    Values in an f-string are left out, and "nobody": there it is the verdict.
    """
    for package in ("runtime", "upperson", "export"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            if file in WORD_LISTS:
                continue
            nodes = [*ast.walk(ast.parse(path.read_text("utf-8")))]
            parts = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
            parts += [[node.value] for node in nodes if isinstance(node, ast.Expr)]
            inner = {id(part) for found in parts for part in found}
            for node in nodes:
                if isinstance(node, ast.JoinedStr):
                    text = "".join(map(_literal, node.values))
                elif isinstance(node, ast.Constant) and id(node) not in inner:
                    text = _literal(node)
                else:
                    continue
                if len(text.split()) >= 4:
                    yield file, node.lineno, re.sub(r"\bnobody\b", "code", text)


def _literal(node: ast.expr) -> str:
    """Return the text of a string, and a word for a value in an f-string."""
    if not isinstance(node, ast.Constant):
        return "code"
    return node.value if isinstance(node.value, str) else ""


def _has_body(node: ast.AST) -> bool:
    return isinstance(getattr(node, "body", None), list)


def help_texts() -> Iterator[tuple[str, str]]:
    """Yield each command's name with its help, and its options' names with theirs."""
    from tests.helpers.frozen_options import iter_commands

    for name, command in iter_commands():
        yield name, command.help or ""
        for parameter in command.params:
            yield f"{name} {parameter.opts[0]}", getattr(parameter, "help", None) or ""


def findings() -> Iterator[str]:
    for page in pages():
        for number, finding in measure((ROOT / page).read_text("utf-8"))[1]:
            yield f"{page}:{number}: {finding}"
    for file, number, line in first_lines():
        for finding in glossary_findings(plain(" ".join(line.split()))):
            yield f"{file}:{number}: {finding}"
    for file, number, text in messages():
        for finding in glossary_findings(plain(text)):
            yield f"{file}:{number}: {finding}"
    for name, text in help_texts():
        for finding in glossary_findings(plain(text)):
            yield f"{name}: {finding}"


def print_table() -> None:
    print(f"{'words':>7} {'mean':>5} {'long':>5} {'found':>5}")
    for page in pages():
        text = (ROOT / page).read_text("utf-8")
        lengths, found = measure(text)
        mean = statistics.mean(lengths or [0])
        long = sum(n > LONG_WORDS for n in lengths)
        print(f"{len(text.split()):7} {mean:5.1f} {long:5} {len(found):5}  {page}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print_table()
    else:
        listed = list(findings())
        sys.exit("\n".join(listed) if listed else 0)
