"""Turns at the encoder: in the order of coming, and a bounded number."""

import threading
from contextlib import ExitStack

import pytest

from upperson_console.turns import BusyError, Turns


def test_who_comes_first_is_first():
    turns, order, threads = Turns(running=1, waiting=8), [], []

    def ask(number):
        with turns.turn():
            order.append(number)

    with turns.turn():
        for number in range(8):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            while turns.waiting < number + 2:
                pass
    for thread in threads:
        thread.join()
    assert order == [*range(8)]
    assert (turns.waiting, turns.taken) == (0, 9)


def test_so_many_run_and_what_fails_gives_its_turn_back():
    turns = Turns(running=2, waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), turns.turn():
            1 / 0  # noqa: B018
    with ExitStack() as stack:
        stack.enter_context(turns.turn())
        stack.enter_context(turns.turn())
        with pytest.raises(BusyError, match="try again in"), turns.turn():
            pass
    assert (turns.waiting, turns.taken, turns.refused) == (0, 5, 1)
