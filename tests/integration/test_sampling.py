"""Calibration text that the dense model writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_surgeon.cluster import sampling
from ray_surgeon.cluster.sampling import Wanted, texts_together, write_text
from ray_surgeon.run.directory import RunDirectory
from ray_surgeon.storage import tensor_files
from tests.conftest import CONFIGS
from tests.integration.runs import assert_same_shot, loaded, report_of, run

WANTED = Wanted(prompt=(0, 5), temperature=0.7, seed=3, num_sequences=18, sequence_length=12)


def by_whole_passes(model: torch.nn.Module, wanted: Wanted, number: int) -> list[int]:
    """Return a sequence drawn without a cache, each token from the whole sequence before it."""
    chances = torch.rand(wanted.sequence_length, generator=torch.Generator().manual_seed(wanted.seed + 1_000_003 * number))
    tokens = list(wanted.prompt)
    for chance in chances:
        logits = model(torch.tensor([tokens])).logits[0, -1] / wanted.temperature
        cumulated = torch.softmax(logits, dim=-1).cumsum(0)
        tokens.append(int(torch.searchsorted(cumulated, chance * cumulated[-1], right=True)))
    return tokens[len(wanted.prompt) :]


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_drawn_from_the_model_whatever_the_workers_are(
    family: str, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "TOKENS_TOGETHER", 0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(model_folders[family])
        expected = [by_whole_passes(model, WANTED, number) for number in (0, 8, 9, 17)]  # of two batches
    written = [write_text(loaded(model_folders[family], *workers), WANTED) for workers in ((1, 1), (3, 1), (2, 2))]
    begun = write_text(loaded(model_folders[family]), replace(WANTED, first=7))
    assert begun[:, 0].tolist() == [7] * 18
    assert np.array_equal(begun[:, 1:], written[0])
    assert written[0].shape == (18, 12)
    assert written[0][[0, 8, 9, 17]].tolist() == expected
    for other in written[1:]:
        assert np.array_equal(other, written[0])


def test_short_texts_are_written_in_larger_batches() -> None:
    assert [texts_together(length) for length in (8192, 512, 128, 1)] == [16, 16, 64, 8192]


def test_several_texts_fill_a_sequence_and_begin_with_the_last_token_of_the_prompt(model_folders: dict[str, Path], tmp_path: Path) -> None:
    several = {"source": "self", "weight": 0.5, "prompt": "<end>", "texts_per_sequence": 4}
    assert run(tmp_path, model_folders["llama"], calibration__mix=[several]) == 0
    written = tensor_files.read(str(tmp_path / "run/written.safetensors"))["1"]
    assert written.shape == (2, 40)
    prompt = AutoTokenizer.from_pretrained(model_folders["llama"])("<end>", add_special_tokens=False)["input_ids"]
    texts = written.view(8, 10)
    assert texts[:, 0].tolist() == [prompt[-1]] * 8
    alone = write_text(loaded(model_folders["llama"]), Wanted(tuple(prompt), 1.0, 0, 8, 9))
    assert np.array_equal(texts[:, 1:], alone), "each begins after the prompt, not after the text before it"


def test_a_run_calibrates_on_it_and_goes_on_with_it(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"calibration__mix": [{"source": "self", "weight": 0.5, "prompt": "<end>"}], "cluster__num_shards": 2}
    assert run(tmp_path / "whole", model_folders["llama"], **options) == 0
    written = tensor_files.read(str(tmp_path / "whole/run/written.safetensors"))["1"]
    assert written.shape == (2, 40)
    assert run(tmp_path / "streamed", model_folders["llama"], memory__weights="disk", memory__factors="disk", **options) == 0
    assert run(tmp_path / "plain", model_folders["llama"], cluster__num_shards=2) == 0
    assert (
        report_of(tmp_path / "plain/run")["shots"][0]["calibration_loss"]
        != report_of(tmp_path / "whole/run")["shots"][0]["calibration_loss"]
    )

    commit = RunDirectory.commit_shot

    def fails_at_the_second(self: RunDirectory, index: int, *rest: Any) -> None:
        if index == 2:
            raise OSError("the machine is lost")
        commit(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit_shot", fails_at_the_second)
        assert run(tmp_path / "cut", model_folders["llama"], **options) != 0
    text = tmp_path / "cut/run/written.safetensors"
    text.rename(tmp_path / "kept")
    assert run(tmp_path / "cut", model_folders["llama"], "--resume", **options) == 1, "pruned weights must not write it"
    assert "is gone" in capsys.readouterr().err
    (tmp_path / "kept").rename(text)
    states = tmp_path / "cut/run/dense.safetensors"
    states.rename(tmp_path / "kept")
    assert run(tmp_path / "cut", model_folders["llama"], "--resume", **options) == 2, "found before anything is loaded"
    assert "dense.safetensors is gone" in capsys.readouterr().err
    states.write_bytes((tmp_path / "kept").read_bytes()[:100])
    assert run(tmp_path / "cut", model_folders["llama"], "--resume", **options) == 2
    assert "cut short" in (said := capsys.readouterr().err)
    assert "put it back, or start a new run" in said
    (tmp_path / "kept").rename(states)
    assert run(tmp_path / "cut", model_folders["llama"], "--resume", **options) == 0
    for other in ("streamed", "cut"):
        for shot in (1, 2):
            assert_same_shot(tmp_path / "whole/run", tmp_path / other / "run", shot)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration__source": "self"}, "a place in calibration.mix only"),
        ({"calibration__mix": [{"source": "self", "temperature": 0}]}, "temperature"),
        ({"calibration__mix": [{"source": "self", "split": "test"}]}, "split"),
        ({"calibration__mix": [{"source": "self", "texts_per_sequence": 3}]}, "a divisor of sequence_length"),
        ({"calibration__mix": [{"source": "self", "prompt": "with a long prompt " * 400}]}, "change the prompt or the lengths"),
        ({"calibration__mix": [{"source": "self", "texts_per_sequence": 40}]}, "two tokens or more"),
    ],
)
def test_what_cannot_be_written_is_refused(
    changes: dict[str, object], said: str, model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, model_folders["llama"], **changes) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
