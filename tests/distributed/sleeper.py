"""Prints its process id and sleeps; see tests/distributed/test_processes.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    Path(request["path"] + ".new").write_text(str(os.getpid()))
    os.replace(request["path"] + ".new", request["path"])
    time.sleep(request["seconds"])
    return {}
