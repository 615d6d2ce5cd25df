"""Says its process id, and sleeps; see tests/cluster/test_processes.py."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ray_surgeon.cluster.fresh_process import read_request

if __name__ == "__main__":
    request = read_request()
    Path(request["path"] + ".new").write_text(str(os.getpid()))
    os.replace(request["path"] + ".new", request["path"])
    time.sleep(request["seconds"])
