"""Runs a module in a process that ends with its parent.

``python -m ray_surgeon.distributed.die_with_parent PID MODULE``.

See `processes.run_module`. Imports little, because nobody ends this process until the kernel is
asked to.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        # else it would keep a GPU, and write beside the next try
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(sys.argv[1]):
            sys.exit("the process that asked for this has ended")
    reply = importlib.import_module(sys.argv[2]).answer(json.load(sys.stdin))
    # on a line of its own, whatever was printed before
    sys.stdout.write(f"\n{json.dumps(reply)}\n")
