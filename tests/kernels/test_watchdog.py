"""Work in processes that are watched."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from shaped_attn import watchdog
from shaped_attn.watchdog import HangError, Job, JobError, in_turn, run


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_answers_come_in_the_order_of_the_jobs():
    jobs = [Job(f"{i}", pow, {"base": i, "exp": 2}) for i in range(5)]
    jobs.insert(0, Job("slow", subprocess.call, {"args": ["sleep", "1"]}))
    assert list(in_turn(jobs)) == list(run(jobs, processes=2, limit=60)) == [0, 0, 1, 4, 9, 16]


def test_a_job_that_hangs_is_named_and_ended(tmp_path):
    pid = tmp_path / "pid"
    # The sleeping program is a child of the process that hangs, as a compiler would be.
    script = f"echo $$ > {pid}; exec sleep 1000"
    jobs = [
        Job("first", pow, {"base": 2, "exp": 3}),
        Job("sleeps", subprocess.call, {"args": ["sh", "-c", script]}),
        Job("last", pow, {"base": 2, "exp": 4}),
    ]
    answers = run(jobs, processes=1, limit=2)
    assert next(answers) == 8
    with pytest.raises(HangError, match="no answer in 2 s: sleeps") as raised:
        next(answers)
    assert (raised.value.late, raised.value.beside, raised.value.seconds) == ("sleeps", (), 2)
    end = time.monotonic() + 60
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_hang_names_what_ran_beside_it():
    sleep = {"args": ["sleep", "1000"]}
    jobs = [Job(name, subprocess.call, sleep) for name in ("one", "two")]
    with pytest.raises(HangError) as raised:
        next(run(jobs, processes=2, limit=2))
    assert {raised.value.late, *raised.value.beside} == {"one", "two"}


@pytest.mark.parametrize(
    "job, message",
    [
        (Job("divides", divmod, {}), "divides: Traceback .*TypeError"),
        (Job("ends", os._exit, {"status": 3}), "ends: its process ended with 3"),
        (Job("dies", os.abort, {}), "dies: its process ended with -6"),
        (Job("no answer", open, {"file": os.devnull}), "no answer: Traceback .*TypeError"),
    ],
    ids=lambda x: x.name if isinstance(x, Job) else "",
)
def test_a_job_that_fails_is_named(job, message):
    with pytest.raises(JobError, match=f"(?s){message}"):
        list(run([job], processes=1, limit=60))


def test_a_process_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(watchdog, "_START_SECONDS", 0)
    with pytest.raises(HangError, match="no answer in 0 s: the start of a process"):
        next(run([Job("never", pow, {})], processes=1, limit=60))


def test_processes_see_the_modules_of_this_one(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    assert list(run([Job("here", only_here.answer, {})], processes=4, limit=60)) == [42]
