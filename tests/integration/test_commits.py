"""Recovery that is interrupted within a shot resumes with the same bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.passes import forward_and_backward
from ray_surgeon.recovery.training import trial_steps
from tests.integration import runs
from tests.integration.runs import ONE, Done, Jobs, assert_same_shot

NUM_STEPS = 12
TRAINED = ONE | runs.LORA | {"recovery__num_tokens": NUM_STEPS * 40}
NOTHING_HELD = {"calibration__held_aside": 0}
GIVEN = {"recovery__learning_rate": 1e-3}
ALWAYS = {"recovery__commit_minutes": 1e-9}
"""Commits after every step, except in trials of a learning rate."""
ANSWERED = {
    "evaluation": {
        "texts": [runs.windows("python-docs", 3, name="docs")],
        "generation": {"num_prompts": 2, "max_new_tokens": 6},
    }
}
STREAMED = {"recovery__texts": [{"source": "python-docs", "max_tokens": 9000}]}
WHOLE = {"recovery__rank": "all", "cluster__num_replicas": 2, "model__dtype": "bfloat16"}
MEASURED = ("losses", "rate", "tried", "undone", "ended", "absorbed")


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield a list of numbers of steps: the process exits after the last one and removes it."""
    left = list[int]()
    num_made = 0

    def step(*args: Any) -> list[float]:
        nonlocal num_made
        num_made += bool(left)
        if left and num_made > left[-1]:
            left.pop()
            num_made = 0
            sys.exit("killed")
        return forward_and_backward(*args)

    monkeypatch.setattr("ray_surgeon.recovery.training.forward_and_backward", step)
    yield left
    assert not left, "the process was killed as often as requested"


def killed(job: Jobs, options: Any, *arguments: str) -> None:
    with pytest.raises(SystemExit):
        job(options | ALWAYS, *arguments)


def assert_same(again: Done, whole: Done) -> None:
    """Compare the bits and measures of the last shots, and check that no partial state is left."""
    last = len(whole.shots)
    assert_same_shot(again.uri, whole.uri, last)
    for name in (
        *(f"recovery_{part}" for part in MEASURED),
        "perplexity",
        "divergence",
        "linears",
    ):
        assert again.shot.get(name) == whole.shot.get(name), name
    checks = [
        [
            (c["steps"], c["value"], c["tokens"], c["loss"])
            for c in done.shot["recovery_held_aside"]
        ]
        for done in (again, whole)
    ]
    assert checks[0] == checks[1]
    assert again.report["dense"] == whole.report["dense"]
    assert again.report["linears"] == whole.report["linears"]
    assert set(again.shot["seconds"]) == set(whole.shot["seconds"])
    assert not list(again.uri.glob("shots/*/part"))


def slow(settings: dict[str, Any], name: str) -> Any:
    return pytest.param(settings, id=name, marks=pytest.mark.slow)


def test_preemption_notice_commits_the_training(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is committed when a machine gets a preemption notice, and resumes from there."""
    whole = job.baseline(TRAINED | GIVEN)
    asked = iter(range(100))
    monkeypatch.setattr(LocalCluster, "notice", lambda _: "a notice" * (next(asked) >= 3))
    error = job(TRAINED | GIVEN, code=1).error
    assert "a machine is taken away: a notice" in error
    monkeypatch.undo()
    again = job(TRAINED | GIVEN, "--resume")
    assert "continuing in round 1 after 3 steps of recovery" in again.out
    assert_same(again, whole)


@pytest.mark.parametrize(
    "settings",
    [
        slow(NOTHING_HELD, "nothing_held"),
        slow(GIVEN | {"recovery__loss": "cross_entropy"}, "given"),
        pytest.param({}, id="tried"),
        slow(runs.ELEMENT | GIVEN | runs.DISK, "elements"),
        slow(ANSWERED | GIVEN, "answers"),
        pytest.param(STREAMED | GIVEN, id="stream"),
        pytest.param(GIVEN | WHOLE, id="all_weights"),
    ],
)
def test_run_killed_three_times_resumes_to_the_same_bits(
    settings: Any, job: Jobs, dies: list[int]
) -> None:
    options = TRAINED | settings
    whole = job.baseline(options)
    tried = not {*settings} & {*GIVEN, *NOTHING_HELD}
    trial = len(whole.shot["recovery_tried"]) * trial_steps(NUM_STEPS) if tried else 0
    dies += [3, 1, trial + 2]
    killed(job, options)
    killed(job, options, "--resume")
    killed(job, options, "--resume")
    again = job(options, "--resume")
    assert_same(again, whole)
    before = trial_steps(NUM_STEPS) if tried else 0
    assert (
        f"continuing in round 1 after {before + 2 + 1 + 3} steps of recovery" in again.out
    )
    if "evaluation" in options:
        assert again.shot["generation"] == whole.shot["generation"]
        name = "generation_before_recovery"
        assert again.shot[name] == whole.shot[name]


def test_interrupted_trial_of_a_rate_is_repeated(job: Jobs, dies: list[int]) -> None:
    whole = job.baseline(TRAINED)
    dies += [2]
    killed(job, TRAINED)
    part = job.folder / "run/shots/0001/part"
    assert not list(part.glob("training-*"))
    again = job(TRAINED, "--resume")
    assert "continuing in round 1 after 0 steps of recovery" in again.out
    assert_same(again, whole)


@pytest.mark.parametrize("num_shards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_resumes_on_another_number_of_shards(
    num_shards: int, job: Jobs, dies: list[int]
) -> None:
    whole = job.baseline(TRAINED | GIVEN | runs.FOUR)
    dies += [6]
    killed(job, TRAINED | GIVEN | runs.FOUR)
    again = job(TRAINED | GIVEN | runs.FOUR, "--resume", cluster__num_shards=num_shards)
    assert_same(again, whole)


def test_training_after_the_second_shot_resumes(job: Jobs, dies: list[int]) -> None:
    options = TRAINED | GIVEN | {"pruning__num_shots": 2}
    whole = job.baseline(options)
    dies += [3 + 4]
    killed(job, options)
    again = job(options, "--resume")
    assert "continuing in round 2 after 4 steps" in " ".join(again.out.split())
    assert_same(again, whole)


def test_damaged_partial_training_is_refused(job: Jobs, dies: list[int]) -> None:
    """Without its manifest, the partial training is ignored and the shot is repeated."""
    options = TRAINED | GIVEN
    whole = job.baseline(options)
    dies += [4]
    killed(job, options)
    part = job.folder / "run/shots/0001/part"
    for name, kept in (("training-*", None), ("masks-*", -9), ("manifest.json", -9)):
        (path,) = part.glob(name)
        content = path.read_bytes()
        path.unlink() if kept is None else path.write_bytes(content[:kept])
        error = job(options, "--resume", code=2).error
        assert str(path) in error
        assert f"remove {part} to repeat this shot from its beginning" in error
        path.write_bytes(content)
    (part / "manifest.json").unlink()
    again = job(options | ALWAYS, "--resume")
    assert "continuing in round" not in again.out
    assert_same(again, whole)
