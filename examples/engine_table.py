"""Measure the time of a model's blocks by their widths, in the engine that will serve it.

``python -m examples.engine_table MODEL TABLE --engine transformers`` builds models of MODEL's shape
with random weights: the dense shape, half of the blocks, and smaller widths like those of uniform
exports. It times them in turns and writes to TABLE the seconds per block, by number of channels or
KV heads, for a prompt and for the new tokens after it. A job that names the file prunes to a speed
in that engine: ``pruning.target: {speedup: 1.25, table: TABLE}``. With ``--engine vllm`` or
``llamacpp`` and ``--python PYTHON``, a Python that has the engine serves the models; that needs
``ray-surgeon[gguf,serve]``. ``TMPDIR`` needs room for seven copies of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

from examples import serve_llamacpp, serve_vllm
from examples.serving import check_engine, serving
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.export.folder import copy_small_files, dense_document
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of
from ray_surgeon.models.pruned_config import (
    BlockWidths,
    kv_heads_left,
    shallower,
    uniform_document,
)

if TYPE_CHECKING:
    from openai import OpenAI

Size = tuple[int, int, int]
"""Blocks, feed-forward channels and KV heads."""
Seconds = tuple[float, float]
"""Seconds of the prompts, and of the new tokens after them."""
TURNS = 3


def half_of(layout: ModelLayout) -> list[int]:
    """Return the numbers of half of the blocks: every second one of each kind."""
    kinds = getattr(layout.config, "layer_types", None) or [None] * layout.num_blocks
    seen = Counter[Any]()
    half = []
    for block, kind in enumerate(kinds):
        if seen[kind] % 2 == 0:
            half.append(block)
        seen[kind] += 1
    return half


def sizes_of(layout: ModelLayout, engine: str, multiple: int) -> dict[str, list[Size]]:
    """Return the models to measure: ``dense``, ``shallow``, ``channels`` and ``kv_heads``.

    Raises:
        ValueError: the model is a mixture, or too small.
    """
    blocks, channels, heads = layout.num_blocks, layout.num_channels, layout.heads.num_kv
    parts = {channels * quarter // 4 // multiple * multiple for quarter in (1, 2, 3)} - {
        0
    }
    if layout.is_mixture or blocks < 2 or not parts:
        kind = "a mixture" if layout.is_mixture else "a dense model"
        raise ValueError(
            f"model: {layout.config.model_type} is {kind} of {blocks} blocks with {channels} "
            "channels; give a model without experts, with two blocks or more that are wider than "
            "--multiple"
        )
    fewer = [k for k in kv_heads_left(layout, 1, uniform=True) if k < heads]
    fewer = [k for k in fewer if _is_served(layout, engine, k)]
    return {
        "dense": [(blocks, channels, heads)],
        "shallow": [(len(half_of(layout)), channels, heads)],
        "channels": [(blocks, width, heads) for width in sorted(parts)],
        "kv_heads": [(blocks, channels, k) for k in sorted({*fewer[:1], *fewer[-1:]})],
    }


def _is_served(layout: ModelLayout, engine: str, num_kv_heads: int) -> bool:
    """Return whether an engine runs the model with fewer heads."""
    if engine == "transformers":
        return True
    if engine == "vllm":
        return layout.family.has_free_heads_in_vllm
    try:
        architecture_of(layout, [BlockWidths(layout.num_channels, num_kv_heads)])
    except ValueError:
        return False
    return True


def write_model(
    source: ModelSection, layout: ModelLayout, size: Size, folder: Path
) -> None:
    """Write a checkpoint of a size, with random weights and the model's tokenizer."""
    blocks, channels, heads = size
    widths = [BlockWidths(channels, heads)] * layout.num_blocks
    document = uniform_document(layout, dense_document(source), widths)
    left = range(blocks) if blocks == layout.num_blocks else half_of(layout)
    config = AutoConfig.for_model(**shallower(layout, document, left))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    another = config.model_type != layout.config.model_type
    copy_small_files(source, str(folder), another_type=another)


def measure(client: OpenAI, request: Mapping[str, int], vocab_size: int) -> Seconds:
    """Return the time that an engine takes for a request, the median over turns after a warm-up."""
    model = client.models.list().data[0].id
    number, length, new = (request[name] for name in _REQUEST)

    def ask(first: int, num_new: int) -> None:
        # every prompt is different, so that prefix caching has no effect
        prompt = [(first + 7 * place) % (vocab_size // 2) + 10 for place in range(length)]
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=num_new,
            temperature=0.0,
            extra_body={
                "ignore_eos": True
            },  # a model with random weights may end at once
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == num_new

    turns = list[Seconds]()
    with ThreadPoolExecutor(number) as pool:
        for turn in range(TURNS + 1):
            took = []
            for num_new in (1, 1 + new):
                start = time.perf_counter()
                places = range(
                    number * (2 * turn + (num_new > 1)), number * (2 * turn + 2)
                )
                list(pool.map(ask, places[:number], [num_new] * number))
                took.append(time.perf_counter() - start)
            turns.append((took[0], took[1] - took[0]))
    prompts, decodes = zip(*turns[1:], strict=True)
    return statistics.median(prompts), statistics.median(decodes)


def table_of(
    sizes: Mapping[str, Sequence[Size]], seconds: Mapping[Size, Seconds]
) -> dict[str, Any]:
    """Return the seconds of a block by channels and by KV heads, and those outside the blocks.

    Args:
        sizes: see `sizes_of`.
        seconds: seconds of each size.

    Raises:
        ValueError: a model with fewer blocks takes longer.
    """
    (dense,), (shallow,) = sizes["dense"], sizes["shallow"]
    blocks = dense[0]
    pairs = list(zip(seconds[dense], seconds[shallow], strict=True))
    block = [(whole - half) / (blocks - shallow[0]) for whole, half in pairs]
    if min(block) <= 0:
        raise ValueError(
            f"{blocks} blocks take {seconds[dense]} s, but {shallow[0]} blocks take "
            f"{seconds[shallow]} s; measure again on an idle machine, or with longer requests"
        )
    rest = [
        max(0.0, whole - blocks * each)
        for (whole, _), each in zip(pairs, block, strict=True)
    ]

    def each(some: Iterable[Size], place: int) -> dict[int, list[float]]:
        by_number = {
            size[place]: [
                max(0.0, s - r) / blocks for s, r in zip(seconds[size], rest, strict=True)
            ]
            for size in (*some, dense)
        }
        return dict(sorted(by_number.items()))

    own = {"num_blocks": blocks, "rest": rest}
    return own | {
        "channels": each(sizes["channels"], 1),
        "kv_heads": each(sizes["kv_heads"], 2),
    }


_REQUEST = ("batch_size", "prompt_length", "num_new_tokens")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.engine_table", description=__doc__
    )
    parser.add_argument("model", help="as model.source in a job spec")
    parser.add_argument("table", type=Path, help="JSON file to write")
    parser.add_argument(
        "--engine", choices=["transformers", "vllm", "llamacpp"], required=True
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="Python of an environment with the engine",
    )
    parser.add_argument(
        "--device", default="cpu", help="device of transformers: cpu or cuda"
    )
    parser.add_argument("--threads", type=int, help="threads of transformers on a CPU")
    parser.add_argument(
        "--options", nargs="*", default=["--enforce-eager"], help="of vLLM's server"
    )
    parser.add_argument("--port", type=int, default=8014, help="of the server")
    parser.add_argument("--batch-size", type=int, default=1, help="requests at a time")
    parser.add_argument(
        "--prompt-length", type=int, default=256, help="tokens of a prompt"
    )
    parser.add_argument("--num-new-tokens", type=int, default=64, help="tokens after it")
    parser.add_argument(
        "--multiple", type=int, default=64, help="widths are multiples of this number"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="number of times each model is measured"
    )
    arguments = parser.parse_args(argv)
    if arguments.engine != "transformers":
        module = {"vllm": "vllm", "llamacpp": "xllamacpp"}[arguments.engine]
        check_engine(parser, arguments, option="python", module=module)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Build, serve and measure the models, and write the table."""
    arguments = _arguments(argv)
    source = ModelSection(source=arguments.model)
    layout = ModelLayout.of(AutoConfig.for_model(**dense_document(source)))
    sizes = sizes_of(layout, arguments.engine, arguments.multiple)
    request = {name: getattr(arguments, name) for name in _REQUEST}
    turns: dict[Size, list[Seconds]] = {
        size: [] for some in sizes.values() for size in some
    }
    with tempfile.TemporaryDirectory() as scratch:
        commands = dict[Size, list[str]]()
        for size in turns:
            folder = Path(scratch) / "x".join(map(str, size))
            write_model(source, layout, size, folder)
            commands[size] = command_of(arguments, folder)
        os.sync()  # pending writes would slow the measurement
        for size in [*turns] * arguments.rounds:
            if arguments.engine == "transformers":
                prompt, new = time_here(commands[size])
            else:
                with serving(commands[size], arguments.port) as client:
                    prompt, new = measure(client, request, layout.config.vocab_size)
            turns[size].append((prompt, new))
            sys.stdout.write(
                f"{size}: {prompt:.4g} s for prompts, {new:.4g} s for new tokens\n"
            )
            sys.stdout.flush()
    # other work on the machine makes a round slower, never faster: the fastest one counts
    seconds = {
        size: (min(prompt for prompt, _ in of), min(new for _, new in of))
        for size, of in turns.items()
    }
    about = {"model": arguments.model, "engine": arguments.engine, "request": request}
    arguments.table.write_text(
        json.dumps(about | table_of(sizes, seconds), indent=1) + "\n"
    )
    return 0


def time_here(command: Sequence[str]) -> Seconds:
    """Return the seconds that `examples.time_transformers` prints."""
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    prompt, new = json.loads(printed.splitlines()[-1])
    return prompt, new


def command_of(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that serves or times a checkpoint; llama.cpp needs its GGUF file."""
    length = arguments.prompt_length + arguments.num_new_tokens + 16
    port, python = arguments.port, arguments.python
    if arguments.engine == "transformers":
        command = [python, "-m", "examples.time_transformers", str(folder)]
        command += [f"--device={arguments.device}", f"--turns={TURNS}"]
        if arguments.threads is not None:
            command.append(f"--threads={arguments.threads}")
        for name in _REQUEST:
            command.append(f"--{name.replace('_', '-')}={getattr(arguments, name)}")
        return command
    if arguments.engine == "vllm":
        return serve_vllm.command_of(folder, port, "", python, length, arguments.options)
    file = folder.with_suffix(".gguf")
    serve_llamacpp.write_uniform(folder, file)
    shutil.rmtree(folder)
    return serve_llamacpp.command_of(file, port, "", python, arguments.batch_size, length)


if __name__ == "__main__":
    sys.exit(main())
