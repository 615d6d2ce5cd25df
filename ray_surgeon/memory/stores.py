"""What a worker keeps where, and the folder on its disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import SafetensorError

Place = Literal["device", "host", "disk"]
"""Of weights or factors."""

Activations = Literal["keep", "recompute"]
"""Of a block, between its forward and its backward pass."""


@dataclass(frozen=True)
class Stores:
    """Where idle weights and factors are kept, and how many sequences pass together."""

    weights: Place = "device"  # of blocks
    factors: Place = "device"  # A and G of all linears
    activations: Activations = "keep"
    wave: int = 1  # sequences that pass a block before the next block runs


class ScratchNames(NamedTuple):
    """What names the folders of scratch of a run."""

    root: str | None  # folder for all runs; None for the machine's own
    run: str  # the same for every try
    attempt: str  # another one for every try


NO_SCRATCH = ScratchNames(None, "none", "none")
"""Of workers outside of runs."""


def scratch_root(root: str | None) -> Path:
    """Return the folder for all runs, on this machine; None for the one of its temporary files."""
    return Path(tempfile.gettempdir() if root is None else root)


class Scratch:
    """A folder on the local disk for one worker of one try of a run.

    The tries of a run share a parent folder, so that a try removes what a killed one before it
    left.
    """

    def __init__(self, root: str | None, run: str, attempt: str, worker: str) -> None:
        """Name the folder; it is made when something is written.

        Args:
            root: folder for all runs; see `scratch_root`.
            run: the same for every try of a run.
            attempt: one try of it.
            worker: one of its workers.
        """
        self._run = scratch_root(root) / f"ray_surgeon-{run}"
        self._attempt = attempt
        self.folder = self._run / attempt / worker

    def path(self, name: str) -> Path:
        """Return the path of a file in the folder, which is made if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a path to write to; its file then replaces the one of this name.

        Who still reads the old one keeps it.

        Raises:
            OSError: it cannot be written; names the file and the remedy.
        """
        path = self.path(name)
        written = path.with_suffix(".writing")
        try:
            yield written
            written.replace(path)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{path}: cannot write: {error}; free space on that disk, or name another one in "
                "memory.scratch"
            ) from error

    def _earlier(self) -> list[Path]:
        """Return the folders of earlier tries of this run."""
        tries = self._run.iterdir() if self._run.exists() else ()
        return [folder for folder in tries if folder.name != self._attempt]

    def earlier_bytes(self) -> int:
        """Return the bytes of what earlier tries of this run left."""
        sizes = 0
        for path in (path for left in self._earlier() for path in left.rglob("*")):
            with contextlib.suppress(OSError):  # that try may live, and remove its files
                sizes += path.lstat().st_size
        return sizes

    def remove_earlier(self) -> None:
        """Remove what earlier tries of this run left."""
        for left in self._earlier():
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder, and those above it that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other workers' folders are there, or it is gone
            self.folder.parent.rmdir()
            self._run.rmdir()
