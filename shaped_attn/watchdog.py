"""Work in processes of its own, so that a kernel that hangs on a GPU does not hang the command."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

_START_SECONDS = 60  # for a process to start, which is nobody's job
_END_SECONDS = 5  # to wait for a process that was killed; a hanging GPU may keep it


class Job(NamedTuple):
    """A call to make: its name for messages, a function of a module, and its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self) -> Any:
        """Make the call."""
        return self.function(**self.arguments)


class HangError(Exception):
    """Jobs without an answer within the limit.

    Attributes:
        late: name of the job that was waited for.
        beside: names of those that other processes were at.
        seconds: the limit.
    """

    def __init__(self, late: str, beside: Sequence[str], seconds: float) -> None:
        super().__init__(f"no answer in {seconds:g} s: {late}")
        self.late, self.beside, self.seconds = late, tuple(beside), seconds


class JobError(Exception):
    """A job that failed, or whose process ended; the message names it and says how."""


def in_turn(jobs: Sequence[Job]) -> Iterator[Any]:
    """Yield the answers of jobs, made here one after another."""
    for job in jobs:
        yield job()


def run(jobs: Sequence[Job], *, processes: int, limit: float) -> Iterator[Any]:
    """Yield the answers of jobs, in their order, made in processes that are watched.

    Args:
        jobs: functions are found by their names, arguments and answers are pickled.
        processes: how many jobs are at work at once.
        limit: seconds from a job's start to its answer.

    Raises:
        HangError: a job takes longer, or a process does not start. All processes are ended.
        JobError: a job raises, or its process ends. All processes are ended.
    """
    answers: dict[int, Any] = {}
    waiting = list(range(len(jobs)))[::-1]
    # The index of the job that each is at; -1 is its start, and None that it is idle.
    workers: dict[Worker, int | None] = {}
    try:
        for _ in range(min(processes, len(jobs))):
            workers[Worker()] = -1
        for index in range(len(jobs)):
            while index not in answers:
                _collect(workers, jobs, waiting, answers, limit)
            yield answers.pop(index)
    finally:
        for worker in workers:
            worker.end()


def _collect(
    workers: dict[Worker, int | None],
    jobs: Sequence[Job],
    waiting: list[int],
    answers: dict[int, Any],
    limit: float,
) -> None:
    """Give idle workers jobs and wait for an answer or the first limit."""
    for worker, index in workers.items():
        if index is None and waiting:
            workers[worker] = waiting.pop()
            worker.send(jobs[workers[worker]], limit)
    busy = {worker.connection: worker for worker, index in workers.items() if index is not None}
    first = min(busy.values(), key=lambda worker: worker.deadline)
    ready = wait(busy, max(0.0, first.deadline - time.monotonic()))
    if not ready:
        beside = [worker.name for worker in busy.values() if worker is not first]
        raise HangError(first.name, beside, first.limit)
    for connection in ready:
        worker = busy[connection]
        answers[workers[worker]] = worker.receive()
        workers[worker] = None


class Worker:
    """A process of Python that makes the calls it is sent, one at a time.

    Its first answer, to nothing that was sent, says that it has started.

    Args:
        limit: seconds to start, if less than the usual ones.
        options: of `subprocess.Popen`.
    """

    def __init__(self, limit: float = math.inf, **options: Any) -> None:
        self.connection, other = Pipe()
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; "
        # Not of multiprocessing, which waits at exit for a process that cannot be killed.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{start}_serve({other.fileno()})"],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that its compilers are ended with it
            **options,
        )
        other.close()
        self._expect("the start of a process", min(limit, _START_SECONDS))

    def _expect(self, name: str, limit: float) -> None:
        self.name, self.limit, self.deadline = name, limit, time.monotonic() + limit

    def send(self, job: Job, limit: float) -> None:
        """Let it make a call; the limit is in seconds."""
        self._expect(job.name, limit)
        with contextlib.suppress(OSError):  # that its process ended shows in the answer
            self.connection.send(tuple(job))

    def receive(self) -> Any:
        """Wait for the answer to what was sent.

        Raises:
            HangError: there is none within the limit. The process goes on.
            JobError: the call raises, or the process ends.
        """
        if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
            raise HangError(self.name, (), self.limit)
        try:
            is_done, answer = self.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)
            raise JobError(f"{self.name}: its process ended with {self.end()}") from None
        if not is_done:
            raise JobError(f"{self.name}: {answer}")
        return answer

    def end(self) -> int | None:
        """Kill the process; return its status, None if it does not end."""
        status = self.process.poll()
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None


def _serve(descriptor: int) -> None:
    """Answer calls until the other end closes: (True, what they return) or (False, why not)."""
    connection = Connection(descriptor)
    connection.send((True, None))  # it has started
    while True:
        try:
            job = Job(*connection.recv())
        except EOFError:
            return
        try:
            connection.send((True, job()))
        except Exception:
            connection.send((False, traceback.format_exc()))
