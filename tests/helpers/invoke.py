"""Run commands inside the test's process: fast, and open to monkeypatching."""

import json

from typer.testing import CliRunner

import upperson.cli
import upperson_rt.cli
from upperson_rt.printable import escape_for_display


def run(*arguments, app=upperson.cli.app):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments, app=upperson.cli.app):
    result = run(*arguments, "--json", app=app)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def run_failing(exit_code, code, *arguments):
    """Return the error of a command of ``upperson``; see `refusal`."""
    result = run(*arguments, "--json")
    assert result.stderr.count("error: ") == bool(result.stdout)  # Else Typer has refused.
    return refusal(result, exit_code, code)


def run_rt(*arguments):
    """Run ``upperson-rt``."""
    return run(*arguments, app=upperson_rt.cli.app)


def run_rt_json(*arguments):
    return run_json(*arguments, app=upperson_rt.cli.app)


def refusal(result, exit_code, code=None):
    """Check that a command refused in one line; return what ``--json`` says of it, if given."""
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.stderr
    if not result.stdout:
        assert code is None
        return None
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == exit_code
    assert code in (None, error["code"]), error
    assert f"error: {escape_for_display(error['message'])}" == result.stderr.splitlines()[-1]
    return error


def snapshot(folder):
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
