"""Measure what blocks of a model cost in the engine that will serve it, by their widths.

``python -m examples.engine_table MODEL TABLE --engine vllm --python PYTHON`` builds models of
MODEL's shape with random weights: whole, with half of the blocks, and narrower, as uniform exports
are. It serves them in turns and writes to TABLE the seconds that a block with so many channels or
KV heads takes for a prompt and for new tokens. A job that names the file is pruned to a speed in
that engine: ``pruning.target: {speedup: 1.25, table: TABLE}``. Needs ``ray-surgeon[gguf,serve]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples import serve_llamacpp, serve_vllm, serving
from ray_surgeon.export.folder import copy_small_files, dense_document
from ray_surgeon.export.gguf_file import write_gguf
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, kv_heads_left, shallower, uniform_document
from ray_surgeon.spec.sections import ModelSection

Size = tuple[int, int, int]
"""Blocks, feed-forward channels and KV heads."""
Seconds = list[float]
"""Of the prompts and of the new tokens of a request."""


def sizes_of(layout: ModelLayout, multiple: int) -> dict[str, list[Size]]:
    """Return the models to measure: ``dense``, ``shallow``, ``channels`` and ``kv_heads``."""
    blocks, channels, heads = layout.num_blocks, layout.num_channels, layout.heads.num_kv
    parts = {channels * quarter // 4 // multiple * multiple for quarter in (1, 2, 3)} - {0}
    fewer = [k for k in kv_heads_left(layout, 1, uniform=True) if k < heads]
    return {
        "dense": [(blocks, channels, heads)],
        "shallow": [((blocks + 1) // 2, channels, heads)],
        "channels": [(blocks, width, heads) for width in sorted(parts)],
        "kv_heads": [(blocks, channels, k) for k in sorted({*fewer[:1], *fewer[-1:]})],
    }


def write_model(source: ModelSection, layout: ModelLayout, size: Size, folder: Path) -> None:
    """Write a checkpoint of a size, with random weights and the model's tokenizer."""
    blocks, channels, heads = size
    widths = [BlockWidths(channels, heads)] * layout.num_blocks
    document = uniform_document(layout, dense_document(source), widths)
    document = shallower(layout, document, range(blocks))
    config = AutoConfig.for_model(**document)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    another = config.model_type != layout.config.model_type
    copy_small_files(source, str(folder), another_type=another)


def table_of(
    sizes: Mapping[str, Sequence[Size]], seconds: Mapping[Size, Seconds]
) -> dict[str, Any]:
    """Return the seconds of a block by channels and by KV heads, and of what is outside them.

    Args:
        sizes: see `sizes_of`.
        seconds: of each size.
    """
    (dense,), (shallow,) = sizes["dense"], sizes["shallow"]
    blocks = dense[0]
    pairs = list(zip(seconds[dense], seconds[shallow], strict=True))
    block = [(whole - half) / (blocks - shallow[0]) for whole, half in pairs]
    rest = [max(0.0, whole - blocks * each) for (whole, _), each in zip(pairs, block, strict=True)]

    def each(some: Iterable[Size], place: int) -> dict[int, Seconds]:
        by_number = {
            size[place]: [(s - r) / blocks for s, r in zip(seconds[size], rest, strict=True)]
            for size in (*some, dense)
        }
        return dict(sorted(by_number.items()))

    own = {"num_blocks": blocks, "rest": rest}
    return own | {"channels": each(sizes["channels"], 1), "kv_heads": each(sizes["kv_heads"], 2)}


def main(argv: Sequence[str] | None = None) -> int:
    """Build, serve and measure the models, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.engine_table", description=__doc__)
    parser.add_argument("model", help="as model.source in a job spec")
    parser.add_argument("table", type=Path, help="JSON file to write")
    parser.add_argument("--engine", choices=["vllm", "llamacpp"], required=True)
    parser.add_argument("--python", required=True, help="one that has the engine")
    parser.add_argument("--port", type=int, default=8014, help="of the server")
    parser.add_argument("--batch-size", type=int, default=1, help="requests at a time")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--num-new-tokens", type=int, default=64, help="tokens after it")
    parser.add_argument("--multiple", type=int, default=64, help="of which widths are multiples")
    parser.add_argument("--rounds", type=int, default=2, help="how often each model has its turn")
    arguments = parser.parse_args(argv)
    source = ModelSection(source=arguments.model)
    layout = ModelLayout.of(AutoConfig.for_model(**dense_document(source)))
    sizes = sizes_of(layout, arguments.multiple)
    batch, length, new = arguments.batch_size, arguments.prompt_length, arguments.num_new_tokens
    with tempfile.TemporaryDirectory() as scratch:
        commands = dict[str, list[str]]()
        all_sizes = [size for some in sizes.values() for size in some]
        for size in all_sizes:
            folder = Path(scratch) / "x".join(map(str, size))
            write_model(source, layout, size, folder)
            commands[folder.name] = _command(arguments, folder)
        rates = serving.medians(commands, arguments.port, [batch], arguments.rounds, (length, new))
    tokens = (batch * length, batch * new)
    seconds = {
        size: [n / rate for n, rate in zip(tokens, of, strict=True)]
        for size, of in zip(all_sizes, rates.values(), strict=True)
    }
    request = {"batch_size": batch, "prompt_length": length, "num_new_tokens": new}
    about = {"model": arguments.model, "engine": arguments.engine, "request": request}
    arguments.table.write_text(json.dumps(about | table_of(sizes, seconds), indent=1) + "\n")
    for size, (prompt, decode) in seconds.items():
        sys.stdout.write(f"{size}: {tokens[0] / prompt:.0f}, {tokens[1] / decode:.1f} tokens/s\n")
    return 0


def _command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return how the engine serves a folder, of which llama.cpp takes one file."""
    if arguments.engine == "vllm":
        return serve_vllm.command_of(folder, arguments.port, "", arguments.python)
    config = AutoConfig.from_pretrained(folder)
    layout = ModelLayout.of(config)
    widths = [BlockWidths(layout.num_channels, layout.heads.num_kv)] * layout.num_blocks
    file = folder.with_suffix(".gguf")
    write_gguf(str(folder), config, widths, "bf16", folder.name, file)
    return serve_llamacpp.command_of(file, arguments.port, "", arguments.python)


if __name__ == "__main__":
    sys.exit(main())
