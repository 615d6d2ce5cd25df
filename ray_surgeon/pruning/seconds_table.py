"""Seconds of a request as a budget: a sum over blocks, by their widths.

They are in a table that was measured in the engine that will serve, see examples/engine_table.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layers import LAYER_KINDS, layers_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.spec.base import REASON, refusing
from ray_surgeon.spec.targets import SpeedSection, TimedTarget
from ray_surgeon.storage import files

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_OfNumbers = Annotated[dict[NonNegativeInt, tuple[_Seconds, _Seconds]], Field(min_length=1)]


class _Table(BaseModel):
    """What a table says; it may say more.

    Seconds are pairs: of the prompts, and of the new tokens.
    """

    model_config = ConfigDict(hide_input_in_errors=True)
    request: SpeedSection
    num_blocks: PositiveInt
    channels: _OfNumbers  # number of channels of a block -> its seconds
    kv_heads: _OfNumbers  # number of KV heads of a block -> its seconds
    rest: tuple[_Seconds, _Seconds]  # of what is outside the blocks


def budget_in(uri: str, layout: ModelLayout, target: TimedTarget) -> Budget:
    """Return a budget from a table, linear between the widths that were measured.

    Raises:
        ValueError: it is no such table, or one of another model.
    """
    where = f"pruning.target: the table {uri}"
    remedy = "give one that examples/engine_table.py wrote for this model"
    with refusing(f"{where} cannot be used: {REASON}", remedy, (OSError, ValueError)):
        table = _Table.model_validate(files.read_json(uri))
    request = table.request
    num_tokens = request.batch_size * request.num_new_tokens if target.of_decode else 1

    def of_parts(parts: tuple[float, float]) -> float:
        return sum(parts[target.of_decode :]) / num_tokens

    own = (layout.num_blocks, layout.num_channels, layout.heads.num_kv)
    found = (table.num_blocks, max(table.channels), max(table.kv_heads))
    if own != found:
        names = "blocks, feed-forward channels and KV heads"
        problem = f"of a model with {found} {names}, but this one has {own}"
        raise ValueError(f"{where} is {problem}; {remedy}")
    channels, heads = (
        _of_each_number({number: of_parts(parts) for number, parts in of.items()})
        for of in (table.channels, table.kv_heads)
    )
    by_left = {"ffn": channels, "attention": tuple(seconds - heads[-1] for seconds in heads)}
    parts = {"blocks": channels[-1]}
    for kind, name in (("ffn_layers", "ffn"), ("attention_layers", "attention")):
        parts[kind] = by_left[name][-1] - by_left[name][0]
    of_layers = {layer.key: parts[layer.kind] for layer in layers_of(layout, LAYER_KINDS)}
    unit = "seconds a new token" if target.of_decode else "latency_s"
    num_blocks = dict.fromkeys(by_left, layout.num_blocks)
    return Budget(unit, of_parts(table.rest), by_left, num_blocks, of_layers=of_layers)


def _of_each_number(measured: Mapping[int, float]) -> tuple[float, ...]:
    """Return the seconds with 0, 1, ... groups left.

    Values are linear between measured numbers, and go on from the two lowest below these. None is
    above that of the whole, and they never fall.
    """
    numbers = sorted(measured)
    seconds = np.array([measured[number] for number in numbers])
    rising = np.maximum.accumulate(np.minimum(seconds, seconds[-1])).tolist()
    if numbers[0] and len(numbers) > 1:
        each = (rising[1] - rising[0]) / (numbers[1] - numbers[0])
        rising.insert(0, max(0.0, rising[0] - each * numbers[0]))
        numbers.insert(0, 0)
    return tuple(float(value) for value in np.interp(range(numbers[-1] + 1), numbers, rising))
