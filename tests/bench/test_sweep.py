"""The sweep behind the tables of configurations: all of it but the times."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shaped_attn import shaped_attention
from shaped_attn.kernels import configs
from shaped_attn.kernels.configs import TileConfig
from shaped_attn.kernels.primitives import ROW_ALIGNMENT

BENCH = Path(__file__).resolve().parents[2] / "bench"
SMALL = TileConfig(16, 16, 4, 1, sum_block=16)
MASKS = ["full", "causal"]


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # worker processes import it by name
    import sweep

    return sweep


def row(kernel="forward", variant="", dim=64, config=SMALL, candidate=0, **others):
    fixed = {"family": "portable", "kernel": kernel, "variant": variant, "dim": dim, "mask": ""}
    fixed["dtype"] = "bf16"
    return fixed | {"config": dataclasses.asdict(config), "candidate": candidate} | others


def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    output = tmp_path / "sweep.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCH / "sweep.py"), "--output", str(output)],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    for part in ("sm_80", "gfx942", "lacks a GPU that torch sees", "`--compile-only 90`"):
        assert part in done.stderr
    assert not output.exists()


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_candidates_are_valid_and_differ(arch, sweep):
    for kernel, dim in ((kernel, dim) for kernel in sweep.CANDIDATES for dim in (64, 128)):
        present = configs.pick_config(kernel, dim, dim, 2, arch, weighed_by=None)
        found = sweep.candidates(kernel, present, arch)
        assert found[0] == present
        bare = [dataclasses.replace(config, measured_on="") for config in found]
        assert len(set(bare)) == len(bare) > 5
        for config in found:
            assert ROW_ALIGNMENT.value % config.block_t == 0
            for size in (config.block_t, config.block_s, config.sum_block):
                assert size >= 16 and size & (size - 1) == 0
            assert config.num_warps in (4, 8) and config.row_sums in ("packed", "product")
            if isinstance(arch, str):
                assert config.max_registers is None


def test_the_fastest_by_the_geometric_mean_is_to_paste(sweep):
    arithmetic = TileConfig(64, 64, 4, 2)
    geometric = TileConfig(128, 32, 8, 3, row_sums="product", masked_stages=1, max_registers=128)
    rows = [
        row(ms={"full": 4.0, "causal": 2.0}),
        row(config=arithmetic, ms={"full": 3.0, "causal": 2.0}),
        row(config=geometric, ms={"full": 5.0, "causal": 1.0}),
        row(config=TileConfig(32, 32, 4, 1), ms={"full": 0.1}),  # the limit came in between
        row(config=TileConfig(32, 64, 4, 1), reason="wrong"),
        row(dim=128, ms={"full": 4.0, "causal": 2.0}),
        row(variant="plain", ms={"full": 4.0, "causal": 2.0}),
        row("dkdv", reason="not reached"),
    ]
    lines = sweep.lines_to_paste(rows, MASKS, "H100")
    pasted = eval("{" + "\n".join(lines) + "}", {"TileConfig": TileConfig})
    assert pasted == {
        "forward": {
            64: dataclasses.replace(geometric, measured_on="H100"),
            128: dataclasses.replace(SMALL, measured_on="H100"),
        },
        "forward plain": {64: dataclasses.replace(SMALL, measured_on="H100")},
    }
    assert sweep.lines_to_paste(rows[3:5], MASKS, "H100") == []
    only_full = sweep.lines_to_paste(rows[:5], ["full"], "H100")
    assert "TileConfig(32, 32, 4, 1" in only_full[0]


def test_the_report_has_times_ratios_and_reasons(sweep):
    rows = [
        row(config=SMALL, ms={"full": 4.0, "causal": 2.0}),
        row(config=TileConfig(64, 64, 4, 2), ms={"full": 2.0, "causal": 1.0}),
        row(config=TileConfig(32, 64, 4, 1), reason="no answer in 60 s"),
    ]
    *_, fast, present, failed = sweep.report(rows, MASKS, 4096)
    # 2 products of 2 T T D flops each, for B H = 128.
    assert f"2.000  {4 * 16384 * 4096 * 2048 / 2e9:.0f}  0.500" in fast
    assert "(present)" in present and "4.000" in present and "1.000" in present
    assert "TileConfig(32, 64, 4, 1)" in failed and "no answer in 60 s" in failed


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_short_names(gpu, name, sweep):
    assert sweep.short_name(gpu) == name


def test_heavy_spills_and_too_much_memory_leave_out_a_candidate(sweep):
    forms = [{"spills": sweep.MOST_SPILLS + 1, "shared": 1000}]
    present, other = row(forms=forms), row(forms=forms, candidate=1)
    for candidate in (present, other):
        sweep.refuse(candidate)
    assert "reason" not in present and "spills" in other["reason"]
    sweep.refuse(present, shared_memory=999)
    assert "shared memory" in present["reason"]


def test_a_process_that_hangs_or_fails_costs_its_own_job_alone(sweep):
    jobs = [
        (dict, {"answer": 1}),
        (time.sleep, {}),  # a TypeError
        (subprocess.run, {"args": ["sleep", "1000"]}),
        (dict, {"answer": 2}),
        (os._exit, {"status": 3}),
        (dict, {"answer": 3}),
    ]
    answers = sweep.run_jobs(jobs, processes=2, job_limit=5, limit=300)
    assert [x.get("answer") for x in answers] == [1, None, None, 2, None, 3]
    assert "TypeError" in answers[1]["reason"]
    assert answers[2]["reason"] == "no answer in 5 s"
    assert answers[4]["reason"] == "its process ended with 3"


def test_jobs_past_the_limit_are_not_started(sweep):
    (answer,) = sweep.run_jobs([(dict, {})], processes=1, job_limit=60, limit=0)
    assert answer == {"reason": "not reached before the limit"}


WRONG = {
    "forward": lambda q, k, v, out: (q, k, v, out * 1.03),
    "dkdv": lambda q, k, v, out: (q, _scaled_gradient(k), v, out),
    "dq": lambda q, k, v, out: (_scaled_gradient(q), k, v, out),
}


def _scaled_gradient(x):
    x = x.clone()
    x.register_hook(lambda gradient: gradient * 1.03)
    return x


@pytest.mark.parametrize("variant", ["", "plain"])
@pytest.mark.parametrize("kernel", WRONG)
def test_the_check_accepts_right_results_and_refuses_wrong_ones(
    kernel, variant, sweep, device, monkeypatch
):
    job = row(kernel, variant, dim=16)
    found = sweep.check(job, length=80, device=str(device))
    assert len(found["forms"]) == (0 if device.type == "cpu" else 1 + (kernel == "forward"))

    def wrong(q, k, v, residual, **options):
        q, k, v, factor = WRONG[kernel](q, k, v, 1.0)
        out, lse = shaped_attention(q, k, v, residual, impl="triton", **options)
        return out * factor, lse

    monkeypatch.setattr(sweep, "triton_attention", wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        sweep.check(job, length=80, device=str(device))


def test_the_check_reaches_the_running_form(sweep, device, monkeypatch):
    run = sweep.launch.Launch.__call__

    def without_running_form(self, *varying):
        if self.constants.get("BOUNDED") is not False:
            run(self, *varying)

    monkeypatch.setattr(sweep.launch.Launch, "__call__", without_running_form)
    with pytest.raises(AssertionError):
        sweep.check(row(dim=16), length=80, device=str(device))


@pytest.mark.parametrize("kernel", WRONG)
def test_only_the_launches_of_the_kernel_are_timed(kernel, sweep, device, monkeypatch):
    replayed = []

    def do_bench(function, **options):
        launches = []
        run = sweep.launch.Launch.__call__

        def record(self, *varying):
            launches.append((self.kernel.fn.__name__, self.constants["BLOCK_T"]))
            run(self, *varying)

        with monkeypatch.context() as patch:
            patch.setattr(sweep.launch.Launch, "__call__", record)
            function()
        replayed.append(launches)
        return float(len(replayed))

    monkeypatch.setattr(sweep.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(sweep, "TOKENS", 64)
    monkeypatch.setattr(sweep, "WIDTH", 32)
    monkeypatch.setattr(sweep, "ROUNDS", 2)
    rows = [row(kernel, dim=16), row(kernel, dim=16, config=dataclasses.replace(SMALL, block_t=32))]
    answers = sweep.time_group(rows, MASKS, 64, seconds=100, device=str(device))["answers"]
    forms = 2 if kernel == "forward" else 1
    (name,) = sweep.FAMILIES["portable"].functions[kernel]
    turn = [[(name, block_t)] * forms for block_t in (16, 16, 32, 32)]
    assert replayed == turn * 2
    # Medians of what do_bench said in both rounds.
    assert answers == [{"ms": {"full": 3.0, "causal": 4.0}}, {"ms": {"full": 5.0, "causal": 6.0}}]


def test_a_whole_sweep_with_made_up_answers(sweep, tmp_path, monkeypatch, capsys):
    """Candidate 1 is wrong, 2 the fastest; the last group is not reached."""

    def run_jobs(jobs, processes, job_limit, limit):
        if jobs[0][0] is sweep.check:
            ranks = [arguments["row"]["candidate"] for _, arguments in jobs]
            assert ranks == sorted(ranks) and ranks.count(0) == 10
            forms = [{"kernel": "x", "registers": 99, "spills": 0, "shared": 1000}]
            return [{"reason": "wrong"} if rank == 1 else {"forms": forms} for rank in ranks]
        assert all(function is sweep.time_group for function, _ in jobs)
        groups = [[row["candidate"] for row in arguments["rows"]] for _, arguments in jobs]
        assert all(group[:2] == [0, 2] for group in groups)
        answers = [
            {"answers": [{"ms": dict.fromkeys(MASKS, 1.0 if x == 2 else 2.0)} for x in group]}
            for group in groups
        ]
        return [*answers[:-1], {"reason": "not reached before the limit"}]

    output = tmp_path / "new" / "sweep.json"
    monkeypatch.setattr(sweep, "run_jobs", run_jobs)
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(sweep, "architecture", lambda: 90)
    monkeypatch.setattr(sweep.launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(sweep, "collect", lambda: {"gpus": ["made up"]})
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--output", str(output)])
    assert sweep.main() == 0
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert result["environment"] == {"gpus": ["made up"]} and result["architecture"] == 90
    pasted = eval("{" + "".join(result["to paste"]) + "}", {"TileConfig": TileConfig})
    assert {name: sorted(entry) for name, entry in pasted.items()} == {
        "forward": [64, 128],
        "forward plain": [64, 128],
        "dkdv": [64, 128],
        "dkdv plain": [64, 128],
        "dq": [64],
    }
    for row in result["candidates"]:
        if row["candidate"] == 2 and (row["kernel"], row["dim"]) != ("dq", 128):
            name = f"{row['kernel']} {row['variant']}".strip()
            expected = TileConfig(**row["config"] | {"measured_on": "H100"})
            assert pasted[name][row["dim"]] == expected
            assert sweep.source(expected) in printed
    assert "wrong" in printed and "not reached before the limit" in printed
