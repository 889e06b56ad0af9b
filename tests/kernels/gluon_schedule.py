"""Who runs when: programs, their partitions and the operations in flight, under a seeded schedule.

Each partition is a thread, of which one runs at a time. Where a kernel synchronises or touches
shared memory it comes to `pause`: there a random choice decides what goes on, a partition that can
or an operation in flight. So an asynchronous operation takes effect at any time between its issue
and the wait that covers it.

What a partition may rely on does not depend on the schedule. Everything that another partition
could have to wait for is an event: an access to shared memory, a barrier's initialisation, a phase
that a partition has seen. A set of events is an integer, a bit each. A partition has two:

- `known`: events that all its threads know to be over, which it hands on where it arrives at a
  barrier and gains where it waits;
- `own`: events known to be over only to the thread that caused them: its stores, the copies that
  its `store_wait` covers. The partition's next barrier makes them known.

A store to shared memory takes a second bit, the next one, which `fence_async_shared` adds: that the
store is visible to TMA and tensor cores. These need that bit, all others the first.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# A name in the globals of every function that is kernel code.
KERNEL_MARK = "__emulated_kernel__"


class EmulationError(Exception):
    """A kernel did what the hardware does not allow, or what it only survives by luck."""


class Deadlock(EmulationError):
    """No partition can go on and nothing is in flight."""


class BarrierError(EmulationError):
    """Arrivals, bytes or phases of a barrier do not add up, or one phase can pass for another."""


class RaceError(EmulationError):
    """Two accesses to shared memory that nothing orders, or a store that is not fenced."""


class UninitializedError(EmulationError):
    """Shared memory that was never written is read, or a barrier used ahead of its `init`."""


class RegisterError(EmulationError):
    """The result of a product is used ahead of the wait that covers it."""


class UnfinishedError(EmulationError):
    """A program ends with work that nobody waited for, or with a barrier inside a phase."""


class BoundsError(EmulationError):
    """An index or an address out of range or misaligned, or more shared memory than there is."""


class UnsupportedError(NotImplementedError):
    """Something that the emulator does not know. Says nothing about the kernel."""


class _Abandoned(BaseException):
    """Unwinds the other partitions after an error."""


def error(kind: type[Exception], text: str) -> Exception:
    """Make an exception that says in which partition and at which lines of the kernel it arose."""
    machine = Machine.active
    if machine is not None and machine.completing is not None:
        text += f"\n  as the {machine.completing} completes"
    elif machine is not None and machine.running is not None:
        text += f"\n  {machine.running}, {Place.here()}"
    return kind(text)


class Place:
    """Lines of the kernel in a call stack, innermost first."""

    def __init__(self, frame) -> None:
        self.lines = []
        while frame is not None:
            if KERNEL_MARK in frame.f_globals:
                self.lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back

    @classmethod
    def here(cls) -> Place:
        return cls(sys._getframe(1))

    def __str__(self) -> str:
        lines = (f"{os.path.basename(c.co_filename)}:{n} in {c.co_name}" for c, n in self.lines)
        return ", called from ".join(lines)


@dataclass
class Statistics:
    """What happened in a launch.

    Attributes:
        programs: Size of the grid.
        steps: Choices that the schedule made.
        events: Events noted, of all programs.
        shared_bytes: Shared memory of one program.
        most_in_flight: The most operations of each kind that were in flight at a time.
    """

    programs: int = 0
    steps: int = 0
    events: int = 0
    shared_bytes: int = 0
    most_in_flight: Counter[str] = field(default_factory=Counter)


def _always() -> bool:
    return True


class Program:
    """One program of the grid (a CTA): what its partitions share."""

    def __init__(self, index: tuple[int, int, int]) -> None:
        self.index = index
        self.allocations: list[Any] = []
        self.named_barriers: dict[int, Any] = {}
        self.compiler_barriers = 1  # named barriers, from 0 on, that the compiler uses
        self.operations: list[Operation] = []
        self.bits = 0  # of events so far
        self.stores = 0  # the set of events that are stores

    def __str__(self) -> str:
        return f"program {self.index[0]}" if self.index[1:] == (0, 0) else f"program {self.index}"

    def event(self, is_store: bool = False) -> int:
        """Return a new event as a set of one."""
        event = 1 << self.bits
        self.bits += 1
        if is_store:
            self.stores |= event
            self.bits += 1  # for "fenced"
        Machine.active.statistics.events += 1
        return event

    def fenced(self, known: int) -> int:
        """Add to a set of events that its stores are fenced."""
        return known | (known & self.stores) << 1

    def main(self, function: Callable, arguments: tuple) -> None:
        function(*arguments)
        partition = running()
        for operation in self.operations:
            if not (partition.known | partition.own) & operation.event:
                raise UnfinishedError(f"{self} ends and nobody waited for the {operation}")
        for allocation in self.allocations:
            for barrier in allocation.barriers.values():
                if barrier.is_inside_phase():
                    raise UnfinishedError(f"{self} ends with {barrier}")


class Partition:
    """A partition of a program's warps, or its only one: a thread that runs when it is chosen."""

    def __init__(
        self,
        program: Program,
        name: str,
        warps: int,
        known: int,
        function: Callable,
        arguments: tuple,
    ) -> None:
        machine = Machine.active
        self.program, self.name, self.warps = program, name, warps
        self.known, self.own = known, 0
        self.products: list[Operation] = []  # oldest first, those that no wait has covered
        self.stores: list[Operation] = []
        self.can_go_on: Callable[[], bool] = _always
        self.awaited: Callable[[], object] = str
        self.speed = machine.random.choice((1, 1, 10))
        self.is_done = False
        self.baton = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, args=(function, arguments), daemon=True)
        self.thread.start()
        machine.partitions.append(self)

    def __str__(self) -> str:
        return f"{self.program}, {self.name}"

    def meet(self) -> None:
        """All threads of the partition wait for each other."""
        self.known |= self.own
        self.own = 0

    def fence(self) -> None:
        """Make the stores that the threads know of visible to TMA and tensor cores."""
        self.own = self.program.fenced(self.known | self.own)
        self.known = self.program.fenced(self.known)

    def _main(self, function: Callable, arguments: tuple) -> None:
        self.baton.acquire()
        machine = Machine.active
        try:
            # Each thread has a mode of its own: in this one all tensors can be written.
            with torch.inference_mode():
                if machine.failure is None:
                    function(*arguments)
                    self.is_done = True
                    machine.partitions.remove(self)
                    machine.pass_on()
        except _Abandoned:
            pass
        except BaseException as failure:
            machine.stop(failure)


class Operation:
    """An asynchronous operation, in flight until the schedule completes it.

    Those that have waited for it know `event`. `effect` happens at completion.
    """

    def __init__(self, kind: str, effect: Callable[[], None], in_order: list | None = None) -> None:
        partition, machine = running(), Machine.active
        self.kind, self.effect, self.queue = kind, effect, in_order
        self.event = partition.program.event()
        self.origin = f"{partition}, {Place.here()}"
        self.is_complete = self.is_covered = False
        partition.program.operations.append(self)
        machine.in_flight.append(self)
        most = machine.statistics.most_in_flight
        most[kind] = max(most[kind], sum(x.kind == kind for x in machine.in_flight))

    def __str__(self) -> str:
        return f"{self.kind} of {self.origin}"

    def can_complete(self) -> bool:
        return self.queue is None or next(x for x in self.queue if not x.is_complete) is self


class Machine:
    """Chooses what goes on. Use as a context manager: there is one at a time."""

    active: Machine | None = None

    def __init__(self, seed: int, grid: tuple[int, int, int], warps: int) -> None:
        self.random = random.Random(seed)
        self.grid, self.warps = grid, warps
        self.statistics = Statistics()
        self.partitions: list[Partition] = []
        self.in_flight: list[Operation] = []
        self.running: Partition | None = None
        self.completing: Operation | None = None
        self.failure: BaseException | None = None
        self.over = threading.Semaphore(0)
        # Some runs have slow copies and products, some fast ones.
        self.operation_speed = self.random.choice((0.2, 1, 5))

    def __enter__(self) -> Machine:
        if Machine.active is not None:
            raise UnsupportedError("a kernel launched from inside another")
        Machine.active = self
        return self

    def __exit__(self, *_) -> None:
        Machine.active = None

    def run(self, function: Callable, arguments: tuple, indices: list) -> None:
        """Run the programs of these indices side by side."""
        self.statistics.programs += len(indices)
        started = []
        try:
            for index in indices:
                program = Program(index)
                body = (function, arguments)
                started.append(Partition(program, "main", self.warps, 0, program.main, body))
            self.pass_on()
            self.over.acquire()
        except BaseException as failure:
            self.stop(failure)
        if self.failure is not None:
            for partition in [*started, *self.partitions]:
                partition.thread.join()
            raise self.failure

    def stop(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        for partition in self.partitions:
            partition.baton.release()
        self.over.release()

    def pass_on(self) -> None:
        """Let whoever is chosen go on."""
        self.running = self._choose() if self.partitions else None
        (self.running.baton if self.running else self.over).release()

    def pause(self, can_go_on: Callable[[], bool], awaited: Callable[[], object]) -> None:
        partition = self.running
        partition.can_go_on, partition.awaited = can_go_on, awaited
        self.running = self._choose()
        if self.running is not partition:
            self.running.baton.release()
            partition.baton.acquire()
            if self.failure is not None:
                raise _Abandoned
        partition.can_go_on = _always

    def _choose(self) -> Partition:
        while True:
            able: list = [x for x in self.partitions if x.can_go_on()]
            speeds = [x.speed for x in able]
            able += [x for x in self.in_flight if x.can_complete()]
            if not able:
                raise Deadlock("nothing can go on" + "".join(map(self._waiting, self.partitions)))
            speeds += [self.operation_speed] * (len(able) - len(speeds))
            chosen = self.random.choices(able, speeds)[0]
            self.statistics.steps += 1
            if isinstance(chosen, Partition):
                return chosen
            self.in_flight.remove(chosen)
            self.completing = chosen
            chosen.is_complete = True
            chosen.effect()
            self.completing = None

    @staticmethod
    def _waiting(partition: Partition) -> str:
        place = Place(sys._current_frames()[partition.thread.ident])
        return f"\n  {partition} waits for {partition.awaited()}, {place}"


def running() -> Partition:
    """Return the partition that runs."""
    return Machine.active.running


def pause(
    can_go_on: Callable[[], bool] = _always, awaited: Callable[[], object] = str
) -> Partition:
    """Let others run first; return the running partition once `can_go_on` and chosen.

    `awaited` says what it waits for.
    """
    partition = running()
    Machine.active.pause(can_go_on, awaited)
    return partition


def wait_for_all_but(pending: int, operations: list[Operation]) -> list[Operation]:
    """Wait for all but the last `pending` operations, take those off the list and return them."""
    covered = operations[: max(0, len(operations) - int(pending))]
    pause(
        lambda: all(x.is_complete for x in covered),
        lambda: "the " + " and the ".join(str(x) for x in covered if not x.is_complete),
    )
    del operations[: len(covered)]
    for operation in covered:
        operation.is_covered = True
    return covered
