"""Compares llama.cpp's K- and I-quants with and without our importance matrix, as a Markdown table.

Its columns are bytes, and divergences in llama.cpp from the unrounded file.

``python -m benchmarks.importance FOLDER --tools FOLDER_OF_LLAMA_CPP`` prunes channels of
feed-forward layers like the quickstart, but without recovery, and rounds the GGUF export with
``llama-quantize``; ``llama-perplexity`` evaluates on the windows of the quickstart's texts, joined
to one text each. ``--dense`` rounds the dense model. ``--set`` changes the quickstart.
`tests.serve.environments` builds both programs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import ray_surgeon
from benchmarks.peers import add_settings, quickstart
from ray_surgeon.config.job import JobSpec
from ray_surgeon.preparation.inputs import check
from ray_surgeon.storage.sources import open_model

KINDS = ("Q4_K_M", "IQ4_XS", "Q3_K_M")
_MEAN = re.compile(r"Mean\s+KLD:\s+(\S+)")


class Tools:
    """The programs of a build of llama.cpp."""

    def __init__(self, folder: Path, num_threads: int = 2) -> None:
        """Return the programs in a folder."""
        self._folder = folder
        self._num_threads = str(num_threads)

    def _run(self, program: str, *arguments: str | Path) -> str:
        command = [str(self._folder / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError("\n".join(said.splitlines()[-30:]))
        return said

    def quantize(
        self, file: Path, target: Path, kind: str, matrix: Path | None = None
    ) -> None:
        """Round a file to a type, optionally with an importance matrix."""
        given = ["--imatrix", str(matrix)] if matrix else []
        self._run("llama-quantize", *given, file, target, kind, self._num_threads)

    def remember(self, file: Path, text: Path, logits: Path) -> None:
        """Save the logits of a file's model on a text."""
        self._perplexity(file, "-f", text, "--save-all-logits", logits)

    def divergence(self, file: Path, logits: Path) -> float:
        """Return the mean divergence of a file's model from saved logits, in nats per token.

        llama.cpp evaluates the second half of every 512 tokens.
        """
        said = self._perplexity(file, "--kl-divergence-base", logits, "--kl-divergence")
        (found,) = _MEAN.findall(said)
        return float(found)

    def _perplexity(self, file: Path, *arguments: str | Path) -> str:
        options = ("--ctx-size", "512", "--threads", self._num_threads)
        return self._run("llama-perplexity", "--model", file, *options, *arguments)


def measured(
    folder: Path,
    export: Mapping[str, Any],
    texts: Mapping[str, str],
    tools: Tools,
    kinds: Sequence[str] = KINDS,
) -> list[dict[str, Any]]:
    """Return a line for every type, with and without the matrix.

    Args:
        folder: folder of the rounded files.
        export: entry of the GGUF export.
        texts: texts by name.
        tools: llama.cpp's programs.
        kinds: types, by llama.cpp's names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = Path(export["uri"], export["files"][0]["file"])
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        tools.remember(whole, folder / f"{name}.txt", folder / f"{name}.logits")
    rows = []
    for kind in kinds:
        for matrix in (None, Path(export["uri"], export["imatrix"]["file"])):
            target = folder / f"{kind}{'-imatrix' if matrix else ''}.gguf"
            tools.quantize(whole, target, kind, matrix)
            found = {
                name: tools.divergence(target, folder / f"{name}.logits")
                for name in texts
            }
            line = {"kind": kind, "matrix": matrix is not None, "divergence": found}
            rows.append(line | {"size_bytes": target.stat().st_size})
            sys.stderr.write(table(rows[-1:]))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    texts = list(rows[0]["divergence"])
    lines = ["| type | matrix | MB | " + " | ".join(texts) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(texts))
    for line in rows:
        cells = [line["kind"], "ours" if line["matrix"] else "none"]
        cells.append(f"{line['size_bytes'] / 1e6:.1f}")
        cells += [f"{line['divergence'][text]:.4f}" for text in texts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def exported(
    folder: Path, overrides: Sequence[str], *, dense: bool
) -> tuple[Any, dict[str, str]]:
    """Return the GGUF export of the quickstart's model, and its evaluation texts."""
    document = quickstart(overrides)
    output = {"uri": str(folder / "run"), "exports": ["gguf"]}
    document |= {"preset": None, "recovery": None, "output": output}
    if dense:
        document |= {"pruning": None, "curvature": None}
    spec = JobSpec.model_validate(document)
    result = ray_surgeon.prune(spec=spec, resume=(folder / "run" / "spec.yaml").exists())
    inputs = check(spec, resume=True, dry_run=True)
    tokenizer = AutoTokenizer.from_pretrained(open_model(spec.model).small_files_folder())
    texts = {name: "".join(tokenizer.batch_decode(w)) for name, w in inputs.texts.items()}
    return result.report["exports"][0], texts


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write FOLDER/importance.json and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.importance",
        description="Measure the effect of an importance matrix.",
    )
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument(
        "--tools", type=Path, required=True, help="folder of llama.cpp's programs"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, help="types, by llama.cpp's names"
    )
    parser.add_argument("--dense", action="store_true", help="round the dense model")
    add_settings(parser)
    arguments = parser.parse_args(argv)
    export, texts = exported(arguments.folder, arguments.set, dense=arguments.dense)
    tools = Tools(arguments.tools)
    rows = measured(arguments.folder, export, texts, tools, arguments.kinds)
    (arguments.folder / "importance.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
