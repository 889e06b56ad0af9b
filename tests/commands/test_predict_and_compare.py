import io
import json
import os
import re
import signal
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from command_line import invoke

from shaped_attn import commands
from shaped_attn.commands import common
from shaped_attn.commands.predict import format_estimate, format_number, tuning_lines
from shaped_attn.sde import CovarianceSDE, equicorrelated, prediction
from shaped_attn.sde.network import FiniteNetwork
from shaped_attn.sde.prediction import Settings
from shaped_attn.sde.sample import Estimate, quantile, quantile_error
from shaped_attn.sde.tuning import Candidate, End, Interval, Tuning

# Small, on one device wherever the tests run.
SMALL = ("--depth", "4", "--width", "16", "--tokens", "3", "--paths", "64", "--device", "cpu")
SMALL += ("--heads", "1")
NETWORKS = (*SMALL, "--networks", "40", "--against", "chain")
BLOCK = {"is_causal": True, "mlp_ratio": 4.0}  # the defaults of both commands
PREDICTED = {
    "model",
    "recommended",
    "settings",
    "time",
    "is_complete",
    "source",
    "paths",
    "requested",
    "times",
    "layers",
    "levels",
    "quantiles",
    "blow_up",
    "collapse",
    "tuning",
    "assumptions",
    "versions",
    "device",
    "seconds",
}
STATISTICS = ["mean_correlation", "rho_12", "rho_23", "rho_13", "V_11", "V_33"]


def predict(*args):
    result = invoke("predict", *SMALL, "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def write(tmp_path):
    """Write a file, JSON unless it is text, and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def npy(array):
    """What `numpy.save` writes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def interrupt_after(monkeypatch, owner, calls):
    """Press Ctrl-C in one of the calls of ``owner.sample``, after half of its work."""
    sample = owner.sample
    seen = []

    def interrupted(self, *args, on_progress=None, **options):
        def count(done, total):
            if on_progress is not None:
                on_progress(done, total)
            if len(seen) == calls and 2 * done >= total:
                seen.append(None)
                os.kill(os.getpid(), signal.SIGINT)

        seen.append(None)
        return sample(self, *args, on_progress=count, **options)

    monkeypatch.setattr(owner, "sample", interrupted)


# ---------------------------------------------------------------------------------- settings


def test_every_flag_reaches_the_process():
    flags = {
        "depth": 6,
        "width": 24,
        "tokens": 5,
        "correlation": 0.3,
        "variance": 2.0,
        "branch_gain": 0.4,
        "tau0": 0.7,
        "heads": 2,
        "softmax_gain": 0.8,
        "out_proj": "gaussian",
        "causal": True,
        "mlp_ratio": 4.0,
        "c_plus": 0.1,
        "c_minus": -0.6,
        "head_dim": 3,
    }
    settings = Settings(**flags)
    block = {
        "tau0": 0.7,
        "branch_gain": 0.4,
        "heads": 2,
        "softmax_gain": 0.8,
        "out_proj": "gaussian",
        "is_causal": True,
        "mlp_ratio": 4.0,
        "c_plus": 0.1,
        "c_minus": -0.6,
    }
    assert settings.sde().to_dict() == CovarianceSDE(width=24, **block).to_dict()
    expected = FiniteNetwork(width=24, depth=6, head_dim=3, **block)
    assert settings.network().to_dict() == expected.to_dict()
    assert settings.time == 0.25
    torch.testing.assert_close(settings.start(), equicorrelated(5, 0.3, 2.0))
    assert Settings(finite_width=False).sde().width is None
    assert Settings(mlp=False).sde().mlp is False
    assert Settings(attention=False).sde().attention is False


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"depth": 256, "width": 512}, 256),
        ({"depth": 12, "width": 768}, 768),  # one for each of 12 layers, fewer than 64
        ({"depth": 64, "width": 64}, 64),
        ({"depth": 64, "width": 64, "finite_width": False}, 256),
        ({"depth": 64, "width": 64, "integrator": "euler_maruyama"}, 256),
        ({"depth": 8, "width": 128, "finite_width": False}, 1024),  # 64 in all
        ({"depth": 8, "width": 8, "tokens": 7}, 14),  # what the chain needs
        ({"depth": 8, "width": 8, "mlp_ratio": 0.05, "branch_gain": 0.9}, 61),  # kappa is 15.05
        ({"steps": 100}, 100),
    ],
)
def test_the_steps_follow_from_depth_and_width(settings, steps):
    assert Settings(**settings).steps == steps


def test_the_help_shows_the_defaults():
    text = " ".join(invoke("predict", "--help").stdout.split())
    for flag, default in (
        ("--depth, --layers INTEGER", "12"),
        ("--causal / --no-causal", "causal"),
        ("--finite-width / --limit", "finite-width"),
        ("--mlp-ratio FLOAT", "4"),
        ("--correlation FLOAT", "0.2"),
        ("--integrator [chain|euler_maruyama]", "chain"),
    ):
        assert re.search(re.escape(flag) + r"[^\[]*\[default: " + re.escape(default) + r"\]", text)
    margin = float(re.search(r"--band LOW HIGH .*?default: ([\d.]+) around the start", text)[1])
    found = Settings()
    rho, band = found.correlation, found.target_band
    assert band == pytest.approx((rho - margin, rho + margin))
    names = {f.name for f in fields(Settings)} - {"has_skip", "has_normalization"}
    names -= {"impl", "deterministic", "preserves_variance"}
    for command, others in (("predict", {"networks", "against"}), ("compare", {"band", "tune"})):
        shown = set(re.findall(r"--([a-z0-9-]+)", invoke(command, "--help").stdout))
        assert {name.replace("_", "-") for name in names - others} <= shown
        assert not others & shown


def test_flags_win_over_the_file(write):
    config = write("c.json", {"depth": 6, "width": 12, "correlation": 0.4, "mlp": False})
    found = predict("--config", config, "--no-tune", "--mlp")
    assert (found["model"]["depth"], found["model"]["width"]) == (4, 16)  # those of SMALL
    found = found["settings"]
    assert found["correlation"] == 0.4
    assert found["mlp"] is True
    assert found["tune"] is False


def test_a_start_of_the_command_line_replaces_that_of_the_file(write):
    matrix = [[1.0, 0.5], [0.5, 2.0]]
    common = ("--depth", 2, "--width", 16, "--paths", 8, "--no-tune", "--device", "cpu", "--json")

    def start(values, *flags):
        result = invoke("predict", *common, "--config", write("c.json", values), *flags)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["settings"]
        return [found[name] for name in ("v0", "tokens", "correlation")]

    assert start({"v0": matrix, "paths": 3}, "--correlation", 0.1) == [None, 4, 0.1]
    file = write("v0.json", matrix)
    assert start({"tokens": 7, "correlation": 0.1}, "--v0", file) == [matrix, 2, None]


def test_toml_says_the_same_as_json(write):
    pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    text = "depth = 6\nskip = true\nmlp = false\ntune = false\npaths = 8\n"
    text += "v0 = [[1, 0.5], [0.5, 1]]\n"
    values = {"depth": 6, "skip": True, "mlp": False, "tune": False, "paths": 8}
    values |= {"v0": [[1, 0.5], [0.5, 1]]}
    results = [
        json.loads(invoke("predict", "--json", "--device", "cpu", "--config", path).stdout)
        for path in (write("c.toml", text), write("c.json", values))
    ]
    for found in results:
        del found["seconds"]
    assert results[0] == results[1]
    assert results[0]["model"]["has_skip"] is True


def test_toml_without_tomllib_is_a_clear_error(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    result = invoke("predict", "--config", write("c.toml", "depth = 6\n"))
    assert result.exit_code == 2
    assert "Python 3.11" in result.stderr
    assert "JSON" in result.stderr


def test_a_start_can_come_from_a_file(write, tmp_path):
    matrix = [[1.0, 0.5, 0.1], [0.5, 2.0, 0.2], [0.1, 0.2, 0.5]]
    np.save(tmp_path / "v0.npy", np.array(matrix))
    small = ("--depth", 4, "--width", 16, "--paths", 8, "--no-tune", "--json", "--device", "cpu")
    starts = (
        ("--v0", tmp_path / "v0.npy"),
        ("--v0", write("v0.json", matrix)),
        ("--config", write("c.json", {"v0": "v0.npy"})),  # beside the configuration
    )
    for start in starts:
        result = invoke("predict", *small, *start)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["settings"]["v0"] == matrix
        assert found["quantiles"]["V_33"]["values"][0] == pytest.approx([0.5] * 3)
        rho = 0.2 / (2.0 * 0.5) ** 0.5
        assert found["quantiles"]["rho_23"]["values"][0] == pytest.approx([rho] * 3)


def test_a_result_is_a_configuration(write):
    first = predict("--no-tune", "--seed", 3)
    config = write("again.json", first)
    result = invoke("predict", "--config", config, "--json", "--device", "cpu")
    assert json.loads(result.stdout)["quantiles"] == first["quantiles"]
    other = predict("--no-tune", "--seed", 4)
    assert other["quantiles"] != first["quantiles"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"branch_gian": 0.5}, "branch_gian is not a setting. Did you mean branch_gain?"),
        ({"branch-gain": 0.5}, "Did you mean branch_gain?"),
        ({"zzz": 0.5}, "zzz is not a setting. Known are method, depth,"),
        ({"no_mlp": True}, "Write mlp = false."),
        ({"limit": True}, "Write finite_width = false."),
        ({"plot": "a.png"}, "Give --plot on the command line."),
        ({"depth": "6"}, "c.json: depth must be an int, got '6'"),
        ({"depth": 0}, "c.json: depth must be at least 1, got 0"),
        ({"causal": 1}, "c.json: causal must be True or False, got 1"),
        ({"out_proj": "haar"}, "out_proj must be one of"),
        ({"method": "e_spa"}, "c.json: method must be 'shaped' for a prediction"),
        ({"skip": False}, "c.json: has_skip must be None or True for a prediction"),
        ({"normalization": True}, "has_normalization must be None or False for a prediction"),
        ({"kv_heads": 2}, "kv_heads must be None or 4 for a prediction"),
        ({"out_proj": "gpt2"}, "out_proj must be one of 'none', 'orthogonal', 'gaussian'"),
        ({"identity_gain": 0.5}, "identity_gain must be 1 where there is an MLP"),
        ({"center_gain": 0.5}, "center_gain must equal softmax_gain"),
        ({"skip_gain": 0.5}, "skip_gain must satisfy"),
        ({"seed": -1}, "c.json: seed must be from 0 to 9223372036854775807, got -1"),
        ({"heads": 1, "softmax_gain": [True]}, "c.json: softmax_gain must be a number, got True"),
        ({"band": [0.1, "a"]}, "c.json: band must be a number, got 'a'"),
        ({"width": 100, "heads": 7}, "c.json: heads must divide width, 100, got 7. Choose a"),
        ({"band": 0.3}, "c.json: band must be 2 numbers"),
        ({"band": [0.1, 1.5]}, "band must ascend and lie in [-0.333, 1]"),
        ({"softmax_gain": [1, 2]}, "softmax_gain must be a number or 4 numbers"),
        ({"branch_gain": 1.5}, "branch_gain must be from 0 to 1"),
        ({"correlation": -0.5}, "correlation must be from -0.333333 to 1 for 4 tokens"),
        ({"correlation": 1.0}, "correlation and variance must lead to eigenvalues from 0.0001"),
        ({"v0": [[1, 1], [1, 1]]}, "c.json: v0 must lead to eigenvalues from 0.0001"),
        ({"depth": 64, "steps": 3}, "steps must be at least 8 per unit of"),
        ({"v0": [[1, 0.5]]}, "v0 must be a square matrix, got 1 rows, of lengths [2]"),
        ({"v0": [[1, "a"], [0, 1]]}, "c.json: an entry of v0 must be a number, got 'a'"),
        ({"v0": [[1, 2], [2, 1]]}, "v0 must be positive semidefinite"),
        ({"v0": [[1, 0.5], [0.4, 1]]}, "v0 must be symmetric"),
        ({"v0": [[1]], "correlation": 0.1}, "v0 must not be given beside"),
        ({"v0": [[1]], "tokens": 2}, "v0 must not be given beside"),
        ({"v0": "none.npy"}, "none.npy"),
        ({"v0": "c.csv"}, "v0 must be a .npy or .json file"),
        ([1], "must hold settings by name, got list"),
        ("{", "Expecting property name"),
        ('{"depth": 1, "depth": 2}', "depth is given twice"),
        ('{"tau0": NaN}', "tau0 must be finite"),
    ],
)
def test_a_wrong_file_is_wrong_usage(write, content, message):
    result = invoke("predict", "--config", write("c.json", content))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("predict", ("--depth", "x"), "'x' is not a valid integer"),
        ("predict", ("--depth", 0), "depth must be at least 1"),
        ("predict", ("--band", 0.5, 0.1), "band must ascend"),
        ("predict", ("--width", 100, "--heads", 7), "heads must divide width, 100, got 7. Choose"),
        ("predict", ("--tokens", 1, "--band", 0.1, 0.5), "band needs at least 2 tokens"),
        ("predict", ("--integrator", "rk4"), "'rk4' is not one of"),
        ("predict", ("--networks", 5), "No such option"),
        ("predict", ("--config", "c.yaml"), "does not exist"),
        ("predict", ("--plot", "a.jpg"), "a.jpg must end in one of"),
        ("predict", ("--plot", "missing/a.png"), "got missing/a.png (No such file or directory)"),
        ("predict", ("--device", "abacus"), "'abacus' is not a device"),
        ("predict", ("--c-minus", -12, "--width", 144, "--c-plus", -12), "must not both be"),
        ("compare", ("--networks", 3), "networks and paths must be enough"),
        ("compare", ("--heads", 3), "heads must divide width, 128, got 3"),
        ("compare", ("--width", 8, "--heads", 2, "--against", "chain"), "must be at least 16"),
        ("compare", ("--width", 3, "--heads", 1), "at least 4 for networks of 4 tokens"),
        ("compare", ("--head-dim", 0), "head_dim must be at least 1"),
        ("compare", ("--band", 0.1, 0.2), "No such option"),
    ],
)
def test_wrong_flags_are_wrong_usage(command, args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(command, *args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "depth: 3", "config must be a .json or .toml file"),
        ("c.json", b"\xff\xfe", "codec can't decode"),
        ("v0.json", b'{"a": 1}', "v0.json must be a square matrix, got dict"),
        ("v0.json", b"", "v0 must be a whole .json file"),
        ("v0.json", b"\xff\xfe", "v0 must be a whole .json file"),
        ("v0.json", b"[[1, 2], [2]]", "must be a square matrix, got 2 rows, of lengths [2, 1]"),
        ("v0.json", b"[]", "v0.json must be a square matrix"),
        ("v0.json", b"[[1, NaN], [NaN, 1]]", "v0.json must be finite, got nan"),
        ("v0.json", b'[["a", 0], [0, 1]]', "v0.json must be a number, got 'a'"),
        ("v0.json", b"[[true, 0], [0, 1]]", "v0.json must be a number, got True"),
        ("v0.json", b"[[1, 2], [2, 1]]", "v0 must be positive semidefinite"),
        ("v0.json", b"[[1, 0.5], [0.2, 1]]", "v0 must be symmetric"),
        ("v0.npy", b"no array", "v0 must be a whole .npy file"),
        ("v0.npy", b"", "v0 must be a whole .npy file"),
        ("v0.npy", b"PK\x03\x04", "v0 must be a whole .npy file"),
        ("v0.npy", npy(np.eye(4))[:-1], "v0 must be a whole .npy file"),
        ("v0.npy", npy(np.array([[None]])), "Write it with numpy.save"),
        ("v0.npy", npy(np.eye(2) * 1j), "v0.npy must be a number"),
        ("v0.npy", npy(np.full((2, 2), np.nan)), "v0.npy must be finite, got nan"),
        ("v0.npy", npy(np.ones(3)), "v0.npy must be a square matrix"),
        ("v0.npy", npy(np.float64(3)), "v0.npy must be a square matrix"),
        ("v0.txt", b"1", "v0 must be a .npy or .json file"),
    ],
)
def test_a_file_of_another_format_is_wrong_usage(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("predict", "--v0" if name.startswith("v0") else "--config", path)
    assert result.exit_code == 2, result.output
    text = " ".join(result.stderr.split())
    assert message in text
    assert "unsafely" not in text  # numpy.load's advice for a file that is none of its own


@pytest.mark.parametrize("name", ["v0.npy", "v0.json"])
def test_a_start_that_cannot_be_read_is_wrong_usage(name, tmp_path, write):
    for content in (tmp_path / name, tmp_path):  # not there, and a folder
        result = invoke("predict", "--v0", content)
        assert result.exit_code == 2
        assert "'--v0'" in result.stderr
    (tmp_path / name).mkdir()
    for given, reason in ((name, "Is a directory"), (f"no/{name}", "No such file")):
        result = invoke("predict", "--config", write("c.json", {"v0": given}))
        assert result.exit_code == 2, result.output
        text = " ".join(result.stderr.split())
        assert f"v0 must be a file that can be read, got {tmp_path / given} ({reason}" in text


def test_a_file_names_itself_for_its_own_settings_alone(write):
    config = write("c.json", {"depth": 0, "width": 12})
    result = invoke("predict", "--config", config, "--width", 0, "--depth", 3)
    text = " ".join(result.stderr.split())
    assert "Error: width must be at least 1" in text
    assert "c.json" not in text


@pytest.mark.parametrize("command", ["predict", "compare"])
@pytest.mark.parametrize("flag", ["--output", "--plot"])
def test_a_file_that_cannot_be_written_is_found_before_any_work(
    command, flag, tmp_path, monkeypatch
):
    monkeypatch.setattr(prediction, "predict", None)
    monkeypatch.setattr(prediction, "compare_networks", None)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    (tmp_path / "kept.png").write_text("before")
    (tmp_path / "kept.png").chmod(0o444)
    files = []
    if not os.access(closed, os.W_OK):
        files += [closed / "a.png"]
        if flag == "--output":
            files += [tmp_path / "kept.png"]
    if os.path.exists("/proc/self"):  # there root cannot write either
        files += ["/proc/a.png"]
    for path in files:
        result = invoke(command, flag, path)
        assert result.exit_code == 2, result.output
        text = " ".join(result.stderr.split())
        assert f"{flag} must be a file that can be written, got {path} (" in text
    assert (tmp_path / "kept.png").read_text() == "before"


# ----------------------------------------------------------------------------------- predict


def test_the_numbers_are_those_of_the_process():
    found = predict("--no-tune", "--tau0", 0.5, "--seed", 7)
    assert set(found) == PREDICTED
    generator = torch.Generator().manual_seed(7)
    sde = CovarianceSDE(width=16, tau0=0.5, **BLOCK)
    sample = sde.sample(equicorrelated(3, 0.2), 0.25, 64, 16, generator)
    assert found["times"] == sample.times.tolist() == [0, 1 / 16, 2 / 16, 3 / 16, 4 / 16]
    assert found["layers"] == [0, 1, 2, 3, 4]
    assert list(found["quantiles"]) == STATISTICS
    expected = sample.statistics()
    pairs = [expected[name] for name in ("rho_12", "rho_13", "rho_23")]
    expected["mean_correlation"] = torch.stack(pairs).mean(0)
    for name in STATISTICS:
        values, errors = (found["quantiles"][name][key] for key in ("values", "standard_errors"))
        levels = (0.05, 0.5, 0.95)
        torch.testing.assert_close(
            torch.tensor(values), quantile(expected[name], levels), check_dtype=False
        )
        torch.testing.assert_close(
            torch.tensor(errors), quantile_error(expected[name], levels), check_dtype=False
        )
    assert found["blow_up"] == sample.exploded_fraction()._asdict()
    assert found["tuning"] is None
    assert (found["paths"], found["requested"], found["is_complete"]) == (64, 64, True)


def test_blow_up_and_collapse_are_told_apart():
    # Steps as coarse as these throw paths out at both ends.
    options = ("--no-tune", "--integrator", "euler_maruyama", "--branch-gain", 1, "--steps", 16)
    options += ("--depth", 64, "--tau0", 0.3, "--paths", 400, "--seed", 1)
    found = predict(*options)
    sde = CovarianceSDE(width=16, tau0=0.3, branch_gain=1.0, **BLOCK)
    generator = torch.Generator().manual_seed(1)
    sample = sde.sample(
        equicorrelated(3, 0.2), 4.0, 400, 16, generator, integrator="euler_maruyama"
    )
    exploded, stopped = sample.exploded_fraction().value, sample.stopped_fraction().value
    assert 0 < exploded < stopped
    assert found["blow_up"]["value"] == exploded
    assert found["collapse"]["value"] == pytest.approx(stopped - exploded)
    assert found["collapse"]["standard_error"] > 0
    text = invoke("predict", *SMALL, *options).stdout
    for name in ("blow_up", "collapse"):
        shown = format_estimate(Estimate(**found[name]))
        assert f"Probability of {name.replace('_', '-'):8}  {shown}" in text


def test_the_table_shows_the_numbers_of_the_json():
    found = predict("--no-tune", "--depth", 16)
    text = invoke("predict", *SMALL, "--no-tune", "--depth", 16).stdout
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +[\d.]+ ", line)]
    assert [row[0] for row in rows] == ["0", "4", "8", "12", "16"]
    shown = ["mean_correlation", "rho_12", "V_11"]
    for row in rows:
        index = found["layers"].index(int(row[0]))
        assert float(row[1]) == found["times"][index]
        values = [value for name in shown for value in found["quantiles"][name]["values"][index]]
        assert [float(cell) for cell in row[2:]] == pytest.approx(values, abs=5.01e-4)
    for word in ("Probability of blow-up", "Probability of collapse", "±", "Assumed:"):
        assert word in text
    for line in found["assumptions"]:
        assert line in text
    assert max(len(line) for line in text.split("Assumed:")[0].splitlines()) <= 80


@pytest.mark.parametrize(
    ("tokens", "headers"),
    [(1, ["V_11"]), (2, ["rho_12", "V_11"]), (10, ["mean", "rho", "rho_1_2", "V_1_1"])],
)
def test_the_table_fits_the_number_of_tokens(tokens, headers):
    result = invoke(
        *("predict", *SMALL, "--width", 32, "--tokens", tokens, "--no-tune", "--paths", 8)
    )
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.strip().startswith("depth"))
    assert line.split()[1:] == headers


def test_one_token_is_not_tuned():
    result = invoke("predict", *SMALL, "--tokens", 1)
    assert result.exit_code == 0
    assert "one token has no correlation" in result.stdout


def test_the_tuning_is_in_words_and_in_numbers():
    options = ("--band", 0.19, 0.21, "--paths", 256, "--seed", 2)
    tuning = predict(*options)["tuning"]
    assert tuning["band"] == [0.19, 0.21]
    assert (tuning["time"], tuning["seed"], tuning["is_complete"]) == (0.25, 2, True)
    gains = tuning["branch_gain"]
    assert gains["is_found"]
    low, high = (gains[end]["candidate"]["branch_gain"] for end in ("low", "high"))
    assert low == 0.05
    assert gains["low"]["is_search_limit"]
    assert 0.05 <= high < 1
    assert gains["high"]["outside"] == pytest.approx(high + 0.01)
    text = invoke("predict", *SMALL, *options).stdout
    assert "in [0.19, 0.21] at the last layer" in text
    assert f"branch gain: from {low:g} to {high:g}, at tau0 1" in text
    assert f"at {low:g}: median" in text
    assert "bounded by the search range" in text
    assert "tau0" in tuning


def estimate(value):
    return Estimate(value, 0.0123)


def interval(parameter, low=None, high=None, values=(0.05, 1.0), is_complete=True):
    tried = tuple(
        Candidate(
            **{"branch_gain": 0.5, "tau0": 2.0, parameter: value},
            correlation=estimate(0.1 * value),
            blow_up=estimate(0.0),
        )
        for value in values
    )
    ends = [
        None if end is None else End(tried[values.index(end[0])], *end[1:]) for end in (low, high)
    ]
    nearest = tried[-1] if tried else None
    return Interval(parameter, *ends, (0.05, 1.0), 0.01, tried, nearest, is_complete)


@pytest.mark.parametrize(
    ("first", "second", "is_complete", "lines"),
    [
        (
            interval("branch_gain", (0.05, None, True), (1.0, None, True)),
            None,
            True,
            [
                "branch gain: from 0.05 to 1, at tau0 2",
                "at 0.05: median 0.005 ± 0.012, blow-up 0 ± 0.012; bounded by the search range",
                "tau0: has no effect without attention",
            ],
        ),
        (
            interval("branch_gain"),
            interval("tau0", (1.0, 0.9, False), (1.0, 1.1, False)),
            True,
            [
                "branch gain: no value from 0.05 to 1 does; nearest:",
                "at 1: median 0.100 ± 0.012",
                "tau0: from 1 to 1, at branch gain 0.5",
            ],
        ),
        (
            interval("branch_gain", (0.05, None, True), (1.0, None, False), is_complete=False),
            None,
            False,
            ["blow-up 0 ± 0.012; interrupted there", "tau0: not searched: interrupted"],
        ),
        (
            interval("branch_gain", (0.05, 0.04, False), (0.05, 0.2, False), is_complete=False),
            None,
            False,
            ["from 0.05 to 0.05", "0.04 is outside, between them interrupted"],
        ),
        (
            interval("branch_gain", is_complete=False),
            interval("tau0", values=(), is_complete=False),
            False,
            [
                "interrupted; none of the 2 values tried does; nearest:",
                "tau0: interrupted before the first value was tried",
            ],
        ),
    ],
)
def test_every_outcome_of_the_tuning_has_its_words(first, second, is_complete, lines):
    tuning = Tuning(first, second, (0.1, 0.3), 1.0, 5, 6, 0, is_complete)
    text = "\n".join(tuning_lines(tuning))
    for line in lines:
        assert line in text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0066, 0.00131, "0.0066 ± 0.0013"),
        (0.0, 0.00017, "0 ± 0.00017"),
        (1234.5, 56.7, "1234 ± 57"),
        (0.2, 0.0, "0.2 ± 0"),
        (float("nan"), float("nan"), "nan ± nan"),
    ],
)
def test_an_estimate_is_written_to_the_digits_of_its_error(value, error, text):
    assert format_estimate(Estimate(value, error)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.123456, "0.123"), (-99.5, "-99.500"), (1234.5, "1.2e3"), (2e-4, "2.0e-4")],
)
def test_a_number_is_short(value, text):
    assert format_number(value) == text


def test_files_are_written(tmp_path):
    plot, output = tmp_path / "p.svg", tmp_path / "p.json"
    result = invoke("predict", *SMALL, "--no-tune", "--plot", plot, "--output", output)
    assert result.exit_code == 0, result.output
    assert f"Plot: {plot}" in result.stdout
    assert f"Numbers: {output}" in result.stdout
    assert "<svg" in plot.read_text()
    written = json.loads(output.read_text())
    assert set(written) == PREDICTED
    again = invoke("predict", *SMALL, "--no-tune", "--plot", plot, "--output", output, "--json")
    assert json.loads(again.stdout)["quantiles"] == written["quantiles"]  # and nothing but JSON
    assert f"Plot: {plot}" in again.stderr


def test_a_file_that_cannot_be_written_does_not_cost_the_result(tmp_path):
    (tmp_path / "folder.png").mkdir()
    result = invoke("predict", *SMALL, "--no-tune", "--plot", tmp_path / "folder.png")
    assert result.exit_code == 2
    assert "directory" in result.stderr
    output = tmp_path / "full.json"
    output.symlink_to("/dev/full")
    result = invoke("predict", *SMALL, "--no-tune", "--output", output)
    assert result.exit_code == 1
    assert "Probability of blow-up" in result.stdout
    assert "No space left" in result.stderr


def test_progress_goes_to_stderr_and_a_busy_cpu_gets_one_thread(monkeypatch):
    seen = []
    threads = torch.get_num_threads()

    def predict(settings, *, device, on_progress, stop):
        for phase, done, total in (("paths", 1, 2), ("paths", 2, 2), ("tuning", 1, 9)):
            on_progress(phase, done, total)
            seen.append((stop(), torch.get_num_threads()))
        return Settings(depth=2, width=8, tokens=2, paths=8, steps=8)

    monkeypatch.setattr(prediction, "predict", predict)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    torch.set_num_threads(2)
    try:
        result = invoke("predict", *SMALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert isinstance(result.exception, AttributeError)  # not a prediction
    assert seen == [(False, 1)] * 3
    assert "paths" in result.stderr
    assert "tuning" in result.stderr
    assert result.stdout == ""


# ------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(prediction._CHUNK, "cpu", 16)


def test_an_interrupt_keeps_the_paths_that_are_done(monkeypatch, small_chunks, tmp_path):
    interrupt_after(monkeypatch, CovarianceSDE, calls=1)
    plot, output = tmp_path / "p.png", tmp_path / "p.json"
    result = invoke("predict", *SMALL, "--plot", plot, "--output", output)
    assert result.exit_code == 130, result.output
    assert "32 of 64 paths" in result.stdout
    assert "Probability of blow-up" in result.stdout
    assert "partial" in result.stderr
    found = json.loads(output.read_text())
    assert (found["paths"], found["requested"], found["is_complete"]) == (32, 64, False)
    assert found["tuning"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_before_the_first_paths_prints_what_there_is(monkeypatch, tmp_path):
    # One chunk of all paths: none of them is done.
    interrupt_after(monkeypatch, CovarianceSDE, calls=1)
    plot = tmp_path / "p.png"
    result = invoke("predict", *SMALL, "--json", "--plot", plot)
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout)
    assert (found["paths"], found["is_complete"]) == (0, False)
    assert found["quantiles"] == {}
    assert found["blow_up"] is found["collapse"] is None
    assert not plot.exists()


def test_an_interrupt_of_the_tuning_keeps_what_was_tried(monkeypatch):
    interrupt_after(monkeypatch, CovarianceSDE, calls=5)
    result = invoke("predict", *SMALL, "--json", "--band", -0.5, 1)
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout)
    assert found["paths"] == 64
    assert found["is_complete"] is False
    tuning = found["tuning"]
    assert tuning["is_complete"] is False
    assert tuning["tau0"] is None
    tried = [candidate["branch_gain"] for candidate in tuning["branch_gain"]["candidates"]]
    assert tried == [0.05, 0.15, 0.25]  # after the prediction itself; the fifth call is dropped
    assert tuning["branch_gain"]["high"]["candidate"]["branch_gain"] == 0.25


def test_a_second_interrupt_ends_the_command(monkeypatch):
    def sample(self, *args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CovarianceSDE, "sample", sample)
    monkeypatch.setattr(sys, "argv", ["shaped-attn", "predict", *SMALL])
    monkeypatch.setattr(common, "is_program", False)
    with pytest.raises(SystemExit) as error:
        commands.main()
    assert error.value.code == 130


# ------------------------------------------------------------------------------------- compare


def test_a_comparison_has_both_sides():
    result = invoke("compare", *NETWORKS, "--json", "--seed", 5)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {
        "model",
        "settings",
        "time",
        "is_complete",
        "agrees",
        "prediction",
        "networks",
        "comparison",
        "assumptions",
        "versions",
        "device",
        "seconds",
    }
    assert found["agrees"] is True
    assert (found["prediction"]["source"], found["networks"]["source"]) == ("sde", "chain")
    assert (found["prediction"]["paths"], found["networks"]["paths"]) == (64, 40)
    comparison = found["comparison"]
    assert list(comparison["statistics"]) == ["rho_12", "rho_13", "rho_23", "V_11", "V_22", "V_33"]
    assert comparison["paths"] == [64, 40]
    assert comparison["level"] == 0.01
    sides = (found["prediction"], found["networks"])
    for name in ("rho_12", "V_11"):
        medians = [side["quantiles"][name]["values"][-1][1] for side in sides]
        compared = [pair[1] for pair in comparison["statistics"][name]["quantiles"]]
        assert compared == pytest.approx(medians)


def test_the_networks_are_those_of_the_settings():
    options = ("--head-dim", 2, "--out-proj", "gaussian", "--heads", 2, "--tau0", 0.5)
    result = invoke("compare", *NETWORKS, "--json", "--seed", 5, *options)
    found = json.loads(result.stdout)["networks"]
    network = FiniteNetwork(
        width=16, depth=4, head_dim=2, out_proj="gaussian", heads=2, tau0=0.5, **BLOCK
    )
    generator = torch.Generator().manual_seed(6)
    sample = network.sample(equicorrelated(3, 0.2), 40, generator, method="chain")
    expected = quantile(sample.statistics()["rho_13"], (0.05, 0.5, 0.95))
    values = torch.tensor(found["quantiles"]["rho_13"]["values"], dtype=torch.float64)
    torch.testing.assert_close(values, expected)


def test_the_comparison_table_shows_the_numbers_of_the_json(tmp_path):
    output, plot = tmp_path / "c.json", tmp_path / "c.pdf"
    result = invoke("compare", *NETWORKS, "--seed", 5, "--output", output, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"%PDF")
    found = json.loads(output.read_text())["comparison"]
    for name, statistic in found["statistics"].items():
        (row,) = [
            line.split() for line in result.stdout.splitlines() if line.startswith(f"{name} ")
        ]
        assert row[-1] == "ok"
        assert [float(cell) for cell in row[1:3]] == pytest.approx(
            [statistic["ks"], statistic["critical"]], abs=5.01e-4
        )
        for place, side in ((3, 0), (6, 1)):
            median, error = statistic["quantiles"][side][1], statistic["quantile_errors"][side][1]
            assert float(row[place]) == pytest.approx(median, abs=0.06 * error)
            assert float(row[place + 2]) == pytest.approx(error, rel=0.06)
    assert "Stopped  SDE 0 ± " in result.stdout
    assert "Agree" in result.stdout
    assert found["largest"] in result.stdout.split("Agree")[1].split(";")[1]


def test_networks_of_another_law_disagree(monkeypatch):
    network = Settings.network

    def wrong(self):
        return type(network(self))(width=16, depth=4, branch_gain=0.9)

    monkeypatch.setattr(Settings, "network", wrong)
    result = invoke("compare", *NETWORKS, "--networks", 200, "--paths", 500)
    assert result.exit_code == 1, result.output
    assert "Disagree" in result.stdout
    assert "differs" in result.stdout


def test_real_networks_run():
    result = invoke("compare", *SMALL, "--networks", 40, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["networks"]["source"] == "network"
    assert found["networks"]["paths"] == 40


def test_many_tokens_show_the_largest_distances():
    result = invoke("compare", *NETWORKS, "--width", 32, "--tokens", 7)
    assert result.exit_code == 0, result.output
    assert "The 21 of 28 statistics with the largest KS distance" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.endswith(" ok")]
    distances = [float(row[1]) for row in rows]
    assert len(rows) == 21
    assert distances == sorted(distances, reverse=True)


def test_an_interrupt_keeps_the_networks_that_are_done(monkeypatch, tmp_path):
    from shaped_attn.sde import network

    monkeypatch.setattr(network, "_CHAIN_PATHS", 10)
    interrupt_after(monkeypatch, FiniteNetwork, calls=1)
    output = tmp_path / "c.json"
    result = invoke("compare", *NETWORKS, "--output", output)
    assert result.exit_code == 130, result.output
    assert "64 paths of the SDE, 20 of 40 chains" in result.stdout
    assert "critical" in result.stdout
    found = json.loads(output.read_text())
    assert found["is_complete"] is False
    assert found["comparison"]["paths"] == [64, 20]
    assert found["comparison"]["requested"] == [64, 40]


def test_too_few_networks_do_not_agree(monkeypatch):
    from shaped_attn.sde import network

    monkeypatch.setattr(network, "_CHAIN_PATHS", 2)
    sample, done = FiniteNetwork.sample, []

    def interrupted(self, *args, on_progress=None, **options):
        def count(steps, total):
            done.append(steps)
            if len(done) == 5:  # the first two networks have four layers each
                os.kill(os.getpid(), signal.SIGINT)

        return sample(self, *args, on_progress=count, **options)

    monkeypatch.setattr(FiniteNetwork, "sample", interrupted)
    for args in (NETWORKS, (*NETWORKS, "--json")):
        done.clear()
        result = invoke("compare", *args)
        assert result.exit_code == 130, result.output
        if "--json" in args:
            found = json.loads(result.stdout)
            assert found["networks"]["paths"] == 2
            assert found["agrees"] is None
        else:
            assert "Too few to tell" in result.stdout


def test_an_interrupt_before_the_networks_keeps_the_prediction(monkeypatch, small_chunks):
    interrupt_after(monkeypatch, CovarianceSDE, calls=1)
    result = invoke("compare", *NETWORKS, "--json")
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout)
    assert found["prediction"]["paths"] == 32
    assert found["networks"] is found["comparison"] is found["agrees"] is None


def test_an_interrupt_before_the_first_network_compares_nothing(monkeypatch, tmp_path):
    interrupt_after(monkeypatch, FiniteNetwork, calls=1)
    plot = tmp_path / "c.png"
    result = invoke("compare", *NETWORKS, "--plot", plot)
    assert result.exit_code == 130, result.output
    assert "0 of 40 chains" in result.stdout
    assert "critical" not in result.stdout
    assert plot.exists()  # the prediction


def test_a_prediction_without_its_tuning_is_not_complete():
    for tune, tokens, is_complete in ((True, 3, False), (False, 3, True), (True, 1, True)):
        settings = Settings(depth=2, width=16, tokens=tokens, paths=8, tune=tune)
        sample = settings.sde().sample(settings.start(), settings.time, 8, settings.steps)
        found = prediction.Prediction(settings, sample, None, "cpu", 0.0)
        assert found.is_complete is is_complete
