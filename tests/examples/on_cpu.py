"""Runs an example as it is on a machine without a GPU: ``python on_cpu.py SCRIPT [OPTIONS]``.

The script is imported instead of run, because distributed checkpointing starts helper processes, which import the main
program.
"""

from __future__ import annotations

import importlib.util
import sys

if __name__ == "__main__":
    from cpu_shim import cuda_on_cpu

    sys.argv = sys.argv[1:]
    with cuda_on_cpu():
        found = importlib.util.spec_from_file_location("example", sys.argv[0])
        example = importlib.util.module_from_spec(found)
        found.loader.exec_module(example)
        example.main()
