import dataclasses
import re
import shlex
from urllib.parse import unquote

import pytest
import typer

import upperson_rt
from tests.helpers.command_line import ROOT
from tests.helpers.frozen_options import APPS
from upperson.config import TrainConfig
from upperson.model.parts import UPPersonConfig

# The class of click, or of the copy of click that newer Typer releases carry.
UsageError = typer.BadParameter.__bases__[0]
TOP = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "runtime/README.md"]
DOCUMENTS = [*TOP, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def read(name):
    return (ROOT / name).read_text("utf-8")


def anchors_of(text):
    """The anchors that Markdown viewers give to headings."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(text):
    """Yield the lines of shell blocks that call one of our programs, as lists of words."""
    for language, block in FENCE.findall(text):
        if language not in {"bash", "sh", "shell", "console"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):  # What follows is another command, or a file.
                    if words and words[0].rpartition("/")[2] in APPS:
                        yield [words[0].rpartition("/")[2], *words[1:]]
                    words = []
                elif words or not re.fullmatch(r"\w+=.*", word):  # Not VARIABLE=value in front.
                    words.append(word)


def parse(program, *words):
    """Parse a command line without running it; raises UsageError if it is wrong."""
    command, rest = typer.main.get_command(APPS[program]), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if rest in (["--help"], ["-h"], ["--version"]):
        return
    if hasattr(command, "commands"):
        raise UsageError(f"{program} has no command '{' '.join(words)}'")
    command.make_context(program, rest)


def complaint(program, *words):
    """Return what is wrong with a command line, or nothing."""
    try:
        parse(program, *words)
    except UsageError as error:
        return error.format_message()
    return ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve_and_commands_parse(name):
    text = read(name)
    # Links within docs/ are MkDocs' affair, which knows the generated pages: make docs.
    links = [] if name.startswith("docs/") else LINK.findall(FENCE.sub("", text))
    for link in (a or b for a, b in links):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target.read_text("utf-8")), f"{name} links to {link}"
    wrong = {shlex.join(words): complaint(*words) for words in commands_in(text)}
    assert {line: found for line, found in wrong.items() if found} == {}
    assert not re.findall(r"^[A-Z_]{6,}$", text, flags=re.MULTILINE), "placeholders"


def test_the_readme_shows_the_commands_and_the_changelog_knows_this_version():
    text = read("README.md")
    assert {command[0] for command in commands_in(text)} == set(APPS)
    assert {target for target in ("make demo", "make test") if target not in text} == set()
    assert f"## [{upperson_rt.__version__}]" in read("CHANGELOG.md")


def test_every_setting_of_a_recipe_is_explained():
    text = read("docs/reference/training.md")
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "model"]
    names += [f"model.{field.name}" for field in dataclasses.fields(UPPersonConfig)]
    assert [name for name in names if f"`{name}`" not in text] == []
