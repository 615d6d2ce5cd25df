"""Bars and warnings of transformers are hidden only in our runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import LlamaConfig, modeling_gguf_pytorch_utils
from transformers.utils import logging

from ray_surgeon.run.arguments import own_modes, quiet_transformers
from ray_surgeon.storage.sources import no_bar_of_gguf


@pytest.fixture
def as_usual() -> Iterator[None]:
    """Restore the settings that these tests change."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    enable_progress_bars()


@pytest.mark.usefixtures("as_usual")
@pytest.mark.parametrize("hub_bars", [True, False])
def test_bars_and_verbosity_are_restored(hub_bars: bool) -> None:
    logging.set_verbosity_info()
    if not hub_bars:
        disable_progress_bars()
    with own_modes():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is not hub_bars
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    assert are_progress_bars_disabled() is not hub_bars


def test_conversion_of_a_gguf_file_has_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    bar = modeling_gguf_pytorch_utils.tqdm
    with no_bar_of_gguf():
        assert list(modeling_gguf_pytorch_utils.tqdm(range(2), desc="Converting")) == [
            0,
            1,
        ]
    assert not capfd.readouterr().err
    assert modeling_gguf_pytorch_utils.tqdm is bar


@pytest.mark.usefixtures("as_usual")
def test_special_tokens_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.set_verbosity_warning()  # a library may have hidden them before
    logging.enable_propagation()
    try:
        with quiet_transformers():
            LlamaConfig(vocab_size=320, bos_token_id=50255)
        assert not caplog.messages
        LlamaConfig(vocab_size=320, bos_token_id=50257)
        assert "bos_token_id must be" in caplog.text
    finally:
        logging.disable_propagation()
