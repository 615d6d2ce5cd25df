"""Causal attention on CPUs as matrix products over blocks of queries.

It is registered with transformers under the name `IN_PRODUCTS`.

In torch's own kernel for CPUs one core of an EPYC with AVX-512 BF16 reaches 40 of the 450 GFLOP/s
that it reaches in products of 512 x 576 numbers, and a small model spends more time there than in
all of its linears. `python -m benchmarks.attention` compares the two. Memory is linear in the
number of tokens, as in the kernel: the weights of a block of queries exist only while they are
needed, and are computed again for gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ray_surgeon.errors import ConfigError

IN_PRODUCTS = "sdpa_in_products"
"""Name under which models select this implementation."""
QUERIES_AT_A_TIME = 128
"""Queries in a block, for every head that shares keys.

Keys after the last query of a block are skipped, so smaller blocks need fewer operations, and
larger blocks have larger products.
"""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the outputs of attention.

    Plain attention on a CPU, in bfloat16 or with a single query, is computed here; all other cases
    are passed to transformers' function for SDPA.

    Args:
        module: attention layer; its `is_causal` is the default.
        query: [n, heads, T, d].
        key: [n, key heads, S, d]; consecutive query heads share a key head.
        value: [n, key heads, S, e].
        attention_mask: None if every query reads all keys, or the keys up to its own position.
        dropout: fraction of weights that are set to zero.
        scaling: factor of the scores; 1 / sqrt(d) if None.
        is_causal: whether a query reads the keys up to its own position only.
        kwargs: further arguments of transformers' function.

    Returns:
        [n, T, heads, e], and None in place of the weights.
    """
    T = query.shape[2]
    S = key.shape[2]
    causal = T > 1 and _is_causal(module, is_causal)
    is_plain = (
        not dropout
        and attention_mask is None
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and (not causal or T == S)
    )
    on_cpu = query.device.type == "cpu"
    num_shared = query.shape[1] // key.shape[1]
    if is_plain and not on_cpu and num_shared > 1 and query.dtype == torch.float32:
        # with heads that share keys, the only kernel for GPUs that takes float32 keeps all scores
        # for gradients
        outputs = scaled_dot_product_attention(
            query,
            key.repeat_interleave(num_shared, dim=1),
            value.repeat_interleave(num_shared, dim=1),
            is_causal=causal,
            scale=scaling,
        )
        return outputs.transpose(1, 2).contiguous(), None

    is_faster_here = on_cpu and (query.dtype == torch.bfloat16 or T == 1)
    if not is_plain or not is_faster_here:
        outputs, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return outputs, None

    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    outputs = in_products(query * scaling, key, value, causal=causal)
    return outputs.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    if is_causal is not None:
        return is_causal
    return getattr(module, "is_causal", True)


def in_products(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Return softmax(Q K^T) V [n, heads, T, e], with gradients for all three.

    Args:
        query: [n, heads, T, d], scaled.
        key: [n, key heads, S, d].
        value: [n, key heads, S, e].
        causal: whether query t reads only the keys up to t; S equals T then.
    """
    n, heads, T, d = query.shape
    Q = query.reshape(n * key.shape[1], -1, T, d)
    K = key.flatten(0, 1)
    V = value.flatten(0, 1)
    outputs: Tensor = _InProducts.apply(Q, K, V, causal)  # type: ignore[no-untyped-call]
    return outputs.reshape(n, heads, T, -1)


class _InProducts(torch.autograd.Function):
    """`in_products` for queries [N, r, T, d] that share keys [N, S, d] and values [N, S, e]."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, causal: bool) -> Tensor:
        """Return [N, r, T, e]."""
        outputs = Q.new_empty(*Q.shape[:3], V.shape[-1])
        centred = _centred(K, causal)
        for places, num_keys in _blocks(Q.shape[2], K.shape[1], causal):
            q = Q[:, :, places].flatten(1, 2)
            weights = _weights(q, centred[:, :num_keys], places, causal=causal)
            part = outputs[:, :, places]
            part.copy_(torch.bmm(weights, V[:, :num_keys]).view(part.shape))
        ctx.causal = causal
        ctx.save_for_backward(Q, K, V, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values."""
        Q, K, V, outputs = ctx.saved_tensors
        causal = ctx.causal
        centred = _centred(K, causal)
        grad_Q = torch.empty_like(Q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(K.dtype, torch.float32)
        grad_K = torch.zeros(K.shape, dtype=wide)
        grad_V = torch.zeros(V.shape, dtype=wide)
        # [N, r, T], mean of the gradients of a query's weights, weighted by these weights
        means = (gradient.to(wide) * outputs).sum(dim=-1).to(Q.dtype)
        for places, num_keys in _blocks(Q.shape[2], K.shape[1], causal):
            q = Q[:, :, places].flatten(1, 2)
            grad_outputs = gradient[:, :, places].flatten(1, 2)
            weights = _weights(q, centred[:, :num_keys], places, causal=causal)
            # of the product's two sides, the smaller one is transposed
            grad_V[:, :num_keys] += torch.bmm(grad_outputs.mT, weights).mT
            grad_scores = torch.bmm(grad_outputs, V[:, :num_keys].mT)
            grad_scores.sub_(means[:, :, places].flatten(1, 2)[:, :, None]).mul_(weights)
            part = grad_Q[:, :, places]
            part.copy_(torch.bmm(grad_scores, centred[:, :num_keys]).view(part.shape))
            grad_K[:, :num_keys] += torch.bmm(q.mT, grad_scores).mT
        return grad_Q, grad_K.to(K.dtype), grad_V.to(V.dtype), None


def _centred(K: Tensor, causal: bool) -> Tensor:
    """Return the keys minus their mean if attention is causal, else the keys.

    This shifts all scores of a query by the same amount; smaller scores have smaller rounding
    errors.
    """
    if not causal:
        return K
    return K - K.mean(dim=1, keepdim=True)


def _weights(q: Tensor, K: Tensor, places: slice, *, causal: bool) -> Tensor:
    """Return softmax(q K^T) [N, r m, k].

    Args:
        q: [N, r m, d] queries of r heads.
        K: [N, k, d].
        places: positions of the m queries.
        causal: whether queries read keys up to their own position only.
    """
    scores = torch.bmm(q, K.mT)
    if causal:
        m = places.stop - places.start
        is_later = torch.ones(m, m, dtype=torch.bool).triu_(1)
        on_diagonal = scores.view(len(scores), -1, m, scores.shape[-1])[..., places]
        on_diagonal.masked_fill_(is_later, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _blocks(T: int, S: int, causal: bool) -> list[tuple[slice, int]]:
    """Return the positions of each block of the T queries, and how many of the S keys it reads."""
    blocks = list[tuple[slice, int]]()
    for start in range(0, T, QUERIES_AT_A_TIME):
        stop = min(start + QUERIES_AT_A_TIME, T)
        num_keys = stop if causal else S
        blocks.append((slice(start, stop), num_keys))
    return blocks


AttentionInterface.register(IN_PRODUCTS, attention)
AttentionMaskInterface.register(IN_PRODUCTS, sdpa_mask)


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return the parameters of a model's rotary embeddings; empty if it has none.

    Layers with full attention may have other parameters than the rest; theirs are returned then.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    of_full_attention: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return of_full_attention


def rope_kind(config: PretrainedConfig) -> str:
    """Return the type of a model's rotary embeddings, ``default`` if there are none."""
    return str(rope_of(config).get("rope_type", "default"))


def for_older_readers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json for older and newer programs.

    Older programs read ``rope_theta`` and similar fields, but not `rope_parameters`; newer programs
    read both. `rope_parameters` are kept only if the older fields cannot hold all of them.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return dict(document)
    is_gemma3 = str(document.get("model_type")).startswith("gemma3")
    if "full_attention" in parameters and not is_gemma3:
        # only Gemma 3 reads parameters of both kinds of attention from the older fields
        return dict(document)
    both = {**document, **older_fields(document)}
    if _fit_older_fields(parameters):
        del both["rope_parameters"]
    return both


def older_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of rotary embeddings for older programs, made from `rope_parameters`."""
    parameters = document["rope_parameters"]
    of_full_attention = parameters.get("full_attention", parameters)
    older = dict[str, Any]()
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in of_full_attention:
            older[name] = of_full_attention[name]
    sliding = parameters.get("sliding_attention", {})
    if "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    if of_full_attention.get("rope_type", "default") != "default":
        older["rope_scaling"] = {
            name: value for name, value in of_full_attention.items() if name not in older
        }
    return older


def _fit_older_fields(parameters: Mapping[str, Any]) -> bool:
    """Return whether `older_fields` hold all of these `rope_parameters`."""
    if "full_attention" not in parameters:
        return True
    sliding = parameters.get("sliding_attention", {})
    kinds = parameters.keys() == {"full_attention", "sliding_attention"}
    is_plain = sliding.get("rope_type", "default") == "default"
    return kinds and is_plain and sliding.keys() <= {"rope_theta", "rope_type"}


def check_rope(document: Mapping[str, Any]) -> None:
    """Refuse a config.json whose old and new fields of rotary embeddings disagree.

    A program reads either the old fields or the new ones.

    Raises:
        ValueError: names both values.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return
    expected = {**document, **older_fields(document)}
    expected.update(parameters.get("full_attention", parameters))
    older = dict[str, Any]()
    for name in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        older[name] = document.get(name)
    older.update(document.get("rope_scaling") or {})
    for name, value in older.items():
        if value is not None and value != expected.get(name, value):
            raise ConfigError(
                field="model.source",
                found=f"config.json has {name} {value}, and {expected[name]} in rope_parameters",
                remedy="remove the wrong one",
            )
