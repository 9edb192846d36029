"""Help and options of every command: snapshots, and rules that hold for all of them."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.helpers.command_line import environment, run_program
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
    assert "--debug" in text
    assert "--json" in text or program == "upperson"
    if program == "upperson-rt" and " ".join(words).startswith(CORE):
        shown = [one for one in COMMANDS[name].params if one.param_type_name == "option"]
        assert sum(panel_of(one) != ADVANCED for one in shown) <= 12


def test_bash_completes_commands_and_options(tmp_path, monkeypatch):
    """In a bash without the user's files, by the script that ``--install-completion`` writes."""
    program, command = "upperson-rt", "query"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    with monkeypatch.context() as patch:
        patch.setenv("_UPPERSON_RT_COMPLETE", "source_bash")
        shown = run_program(program)
    assert shown.returncode == 0, shown.stderr
    (name,) = re.findall(r"(\w+)\(\) \{", shown.stdout)
    (tmp_path / program).write_text(
        f"#!{bash}\nexec {shlex.quote(sys.executable)} -c "
        f"'from upperson_rt.cli import main; main()' \"$@\"\n"
    )
    (tmp_path / program).chmod(0o755)
    for words, expected in (
        ([program, command[:-2]], command),
        ([program, command, "--expl"], "--explain"),
    ):
        asked = f"{shown.stdout}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        asked += f'{name} {program}; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(
            [bash, "--norc", "--noprofile", "-c", asked],
            env=environment() | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert expected in done.stdout.split(), done


def test_the_old_name_of_an_option_works_with_a_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, old, new in (
        (("query", "red", "--where", "floor=0"), "--where", "--attribute"),
        (("query", "red", "--where=floor=0"), "--where", "--attribute"),
        (("bench", "towers", "--batch", "1"), "--batch", "--batch-size"),
        (("doctor", "--detector", "hog", "--picture", "none.png"), "--picture", "--image"),
    ):
        now = [word.replace(old, new) for word in line]
        before, after = (run(*one, app=APPS["upperson-rt"]) for one in (line, now))
        assert before.stderr.splitlines()[0].startswith(f"{old} is called {new} now")
        assert before.stderr.splitlines()[1:] == after.stderr.splitlines()
        assert (before.exit_code, before.stdout) == (after.exit_code, after.stdout)
    unknown = run("index", "crops", "--where", "a=b", app=APPS["upperson-rt"])
    assert unknown.exit_code == 2  # Of the commands that had it only.
