"""Run a function on n CPU ranks, each a process with one thread and a gloo group."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(rank, function, world, port, args):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    function(rank, world, *args)
    dist.barrier()
    os._exit(0)  # gloo threads that are still alive abort an ordinary interpreter exit now and then


def run_ranks(world, function, *args):
    mp.spawn(_start, (function, world, free_port(), args), nprocs=world)
