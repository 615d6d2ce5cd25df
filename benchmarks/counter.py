"""Counts launches, syncs, bytes and operations without a GPU.

`Counter` counts them for all code inside its context, on tensors of a CPU or a simulated
accelerator.
"""

from __future__ import annotations

import collections
import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ray_surgeon.models import attention as own_attention

_NO_KERNELS = frozenset(
    re.findall(
        r"\S+",
        "empty empty_like empty_strided new_empty new_empty_strided empty_permuted resize_ set_ "
        "detach detach_ alias lift_fresh lift _unsafe_view _reshape_alias reshape is_pinned "
        "_pin_memory record_stream is_same_size _local_scalar_dense _nested_tensor_size",
    )
)
"""Operators without a view in their schema that start no kernel, such as allocations."""
_SYNCS = frozenset(
    re.findall(
        r"\S+",
        "_local_scalar_dense nonzero masked_select equal bincount _unique2 unique_dim "
        "unique_consecutive unique_dim_consecutive _linalg_check_errors _linalg_eigh _linalg_svd",
    )
)
"""Operators that make the host wait for the result or its size."""
_GATHERS = frozenset(re.findall(r"\S+", "index index_select gather embedding"))
"""Operators that read as many bytes of their first argument as they return."""
_SCATTERS = frozenset(
    re.findall(
        r"\S+", "index_add_ index_put_ index_copy_ scatter_ scatter_add_ index_fill_"
    )
)
"""Operators that read and write as many bytes of their first argument as their last one has."""
_OVERWRITES = frozenset(
    re.findall(r"\S+", "copy_ zero_ fill_ normal_ uniform_ bernoulli_")
)
"""Operators that only write to their first argument."""


class _CopiedTensors(TorchFunctionMode):
    """Makes ``torch.tensor`` on a device a copy from the CPU, visible to dispatch modes.

    Otherwise torch fails if the device's kernels are written in Python.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


_COUNTED = ("launches", "syncs", "bytes", "moved_bytes", "flops", "operators", "waits")


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the work of a device for all computations in this thread.

    A launch is an operator that starts a kernel: neither a view nor an allocation, and with a
    non-empty result. A sync is an operator for which the host waits. Copies between devices are
    launches, and also syncs unless they are ``non_blocking``. Only operators with a tensor on the
    device count.

    Attributes: launches: number of launches. syncs: number of syncs. bytes: bytes read and written
    in the device's memory. moved_bytes: bytes copied between host and device. flops: operations of
    products, by the dtype of the first matrix. operators: launches by the operator's name. waits:
    syncs by the operator's name.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.launches = 0
        self.syncs = 0
        self.bytes = 0
        self.moved_bytes = 0
        self.flops: collections.Counter[torch.dtype] = collections.Counter()
        self.operators: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Counter:
        self._copied = _CopiedTensors()
        self._copied.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._copied.__exit__(*error)  # type: ignore[no-untyped-call]

    def taken(self) -> Counter:
        """Return the counts so far, and reset them."""
        counts = Counter(self.device_type)
        for name in _COUNTED:
            value = getattr(self, name)
            setattr(counts, name, value)
            setattr(self, name, type(value)())
        return counts

    def plus(self, other: Counter) -> Counter:
        """Return the sums of two counts."""
        counts = Counter(self.device_type)
        for name in _COUNTED:
            setattr(counts, name, getattr(self, name) + getattr(other, name))
        return counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        inputs = list(_tensors((args, kwargs)))
        waits = self._waits(name, func, args, kwargs)
        # before it runs, because in-place operators may give tensors other sizes
        read = sum(map(_size, _read(name, func, args, kwargs)))
        results = func(*args, **kwargs)
        outputs = list(_tensors(results))
        if not any(t.device.type == self.device_type for t in inputs + outputs):
            return results
        if waits:
            self.syncs += 1
            self.waits[name] += 1
        if not _starts_a_kernel(name, func) or not any(
            t.numel() for t in outputs or inputs
        ):
            return results
        self.launches += 1
        self.operators[name] += 1
        if len({t.device.type for t in (inputs + outputs) if t.dim()}) > 1:
            self.moved_bytes += sum(map(_size, outputs))
        self.bytes += read + _written(name, args, outputs)
        if (flops := _flops(func, args, kwargs, results)) and inputs:
            matrices = [t for t in inputs if t.dim() > 1] or inputs
            self.flops[matrices[-1].dtype] += flops
        return results

    def _waits(
        self, name: str, func: OpOverload, args: Any, kwargs: dict[str, Any]
    ) -> bool:
        if name in {"index", "index_put_", "index_put", "_index_put_impl_"}:
            masks = [
                t
                for t in args[1]
                if t is not None and t.dtype in {torch.bool, torch.uint8}
            ]
            # a mask and a number is a masked_fill_
            return bool(masks) and not (name != "index" and args[2].numel() == 1)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "_to_copy":
            device = kwargs.get("device") or args[0].device
            other = torch.device(device).type != args[0].device.type
            return other and not kwargs.get("non_blocking", False)
        if name == "copy_":
            is_blocking = not (
                kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            )
            return bool(args[0].device.type != args[1].device.type and is_blocking)
        return name in _SYNCS


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _starts_a_kernel(name: str, func: OpOverload) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    is_aten = func.namespace in {"aten", "torchvision"} or bool(returned)
    return is_aten and not is_view and name not in _NO_KERNELS


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; elements repeated by an expansion count once."""
    if tensor.is_sparse:
        return int(tensor._values().numel() * tensor.element_size())
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _read(
    name: str, func: OpOverload, args: tuple[Any, ...], kwargs: Any
) -> Iterator[Tensor]:
    out = {
        a.name
        for a in func._schema.arguments
        if a.kwarg_only and a.alias_info is not None
    }
    skips_first = name in _OVERWRITES | _GATHERS | _SCATTERS
    yield from _tensors(args[1:] if skips_first else args)
    yield from _tensors([value for key, value in kwargs.items() if key not in out])


def _written(name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> int:
    """Return the bytes written, and the bytes read of partially read arguments."""
    if name in _SCATTERS:
        return 2 * (_size(args[-1]) if isinstance(args[-1], Tensor) else 0)
    return sum(map(_size, outputs)) * (2 if name in _GATHERS else 1)


def _flops(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any
) -> int:
    """Return the operations of a product, a factorisation or a triangular solve; otherwise 0."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name in {"mv", "addmv", "dot", "vdot"}:
        return int(2 * args[1 if name == "addmv" else 0].numel())
    if name in {"linalg_cholesky_ex", "cholesky", "cholesky_inverse"}:
        return int(
            args[0].numel() * args[0].shape[-1] // (3 if "inverse" not in name else 1.5)
        )
    if name in {"linalg_solve_triangular", "triangular_solve", "cholesky_solve"}:
        both = args[1].numel() if name == "linalg_solve_triangular" else args[0].numel()
        return int(both * args[1 if name != "linalg_solve_triangular" else 0].shape[-1])
    packet = getattr(torch.ops.aten, name, None)
    counted = flop_registry.get(packet)
    return int(counted(*args, **kwargs, out_val=results)) if counted else 0


@torch.library.custom_op("ray_surgeon_benchmarks::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        how: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
        result: Tensor = _sdpa(query, key, value, mask, **how)
        return result


@torch.library.custom_op("ray_surgeon_benchmarks::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> list[Tensor]:
    num_repeats = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(num_repeats, dim=1) for x in (key, value))
    scores = scale * query @ keys.mT
    if is_causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
    chances = scores.softmax(dim=-1)
    of_chances = gradient @ values.mT
    of_scores = (
        scale * chances * (of_chances - (of_chances * chances).sum(dim=-1, keepdim=True))
    )
    of_pairs = (of_scores.mT @ query, chances.mT @ gradient)
    of_key, of_value = (x.unflatten(1, (-1, num_repeats)).sum(dim=2) for x in of_pairs)  # type: ignore[no-untyped-call]
    return [of_scores @ keys, of_key, of_value]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(gradient, *ctx.saved_tensors, *ctx.rest), None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


_attention.register_autograd(_backward, setup_context=_keep)
_sdpa = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def attention_as_one_launch() -> Iterator[None]:
    """Make attention one operator forward and one backward, as on a GPU."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        is_causal = bool(kwargs.get("is_causal"))
        result: Tensor = _attention(query, key, value, attn_mask, is_causal, scale)
        return result

    # both have it by its name
    modules: tuple[Any, ...] = (torch.nn.functional, own_attention)
    for module in modules:
        module.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        for module in modules:
            module.scaled_dot_product_attention = _sdpa
