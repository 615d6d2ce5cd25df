"""Attention in matrix products, against torch's own in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention import main
from ray_surgeon.models import attention
from ray_surgeon.models.attention import in_products


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(
        torch.linalg.norm(found.detach() - expected.detach()) / torch.linalg.norm(expected.detach())
    )


class Layer(nn.Module):
    """What an attention layer says of itself."""

    is_causal = True
    num_key_value_groups = 3


def drawn(T: int, S: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of six heads, and keys and values of two, which lie as projections do; all
    keys have a large part in common.
    """
    generator = torch.Generator().manual_seed(T + S)
    query, key, value = (
        torch.randn(2, length, heads, size, generator=generator, dtype=torch.float64)
        for length, heads, size in ((T, 6, 8), (S, 2, 8), (S, 2, 5))
    )
    return (
        query.to(dtype).transpose(1, 2),
        (key + 3).to(dtype).transpose(1, 2),
        value.to(dtype).transpose(1, 2),
    )


def exact(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=1.0, enable_gqa=True
    )


@pytest.mark.parametrize(
    ("T", "S", "causal"), [(7, 7, True), (9, 9, True), (1, 9, False), (5, 9, False)]
)
def test_outputs_and_gradients_are_those_of_attention(
    T: int, S: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", 4)
    leaves = [part.requires_grad_() for part in drawn(T, S)]
    found = in_products(*leaves, causal=causal)
    expected = exact(*leaves, causal=causal)
    assert relative_error(found, expected) < 1e-12
    gradient = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for one, other in zip(
        torch.autograd.grad(found, leaves, gradient),
        torch.autograd.grad(expected, leaves, gradient),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-12


def test_bfloat16_on_a_cpu_goes_in_products_and_is_as_near_as_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = drawn(300, 300, torch.bfloat16)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    found, _ = attention.attention(Layer(), query, key, value, None)
    expected = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), expected.transpose(1, 2)) < 2**-7


def test_float32_with_shared_keys_on_a_gpu_goes_to_a_kernel_that_keeps_no_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None of torch's takes heads that share keys then; the pretend accelerator's runs compare the
    numbers.
    """
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    shapes = list[torch.Size]()

    def watch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shapes.extend((key.shape, value.shape))
        assert not options.get("enable_gqa")
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watch)
    query, key, value = (part.to("meta") for part in drawn(7, 7, torch.float32))
    found, _ = attention.attention(Layer(), query, key, value, None)
    assert found.shape == (2, 7, 6, 5)
    assert shapes == [(2, 6, 7, 8), (2, 6, 7, 5)]


def test_keys_in_common_do_not_make_scores_coarse() -> None:
    query, key, value = drawn(300, 300, torch.bfloat16)
    expected = exact(query.double(), (key + 64).double(), value.double(), causal=True)
    assert relative_error(in_products(query, key + 64, value, causal=True).double(), expected) < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_everything_else_goes_to_torch(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "in_products", None)
    query, key, value = drawn(9, 9, torch.bfloat16 if masked else torch.float32)
    # a window of four keys
    mask = torch.ones(9, 9, dtype=torch.bool).tril_().triu_(-3) if masked else None
    found, _ = attention.attention(Layer(), query, key, value, mask)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=True
    )
    assert relative_error(found.double(), expected.transpose(1, 2).double()) < 0.02


@pytest.mark.parametrize(
    ("T", "dtype", "options"), [(4, torch.bfloat16, {}), (9, torch.bfloat16, {"dropout": 0.5})]
)
def test_what_is_not_plain_attention_goes_to_torch(
    T: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_torch = Mock(return_value=(None, None))
    monkeypatch.setattr(attention, "in_products", None)
    monkeypatch.setattr(attention, "sdpa_attention_forward", of_torch)
    attention.attention(Layer(), *drawn(T, 9, dtype), None, **options)
    assert of_torch.call_args.kwargs["dropout"] == options.get("dropout", 0.0)


def test_one_query_reads_all_keys_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    query, key, value = drawn(1, 9, torch.float32)
    found, _ = attention.attention(Layer(), query, key, value, None)
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert relative_error(found, expected.transpose(1, 2)) < 1e-5


def test_the_benchmark_measures_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "--tokens",
                "16",
                "--heads",
                "2",
                "--key-heads",
                "1",
                "--head-dim",
                "8",
                "--texts",
                "2",
                "--repeats",
                "1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "16 tokens and gradients" in said
    assert "next token of 2 texts" in said
    with pytest.raises(SystemExit):
        main(["--heads", "9", "--key-heads", "2"])
