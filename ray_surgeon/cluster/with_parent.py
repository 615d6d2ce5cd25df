"""Runs a module that ends with its parent: ``python -m ray_surgeon.cluster.with_parent PID MODULE``; see `fresh_process`.

Imports little, because until the kernel is asked nobody ends this process.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # else it would keep a GPU, and write beside the next try
        if os.getppid() != int(sys.argv[1]):
            sys.exit("the process that asked for this has ended")
    module = sys.argv.pop(2)
    del sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
