"""What runs many paths at once: freezing, the eigenvalues that freeze, snapshots, interruption."""

import math

import pytest
import torch
from covariances import seeded, stop_at
from hypothesis import given, settings
from hypothesis import strategies as st

from shaped_attn.sde.paths import check_range, locate, run


class Scripted:
    """A simulation of given covariances, (paths, steps + 1, m, m). The state is (path, step)."""

    def __init__(self, table):
        self.table, self.begun, self.moved = table, 0, []

    def start(self, paths):
        first = torch.arange(self.begun, self.begun + paths)
        self.begun += paths
        return torch.stack((first, torch.zeros_like(first)), -1)

    def step(self, state, index):
        assert (state[:, 1] == index).all()
        self.moved += [(index, int(path)) for path in state[:, 0]]
        return state + torch.tensor([0, 1])

    def covariance(self, state):
        return self.table[state[:, 0], state[:, 1]]


def run_script(table, **changes):
    arguments = {
        "source": "sde",
        "paths": len(table),
        "steps": table.shape[1] - 1,
        "time": 1.0,
        "snapshots": table.shape[1],
        "eigenvalue_range": (0.1, 10.0),
        "chunk": 100,
    }
    return run(Scripted(table), **{**arguments, **changes})


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


class TestFreezing:
    def test_by_hand(self):
        ok = [diagonal(1.0 + k, 2.0) for k in range(6)]
        high, low, both = diagonal(11.0, 1.0), diagonal(1.0, 0.09), diagonal(11.0, 0.01)
        nan = diagonal(1.0, math.nan)
        table = torch.stack(
            [
                torch.stack(ok),
                torch.stack([ok[0], ok[1], ok[2], high, ok[4], ok[5]]),  # must not come back
                torch.stack([ok[0], ok[1], low, ok[3], ok[4], ok[5]]),
                torch.stack([ok[0], ok[1], ok[2], ok[3], ok[4], nan]),
                torch.stack([ok[0], both, high, ok[3], ok[4], ok[5]]),
                torch.stack([ok[0], ok[1], -high, low, high, ok[5]]),
            ]
        )
        sample = run_script(table, time=2.5)
        inf = math.inf
        assert sample.times.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert sample.stop_times.tolist() == [inf, 1.5, 1.0, 2.5, 0.5, 1.0]
        assert sample.exploded.tolist() == [False, True, False, True, True, False]
        assert sample.collapsed.tolist() == [False, False, True, False, False, True]
        # The number of the last admissible V at each time.
        last = [
            [0, 1, 2, 3, 4, 5],
            [0, 1, 2, 2, 2, 2],
            [0, 1, 1, 1, 1, 1],
            [0, 1, 2, 3, 4, 4],
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1],
        ]
        for path, numbers in enumerate(last):
            expected = torch.stack([ok[number] for number in numbers])
            assert torch.equal(sample.covariances[:, path], expected)

    @given(data=st.data(), paths=st.integers(1, 5), steps=st.integers(1, 5))
    @settings(max_examples=60)
    def test_is_its_definition(self, data, paths, steps):
        """Any pattern of leaving, any chunks and snapshots, against a loop over one path."""
        kinds = st.lists(st.sampled_from("....+-n"), min_size=steps, max_size=steps)
        script = [data.draw(kinds) for _ in range(paths)]
        chunk, snapshots = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 7))
        table = torch.empty(paths, steps + 1, 1, 1, dtype=torch.float64)
        for path in range(paths):
            for k, kind in enumerate([".", *script[path]]):
                size = {".": 1 + 0.1 * path + 0.01 * k, "+": 20.0, "-": 0.01, "n": math.nan}[kind]
                table[path, k] = size
        simulation = Scripted(table)
        arguments = {"source": "sde", "paths": paths, "steps": steps, "time": 1.0}
        sample = run(
            simulation,
            **arguments,
            snapshots=snapshots,
            chunk=chunk,
            eigenvalue_range=(0.1, 10.0),
        )
        recorded = sorted({round(i * steps / (snapshots - 1)) for i in range(snapshots)})
        assert sample.times.tolist() == [k / steps for k in recorded]
        for path in range(paths):
            kept, stop_time, exploded = [float(table[path, 0])], math.inf, False
            for k, kind in enumerate(script[path], 1):
                if stop_time == math.inf and kind != ".":
                    stop_time, exploded = k / steps, kind != "-"
                is_frozen = stop_time != math.inf
                kept.append(kept[-1] if is_frozen else float(table[path, k]))
                # A path is moved until it leaves, and then no more.
                assert ((k - 1, path) in simulation.moved) == (stop_time >= k / steps)
            assert sample.covariances[:, path, 0, 0].tolist() == [kept[k] for k in recorded]
            assert sample.stop_times[path] == stop_time
            assert sample.exploded[path] == exploded


class TestLocate:
    @given(
        values=st.lists(
            st.sampled_from([-1e-9, 0.0, 0.01, 0.09, 0.11, 1.0, 2.0, 9.0, 11.0, 1e3]),
            min_size=1,
            max_size=4,
        ),
        seed=st.integers(0, 10**6),
        low=st.sampled_from([0.1, 0.0]),
    )
    @settings(max_examples=200)
    def test_is_its_definition(self, values, seed, low):
        """Eigenvalues on both sides of both bounds, in random directions."""
        m = len(values)
        if low == 0:
            values = [abs(value) for value in values]  # there is no bound at the lower end
        frame = torch.linalg.qr(torch.randn(m, m, generator=seeded(seed)).double()).Q
        v = (frame * torch.tensor(values, dtype=torch.float64)) @ frame.mT
        is_inside, is_above = locate(((v + v.mT) / 2)[None], low, 10.0)
        assert is_inside.tolist() == [all(low <= value <= 10 for value in values)]
        assert is_above.tolist() == [max(values) > 10]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_many(self, dtype):
        generator = seeded()
        v = torch.randn(2000, 3, 3, generator=generator, dtype=torch.float64)
        v = (v @ v.mT * torch.rand(2000, 1, 1, generator=generator)).to(dtype)
        values = torch.linalg.eigvalsh(v.double())
        is_inside, is_above = locate(v, 0.02, 4.0)
        expected = (values[:, 0] >= 0.02) & (values[:, -1] <= 4)
        assert torch.equal(is_inside, expected)
        assert torch.equal(is_above, values[:, -1] > 4)
        assert 0.1 < expected.double().mean() < 0.9

    def test_trace_and_inverse_alone_do_not_decide(self):
        """Both bound eigenvalues within a factor of m only."""
        v = torch.stack((9.0 * torch.eye(4), 0.11 * torch.eye(4))).double()
        is_inside, is_above = locate(v, 0.1, 10.0)
        assert is_inside.all() and not is_above.any()

    def test_not_finite(self):
        eye = torch.eye(2, dtype=torch.float64)
        bad = [eye.clone() for _ in range(3)]
        bad[0][0, 1] = math.nan
        bad[1][0, 0] = math.inf
        bad[2][1, 1] = -math.inf
        for low in (0.0, 0.1):
            is_inside, is_above = locate(torch.stack((eye, *bad)), low, math.inf)
            assert is_inside.tolist() == [True, False, False, False]
            assert is_above.tolist() == [False, True, True, True]

    def test_extremes(self):
        """Nothing raises: LAPACK did its own scaling."""
        v = torch.stack([x * torch.ones(2, 2).double() for x in (1e308, 1e-310, 1.0, 0.0)])
        is_inside, is_above = locate(v, 1e-4, 1e4)
        assert not is_inside.any()
        assert is_above.tolist() == [True, False, False, False]
        assert locate(v, 0.0, 1e4)[0].tolist() == [False, True, True, True]

    def test_none(self):
        is_inside, is_above = locate(torch.empty(0, 3, 3), 1e-4, 1e4)
        assert is_inside.shape == is_above.shape == (0,)

    @pytest.mark.parametrize("given_range", [(0, 1), (1e-4, math.inf), [0.5, 2]])
    def test_check_range(self, given_range):
        assert check_range(given_range) == tuple(map(float, given_range))


class TestTimes:
    @pytest.mark.parametrize(
        ("snapshots", "recorded"),
        [(2, [0, 10]), (3, [0, 5, 10]), (4, [0, 3, 7, 10]), (11, range(11)), (99, range(11))],
    )
    def test_snapshots(self, snapshots, recorded):
        table = 1 + torch.arange(11.0, dtype=torch.float64).view(1, 11, 1, 1) / 100
        sample = run_script(table, snapshots=snapshots, time=0.7)
        assert sample.times.tolist() == [k / 10 * 0.7 for k in recorded]
        assert sample.covariances.flatten().tolist() == [float(table[0, k]) for k in recorded]

    def test_stop_times_are_recorded_times(self):
        table = torch.ones(7, 8, 1, 1, dtype=torch.float64)
        for path in range(7):
            table[path, path + 1 :] = 20.0
        sample = run_script(table, time=0.3)
        assert sample.stop_times.tolist() == sample.times[1:].tolist()


class TestInterruption:
    table = torch.ones(10, 5, 1, 1, dtype=torch.float64) + torch.arange(10).view(10, 1, 1, 1) / 100

    @pytest.mark.parametrize(
        ("call", "kept"),
        [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8), (12, 10), (99, 10)],
    )
    def test_finished_chunks_are_kept(self, call, kept):
        """Chunks of 4, 4 and 2 paths, of 4 steps each."""
        sample = run_script(self.table, chunk=4, stop=stop_at(call), snapshots=3)
        assert sample.paths == kept and sample.requested == 10
        assert sample.is_complete == (kept == 10)
        assert torch.equal(sample.final, self.table[:kept, -1])
        assert sample.stop_times.shape == sample.exploded.shape == (kept,)
        assert sample.times.tolist() == [0, 0.5, 1.0]

    def test_is_asked_before_each_step(self):
        asked = []
        run_script(self.table, chunk=4, stop=lambda: asked.append(1))
        assert len(asked) == 12

    def test_on_progress(self):
        seen = []
        run_script(self.table, chunk=4, on_progress=lambda *x: seen.append(x))
        done = [4, 8, 12, 16, 20, 24, 28, 32, 34, 36, 38, 40]
        assert seen == [(x, 40) for x in done]
