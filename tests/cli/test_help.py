"""Help and options of every command: snapshots, and rules that hold for all of them."""

import re

import pytest

import upperson_rt
from tests.helpers.frozen_options import APPS, SNAPSHOTS, iter_commands, panel_of, snapshots
from tests.helpers.invoke import run
from upperson_rt.cli.groups import ADVANCED

COMMANDS = dict(iter_commands())
CORE = ("bench query", "bench towers", "doctor", "gallery", "index", "log", "query")


def test_help_and_options_are_frozen():
    kept = {file.name: file.read_text("utf-8") for file in SNAPSHOTS.glob("*.txt")}
    assert snapshots() == kept, (
        "help or options changed: users notice. If that is meant, run  "
        "python -m tests.helpers.frozen_options  and write it into CHANGELOG.md"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_few_plain_options(name):
    program, *words = name.split()
    result = run(*words, "--help", app=APPS[program])
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert f"Example: {name} " in f"{text} "
    assert not re.search(r"[a-z] [,.;:] ", text), "stray spaces"
    assert "<bool>" not in text
    assert "--debug" in text
    assert "--json" in text or program == "upperson"
    if program == "upperson-rt" and " ".join(words).startswith(CORE):
        shown = [one for one in COMMANDS[name].params if one.param_type_name == "option"]
        assert sum(panel_of(one) != ADVANCED for one in shown) <= 12


@pytest.mark.parametrize("program", APPS)
def test_the_programs_have_help_and_a_version(program):
    shown = run("--help", app=APPS[program]).stdout
    own = [name.split()[1] for name in COMMANDS if name.split()[0] == program]
    assert all(word in shown for word in own)
    assert run("--version", app=APPS[program]).stdout == f"{program} {upperson_rt.__version__}\n"
