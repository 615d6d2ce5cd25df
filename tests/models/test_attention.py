"""Attention by matrix products, against torch's own in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ray_surgeon.models import attention
from ray_surgeon.models.attention import in_products


def relative_error(found: Tensor, expected: Tensor) -> float:
    found = found.detach().double()
    expected = expected.detach().double()
    return float((found - expected).norm() / expected.norm())


class Layer(nn.Module):
    """The attributes of an attention layer that the functions read."""

    is_causal = True
    num_key_value_groups = 3


def drawn(
    T: int, S: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of six heads, and keys and values of two, laid out as by projections.

    All keys have a large part in common.
    """
    generator = torch.Generator().manual_seed(T + S)
    query, key, value = (
        torch.randn(2, length, heads, size, generator=generator, dtype=torch.float64)
        .add(shift)
        .to(dtype)
        .transpose(1, 2)
        for length, heads, size, shift in ((T, 6, 8, 0), (S, 2, 8, 3), (S, 2, 5, 0))
    )
    return query, key, value


def exact(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, **options: Any
) -> Tensor:
    options |= {"is_causal": causal, "enable_gqa": True}
    return scaled_dot_product_attention(
        query.double(), key.double(), value.double(), **options
    )


@pytest.mark.parametrize(
    ("T", "S", "causal"), [(9, 9, True), (1, 9, False), (5, 9, False)]
)
def test_outputs_and_gradients_match_the_exact_formula(
    T: int, S: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", 4)
    leaves = [part.requires_grad_() for part in drawn(T, S)]
    found = in_products(*leaves, causal=causal)
    expected = exact(*leaves, causal=causal, scale=1.0)
    assert relative_error(found, expected) < 1e-12
    gradient = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad(outputs, leaves, gradient) for outputs in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize(
    ("T", "S", "dtype", "most"),
    [(300, 300, torch.bfloat16, 2**-7), (1, 9, torch.float32, 1e-5)],
)
def test_cpu_uses_matrix_products_for_bfloat16_and_single_queries(
    T: int, S: int, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the rounding error of the dtype."""
    parts = drawn(T, S, dtype)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    found, _ = attention.attention(Layer(), *parts, None)
    assert found.dtype == dtype
    assert relative_error(found, exact(*parts, causal=T > 1).transpose(1, 2)) < most


def test_float32_with_shared_keys_on_a_gpu_keeps_no_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None of torch's kernels accepts heads that share keys then. Runs on the pretend accelerator
    compare the numbers.
    """
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    of_torch = Mock(wraps=scaled_dot_product_attention)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", of_torch)
    query, key, value = (part.to("meta") for part in drawn(7, 7, torch.float32))
    found, _ = attention.attention(Layer(), query, key, value, None)
    assert found.shape == (2, 7, 6, 5)
    _, keys, values = of_torch.call_args.args
    assert (keys.shape, values.shape) == ((2, 6, 7, 8), (2, 6, 7, 5))
    assert not of_torch.call_args.kwargs.get("enable_gqa")


def test_common_part_of_keys_does_not_reduce_precision() -> None:
    query, key, value = drawn(300, 300, torch.bfloat16)
    expected = exact(query, key + 64, value, scale=1.0)
    assert (
        relative_error(in_products(query, key + 64, value, causal=True), expected) < 0.1
    )


def test_other_cases_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a mask with a window of four keys, fewer queries than keys, and dropout."""
    monkeypatch.setattr(attention, "in_products", None)
    parts = drawn(9, 9, torch.bfloat16)
    mask = torch.ones(9, 9, dtype=torch.bool).tril_().triu_(-3)
    found, _ = attention.attention(Layer(), *parts, mask)
    expected = exact(*parts, attn_mask=mask, causal=False)
    assert relative_error(found, expected.transpose(1, 2)) < 0.02
    of_torch = Mock(return_value=(None, None))
    monkeypatch.setattr(attention, "sdpa_attention_forward", of_torch)
    for T, dropout in ((4, 0.0), (9, 0.5)):
        attention.attention(Layer(), *drawn(T, 9, torch.bfloat16), None, dropout=dropout)
        assert of_torch.call_args.kwargs["dropout"] == dropout
