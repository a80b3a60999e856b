"""Starts programs as users start them: alone or under torchrun, without a fixed port that something else may take."""

from __future__ import annotations

import os
import random
import socket
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def python(processes: int = 1) -> list[str]:
    """The beginning of the command; torchrun's workers share its own store, so that no port is chosen in advance."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def environment(**more: str) -> dict[str, str]:
    """Of a training program; the port is for trainers that open one although they run alone (NeMo)."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_PORT": str(_free_port()),
        **more,
    }


def _free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections: free now, and most likely in a minute too."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
