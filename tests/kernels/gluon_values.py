"""What a kernel computes with: values in registers, arithmetic, pointers and what they point to.

Types and roundings are Triton's. Layouts carry no values: they are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from gluon_schedule import (
    BoundsError,
    EmulationError,
    RegisterError,
    UnsupportedError,
    error,
    pause,
)

TORCH_DTYPES = {
    tl.int1: torch.bool,
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.uint32: torch.uint32,
    tl.int64: torch.int64,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
TRITON_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


def torch_dtype(dtype: Any) -> torch.dtype:
    if dtype not in TORCH_DTYPES:
        raise error(UnsupportedError, f"the type {dtype} is not emulated")
    return TORCH_DTYPES[dtype]


def poison(dtype: torch.dtype) -> float | int:
    """What undefined memory holds."""
    if dtype.is_floating_point:
        return math.nan
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max // 3


def integers(values: Any) -> list[int]:
    """Return a shape or an order, given as one sequence or as arguments, as Python's numbers."""
    if len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = values[0]
    return [int(x) for x in values]


class Unknown:
    """Refuses, by name, the attributes that a class does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        what = type(self).__name__.lower()
        raise error(UnsupportedError, f"the attribute {name} of a {what} is not emulated")


class Tensor(Unknown):
    """A block of values in registers, or a scalar: `data` is on the CPU, of no dimension if so."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> tl.dtype:
        return TRITON_DTYPES[self.data.dtype]

    def __bool__(self) -> bool:
        return bool(self.data)  # of more than one element: an error, as in Triton

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__
    __hash__ = object.__hash__

    def to(self, dtype: tl.dtype, fp_downcast_rounding=None, bitcast: bool = False) -> Tensor:
        target = torch_dtype(dtype)
        if fp_downcast_rounding is not None:
            raise error(UnsupportedError, f"rounding {fp_downcast_rounding} is not emulated")
        if not bitcast:
            return Tensor(self.data.to(target))
        if target.itemsize != self.data.dtype.itemsize:
            raise error(EmulationError, f"bitcast of {self.dtype} to {dtype}, of another size")
        return Tensor(self.data.view(target))

    def reshape(self, *shape) -> Tensor:
        return Tensor(self.data.reshape(integers(shape)))

    def permute(self, *order) -> Tensor:
        return Tensor(self.data.permute(integers(order)))

    def __getitem__(self, index) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if any(i is not None and i != slice(None) for i in index):
            text = f"index {index} of a tensor: only : and None are emulated"
            raise error(UnsupportedError, text)
        return Tensor(self.data[index])

    def __neg__(self) -> Tensor:
        return Tensor(-self.data)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)


class Accumulator(Tensor):
    """The result of a product in flight, None for an initial value: for products and waits only."""

    def __init__(self, shape: list[int], product: Any, value: torch.Tensor | None = None) -> None:
        self._shape, self.product, self.value = shape, product, value

    @property
    def shape(self) -> list[int]:
        return self._shape

    @property
    def data(self) -> torch.Tensor:
        what = self.product or "accumulator of warpgroup_mma_init"
        raise error(RegisterError, f"used ahead of its wait: the {what}")


# -------------------------------------------------------------------------------- arithmetic
def as_tensor(value: Any) -> Tensor:
    """Return a Python number as Triton takes it, a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return Tensor(torch.tensor(value))
    if isinstance(value, int):
        is_short = -(2**31) <= value < 2**31
        return Tensor(torch.tensor(value, dtype=torch.int32 if is_short else torch.int64))
    if isinstance(value, float):
        return Tensor(torch.tensor(value, dtype=torch.float32))
    raise error(UnsupportedError, f"{value!r} is no operand that is emulated")


def _common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    for dtype in (torch.float64, torch.float32, torch.float16):
        if dtype in (a, b):
            return dtype
    if torch.bfloat16 in (a, b):
        return torch.bfloat16 if a == b else torch.float32
    return torch.promote_types(a, b)


def _kind(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _promoted(a: Any, b: Any, is_division: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = as_tensor(a).data, as_tensor(b).data
    if isinstance(a, Tensor) == isinstance(b, Tensor):
        dtype = _common_dtype(x.dtype, y.dtype)
    else:
        # A Python number takes the tensor's type unless it is of a higher kind.
        tensor, number = (x, y) if isinstance(a, Tensor) else (y, x)
        dtype = tensor.dtype
        if _kind(number.dtype) > _kind(dtype):
            dtype = _common_dtype(dtype, number.dtype)
        elif not number.dtype.is_floating_point and number.to(dtype) != number:
            raise error(EmulationError, f"the number {number} does not fit {TRITON_DTYPES[dtype]}")
    if is_division and dtype != torch.float64:
        dtype = torch.float32
    return x.to(dtype), y.to(dtype)


def binary(function: Callable, is_division: bool = False) -> Callable:
    """Make an operator of Triton from one of torch."""

    def operator(a, b):
        if isinstance(b, Pointer):
            return NotImplemented
        return Tensor(function(*_promoted(a, b, is_division)))

    return operator


def unary(function: Callable) -> Callable:
    return lambda x: Tensor(function(as_tensor(x).data))


OPERATORS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    # Integers round towards zero, as in C.
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}
COMPARISONS = {name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _install_operators() -> None:
    for name, function in OPERATORS.items():
        operator = binary(function)
        setattr(Tensor, f"__{name}__", operator)
        setattr(Tensor, f"__r{name}__", lambda x, other, operator=operator: operator(other, x))
    for name, function in COMPARISONS.items():
        setattr(Tensor, f"__{name}__", binary(function))
    Tensor.__truediv__ = binary(torch.div, is_division=True)
    Tensor.__rtruediv__ = lambda self, other: Tensor.__truediv__(as_tensor(other), self)


_install_operators()


def static_assert(cond, msg="") -> None:
    if not cond:
        raise error(EmulationError, f"static_assert: {msg}")


def where(condition, x, y) -> Tensor:
    return Tensor(torch.where(as_tensor(condition).data, *_promoted(x, y)))


def full(shape, value, dtype, layout=None) -> Tensor:
    number = as_tensor(value).data.to(torch_dtype(dtype))
    return Tensor(number.expand(integers((shape,))).clone())


def zeros(shape, dtype, layout=None) -> Tensor:
    return full(shape, 0, dtype)


def arange(start, end, layout=None) -> Tensor:
    return Tensor(torch.arange(int(start), int(end), dtype=torch.int32))


def convert_layout(value, layout, assert_trivial=False) -> Tensor:
    return Tensor(value.data)


def cast(input, dtype, fp_downcast_rounding=None, bitcast=False) -> Tensor:
    return as_tensor(input).to(dtype, fp_downcast_rounding, bitcast)


def split(a) -> tuple[Tensor, Tensor]:
    low, high = a.data.unbind(-1)
    return Tensor(low), Tensor(high)


def join(a, b) -> Tensor:
    return Tensor(torch.stack(torch.broadcast_tensors(a.data, b.data), -1))


def expand_dims(input, axis) -> Tensor:
    return Tensor(input.data.unsqueeze(axis))


def cdiv(x, div) -> Tensor | int:
    return (x + (div - 1)) // div


def total(input, axis=None) -> Tensor:
    x = input.data
    if x.dtype in (torch.float16, torch.bfloat16):
        raise error(UnsupportedError, f"a sum of {input.dtype} is not emulated: its order matters")
    if not x.dtype.is_floating_point and x.dtype.itemsize < 4:
        x = x.to(torch.int32)
    return Tensor(x.sum(axis, dtype=x.dtype))


def extremum(sign: int) -> Callable:
    """Make max (sign 1) or min (sign -1) along an axis, which pass over NaN."""

    def reduce(input, axis=None) -> Tensor:
        x = input.data if axis is not None else input.data.reshape(-1)
        dim = axis or 0
        extreme = torch.amax if sign == 1 else torch.amin
        if not x.dtype.is_floating_point:
            return Tensor(extreme(x, dim))
        found = extreme(torch.where(x.isnan(), -sign * math.inf, x), dim)
        return Tensor(torch.where(x.isnan().all(dim), math.nan, found))

    return reduce


def range_(start, end=None, step=1, num_stages=None) -> Any:
    """Python's `range`, with scalars of int32."""
    start, end = (0, start) if end is None else (start, end)
    return (as_tensor(i) for i in range(int(start), int(end), int(step)))


# -------------------------------------------------------------------------------- global memory
def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"tensors must be on the CPU to be emulated, got one on {tensor.device}")
    return tensor.detach()


class GlobalMemory:
    """What a tensor spans, flat, and which elements of that are the tensor's (None: all)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        shape, strides = tensor.shape, tensor.stride()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.data = on_cpu(tensor).as_strided((extent if tensor.numel() else 0,), (1,))
        self.is_element = None
        if extent > tensor.numel() > 0:
            self.is_element = torch.zeros(extent, dtype=torch.bool)
            self.is_element.as_strided(shape, strides).fill_(True)


class Pointer(Unknown):
    """An address in a tensor's memory, or a block of them: offsets in elements."""

    def __init__(self, memory: GlobalMemory, offsets: torch.Tensor | None = None) -> None:
        self.memory = memory
        self.offsets = torch.zeros((), dtype=torch.int64) if offsets is None else offsets

    @property
    def dtype(self) -> tl.dtype:
        return tl.pointer_type(TRITON_DTYPES[self.memory.data.dtype])

    def __add__(self, other) -> Pointer:
        return Pointer(self.memory, self.offsets + as_tensor(other).data.to(torch.int64))

    __radd__ = __add__

    def __sub__(self, other) -> Pointer:
        return Pointer(self.memory, self.offsets - as_tensor(other).data.to(torch.int64))

    def to(self, dtype) -> Pointer:
        """As an integer, for inline assembly: still an address."""
        if dtype != tl.int64:
            raise error(UnsupportedError, f"a pointer as {dtype} is not emulated")
        return self

    def accessed(self, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return offsets (0 where masked out) and mask in one shape, checked."""
        mask = torch.tensor(True) if mask is None else as_tensor(mask).data
        offsets, mask = torch.broadcast_tensors(self.offsets, mask)
        size, is_element = self.memory.data.numel(), self.memory.is_element
        outside = mask & ((offsets < 0) | (offsets >= size))
        offsets = torch.where(mask & ~outside, offsets, 0)
        if is_element is not None:
            outside = outside | (mask & ~is_element[offsets])
        if outside.any():
            wrong = torch.broadcast_to(self.offsets, mask.shape)[outside][0].item()
            raise error(BoundsError, f"element {wrong} is none of a tensor that spans {size}")
        return offsets, mask


def _undefined(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(poison(dtype), dtype=dtype)


def load(pointer, mask=None, other=None, cache_modifier="", eviction_policy="") -> Tensor:
    offsets, mask = pointer.accessed(mask)
    dtype = pointer.memory.data.dtype
    x = (_undefined(dtype) if other is None else as_tensor(other).data.to(dtype)).expand(mask.shape)
    x = x.clone()
    x[mask] = pointer.memory.data[offsets[mask]]
    return Tensor(x)


def store(pointer, value, mask=None, cache_modifier="", eviction_policy="") -> None:
    offsets, mask = pointer.accessed(mask)
    x = as_tensor(value).data.to(pointer.memory.data.dtype).expand(mask.shape)
    pointer.memory.data[offsets[mask]] = x[mask]


def atomic_add(pointer, val, mask=None, sem=None, scope=None) -> Tensor:
    pause()
    offsets, mask = pointer.accessed(mask)
    old = pointer.memory.data[offsets].clone()
    x = as_tensor(val).data.to(old.dtype).expand(mask.shape)
    pointer.memory.data.index_put_((offsets[mask],), x[mask], accumulate=True)
    return Tensor(torch.where(mask, old, _undefined(old.dtype)))
