"""Runs an example as it is on a machine without a GPU: ``python on_cpu.py SCRIPT [OPTIONS]``.

The script is imported instead of run, because distributed checkpointing starts helper processes, which import the main
program. At its end they are stopped, and gloo is left in a way that does not abort now and then.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys

if __name__ == "__main__":
    import torch
    from cpu_shim import cuda_on_cpu

    sys.argv = sys.argv[1:]
    with cuda_on_cpu():
        found = importlib.util.spec_from_file_location("example", sys.argv[0])
        example = importlib.util.module_from_spec(found)
        found.loader.exec_module(example)
        example.main()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    for helper in multiprocessing.active_children():
        helper.terminate()
        helper.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
