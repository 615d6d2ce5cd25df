"""Causal attention on CPUs as matrix products of blocks of queries.

It is registered with transformers under the name `IN_PRODUCTS`.

torch's own kernel for CPUs makes 40 of the 450 GFLOP/s that one core of an EPYC with AVX-512 BF16
makes in products of 512 x 576 numbers: in a small model it takes more time than all linears.
`python -m benchmarks.attention` compares the two. Memory is linear in the number of tokens, as the
kernel's is: the weights of a block of queries exist only while they are needed, and are computed
again for gradients.
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

IN_PRODUCTS = "sdpa_in_products"
"""The name by which models ask for it."""
QUERIES_AT_A_TIME = 128
"""Of every head that shares keys.

The keys after the last of them are left out, so that fewer queries are less work in larger pieces.
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

    What is not plain attention on a CPU, in bfloat16 or of one query, goes to transformers' own
    function for SDPA.

    Args:
        module: the attention layer, whose `is_causal` counts if none is given.
        query: [n, heads, T, d].
        key: [n, key heads, S, d], each for as many query heads that follow each other.
        value: [n, key heads, S, e].
        attention_mask: None if every query reads all keys, or those up to its own place.
        dropout: share of weights that are set to zero.
        scaling: factor of the scores; 1 / sqrt(d) if None.
        is_causal: whether a query reads the keys up to its own place only.
        kwargs: of other functions.

    Returns:
        [n, T, heads, e], and None in place of the weights.
    """
    T = query.shape[2]
    S = key.shape[2]
    causal = T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    special = (attention_mask, kwargs.get("position_bias"), kwargs.get("softcap"))
    plain = not dropout and all(part is None for part in special) and (not causal or T == S)
    on_cpu = query.device.type == "cpu"
    shared = query.shape[1] // key.shape[1]
    if plain and not on_cpu and shared > 1 and query.dtype == torch.float32:
        # of torch's kernels for GPUs only the one that keeps all scores for gradients takes float32
        # with heads that share keys
        keys, values = (part.repeat_interleave(shared, dim=1) for part in (key, value))
        outputs = scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scaling)
        return outputs.transpose(1, 2).contiguous(), None
    gains = on_cpu and (query.dtype == torch.bfloat16 or T == 1)
    if not plain or not gains:
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        outputs, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return outputs, None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return in_products(query * factor, key, value, causal=causal).transpose(1, 2).contiguous(), None


def in_products(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Return softmax(Q K^T) V [n, heads, T, e], with gradients for all three.

    Args:
        query: [n, heads, T, d], scaled.
        key: [n, key heads, S, d].
        value: [n, key heads, S, e].
        causal: whether query t reads the keys up to t only; T is S then.
    """
    n, heads, T, d = query.shape
    Q = query.reshape(n * key.shape[1], -1, T, d)
    K = key.flatten(0, 1)
    V = value.flatten(0, 1)
    outputs: Tensor = _InProducts.apply(Q, K, V, causal)  # type: ignore[no-untyped-call]
    return outputs.reshape(n, heads, T, -1)


class _InProducts(torch.autograd.Function):
    """The same for queries [N, r, T, d]; r share keys [N, S, d] and values [N, S, e]."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, causal: bool) -> Tensor:
        """Return [N, r, T, e]."""
        outputs = Q.new_empty(*Q.shape[:3], V.shape[-1])
        centred = _centred(K, causal)
        for places, keys in _blocks(Q.shape[2], K.shape[1], causal):
            q = Q[:, :, places].flatten(1, 2)
            weights = _weights(q, centred[:, :keys], places if causal else None)
            part = outputs[:, :, places]
            part.copy_(torch.bmm(weights, V[:, :keys]).view(part.shape))
        ctx.causal = causal
        ctx.save_for_backward(Q, K, V, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values."""
        Q, K, V, outputs = ctx.saved_tensors
        centred = _centred(K, ctx.causal)
        to_Q = torch.empty_like(Q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(K.dtype, torch.float32)
        to_K = torch.zeros(K.shape, dtype=wide)
        to_V = torch.zeros(V.shape, dtype=wide)
        # [N, r, T], mean of the weights' gradients, weighted by them
        read = (gradient.to(to_K.dtype) * outputs).sum(dim=-1).to(Q.dtype)
        for places, keys in _blocks(Q.shape[2], K.shape[1], ctx.causal):
            q, to_outputs = (part[:, :, places].flatten(1, 2) for part in (Q, gradient))
            weights = _weights(q, centred[:, :keys], places if ctx.causal else None)
            to_V[:, :keys] += torch.bmm(to_outputs.mT, weights).mT  # the smaller one is transposed
            means = read[:, :, places].flatten(1, 2)[:, :, None]
            to_scores = torch.bmm(to_outputs, V[:, :keys].mT).sub_(means).mul_(weights)
            part = to_Q[:, :, places]
            part.copy_(torch.bmm(to_scores, centred[:, :keys]).view(part.shape))
            to_K[:, :keys] += torch.bmm(q.mT, to_scores).mT
        return to_Q, to_K.to(K.dtype), to_V.to(V.dtype), None


def _centred(K: Tensor, causal: bool) -> Tensor:
    """Return the keys less their mean.

    That takes the same from all scores of a query, and smaller scores are rounded less.
    """
    return K - K.mean(dim=1, keepdim=True) if causal else K


def _weights(q: Tensor, K: Tensor, places: slice | None) -> Tensor:
    """Return softmax(q K^T) [N, r m, k] of m queries in r heads.

    Queries read keys up to their own places if these are given.
    """
    scores = torch.bmm(q, K.mT)
    if places is not None:
        m = places.stop - places.start
        later = torch.ones(m, m, dtype=torch.bool).triu_(1)
        own = scores.view(len(scores), -1, m, scores.shape[-1])[..., places]
        own.masked_fill_(later, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _blocks(T: int, S: int, causal: bool) -> list[tuple[slice, int]]:
    """Return the places of each block of T queries, and how many of S keys it reads."""
    starts = range(0, T, QUERIES_AT_A_TIME)
    places = [slice(start, min(start + QUERIES_AT_A_TIME, T)) for start in starts]
    return [(part, part.stop if causal else S) for part in places]


AttentionInterface.register(IN_PRODUCTS, attention)
AttentionMaskInterface.register(IN_PRODUCTS, sdpa_mask)


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return what a configuration says of rotary embeddings; nothing if it has none.

    That is of full attention, which may have a table of its own.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    table: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return table


def rope_kind(config: PretrainedConfig) -> str:
    """Return the type of a model's rotary embeddings, ``default`` if there are none."""
    return str(rope_of(config).get("rope_type", "default"))


def for_older_readers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that older programs read, too.

    They do not know `rope_parameters`, but ``rope_theta``.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return dict(document)
    of_all = parameters.get("full_attention", parameters)
    names = ("rope_theta", "partial_rotary_factor")
    older = {name: of_all[name] for name in names if name in of_all}
    sliding = parameters.get("sliding_attention", {})
    if "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    if of_all.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: of_all[name] for name in of_all if name not in older}
    return dict(document) | older


def check_rope(document: Mapping[str, Any]) -> None:
    """Refuse a config.json that says two things of the rotary embeddings.

    Programs read one or the other.

    Raises:
        ValueError: names both.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return
    said = for_older_readers(document) | parameters.get("full_attention", parameters)
    names = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    older = {name: document.get(name) for name in names} | (document.get("rope_scaling") or {})
    for name, value in older.items():
        if value is not None and value != said.get(name, value):
            both = f"{name} {value}, and {said[name]} in rope_parameters"
            raise ValueError(f"model.source: config.json has {both}; remove the wrong one")
