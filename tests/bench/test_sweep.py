"""The sweep behind the tables of tiles, of both families: all of it but the times."""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from shaped_attn import shaped_attention
from shaped_attn.kernels import configs
from shaped_attn.kernels.configs import TileConfig
from shaped_attn.kernels.hopper import tiles
from shaped_attn.kernels.primitives import ROW_ALIGNMENT

SMALL = TileConfig(16, 16, 4, 1, sum_block=16)
HOPPER = {
    "forward": tiles.ForwardTile(2, 64, 3, "packed", True),
    "dkdv": tiles.DkdvTile(2, 64, 2),
    "dq": tiles.DqTile(2, 64, 2, True),
    "fused": tiles.DkdvTile(2, 128, 2),
}
MASKS = ["full", "causal"]
NAMES = {kind.__name__: kind for kind in (TileConfig, *map(type, HOPPER.values()))}


def row(kernel="forward", variant="", dim=64, config=SMALL, candidate=0, **others):
    fixed = {"family": "portable", "kernel": kernel, "variant": variant, "dim": dim, "mask": ""}
    fixed["dtype"] = "bf16"
    return fixed | {"config": dataclasses.asdict(config), "candidate": candidate} | others


def hopper_row(kernel, mask="causal", config=None, **others):
    config = (config or HOPPER[kernel])._asdict()
    return row(kernel, mask=mask, family="hopper", **others) | {"config": config}


def pasted(lines):
    """What lines to paste are in a table."""
    return eval("{" + "".join(lines) + "}", dict(NAMES))


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_candidates_are_valid_and_differ(arch, sweep):
    for kernel, dim in itertools.product(sweep.CANDIDATES, (64, 128)):
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


@pytest.mark.parametrize("kernel", HOPPER)
def test_candidates_of_hopper_differ_and_can_be_pasted(kernel, sweep):
    for dim, is_causal in itertools.product((64, 128), (True, False)):
        found = sweep.hopper_tiles(kernel, dim, is_causal, 4096)
        assert len(set(found)) == len(found) >= (2 if kernel == "fused" else 8)
        for tile in found:
            assert eval(sweep.source(tile), NAMES) == tile
            assert tile.consumers in (2, 3) and tile.stages >= 2
        if kernel == "forward":
            assert found[0] == tiles.forward_tile(dim, is_causal, 4096)
            for name in ("row_sums", "takes_turns", "block_s"):
                assert len({getattr(tile, name) for tile in found}) == 2


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
    small, best = (dataclasses.replace(tile, measured_on="H100") for tile in (SMALL, geometric))
    assert pasted(sweep.lines_to_paste(rows, MASKS, "H100")) == {
        "forward": {64: best, 128: small},
        "forward plain": {64: small},
    }
    assert sweep.lines_to_paste(rows[3:5], MASKS, "H100") == []
    only_full = sweep.lines_to_paste(rows[:5], ["full"], "H100")
    assert "TileConfig(32, 32, 4, 1" in only_full[0]


def test_the_fastest_of_each_mask_is_to_paste_for_hopper(sweep):
    slow, fast = tiles.DqTile(2, 64, 2, True), tiles.DqTile(3, 64, 2, False)
    forward = tiles.ForwardTile(3, 64, 4, "product", True)
    rows = [
        hopper_row("forward", config=forward, ms={"causal": 1.0}),
        hopper_row("dq", config=slow, ms={"causal": 3.0}),
        hopper_row("dq", config=fast, candidate=1, ms={"causal": 2.0}),
        hopper_row("dq", "full", slow, ms={"full": 1.0}),
        hopper_row("dq", "full", fast, candidate=1, reason="wrong"),
    ]
    assert pasted(sweep.lines_to_paste(rows, MASKS, "H100")) == {
        "forward": {(64, True): forward},
        "dq": {(64, True): fast, (64, False): slow},
    }
    printed = "\n".join(sweep.report(rows, MASKS, 4096))
    for part in ("dq centred D=64 causal", "dq centred D=64 full", "(present)", "wrong", "0.667"):
        assert part in printed


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
    ("gpu", "name"),
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


def scaled_gradient(x):
    x = x.clone()
    x.register_hook(lambda gradient: gradient * 1.03)
    return x


WRONG = {
    "forward": lambda q, k, out: (q, k, out * 1.03),
    "dkdv": lambda q, k, out: (q, scaled_gradient(k), out),
    "dq": lambda q, k, out: (scaled_gradient(q), k, out),
    "fused": lambda q, k, out: (scaled_gradient(q), k, out),
}


@pytest.mark.parametrize(
    ("family", "variant", "kernel"),
    [
        *itertools.product(["portable"], ["", "plain"], ["forward", "dkdv", "dq"]),
        *itertools.product(["hopper"], [""], HOPPER),
    ],
)
def test_the_check_accepts_right_results_and_refuses_wrong_ones(
    family, variant, kernel, sweep, hopper, device, monkeypatch
):
    is_hopper = family == "hopper"
    candidate = hopper_row(kernel) if is_hopper else row(kernel, variant, dim=16)
    with hopper() if is_hopper else contextlib.nullcontext():
        found = sweep.check(candidate, length=80, device=device.type)["forms"]
        assert bool(found) == (device.type == "cuda")
        if found and not is_hopper:
            assert len(found) == 1 + (kernel == "forward")

        def wrong(q, k, v, residual, **options):
            q, k, factor = WRONG[kernel](q, k, 1.0)
            out, lse = shaped_attention(q, k, v, residual, impl="triton", **options)
            return out * factor, lse

        monkeypatch.setattr(sweep, "triton_attention", wrong)
        with pytest.raises(AssertionError, match="over the budget"):
            sweep.check(candidate, length=80, device=device.type)


def test_the_check_reaches_the_running_form(sweep, device, monkeypatch):
    run = sweep.launch.Launch.__call__

    def without_running_form(self, *varying):
        if self.constants.get("BOUNDED") is not False:
            run(self, *varying)

    monkeypatch.setattr(sweep.launch.Launch, "__call__", without_running_form)
    with pytest.raises(AssertionError):
        sweep.check(row(dim=16), length=80, device=device.type)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", HOPPER)
def test_candidates_of_hopper_are_right_or_do_not_fit(kernel, dim, sweep, hopper):
    """A tile that a kernel is not made for could write anywhere on a GPU."""
    fitting = 0
    for tile in sweep.hopper_tiles(kernel, dim, True, 4096):
        with hopper():
            try:
                sweep.check(hopper_row(kernel, config=tile, dim=dim), length=80, device="cpu")
                fitting += 1
            except Exception as error:
                assert "shared memory" in str(error), (tile, error)
    assert fitting > 1


@pytest.fixture
def replayed(sweep, monkeypatch):
    """Names and constants of the launches of everything that is timed; times are 1, 2, 3 ..."""
    found = []

    def do_bench(function, **options):
        launches = []
        run = sweep.launch.Launch.__call__

        def record(self, *varying):
            launches.append((self.kernel.fn.__name__, self.constants))
            run(self, *varying)

        with monkeypatch.context() as patch:
            patch.setattr(sweep.launch.Launch, "__call__", record)
            function()
        found.append(launches)
        return float(len(found))

    monkeypatch.setattr(sweep.triton.testing, "do_bench", do_bench)
    return found


def shrink(sweep, monkeypatch, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(sweep, name, value)


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_only_the_launches_of_the_kernel_are_timed(kernel, sweep, replayed, device, monkeypatch):
    shrink(sweep, monkeypatch, TOKENS=64, WIDTH=32, ROUNDS=2)
    rows = [row(kernel, dim=16), row(kernel, dim=16, config=dataclasses.replace(SMALL, block_t=32))]
    answers = sweep.time_group(rows, MASKS, 64, seconds=100, device=device.type)["answers"]
    forms = 2 if kernel == "forward" else 1
    (name,) = sweep.FAMILIES["portable"].functions[kernel]
    turn = [[(name, block_t)] * forms for block_t in (16, 16, 32, 32)]
    found = [[(name, constants["BLOCK_T"]) for name, constants in once] for once in replayed]
    assert found == turn * 2
    # Medians of what do_bench said in both rounds.
    assert answers == [{"ms": {"full": 3.0, "causal": 4.0}}, {"ms": {"full": 5.0, "causal": 6.0}}]


@pytest.mark.parametrize("kernel", HOPPER)
def test_the_launches_of_hopper_are_timed(kernel, sweep, replayed, hopper, device, monkeypatch):
    """With all that they need to be launched again: the counter that programs take tiles from."""
    shrink(sweep, monkeypatch, TOKENS=70, WIDTH=64, ROUNDS=1)
    rows = [hopper_row(kernel), hopper_row(kernel, "full", candidate=1)]
    with hopper():
        answers = sweep.time_group(rows, MASKS, 70, 100, device=device.type)
    assert answers["answers"] == [{"ms": {"causal": 1.0}}, {"ms": {"full": 2.0}}]
    expected = {
        "forward": 2 * ["attention_fwd_kernel"],
        "dkdv": ["attention_bwd_dkdv_kernel"],
        "dq": ["attention_bwd_dq_kernel"],
        "fused": ["attention_bwd_dkdv_kernel", "convert_dq_kernel"],
    }[kernel]
    for launches in replayed:
        names = [name for name, _ in launches]
        assert names[-len(expected) :] == expected
        assert ("value_prefix_kernel" in names) == (kernel == "forward")


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
    found = pasted(result["to paste"])
    assert {name: sorted(entry) for name, entry in found.items()} == {
        "forward": [64, 128],
        "forward plain": [64, 128],
        "dkdv": [64, 128],
        "dkdv plain": [64, 128],
        "dq": [64],
    }
    for one in result["candidates"]:
        if one["candidate"] == 2 and (one["kernel"], one["dim"]) != ("dq", 128):
            name = f"{one['kernel']} {one['variant']}".strip()
            expected = TileConfig(**one["config"] | {"measured_on": "H100"})
            assert found[name][one["dim"]] == expected
            assert sweep.source(expected) in printed
    assert "wrong" in printed and "not reached before the limit" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "fused"], "--kernels must be of the family portable, got fused"),
        (["--family", "hopper", "--compile-only", "80"], "must be compiled for 90"),
        (["--family", "hopper"], "must run on a Hopper GPU (sm_90), this is 80"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, sweep, monkeypatch, capsys):
    monkeypatch.setattr(sweep.launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "architecture", lambda: 80)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
