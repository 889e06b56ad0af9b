"""The demo's covariance: what is predicted and measured, and the page's section about it."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from shaped_attn.demo import covariance, covariance_page, figures
from shaped_attn.sde import Estimate, compare
from shaped_attn.commands.common import format_estimate, format_number

SMALL = covariance.CovarianceConfig(
    width=16,
    depth=32,
    paths=256,
    networks=96,
    plain_networks=40,
    snapshots=9,
    path_chunk=128,
    network_chunk=32,
)


@pytest.fixture(scope="module")
def found():
    return covariance.measure(SMALL, seed=3)


def section(result):
    """The section as a tree: it is well-formed."""
    return ElementTree.fromstring(covariance_page.section(result))


def words(element):
    return " ".join("".join(element.itertext()).split())


def cells(table):
    return [[words(cell) for cell in row] for row in table.iter("tr")]


def points(shape):
    return [tuple(map(float, pair.split(","))) for pair in shape.get("points").split()]


# What is measured


def test_real_networks_are_measured_over_the_depths_of_the_prediction(found):
    assert found.prediction.source == "sde"
    assert found.networks.source == found.plain.source == "network"
    for sample, count in zip(found.samples.values(), (256, 96, 40), strict=True):
        assert sample.paths == count
        assert sample.tokens == 4
        assert sample.times.tolist() == [4 * k / 16 for k in range(9)]
        start = sample.covariances[0].double().mean(0)
        expected = 0.8 * torch.eye(4, dtype=torch.float64) + 0.2
        torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-5)
    assert found.comparison.sources == ("sde", "network")
    assert found.comparison.to_dict() == compare(found.prediction, found.networks).to_dict()
    assert found.is_complete


def test_the_networks_are_those_that_are_predicted():
    config = covariance.CovarianceConfig(width=24, depth=12, branch_gain=0.3, tau0=2.0)
    sde, network, plain = config.prediction(), config.network(), config.plain_network()
    assert config.time == 0.5
    shared = ("branch_gain", "skip_gain", "tau0", "identity_gain", "softmax_gain", "center_gain")
    for name in (*shared, "heads", "is_causal", "mlp", "mlp_ratio", "out_proj"):
        assert getattr(sde, name) == getattr(network, name), name
    assert (sde.branch_gain, sde.tau0, sde.width) == (0.3, 2.0, 24)
    # Plain networks differ from them in the attention matrix alone.
    assert (plain.identity_gain, plain.softmax_gain, plain.center_gain) == (0, 1, 0)
    assert plain.scale_value == pytest.approx(24**-0.5)
    for name in ("width", "depth", "branch_gain", "skip_gain", "heads", "mlp", "mlp_ratio"):
        assert getattr(plain, name) == getattr(network, name), name


def test_the_seed_decides_everything(found):
    again, other = covariance.measure(SMALL, seed=3), covariance.measure(SMALL, seed=4)
    for name, sample in found.samples.items():
        torch.testing.assert_close(
            again.samples[name].covariances, sample.covariances, rtol=1e-4, atol=1e-6
        )
        assert not torch.allclose(other.samples[name].final, sample.final, rtol=0.1)


def test_plain_networks_collapse_and_are_not_frozen(found):
    plain, shaped = found.distance_from_one("plain"), found.distance_from_one("networks")
    assert plain[1] < 0.05 * shaped[1]
    assert not found.plain.stopped.any()
    low = torch.linalg.eigvalsh(found.plain.final)[:, 0]
    assert (low < covariance.EIGENVALUE_RANGE[0]).any()  # where shaped ones would be frozen
    correlation = found.networks.quantiles()["rho_12"][-1]
    assert shaped == pytest.approx((1 - correlation).tolist()[::-1])


def test_progress_covers_all_three(found):
    seen = []
    covariance.measure(SMALL, on_progress=lambda *state: seen.append(state))
    phases = list(dict.fromkeys(phase for phase, _, _ in seen))
    assert phases == ["prediction", "plain networks", "shaped networks"]
    for phase in phases:
        done = [(done, total) for name, done, total in seen if name == phase]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def measure_until(phase, share):
    """Stop as soon as a share of a phase is done."""
    reached = []

    def on_progress(name, done, total):
        if name == phase and done >= share * total:
            reached.append(done)

    return covariance.measure(SMALL, seed=3, on_progress=on_progress, stop=lambda: bool(reached))


def test_an_interruption_keeps_the_finished_networks(found):
    partial = measure_until("shaped networks", 0.7)
    assert partial.prediction.is_complete
    assert partial.plain.is_complete
    assert (partial.networks.paths, partial.networks.requested) == (64, 96)
    torch.testing.assert_close(
        partial.networks.covariances, found.networks.covariances[:, :64], rtol=1e-4, atol=1e-6
    )
    assert partial.comparison.paths == (256, 64)
    assert partial.is_complete is False
    assert partial.to_dict()["is_complete"] is False
    assert "64 of 96 networks, shaped" in words(section(partial))


def test_an_interruption_of_the_prediction_keeps_finished_paths():
    partial = measure_until("prediction", 0.75)
    assert (partial.prediction.paths, partial.networks.paths, partial.plain.paths) == (128, 0, 0)
    assert partial.comparison is partial.agrees is partial.distance_from_one("plain") is None
    page = section(partial)
    assert "128 of 256 paths" in words(page)
    assert "Interrupted before the first networks" in words(page)
    assert len(list(page.iter("svg"))) == 2
    assert not list(page.iter("table"))
    json.dumps(partial.to_dict(), allow_nan=False)


def test_an_interruption_before_anything_says_so():
    nothing = covariance.measure(SMALL, stop=lambda: True)
    assert nothing.prediction.paths == 0
    page = section(nothing)
    assert "nothing to show" in words(page)
    assert not list(page.iter("svg"))
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_the_metrics_are_plain_data(found):
    metrics = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert metrics["settings"]["width"] == 16
    assert metrics["settings"]["seed"] == 3
    assert metrics["comparison"] == found.comparison.to_dict()
    assert metrics["agrees"] is found.agrees
    for name, sample in found.samples.items():
        for statistic in ("rho_12", "V_11"):
            data = metrics[name]["quantiles"][statistic]
            assert data["values"] == sample.quantiles()[statistic].tolist()
            assert data["standard_errors"] == sample.quantile_errors()[statistic].tolist()
        assert metrics[name]["stopped"] == sample.stopped_fraction()._asdict()
    assert metrics["final_one_minus_rho_12"]["plain"] == list(found.distance_from_one("plain"))


@pytest.mark.parametrize("tokens", [1, 10])
def test_a_number_of_tokens_without_the_names_of_the_page_is_refused(tokens):
    with pytest.raises(ValueError, match=f"tokens must be from 2 to 9.*{tokens}"):
        covariance.CovarianceConfig(tokens=tokens)


# The section


def test_the_table_holds_the_comparison(found):
    table, others = section(found).iter("table")
    rows = cells(table)[1:]
    comparison = found.comparison
    for row, name, symbol in zip(rows, ("rho_12", "V_11"), ("ρ12", "V11"), strict=False):
        statistic = comparison.statistics[name]
        medians = [
            format_estimate(Estimate(values[1], errors[1]))
            for values, errors in zip(statistic.quantiles, statistic.quantile_errors, strict=True)
        ]
        assert [row[0], row[1], row[3]] == [symbol, *medians]
        for cell, values in ((row[2], statistic.quantiles[0]), (row[4], statistic.quantiles[1])):
            ends = [float(end) for end in cell.split(" to ")]
            assert ends == pytest.approx([values[0], values[2]], rel=0.06, abs=6e-4)
        assert row[5:] == [format_number(statistic.ks), format_number(statistic.critical)]
    stopped = comparison.stopped
    assert rows[2] == [
        "stopped",
        format_estimate(stopped.first),
        "",
        format_estimate(stopped.second),
        "",
        "",
        "",
    ]
    assert len(cells(others)) == 1 + len(comparison.statistics) == 11


def test_the_charts_show_the_quantiles(found):
    for chart, name, colors in zip(
        section(found).iter("svg"),
        ("rho_12", "V_11"),
        (
            ["shaped", "ink", "ink", "plain", "plain", "plain"],
            ["shaped", "ink", "ink"],
        ),
        strict=True,
    ):
        predicted = found.prediction.quantiles()[name]
        measured = found.networks.quantiles()[name]
        lines = chart.findall("polyline")
        assert [line.get("stroke") for line in lines] == [f"var(--{color})" for color in colors]
        markers = [(float(c.get("cx")), float(c.get("cy"))) for c in chart.findall("circle")]
        assert len(markers) == len(found.networks.times)

        # Two points of the chart give its axes; all others must then lie where they belong.
        def height(values, is_log=name == "V_11"):
            return values.log() if is_log else values

        band = points(chart.find("polygon"))
        count = len(predicted)
        upper, lower = band[:count], band[count:][::-1]
        top, bottom = height(predicted[-1, 2]), height(predicted[-1, 0])
        slope = (upper[-1][1] - lower[-1][1]) / (top - bottom)
        assert slope < 0  # up is smaller in a picture

        def expected(values, top=top, slope=slope, start=upper[-1][1], height=height):
            return (start + (height(values) - top) * slope).tolist()

        drawn = {
            "band, upper": (upper, predicted[:, 2]),
            "band, lower": (lower, predicted[:, 0]),
            "prediction": (points(lines[0]), predicted[:, 1]),
            "networks, lower": (points(lines[1]), measured[:, 0]),
            "networks, upper": (points(lines[2]), measured[:, 2]),
            "networks": (markers, measured[:, 1]),
        }
        if name == "rho_12":
            plain = found.plain.quantiles()[name]
            for index, column in zip((3, 4, 5), (0, 2, 1), strict=True):
                drawn[f"plain, {column}"] = points(lines[index]), plain[:, column]
        for what, (places, values) in drawn.items():
            assert [y for _, y in places] == pytest.approx(expected(values), abs=0.3), what
            steps = [b[0] - a[0] for a, b in zip(places, places[1:], strict=False)]
            assert steps == pytest.approx([steps[0]] * 8, abs=0.21), what
        for index, line in enumerate(lines):
            is_middle = index in (0, 5)
            assert (line.get("stroke-dasharray") is None) == is_middle


def test_a_disagreement_is_said(found):
    # Plain networks are none of those predicted.
    wrong = replace(
        found, networks=found.plain, comparison=compare(found.prediction, found.plain, 0.01)
    )
    assert wrong.agrees is False
    comparison = wrong.comparison
    failed = [s for s in comparison.statistics.values() if not s.agrees]
    page = section(wrong)
    text = words(page)
    assert f"disagree with the prediction: {len(failed)} of 10" in text
    assert f"{comparison.largest.ratio:.2f} times" in text
    assert "cannot be told" not in text
    details = list(page.iter("table"))[1]
    marked = [cell for cell in details.iter("td") if cell.get("class") == "bad"]
    assert len(marked) == len(failed) > 0


def test_an_agreement_is_said(found):
    # Halves of one sample, so that it does not depend on the networks.
    half = found.prediction.paths // 2
    parts = [
        replace(
            found.prediction,
            covariances=found.prediction.covariances[:, part],
            stop_times=found.prediction.stop_times[part],
            exploded=found.prediction.exploded[part],
            requested=half,
        )
        for part in (slice(0, half), slice(half, None))
    ]
    right = replace(found, prediction=parts[0], networks=parts[1], comparison=compare(*parts, 0.01))
    assert right.agrees is True
    text = words(section(right))
    assert "cannot be told from the prediction" in text
    assert f"{right.comparison.largest.ratio:.2f} of it" in text
    assert "disagree" not in text
    assert not [cell for cell in section(right).iter("td") if cell.get("class") == "bad"]


def test_too_few_networks_say_nothing():
    few = covariance.measure(replace(SMALL, networks=2, paths=8, depth=4))
    assert few.agrees is None
    text = words(section(few))
    assert "2 networks are too few to tell" in text
    assert "cannot be told" not in text


def test_collapse_is_called_so_only_where_it_happens(found):
    low, middle, high = map(format_number, found.distance_from_one("plain"))
    text = words(section(found))
    assert f"the last block is {middle} (5 to 95 %: {low} to {high})" in text
    is_parallel = found.distance_from_one("plain")[1] < covariance_page._PARALLEL
    assert ("the tokens become parallel" in text) is is_parallel
    other = {"networks": found.plain, "plain": found.networks}
    assert "become parallel" not in words(section(replace(found, **other)))
    flat = replace(found.plain, covariances=torch.ones_like(found.plain.covariances))
    flat.covariances.diagonal(dim1=-2, dim2=-1).add_(1e-6)
    assert "the tokens become parallel" in words(section(replace(found, plain=flat)))


# Bands in charts


def chart(**options):
    base = {"title": "t", "x_label": "x", "y_label": "y", "lines": []}
    options = {**base, **options}
    return ElementTree.fromstring(figures.line_chart(options.pop("lines"), **options))


def test_a_band_lies_below_the_lines_and_inside_the_frame():
    svg = chart(
        bands=[figures.Band([(0, -5, 5), (1, -10, 10), (2, math.nan, 1), (3, -1, 1)], "shaped")],
        lines=[figures.Line([(0, 0), (3, 0)], "ink")],
    )
    drawn = points(svg.find("polygon"))
    assert len(drawn) == 6  # two for each finite point
    *_, width, height = map(float, svg.get("viewBox").split())
    assert all(0 < x < width and 0 < y < height for x, y in drawn)
    order = [element.tag for element in svg]
    assert order.index("polygon") < order.index("polyline")
    assert order.index("polygon") > max(i for i, tag in enumerate(order) if tag == "line")
    # Above forwards, below backwards: one outline.
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn[:3]) + sorted(
        (x for x, _ in drawn[3:]), reverse=True
    )
    assert all(drawn[k][1] < drawn[5 - k][1] for k in range(3))
    assert svg.find("polygon").get("fill") == "var(--shaped)"


def test_a_band_is_cut_off_at_a_given_range():
    band = figures.Band([(0, -9, 9), (1, -0.5, 9)], "shaped")
    svg = chart(bands=[band], y_range=(-1, 1))
    heights = [y for _, y in points(svg.find("polygon"))]
    grid = [float(line.get("y1")) for line in svg.findall("line") if line.get("x1") == "58"]
    assert heights[0] == heights[1] == min(grid)
    assert heights[3] == max(grid)
    assert min(grid) < heights[2] < max(grid)


def test_points_that_are_not_joined_are_markers_alone():
    svg = chart(lines=[figures.Line([(0, 1), (1, 2)], "ink", joined=False)])
    assert svg.find("polyline") is None
    assert len(svg.findall("circle")) == 2
