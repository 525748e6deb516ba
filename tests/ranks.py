"""Run a function on n CPU ranks, each a process with one thread and a gloo group.

Ranks are forked from a server without threads that has imported the module of the first such function, which takes seconds.
"""

import multiprocessing
import os
import socket
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A port that no process listens on now; another process may take it before the caller does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(rank, function, world, folder, environment, args):
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    # The ranks meet in a file: a port that was free when the parent chose it may be taken when rank 0 listens.
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world)
    function(rank, world, *args)
    dist.barrier()
    os._exit(0)  # gloo threads that are still alive abort an ordinary interpreter exit now and then


def run_ranks(world, function, *args):
    multiprocessing.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        # The server has the environment of the time when it was started.
        given = (function, world, folder, dict(os.environ), args)
        mp.start_processes(_start, given, nprocs=world, start_method="forkserver")
