"""Run commands inside the test's process: fast, and open to monkeypatching."""

import json

from typer.testing import CliRunner

import upperson.cli
import upperson_rt.cli


def run(*arguments, app=upperson.cli.app):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments, app=upperson.cli.app):
    result = run(*arguments, "--json", app=app)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def run_rt(*arguments):
    """Run ``upperson-rt``."""
    return run(*arguments, app=upperson_rt.cli.app)


def snapshot(folder):
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
