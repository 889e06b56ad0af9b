"""The sweep of the Hopper tiles, `bench/sweep.py --family hopper`: all of it but the times."""

import sys
from pathlib import Path

import pytest
import torch

from shaped_attn import shaped_attention
from shaped_attn.kernels.hopper import tiles

BENCH = Path(__file__).resolve().parents[2] / "bench"
MASKS = ["full", "causal"]
NAMES = {"ForwardTile": tiles.ForwardTile, "DkdvTile": tiles.DkdvTile, "DqTile": tiles.DqTile}

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the benchmark is in the repository")


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import sweep

    return sweep


def row(kernel, mask="causal", config=None, dim=64, candidate=0, **others):
    if config is None:
        of_kernel = {
            "forward": tiles.ForwardTile(2, 64, 3, "packed", True, "dynamic"),
            "dkdv": tiles.DkdvTile(2, 64, 2),
            "dq": tiles.DqTile(2, 64, 2, True),
            "fused": tiles.DkdvTile(2, 128, 2),
        }
        config = of_kernel[kernel]
    fixed = {"family": "hopper", "kernel": kernel, "variant": "", "dim": dim, "dtype": "bf16"}
    return fixed | {"mask": mask, "config": config._asdict(), "candidate": candidate} | others


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "fused"])
def test_candidates_differ_and_can_be_pasted(kernel, sweep):
    for dim in (64, 128):
        for is_causal in (True, False):
            found = sweep.hopper_tiles(kernel, dim, is_causal, 4096)
            assert len(set(found)) == len(found) >= (2 if kernel == "fused" else 8)
            for tile in found:
                assert eval(sweep.source(tile), NAMES) == tile
                assert tile.consumers in (2, 3) and tile.stages >= 2
            if kernel == "forward":
                assert found[0] == tiles.forward_tile(dim, is_causal, 4096)
                assert {tile.schedule for tile in found} == {"grid", "rounds", "dynamic"}
                for name in ("row_sums", "takes_turns", "block_s"):
                    assert len({getattr(tile, name) for tile in found}) == 2


def test_the_fastest_of_each_mask_is_to_paste(sweep):
    slow, fast = tiles.DqTile(2, 64, 2, True), tiles.DqTile(3, 64, 2, False)
    forward = tiles.ForwardTile(3, 64, 4, "product", True, "dynamic")
    rows = [
        row("forward", config=forward, ms={"causal": 1.0}),
        row("dq", config=slow, ms={"causal": 3.0}),
        row("dq", config=fast, candidate=1, ms={"causal": 2.0}),
        row("dq", "full", slow, ms={"full": 1.0}),
        row("dq", "full", fast, candidate=1, reason="wrong"),
    ]
    lines = sweep.lines_to_paste(rows, MASKS, "H100")
    assert eval("{" + "".join(lines) + "}", dict(NAMES)) == {
        "forward": {(64, True): forward},
        "dq": {(64, True): fast, (64, False): slow},
    }
    printed = "\n".join(sweep.report(rows, MASKS, 4096))
    for part in ("dq centred D=64 causal", "dq centred D=64 full", "(present)", "wrong", "0.667"):
        assert part in printed


def scaled_gradient(x):
    x = x.clone()
    x.register_hook(lambda gradient: gradient * 1.1)
    return x


WRONG = {
    "forward": lambda q, k, v, out: (q, k, v, out * 1.1),
    "dkdv": lambda q, k, v, out: (q, scaled_gradient(k), v, out),
    "dq": lambda q, k, v, out: (scaled_gradient(q), k, v, out),
    "fused": lambda q, k, v, out: (scaled_gradient(q), k, v, out),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_the_check_accepts_right_results_and_refuses_wrong_ones(
    kernel, sweep, hopper, device, monkeypatch
):
    with hopper():
        found = sweep.check(row(kernel), length=80, device=device.type)
        assert bool(found["forms"]) == (device.type == "cuda")

        def wrong(q, k, v, residual, **options):
            q, k, v, factor = WRONG[kernel](q, k, v, 1.0)
            out, lse = shaped_attention(q, k, v, residual, impl="triton", **options)
            return out * factor, lse

        monkeypatch.setattr(sweep, "triton_attention", wrong)
        with pytest.raises(AssertionError, match="over the budget"):
            sweep.check(row(kernel), length=80, device=device.type)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", WRONG)
def test_candidates_are_right_or_do_not_fit(kernel, dim, sweep, hopper):
    """A tile that a kernel is not made for could write anywhere on a GPU."""
    fitting = 0
    for tile in sweep.hopper_tiles(kernel, dim, True, 4096):
        with hopper():
            try:
                sweep.check(row(kernel, config=tile, dim=dim), length=80, device="cpu")
                fitting += 1
            except Exception as error:
                assert "shared memory" in str(error), (tile, error)
    assert fitting > 1


@pytest.mark.parametrize("kernel", WRONG)
def test_the_launches_of_the_kernel_are_timed(kernel, sweep, hopper, device, monkeypatch):
    """With all that they need to be launched again: the counter that programs take tiles from."""
    replayed = []

    def do_bench(function, **options):
        names = []
        run = sweep.launch.Launch.__call__

        def record(self, *varying):
            names.append(self.kernel.fn.__name__)
            run(self, *varying)

        with monkeypatch.context() as patch:
            patch.setattr(sweep.launch.Launch, "__call__", record)
            function()
        replayed.append(names)
        return 1.0

    monkeypatch.setattr(sweep.triton.testing, "do_bench", do_bench)
    for name, value in {"TOKENS": 70, "WIDTH": 64, "ROUNDS": 1}.items():
        monkeypatch.setattr(sweep, name, value)
    other = row(kernel, "full", candidate=1)
    with hopper():
        answers = sweep.time_group([row(kernel), other], MASKS, 70, 100, device=device.type)
    assert answers["answers"] == [{"ms": {"causal": 1.0}}, {"ms": {"full": 1.0}}]
    expected = {
        "forward": ["attention_fwd_kernel"],
        "dkdv": ["attention_bwd_dkdv_kernel"],
        "dq": ["attention_bwd_dq_kernel"],
        "fused": ["attention_bwd_dkdv_kernel", "convert_dq_kernel"],
    }[kernel]
    for names in replayed:
        assert names[-len(expected) :] == expected
        assert ("value_prefix_kernel" in names) == (kernel == "forward")


@pytest.mark.parametrize(
    "arguments, message",
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
