"""What all figures share: their arguments, how they look, and how they are written."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from figures import make_sample
from fresh_python import python
from matplotlib.figure import Figure

from shaped_attn import plots
from shaped_attn.plots import style

REPO = Path(__file__).resolve().parents[2]
PLOTS = [plots.plot_covariance, plots.plot_densities, plots.plot_rank_collapse]


@pytest.mark.parametrize("plot", PLOTS)
def test_samples_have_to_be_named_samples_with_paths(plot):
    sample = make_sample()
    with pytest.raises(ValueError, match="samples must not be empty"):
        plot({})
    with pytest.raises(TypeError, match="samples must be a Mapping, got list"):
        plot([sample])
    with pytest.raises(TypeError, match=r"samples\['a'\] must be a CovarianceSample, got Tensor"):
        plot({"a": sample.covariances})
    with pytest.raises(ValueError, match=r"samples\['b'\] must have at least one path"):
        plot({"a": sample, "b": make_sample(paths=0)})


@pytest.mark.parametrize("plot", PLOTS[:2])
def test_statistics_have_to_be_there(plot):
    samples = {"a": make_sample(), "b": make_sample(tokens=2)}
    with pytest.raises(ValueError, match=r"samples\['b'\], rho_12, V_11, V_22, got 'V_33'"):
        plot(samples, ["rho_12", "V_33"])
    with pytest.raises(TypeError, match="statistics must be a sequence of names, got 'rho_12'"):
        plot(samples, "rho_12")
    with pytest.raises(ValueError, match="statistics must not be empty"):
        plot(samples, [])


@pytest.mark.parametrize("plot", [PLOTS[0], PLOTS[2]])
@pytest.mark.parametrize(
    ("levels", "rule"),
    [
        ((0.5,), "must be 3 numbers"),
        ((0.5, 0.4, 0.9), "must ascend"),
        ((0.1, 0.5, 1.1), "must be from 0 to 1"),
    ],
)
def test_levels_are_three_ascending_numbers(plot, levels, rule):
    with pytest.raises(ValueError, match=f"levels {rule}"):
        plot({"a": make_sample()}, levels=levels)


def test_the_legend_fits_into_the_figure():
    samples = {f"networks with a long name {i}": make_sample("network") for i in range(5)}
    figure = plots.plot_covariance(samples, ["rho_12"])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert not box.overlaps(figure.axes[0].get_window_extent())


def test_figures_use_no_pyplot_and_change_no_setting(tmp_path):
    code = """
import sys
import matplotlib
def settings():  # reading "backend" chooses one, and imports pyplot for that
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
from shaped_attn import plots
from shaped_attn.plots import style
from shaped_attn.sde import CovarianceSDE, equicorrelated
sample = CovarianceSDE().sample(equicorrelated(2, 0.2), paths=20, steps=8)
for plot in (plots.plot_covariance, plots.plot_densities, plots.plot_rank_collapse):
    plots.save(plot({"a": sample}), "a.png")
print("matplotlib.pyplot" in sys.modules, settings() == before)
"""
    assert python("-c", code, cwd=tmp_path, path=[REPO]).split() == ["False", "True"]


@pytest.mark.parametrize(
    ("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")]
)
def test_save_writes_what_the_suffix_says(name, head, tmp_path):
    path = tmp_path / name
    assert plots.save(Figure(), str(path)) == path
    assert path.read_bytes().startswith(head)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_save_refuses_other_suffixes(name, tmp_path):
    with pytest.raises(ValueError, match="path must end in one of .pdf, .png, .svg"):
        plots.save(Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_behind_when_drawing_fails(tmp_path):
    figure = Figure()
    figure.text(0.5, 0.5, r"$\nonsense{$")
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    for target in (path, tmp_path / "b.pdf"):
        with pytest.raises(ValueError):
            plots.save(figure, target)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


def test_save_does_not_make_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        plots.save(Figure(), tmp_path / "missing/a.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        plots.save(Figure(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_wants_a_figure(tmp_path):
    with pytest.raises(TypeError, match="figure must be a Figure, got NoneType"):
        plots.save(None, tmp_path / "a.png")


def test_the_same_figure_gives_the_same_file(tmp_path):
    samples = {"prediction": make_sample(), "networks": make_sample("network")}
    paths = [plots.save(plots.plot_covariance(samples), tmp_path / n) for n in ("a.pdf", "b.pdf")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_svg_is_one_element_that_stands_alone():
    samples = {"a": make_sample(), "b": make_sample("network")}
    names = []
    for description in ("Variance & correlation", "another"):
        text, again = (plots.svg(plots.plot_covariance(samples), description) for _ in range(2))
        assert text == again
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("aria-label") == description
        assert not list(root.iter("{http://www.w3.org/2000/svg}style"))
        defined = re.findall(r' id="([^"]+)"', text)
        assert set(defined) == set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        names += defined
    assert len(names) == len(set(names)) > 0


def test_svg_has_the_colours_of_its_page():
    networks = {f"networks {index}": make_sample("network") for index in range(6)}
    text = plots.svg(plots.plot_covariance({"prediction": make_sample(), **networks}), "many")
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text))
    series = {style.color(index).lower() for index in range(7)} - {style.INK}
    assert colors == {"none", "currentColor", "var(--paper, white)", *series}
    for opacity in ("fill-opacity: 0.75", "stroke-opacity: 0.45", "stroke-opacity: 0.13"):
        assert opacity in text


def test_svg_wants_a_figure():
    with pytest.raises(TypeError, match="figure must be a Figure, got NoneType"):
        plots.svg(None, "nothing")


def test_the_example_draws_its_figures(tmp_path):
    said = python(
        *(REPO / "examples/figures.py", "--only", "covariance", "stopping_times", "token_kernels"),
        *("--width", 8, "--networks", 16, "--paths", 64, "--cells", 2),
        *("--tokens", 8, "--layers", 1, 3, "--output", tmp_path),
        path=[REPO],
    )
    names = {"covariance.png", "densities.png", "stopping_times.png", "token_kernels.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "E-SPA, repeated tokens: mean correlation 0." in said
