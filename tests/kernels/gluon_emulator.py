"""Run Hopper kernels written in Triton's Gluon dialect on a CPU, unmodified, and find their bugs.

    statistics = run(kernel, grid, *arguments, seed=0, interleave=1, **constants_and_options)

    with emulated(seed=0, interleave=1):
        kernel[grid](*arguments, **constants_and_options)

Tensors on the CPU are pointers, `TensorDescriptor`s of `gluon.nvidia.hopper` are what TMA copies;
None, numbers and tuples of all these may be arguments. The seed decides the schedule and the order
of the programs; `interleave` is how many of these run side by side.

Found are wrong numbers, and with an error that names the partition, the lines of the kernel and the
barrier or the tile: deadlocks; wrong phases, arrivals and byte counts of barriers; races (a missing
wait, arrival, fence, barrier or `store_wait`, a release that comes too early); results of products
used ahead of their wait; shared memory that was never written, which holds NaN; addresses out of
bounds. Races are found whatever the schedule: `gluon_schedule` says how what a partition knows to
have happened is tracked, `gluon_memory` how it is used.

Stricter than the hardware:

- Only barriers in the source count, not those that the compiler puts around arrivals and waits.
- A partition waits for each phase of a barrier in turn, from 0 on (from the one before, with the
  opposite parity); a phase that could complete before all that wait for the last one have seen it
  is an error, as are work that nobody waits for and a barrier left within a phase at the end.
- All allocations of shared memory together must fit.

Not modelled:

- A partition is one thread, whose loads are over at once, and whose loads and stores are in order:
  only what its threads know of their own stores, fences and copies is kept apart until they meet.
  A fence counts for all stores that it knows of, those of other partitions included.
- Layouts are not kept (the compiler checks them), nor are bank conflicts, alignment in shared
  memory, register pressure, operands in registers that are overwritten while a product runs.
- Accesses to global memory are not checked for races; a copy to it is written when it is read.
- A local variable stays a Python number where Triton makes it a scalar, of which only the type that
  a calculation has may tell.
- Products add in float32 in the order of the CPU's library; `exp2` and its like are the CPU's;
  multiplications and additions are not fused.

A name or an instruction that is not in the tables (`EMULATED` here, `INSTRUCTIONS` in
`gluon_assembly`) is refused: adding one is a line.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import gluon_memory as memory
import gluon_values as values
import torch
import triton.language as tl
from gluon_assembly import inline_asm_elementwise
from gluon_schedule import (
    KERNEL_MARK,
    Machine,
    Statistics,
    UnsupportedError,
    error,
    running,
)
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

# What stands in for an object of Triton's, by its identity, and the object itself.
EMULATED: dict[int, tuple[Any, Any]] = {}


def _emulate(modules: tuple, **functions: Callable) -> None:
    """Let functions stand in for those of these names, in the modules that have them."""
    for module, (name, function) in itertools.product(modules, functions.items()):
        if hasattr(module, name):
            original = getattr(module, name)
            EMULATED[id(original)] = original, function


def _program_id(axis) -> values.Tensor:
    return values.as_tensor(running().program.index[int(axis)])


def _num_programs(axis) -> values.Tensor:
    return values.as_tensor(Machine.active.grid[int(axis)])


_emulate(
    (gl, tl),
    constexpr=lambda x: x,
    static_range=range,
    static_assert=values.static_assert,
    range=values.range_,
    program_id=_program_id,
    num_programs=_num_programs,
    num_warps=lambda: running().warps,
    cast=values.cast,
    full=values.full,
    zeros=values.zeros,
    arange=values.arange,
    reshape=lambda input, *shape: input.reshape(*shape),
    permute=lambda input, *dims: input.permute(*dims),
    expand_dims=values.expand_dims,
    split=values.split,
    join=values.join,
    convert_layout=values.convert_layout,
    where=values.where,
    minimum=values.binary(torch.fmin),
    maximum=values.binary(torch.fmax),
    sum=values.total,
    max=values.extremum(1),
    min=values.extremum(-1),
    cdiv=values.cdiv,
    abs=values.unary(torch.abs),
    ceil=values.unary(torch.ceil),
    floor=values.unary(torch.floor),
    exp=values.unary(torch.exp),
    exp2=values.unary(torch.exp2),
    log=values.unary(torch.log),
    log2=values.unary(torch.log2),
    sqrt=values.unary(torch.sqrt),
    rsqrt=values.unary(torch.rsqrt),
    load=values.load,
    store=values.store,
    atomic_add=values.atomic_add,
    inline_asm_elementwise=inline_asm_elementwise,
    allocate_shared_memory=memory.allocate_shared_memory,
    warp_specialize=memory.warp_specialize,
    barrier=memory.thread_barrier,
    thread_barrier=memory.thread_barrier,  # up to Triton 3.6
)
_emulate(
    (hopper,),
    fence_async_shared=memory.fence_async_shared,
    warpgroup_mma=memory.warpgroup_mma,
    warpgroup_mma_init=memory.warpgroup_mma_init,
    warpgroup_mma_wait=memory.warpgroup_mma_wait,
)
_emulate(
    (hopper.mbarrier,),
    init=memory.mbarrier_init,
    expect=memory.mbarrier_expect,
    arrive=memory.mbarrier_arrive,
    wait=memory.mbarrier_wait,
)
_emulate(
    (hopper.tma,),
    async_load=memory.tma_load,
    async_store=memory.tma_store,
    async_copy_global_to_shared=memory.tma_load,  # up to Triton 3.6
    async_copy_shared_to_global=memory.tma_store,
    store_wait=memory.store_wait,
)

# Functions that others stand in for, as `gluon_mutants` makes them.
REPLACED: dict[Callable, Callable] = {}


# -------------------------------------------------------------------------------- translation
class _Refused:
    """An object of Triton's that nothing stands in for: fails when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise error(UnsupportedError, f"{self._name}.{attribute} is not emulated")

    def __call__(self, *_, **__) -> Any:
        raise error(UnsupportedError, f"{self._name} is not emulated")


class _Translated:
    """A module, or an object that holds constants, whose attributes are translated."""

    def __init__(self, original: Any, translation: Translation) -> None:
        self._original, self._translation = original, translation

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._original, name):
            raise error(UnsupportedError, f"{self._original} has no {name}")
        return self._translation.of(getattr(self._original, name))


class Translation:
    """Objects as kernel code is to see them, found by identity whatever name they go by."""

    def __init__(self) -> None:
        self.functions: dict[Callable, Callable] = {}
        self.namespaces: dict[int, dict] = {}

    def of(self, value: Any) -> Any:
        if id(value) in EMULATED:
            return EMULATED[id(value)][1]
        if isinstance(value, gl.constexpr):
            return self.of(value.value)
        if isinstance(value, tuple):
            parts = map(self.of, value)
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, types.ModuleType):
            return _Translated(value, self)
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            return memory.naming(value)
        if isinstance(value, ConstexprFunction):
            return value.fn
        is_kernel = isinstance(value, (JITFunction, InterpretedFunction))
        module = getattr(value.fn if is_kernel else value, "__module__", None) or ""
        if module.partition(".")[0] == "triton":
            name = getattr(value, "__name__", type(value).__name__)
            is_used = callable(value) and not name.endswith("Layout")
            return _Refused(f"{module}.{name}") if is_used else value
        if is_kernel:
            return self.function(value.fn)
        return _Translated(value, self) if is_dataclass(type(value)) else value

    def function(self, original: Callable) -> Callable:
        if original not in self.functions:
            source = REPLACED.get(original, original)
            cells = tuple(
                types.CellType(self.of(cell.cell_contents)) for cell in source.__closure__ or ()
            )
            translated = types.FunctionType(
                source.__code__, self._names(source.__globals__), source.__name__, None, cells
            )
            translated.__defaults__ = self.of(source.__defaults__ or ())
            translated.__kwdefaults__ = source.__kwdefaults__
            self.functions[original] = translated
        return self.functions[original]

    def _names(self, original: dict) -> dict:
        if id(original) not in self.namespaces:
            # Entered ahead of its content: functions refer to each other.
            names = self.namespaces[id(original)] = {}
            names.update((name, self.of(value)) for name, value in original.items())
            names.update({"range": values.range_, KERNEL_MARK: True, "__builtins__": builtins})
        return self.namespaces[id(original)]


# -------------------------------------------------------------------------------- launches
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


def _argument(value: Any, translation: Translation) -> Any:
    """What a kernel gets for an argument that is not constexpr."""
    if isinstance(value, torch.Tensor):
        return values.Pointer(values.GlobalMemory(value))
    if isinstance(value, TensorDescriptor):
        return memory.Descriptor(value)
    if isinstance(value, tuple):
        parts = [_argument(x, translation) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, gl.constexpr) or value is None:
        return translation.of(value)
    return values.as_tensor(value)


def run(
    kernel: GluonJITFunction,
    grid: int | tuple[int, ...],
    *args: Any,
    seed: int = 0,
    interleave: int = 1,
    **options: Any,
) -> Statistics:
    """Run ``kernel[grid](*args, **options)``, `interleave` programs at a time.

    Returns:
        What happened.

    Raises:
        EmulationError: The kernel did what the hardware does not allow.
        UnsupportedError: The kernel uses something that the emulator does not know.
    """
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    sizes = (*sizes, 1, 1)[:3]
    launch = {name: options.pop(name, None) for name in OPTIONS}
    if launch["num_ctas"] not in (None, 1):
        raise UnsupportedError("clusters are not emulated")
    bound = inspect.signature(kernel.fn).bind(*args, **options)
    bound.apply_defaults()
    constants = {p.name for p in kernel.params if p.is_constexpr}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tiles are small
    try:
        with Machine(seed, sizes, launch["num_warps"] or 4) as machine:
            translation = Translation()
            arguments = tuple(
                translation.of(x) if name in constants else _argument(x, translation)
                for name, x in bound.arguments.items()
            )
            function = translation.function(kernel.fn)
            indices = [i[::-1] for i in itertools.product(*map(range, sizes[::-1]))]
            machine.random.shuffle(indices)
            for start in range(0, len(indices), interleave):
                machine.run(function, arguments, indices[start : start + interleave])
            return machine.statistics
    finally:
        torch.set_num_threads(threads)


@contextmanager
def emulated(seed: int = 0, interleave: int = 1) -> Iterator[list[Statistics]]:
    """Run all launches of Gluon kernels inside in the emulator; yields what happened in each.

    Plain Triton kernels run as they would outside, on a CPU in Triton's interpreter.
    """
    launches: list[Statistics] = []
    original = GluonJITFunction.run

    def launch(kernel, *args, grid, warmup, **options):
        if warmup:
            return original(kernel, *args, grid=grid, warmup=True, **options)
        launches.append(
            run(kernel, grid, *args, seed=seed + len(launches), interleave=interleave, **options)
        )
        return None

    with mock.patch.object(GluonJITFunction, "run", launch):
        yield launches
