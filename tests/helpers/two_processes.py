"""Two processes with the variables that torchrun sets; forked, so that neither loads torch anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState


def in_two_processes(work: Callable[[int], Any]) -> list[Any]:
    """Call a function with the rank in both; return what they return, in the order of ranks."""
    start = multiprocessing.get_context("fork")
    answers = start.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def join(rank: int) -> None:
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            answers.put((rank, work(rank), ""))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()

    processes = [start.Process(target=join, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted((answers.get() for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    assert not any(failure for _, _, failure in found), found
    return [answer for _, answer, _ in found]
