"""What names from outside look like where they are shown."""

import io
import logging

import pytest
from rich.console import Console

from upperson_rt.cli import output
from upperson_rt.printable import (
    code_span,
    escape_for_display,
    get_logger,
    one_line,
    safe_repr,
    visible_text,
)

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\u2028\u202egpj.\u200b\ufeff\udcff\x00\x7f\x85"
"""A title, a cleared screen, colours, line ends, a reversed name, hidden marks, bytes, nulls."""
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\u2028\u202egpj.\u200b\ufeff\udcff\x00\x7f\x85"


def test_what_a_terminal_would_obey_is_shown_and_names_of_all_languages_stay():
    assert escape_for_display(HOSTILE) == SHOWN
    persian, heart = "دوربین می\u200cروم", "\N{BLACK HEART SUIT}\ufe0f"
    for name in (SHOWN, "Türe", "門\u3000二", persian, heart, "a\u00a0b"):
        assert escape_for_display(name) == name


@pytest.mark.parametrize(
    "unseen",
    ["", " \t", "\u200b", "\u200d\u2060\ufeff", "\u00ad", "\u3164", "\u2800\ufe0f", "\x00"],
)
def test_a_reason_that_shows_nothing_is_none(unseen):
    assert visible_text(unseen) == ""
    for seen in ("case 7", "門", "?", "\N{BLACK HEART SUIT}\ufe0f", "می\u200cروم"):
        assert visible_text(f" {seen}\n") == seen
        assert visible_text(f"{seen}{unseen}".strip()) == f"{seen}{unseen}".strip()


def test_values_and_messages_are_shown_in_a_few_words_and_no_markdown():
    assert code_span("a`b``c") == "```a`b``c```"
    assert code_span("`a\n# b") == r"`` `a\n# b ``"
    assert code_span("\u202e<b>") == r"`\u202e<b>`"
    assert one_line(ValueError("cannot\n\tread  it\n")) == "cannot read it"
    assert safe_repr("\x1b" * 3) == r"'\x1b\x1b\x1b'"
    assert len(safe_repr("a" * 10_000)) == 60
    assert safe_repr(10**5000) == "a value of type int"


def test_a_log_is_printable_whoever_handles_it(caplog):
    log = get_logger("upperson_rt.test")
    assert get_logger("upperson_rt.test").filters == log.filters
    log.warning("camera %s: 100 %% of %d", HOSTILE, 3, extra={"camera": HOSTILE})
    (record,) = caplog.records
    assert record.getMessage() == f"camera {SHOWN}: 100 % of 3"
    assert record.camera == HOSTILE  # Exact where it is data.
    assert logging.getLogger("upperson_rt.test") is log

    class UnspeakableError(Exception):
        def __str__(self):
            raise self

    log.warning("failed: %s", UnspeakableError())
    shown = "'failed: %s' of values that cannot be shown: UnspeakableError"
    assert caplog.records[-1].getMessage() == shown


def test_whatever_commands_print_is_printable(capsys):
    output.print_line(HOSTILE, HOSTILE)
    output.print_labelled(HOSTILE, "red", HOSTILE)
    table = output.new_table(HOSTILE)
    table.add_row(HOSTILE)
    output.print_table(table)
    for show in (output.print_note, output.print_warning, output.print_error, output.print_prompt):
        show(HOSTILE)
    with output.show_progress() as progress:
        progress(HOSTILE, 1, 1)
    printed = capsys.readouterr()
    assert printed.out.count(SHOWN) == 6
    assert printed.err.count(SHOWN) == 5
    ours = "\n\x1b[0m"  # Line ends, and the colours of labels.
    assert all(one.isprintable() or one in ours for one in printed.out + printed.err)


def test_what_is_drawn_on_a_terminal_is_printable_and_no_markup(monkeypatch, capsys):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200, legacy_windows=False)
    monkeypatch.setattr(output, "Console", lambda **given: console)
    with output.live_display(True) as redraw:
        redraw(f"[red]{HOSTILE}")
    with output.show_progress() as progress:
        progress(f"[red]{HOSTILE}", 1, 2)
    with output.new_progress() as bar:
        bar.add_task(f"[red]{HOSTILE}", total=2)
    table = output.new_table("[red]head", HOSTILE)
    table.add_row("[blue]x[/blue] :bomb:", ("[b]\n", "bold red"))
    console.print(table)
    drawn = stream.getvalue()
    assert drawn.count(f"[red]{SHOWN}") >= 3
    for text in ("[red]head", "[blue]x[/blue] :bomb:", r"[b]\n"):
        assert text in drawn
    assert "\x1b]0;" not in drawn
    assert "\x1b[2J" not in drawn
    output.print_error("a" * 10_000 + ": do this")
    printed = capsys.readouterr().err
    assert len(printed) < 5000
    assert printed.endswith("aaa: do this\n")
