"""A pretend accelerator: the torch device "sim" runs code for GPUs on the CPU and finds mixed
devices.

Its tensors are torch's own, with storages, strides and views, and report the device "sim", but
their memory is the CPU's. An operator checks that no argument is a CPU tensor, and runs on CPU
tensors over the same memory. The device checks where tensors are and, with `tests.pretend_streams`,
the order of copies and computation; it does not model memory sizes, NCCL, or the rounding of GPUs.

It does not support generators on the device, convolutions, copy.deepcopy and torch.save.

Importing this module registers the device for the rest of the process. torch prepares its threads
for backward passes at the first one and does not know devices that are registered later. So the
device has its own processes: forks of `tests.zygote`, whose entry point is `answer`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload

from ray_surgeon.memory.transfers import Transfers
from tests import pretend_streams

SIM = "sim"

_DLPACK = {"cpu": 1, SIM: 12}
"""kDLCPU and kDLExtDev of dlpack.h; torch reads the latter as the device of external backends,
which "sim" is.
"""
_DEVICE_TYPE_OFFSET = 8
"""Offset of DLManagedTensor.dl_tensor.device.device_type, behind the pointer to the data."""
_CPU_KERNELS = DispatchKeySet(DispatchKey.CPU)

_takes_numbers = torch._C._should_allow_numbers_as_tensors

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _seen_as(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor over the same memory, with the same strides, on another device."""
    capsule = torch._C._to_dlpack(tensor)
    address = _pointer_of(capsule, b"dltensor")
    assert address is not None
    ctypes.c_int32.from_address(address + _DEVICE_TYPE_OFFSET).value = _DLPACK[device]
    seen: Tensor = torch._C._from_dlpack(capsule)
    return seen


@dataclass(frozen=True)
class _Signature:
    """Properties of an operator's schema, computed once per operator."""

    names: tuple[str, ...]  # of all arguments
    # outputs, which may have another size or be one of the inputs
    out: Set[str]
    changed: Set[str]  # tensors that are written to
    plain: Set[str]  # single tensors, for which torch may pass a number
    anywhere: Set[str]  # may be on the CPU as well
    is_view: bool  # whether the result shares the storage of an argument
    returns_first: bool  # whether the result is the first argument

    @staticmethod
    @functools.cache
    def of(op: OpOverload) -> _Signature:
        arguments = op._schema.arguments
        returns = [r.alias_info for r in op._schema.returns if r.alias_info is not None]
        changed = {
            a.name
            for a in arguments
            if a.alias_info is not None and a.alias_info.is_write
        }
        takes_numbers = _takes_numbers(op._schema.name.split("::")[1])
        return _Signature(
            names=tuple(a.name for a in arguments),
            out={a.name for a in arguments if a.kwarg_only and a.name in changed},
            changed=changed,
            plain={
                a.name for a in arguments if str(a.type) == "Tensor" and not takes_numbers
            },
            anywhere={"indices"} if "index" in op._schema.name else set(),
            is_view=any(not alias.is_write for alias in returns),
            returns_first=any(alias.is_write for alias in returns),
        )


def _run(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run any operator: views on the tensors themselves, all others on CPU tensors over the same
    memory.
    """
    signature = _Signature.of(op)
    bound = dict(zip(signature.names, args, strict=False)) | kwargs
    _check_devices(op, signature, bound)
    if signature.is_view:  # kernels of views only compute sizes and strides
        return op.redispatch(_CPU_KERNELS, *args, **kwargs)
    pretend_streams.count()
    given = {
        name: _on_cpu(value) for name, value in bound.items() if name not in signature.out
    }
    given |= {name: torch.empty(0, dtype=bound[name].dtype) for name in signature.out}
    for name in signature.plain:
        if isinstance(given[name], bool | int | float):
            given[name] = torch.tensor(
                given[name],
                dtype=torch.float64 if isinstance(given[name], float) else None,
            )
    results = _WIDE_PRODUCTS.get(op, op)(**given)
    for name in signature.out:
        out = bound[name]
        result = given[name]
        if out.shape != result.shape:
            out.resize_(result.shape)
        _seen_as(out, "cpu").copy_(result)
    if signature.out:
        outs = tuple(bound[name] for name in signature.names if name in signature.out)
        return outs if len(outs) > 1 else outs[0]
    return args[0] if signature.returns_first else _on_sim(results)


def _wide_mm(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    return self.to(out_dtype) @ mat2.to(out_dtype)


def _wide_addmm(
    self: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    out_dtype: torch.dtype,
    *,
    out: Tensor,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    return torch.addmm(
        self, mat1.to(out_dtype), mat2.to(out_dtype), beta=beta, alpha=alpha, out=out
    )


_WIDE_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.dtype: _wide_mm,
    torch.ops.aten.addmm.dtype_out: _wide_addmm,
}
"""Compute products of narrow dtypes with float32 results, which the CPU does not support."""


def _check_devices(op: OpOverload, signature: _Signature, bound: dict[str, Any]) -> None:
    """Refuse arguments that a GPU would refuse.

    Raises:
        RuntimeError: a tensor on the CPU has dimensions or is written to, or a generator is on the
            CPU.
    """
    for name in bound.keys() - signature.anywhere:
        value = bound[name]
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Tensor):
                counts = item.dim() > 0 or name in signature.changed
            else:
                counts = isinstance(item, torch.Generator)
            if counts and item.device.type != SIM:
                raise RuntimeError(
                    f"{op}: {name} is on {item.device}, and others are on {SIM}"
                )


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _seen_as(value, "cpu") if value.device.type == SIM else value
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _on_sim(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _seen_as(value, SIM)
    return (
        tuple(_on_sim(item) for item in value)
        if isinstance(value, list | tuple)
        else value
    )


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices or within one, as `copy_` and `to` do."""
    on_device = source if source.device.type == SIM else target
    pretend_streams.copy(
        source,
        target,
        on_device,
        lambda tensor: _on_cpu(target).copy_(_on_cpu(tensor)),
        waits=not non_blocking,
    )
    return target


def _resize(
    tensor: Tensor,
    size: Sequence[int],
    *,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Resize a tensor, as outputs may need it. Its memory is new, because that of the CPU tensor
    behind it cannot grow.
    """
    if tuple(tensor.shape) != tuple(size):
        new = _seen_as(torch.empty(size, dtype=tensor.dtype), SIM)
        storage = torch.ops.aten.set_.source_Storage_storage_offset
        storage.redispatch(
            _CPU_KERNELS, tensor, new.untyped_storage(), 0, list(size), list(new.stride())
        )
    return tensor


def _register() -> tuple[torch.library.Library, ...]:
    setup = torch.utils.backend_registration._setup_privateuseone_for_python_backend
    setup(SIM, pretend_streams.Backend())
    Transfers.pinned = staticmethod(pretend_streams.pinned)  # type: ignore[assignment, method-assign]
    Tensor.record_stream = pretend_streams.record_stream  # type: ignore[assignment]
    everything = torch.library.Library("_", "IMPL")
    some = torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    some.impl("_copy_from", _copy_from, "PrivateUse1")
    some.impl("resize_", _resize, "PrivateUse1")
    return everything, some


_LIBRARIES = _register()
"""Libraries stay alive here, because a library that is freed removes its operators."""


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Call a function in this process and return what it returns: ``{"function": "module:name",
    "arguments": {...}}``.
    """
    module, name = asked["function"].split(":")
    return {
        "returned": getattr(importlib.import_module(module), name)(**asked["arguments"])
    }
