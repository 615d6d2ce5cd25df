"""Says its process id, and sleeps; see tests/cluster/test_processes.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    request = json.load(sys.stdin)
    Path(request["path"] + ".new").write_text(str(os.getpid()))
    os.replace(request["path"] + ".new", request["path"])
    time.sleep(request["seconds"])
