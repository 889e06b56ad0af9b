"""Shared memory with its races, barriers, TMA, products of warpgroups, warp specialisation.

Two accesses to the same elements, one of them a write, are a race unless the partition that makes
the later one knows the earlier one to be over (`gluon_schedule`), in whatever order they came this
time. So a missing wait or arrival shows under any schedule.
"""

from __future__ import annotations

import linecache
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from gluon_schedule import (
    BarrierError,
    BoundsError,
    EmulationError,
    Machine,
    Operation,
    Partition,
    Place,
    RaceError,
    RegisterError,
    UninitializedError,
    UnsupportedError,
    error,
    pause,
    running,
    wait_for_all_but,
)
from gluon_values import (
    TRITON_DTYPES,
    Accumulator,
    Tensor,
    Unknown,
    integers,
    on_cpu,
    poison,
    torch_dtype,
)

SHARED_BYTES = 227 * 1024  # that a program can have on sm_90


# -------------------------------------------------------------------------------- shared memory
class Region:
    """The elements of an allocation that a view has."""

    def __init__(self, view: torch.Tensor) -> None:
        shape, strides = view.shape, view.stride()
        self.geometry = (tuple(shape), strides, view.storage_offset())
        self.start = view.storage_offset()
        self.end = self.start + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self.is_dense = self.end - self.start == view.numel()

    def covers(self, other: Region) -> bool:
        is_inside = self.start <= other.start and other.end <= self.end
        return is_inside and (self.is_dense or self.geometry == other.geometry)

    def overlaps(self, other: Region) -> bool:
        end = min(self.end, other.end)
        if end <= max(self.start, other.start):
            return False
        if self.is_dense and other.is_dense:
            return True
        return bool((self._elements(end) & other._elements(end)).any())

    def _elements(self, end: int) -> torch.Tensor:
        elements = torch.zeros(max(end, self.end), dtype=torch.bool)
        elements.as_strided(*self.geometry).fill_(True)
        return elements[:end]


@dataclass
class Access:
    """One access to shared memory, kept as long as later ones must be compared with it."""

    region: Region
    is_write: bool
    is_asynchronous: bool
    partition: Partition
    event: int
    what: str
    place: Any

    def __str__(self) -> str:
        return f"the {self.what} of {self.place}"


class Allocation:
    def __init__(self, name: str, data: torch.Tensor, layout: Any) -> None:
        self.name, self.data, self.layout = name, data, layout
        self.accesses: list[Access] = []
        self.barriers: dict[int, Barrier] = {}  # by element


class Shared(Unknown):
    """A descriptor of shared memory: a view of an allocation."""

    def __init__(self, allocation: Allocation, data: torch.Tensor, part: str = "") -> None:
        self.allocation, self.data, self.part = allocation, data, part
        self.layout = allocation.layout

    @property
    def path(self) -> str:
        return self.allocation.name + self.part

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return TRITON_DTYPES[self.data.dtype]

    def __str__(self) -> str:
        return f"{self.path} ({self.dtype} {self.shape})"

    def index(self, index) -> Shared:
        part = self._narrowed(0, int(index), 1).squeeze(0)
        return Shared(self.allocation, part, f"{self.part}[{int(index)}]")

    def slice(self, start, length, dim=0) -> Shared:
        start, length = int(start), int(length)
        part = f"{self.part}.slice({start}, {length}, dim={dim})"
        return Shared(self.allocation, self._narrowed(dim, start, length), part)

    def _narrowed(self, dim: int, start: int, length: int) -> torch.Tensor:
        size = self.data.shape[dim]
        if not 0 <= start <= size - length:
            text = f"{start} to {start + length - 1} of {self.path}, which has {size}"
            raise error(BoundsError, text)
        return self.data.narrow(dim, start, length)

    def reshape(self, shape) -> Shared:
        return Shared(self.allocation, self.data.view(integers((shape,))), self.part)

    def permute(self, order) -> Shared:
        return Shared(self.allocation, self.data.permute(integers((order,))), self.part)

    def load(self, layout=None) -> Tensor:
        pause()
        note_access(self, "load", is_write=False)
        return Tensor(self.data.clone())

    def store(self, value) -> None:
        pause()
        if value.shape != self.shape or value.dtype != self.dtype:
            raise error(EmulationError, f"{value.dtype} {value.shape} stored to {self}")
        note_access(self, "store", is_write=True)
        self.data.copy_(value.data)


def note_access(
    view: Shared, what: str, is_write: bool, operation: Operation | None = None
) -> None:
    """Note an access by the running partition, or by an operation that it issues; refuse a race.

    The compiler orders the loads and stores of one partition by its own barriers.
    """
    partition, allocation = running(), view.allocation
    is_asynchronous, is_written, region = operation is not None, False, Region(view.data)
    for old in allocation.accesses:
        if not (is_write or old.is_write) or not region.overlaps(old.region):
            continue
        is_written |= old.is_write
        if old.partition is partition and not (is_asynchronous or old.is_asynchronous):
            continue
        needs_fence = is_asynchronous and old.is_write and not old.is_asynchronous
        needed = old.event << 1 if needs_fence else old.event
        if not partition.known & needed:
            if partition.own & needed:
                reason = "its threads have not met at a barrier since"
            elif needs_fence and (partition.known | partition.own) & old.event:
                reason = "fence_async_shared is missing after the store"
            else:
                reason = "nothing orders them"
            raise error(RaceError, f"{what} of {view} after {old}: {reason}")
    if not is_write and not is_written:
        raise error(UninitializedError, f"{what} of {view}, never written")
    # Who knows the new access to be over knows that of those it follows.
    allocation.accesses = [
        old
        for old in allocation.accesses
        if not region.covers(old.region)
        or not (is_write or (not old.is_write and partition.known & old.event))
    ]
    if operation is not None:
        event, place = operation.event, operation.origin
    else:
        event, place = partition.program.event(is_store=is_write), f"{partition}, {Place.here()}"
        if is_write:
            partition.own |= event
        else:
            partition.known |= event
    access = Access(region, is_write, is_asynchronous, partition, event, what, place)
    allocation.accesses.append(access)


def allocate_shared_memory(element_ty, shape, layout, value=None) -> Shared:
    program, dtype, frame = running().program, torch_dtype(element_ty), sys._getframe(1)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    assigned = re.match(r"\s*(\w+) = gl", line)
    name = assigned[1] if assigned else f"allocation {len(program.allocations)}"
    data = torch.full(integers((shape,)), poison(dtype), dtype=dtype)
    program.allocations.append(Allocation(name, data, layout))
    size = sum(x.data.nbytes for x in program.allocations)
    Machine.active.statistics.shared_bytes = size
    if size > SHARED_BYTES:
        raise error(BoundsError, f"{size} bytes of shared memory, of {SHARED_BYTES}")
    view = Shared(program.allocations[-1], data)
    if value is not None:
        view.store(value)
    return view


def naming(record: type) -> Callable:
    """Make a NamedTuple that names the allocations that it gets as fields."""

    def make(*args, **kwargs):
        made = record(*args, **kwargs)
        for name, x in zip(record._fields, made, strict=True):
            if isinstance(x, Shared) and not x.part:
                x.allocation.name = name
        return made

    return make


# -------------------------------------------------------------------------------- barriers
def thread_barrier() -> None:
    running().meet()


def fence_async_shared(cluster=False) -> None:
    running().fence()


class Barrier:
    """An mbarrier: its phases complete when `count` arrivals and all expected bytes have come."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.phase = 0  # the one to complete next
        self.missing, self.bytes = count, 0
        self.arrived = self.handed = 0  # events known to who arrived: in this phase, before
        self.initialised = running().program.event(is_store=True)
        # Per partition the last phase that it has waited for, and the event of having seen it.
        self.seen: dict[Partition, tuple[int, int]] = {}

    def __str__(self) -> str:
        missing = f"{self.missing} of {self.count} arrivals and {self.bytes} bytes are missing"
        return f"{self.name} in phase {self.phase} ({missing})"

    def is_inside_phase(self) -> bool:
        return self.missing != self.count or self.bytes != 0

    def arrive(self, count: int, bytes_expected: int, known: int) -> None:
        if count > self.missing:
            raise error(BarrierError, f"{count} arrivals too many at {self}")
        self.missing -= count
        self.bytes += bytes_expected
        self.arrived |= known
        if self.missing or self.bytes > 0:
            return
        if self.bytes < 0:
            raise error(BarrierError, f"more bytes than expected at {self}")
        # A wait tells phases apart by parity only: none may complete before all that wait here
        # have seen the one before.
        for partition, (phase, event) in self.seen.items():
            if phase < self.phase - 1 or not self.arrived & event:
                text = f"{self.name} completes phase {self.phase} and nothing ensures that "
                raise error(BarrierError, text + f"{partition} has seen phase {self.phase - 1}")
        self.handed |= self.arrived
        self.phase, self.missing, self.arrived = self.phase + 1, self.count, 0

    def wait(self, parity: int) -> None:
        partition = running()
        last, _ = self.seen.setdefault(partition, (-1, self.initialised))
        wanted = last if parity == last & 1 else last + 1
        if parity not in (0, 1):
            raise error(BarrierError, f"wait for parity {parity} of {self}: 0 or 1")
        pause(lambda: self.phase > wanted, lambda: f"parity {parity} of {self}")
        if self.phase > wanted + 1:
            raise error(BarrierError, f"wait for phase {wanted} of {self}, which is long past")
        event = partition.program.event()
        self.seen[partition] = (wanted, event)
        partition.known |= self.handed | event


def _barrier(view: Shared, is_asynchronous: bool = False) -> Barrier:
    barrier = view.allocation.barriers.get(view.data.storage_offset())
    if barrier is None:
        raise error(UninitializedError, f"{view.path} used ahead of mbarrier.init")
    needed = barrier.initialised << 1 if is_asynchronous else barrier.initialised
    if not running().known & needed:
        fence = "fence_async_shared and " if is_asynchronous else ""
        text = f"{view.path} used without {fence}a barrier of the threads after mbarrier.init"
        raise error(RaceError, text)
    return barrier


def mbarrier_init(mbarrier, count) -> None:
    barriers, index = mbarrier.allocation.barriers, mbarrier.data.storage_offset()
    if index in barriers or int(count) < 1:
        text = f"mbarrier.init of {mbarrier.path}, count {count}: once, with a positive count"
        raise error(BarrierError, text)
    barriers[index] = Barrier(mbarrier.path, int(count))
    running().own |= barriers[index].initialised


def mbarrier_expect(mbarrier, bytes_per_cta=None, pred=True, bytes=None) -> None:
    partition = pause()
    size = int(bytes if bytes_per_cta is None else bytes_per_cta)
    if not 0 <= size < 1 << 20:
        raise error(BarrierError, f"{size} bytes expected at {mbarrier.path}: 0 to {(1 << 20) - 1}")
    if pred:
        _barrier(mbarrier).arrive(1, size, partition.known)


def mbarrier_arrive(mbarrier, *, count=1, pred=True) -> None:
    partition = pause()
    if pred:
        _barrier(mbarrier).arrive(int(count), 0, partition.known)


def mbarrier_wait(mbarrier, phase, pred=True, deps=()) -> None:
    if pred:
        _barrier(mbarrier).wait(int(phase))


class NamedBarrier:
    """A barrier of the hardware, by number: partitions wait at it or only arrive."""

    def __init__(self, number: int) -> None:
        self.number, self.threads, self.phase = number, 0, 0
        self.present: list[Partition] = []
        self.arrived = self.handed = 0

    def __str__(self) -> str:
        present = " and ".join(str(x) for x in self.present) or "nobody"
        return f"named barrier {self.number} of {self.threads} threads, where {present} came"

    def come(self, threads: int, is_waiting: bool) -> None:
        partition = pause()
        if self.present and (threads != self.threads or partition in self.present):
            raise error(BarrierError, f"{partition} comes, with {threads}, to {self}")
        self.threads, phase = threads, self.phase
        self.present.append(partition)
        self.arrived |= partition.known | partition.own
        come = sum(32 * x.warps for x in self.present)
        if come > threads:
            raise error(BarrierError, f"{come} threads at {self}")
        if come == threads:
            self.handed |= self.arrived
            self.present, self.arrived, self.phase = [], 0, phase + 1
        if is_waiting:
            pause(lambda: self.phase > phase, lambda: self)
            partition.meet()
            partition.known |= self.handed


def named_barrier(number: int, threads: int, is_waiting: bool) -> None:
    """`bar.sync` if waiting, else `bar.arrive`, by all threads of the running partition."""
    program = running().program
    if not program.compiler_barriers <= number < 16:
        text = f"named barrier {number}: {program.compiler_barriers} to 15 are free"
        raise error(BarrierError, text)
    program.named_barriers.setdefault(number, NamedBarrier(number)).come(threads, is_waiting)


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs=None) -> Any:
    partition = running()
    partition.meet()
    (function, arguments), *workers = functions_and_args
    partition.program.compiler_barriers = 2 + len(workers)
    started = []
    for i, (worker, warps) in enumerate(zip(workers, worker_num_warps, strict=True), 1):
        name = f"partition {i} ({worker[0].__name__})"
        started.append(Partition(partition.program, name, warps, partition.known, *worker))
    name, partition.name = partition.name, f"partition 0 ({function.__name__})"
    result = function(*arguments)
    pause(lambda: all(x.is_done for x in started), lambda: "the other partitions")
    partition.name = name
    for worker in started:
        partition.known |= worker.known | worker.own
    return result


# -------------------------------------------------------------------------------- TMA
class Descriptor(Unknown):
    """A tensor and the shape of the blocks in which TMA copies it."""

    def __init__(self, host: Any) -> None:
        self.shape = list(host.shape)
        self.strides = list(host.strides)
        self.block_shape = list(host.block_shape)
        self.layout = host.layout
        self.data = on_cpu(host.base).as_strided(self.shape, self.strides)
        self.dtype = TRITON_DTYPES[self.data.dtype]
        self.padding = math.nan if host.padding == "nan" else 0
        self.nbytes_per_cta = math.prod(self.block_shape) * self.data.itemsize
        self.block_type = SimpleNamespace(
            nbytes=self.nbytes_per_cta, shape=self.block_shape, element_ty=self.dtype
        )

    def windows(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where the block at `corner` meets the tensor: in the tensor, in the block."""
        outer, inner = [], []
        for start, length, size in zip(corner, self.block_shape, self.shape, strict=True):
            first = min(max(start, 0), size)
            last = min(max(start + length, first), size)
            outer.append(slice(first, last))
            inner.append(slice(first - start, last - start) if first < last else slice(0, 0))
        return tuple(outer), tuple(inner)

    def corner(self, coord, view: Shared) -> list[int]:
        """Return the coordinates as numbers, if they and the tile in shared memory fit."""
        tile = (view.shape, view.dtype, view.layout)
        block = (self.block_shape, self.dtype, self.layout)
        if tile != block or len(coord) != len(self.shape):
            text = f"{len(coord)} coordinates, {view} in {view.layout} "
            text += f"for blocks of {self.dtype} {self.block_shape} in {self.layout}"
            raise error(EmulationError, text)
        return [int(x) for x in coord]


def tma_load(tensor_desc, coord, barrier, result, pred=True) -> None:
    pause()
    if not pred:
        return
    target, corner = _barrier(barrier, is_asynchronous=True), tensor_desc.corner(coord, result)
    phase = target.phase

    def effect() -> None:
        outer, inner = tensor_desc.windows(corner)
        result.data.fill_(tensor_desc.padding)
        result.data[inner] = tensor_desc.data[outer]
        if target.phase != phase:
            raise error(BarrierError, f"bytes for phase {phase} come to {target}")
        target.arrive(0, -tensor_desc.nbytes_per_cta, operation.event)

    operation = Operation("TMA load", effect)
    note_access(result, "TMA load", is_write=True, operation=operation)
    result.data.fill_(poison(result.data.dtype))  # until it completes


def tma_store(tensor_desc, coord, src) -> None:
    partition = pause()
    corner = tensor_desc.corner(coord, src)

    def effect() -> None:
        outer, inner = tensor_desc.windows(corner)
        tensor_desc.data[outer] = src.data[inner]

    operation = Operation("TMA store", effect)
    note_access(src, "TMA store", is_write=False, operation=operation)
    partition.stores.append(operation)


def store_wait(pendings, read_only=True) -> None:
    partition = running()
    for operation in wait_for_all_but(pendings, partition.stores):
        partition.own |= operation.event  # only the thread that issued it waits


# -------------------------------------------------------------------------------- products
def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False) -> Tensor:
    partition = pause()
    if not isinstance(a, (Shared, Tensor)) or not isinstance(b, Shared):
        text = f"product of {type(a).__name__} and {type(b).__name__}: the second must be shared"
        raise error(EmulationError, text)
    (m, k), (rows, n) = a.shape, b.shape
    if a.dtype != b.dtype or a.dtype.primitive_bitwidth != 16:
        raise error(UnsupportedError, f"a product of {a.dtype} and {b.dtype} is not emulated")
    if k != rows or acc.shape != [m, n] or m % 64 or n % 8 or k % 16:
        raise error(EmulationError, f"product of {a.shape} and {b.shape} into {acc.shape}")
    is_added = bool(use_acc)

    def effect() -> None:
        result.value = a.data.float() @ b.data.float()
        if is_added:
            result.value += acc.value if isinstance(acc, Accumulator) else acc.data

    operation = Operation("product", effect, in_order=partition.products)
    result = Accumulator([m, n], operation)
    for operand in (a, b):
        if isinstance(operand, Shared):
            note_access(operand, "product", is_write=False, operation=operation)
    partition.products.append(operation)
    return result if is_async else warpgroup_mma_wait(0, [result])


def warpgroup_mma_init(value) -> Accumulator:
    return Accumulator(value.shape, None, value.data)


def warpgroup_mma_wait(num_outstanding=0, deps=None) -> Any:
    if not deps:
        raise error(EmulationError, "warpgroup_mma_wait without deps")
    partition = running()
    for operation in wait_for_all_but(num_outstanding, partition.products):
        partition.known |= operation.event
    results = []
    for dep in deps:
        if isinstance(dep, Accumulator):
            if dep.product is not None and not dep.product.is_covered:
                text = f"a wait for all but {num_outstanding} products gives out the result of one"
                raise error(RegisterError, f"{text} that it does not cover: the {dep.product}")
            dep = Tensor(dep.value)
        results.append(dep)
    return results[0] if len(results) == 1 else tuple(results)
