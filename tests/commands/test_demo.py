"""The demo: that its page shows what was measured, and that nothing measured is ever lost."""

import json
import math
import os
import re
import signal
import sys
from html.parser import HTMLParser
from itertools import chain, count
from types import SimpleNamespace

import pytest
import tiny_training
import torch
from command_line import invoke

from shaped_attn import fidelity, shaped_attention
from shaped_attn.commands import common, demo
from shaped_attn.nn import ShapedTransformer, ShapedTransformerConfig
from shaped_attn.sde import prediction
from shaped_attn.train import trainer
from shaped_attn.train.settings import TrainSettings

TINY = {
    "CHECK": {**demo.CHECK, "logit_stds": (0.1, 1.0)},
    "CPU_LENGTH": 16,
    "MODEL": {"depth": 3, "width": 16, "heads": 2, "mlp_ratio": 1.0},
    "TOKENS": 6,
    "NETWORKS": 3,
    "COVARIANCE": {"depth": 12, "width": 12, "paths": 64, "networks": 40},
    "TRAINING": {
        **{**demo.TRAINING, "context": 16, "batch_size": 4, "data_bytes": 200_000},
        **{"evaluation_windows": 6, "learning_rate": 1e-2},
    },
    "VALIDATIONS": 4,
}
ORDER = list(demo.PARTS)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch, tiny_training.one_thread():
        for name, value in TINY.items():
            patch.setattr(demo, name, value)
        patch.setattr(common, "default_impls", lambda device: ("torch",))
        yield


def run(output, *arguments):
    """Run the command; return its result, the metrics by part, and the page."""
    result = invoke("demo", "--output", output, "--device", "cpu", *arguments)
    metrics = json.loads((output / demo.METRICS).read_text(encoding="utf-8"))
    return result, metrics["parts"], Reader((output / demo.PAGE).read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Tags, words and identifiers of a page whose tags are all closed."""

    VOID = frozenset({"meta", "path", "use", "rect", "clipPath"})

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.open, words = text, [], [], []
        self.handle_data = words.append
        self.feed(text)
        self.close()
        assert self.open == []
        self.words = " ".join("".join(words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run(output, "--steps", "8", "--seed", "3")


def test_a_whole_run_succeeds_and_says_what_it_found(finished):
    result, parts, _ = finished
    assert result.exit_code == 0, result.output
    assert [part["status"] for part in parts.values()] == ["done"] * 4
    for part in parts.values():
        assert f"{' '.join(part['headline'])}: {part['claim']}" in result.stdout
    assert demo.PAGE in result.stdout and demo.METRICS in result.stdout


def test_the_metrics_are_those_of_the_parts(finished):
    _, parts, _ = finished
    report = fidelity.measure(("torch",), length=16, seed=3, **demo.CHECK).to_dict()
    assert parts["centred_term"]["measurements"] == json.loads(json.dumps(report))["measurements"]
    assert parts["centred_term"]["failures"] == 0

    found = prediction.compare_networks(prediction.Settings(**demo.COVARIANCE, seed=3))
    assert parts["covariance"]["comparison"] == found.to_dict()["comparison"]

    settings = parts["training"]["settings"]
    for name, method in demo.METHODS.items():
        model = trainer.build(TrainSettings(**{**settings, "method": method}))
        assert model.config.has_skip is model.config.has_normalization is False
        run = parts["training"]["runs"][name]
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
        assert [step for step, _ in run["validation"]] == [0, 2, 4, 6, 8]
        assert parts["training"]["losses"][name] == run["validation"][-1][1]
        assert len(run["batches"]) == 8
    assert parts["training"]["compared_step"] == 8


@pytest.mark.parametrize("name", ["E-SPA, no skips", "softmax, no skips", "shaped"])
def test_the_distance_of_tokens_is_that_of_the_decoders(finished, name):
    found = []
    for seed in (3, 4, 5):
        config = {**demo.MODEL, **demo.DECODERS[name]}
        torch.manual_seed(seed)
        model = ShapedTransformer(
            ShapedTransformerConfig(vocab_size=256, head=None, **config), dtype=torch.float64
        )
        with torch.no_grad():
            x = model(torch.randperm(256)[None, :6]).hidden_states[0]
        rho = torch.corrcoef(torch.cat((x, -x), dim=1))  # whose rows have the mean 0
        found.append(1 - (rho.sum() - 6) / 30)
    value = finished[1]["tokens"]["one_minus_rho"][name][-1][1]
    # rho has the rounding of sums of 16 products; what is left of 1 has the same.
    assert value == pytest.approx(float(torch.stack(found).median()), rel=1e-9, abs=1e-13)


def test_the_page_shows_the_numbers_of_the_metrics(finished):
    _, parts, page = finished
    for part in parts.values():
        number, beside = part["headline"]
        claim = demo._prose(part["claim"])
        assert page.words.count(f"{number} {beside}") == 2  # the tile, and its section
        assert page.words.count(claim) == 2
    for m in parts["centred_term"]["measurements"]:
        assert fidelity.format_error(m["error"]) in page.words
    for values in parts["tokens"]["one_minus_rho"].values():
        assert f" {demo._distance(values[-1][1])}" in page.words
    for name, loss in parts["training"]["losses"].items():
        start = parts["training"]["runs"][name]["validation"][0][1]
        assert f"{name} {start:.3f} {loss:.3f} 8 of 8" in page.words
    for name, statistic in parts["covariance"]["comparison"]["statistics"].items():
        numbers = (*(x[1] for x in statistic["quantiles"]), statistic["ks"], statistic["critical"])
        shown = " ".join(f"{x:.3f}" for x in numbers)
        assert f"{name.replace('rho', 'ρ').replace('_', '')} {shown}" in page.words
    assert "Interrupted" not in page.words and "Failed" not in page.words
    assert "demo --steps 8 --seed 3" in page.words


def test_the_page_needs_no_network_and_reads_well_without_eyes(finished):
    _, _, page = finished
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert not re.search(r"url\((?!#)|@import|(href|src)=\"(?!#)", page.text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#centred_term")[1:] in ids
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("svg")) == 4 + 5
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))


def press(monkeypatch, phase, times=1):
    """Press Ctrl-C once this work has begun."""
    long_work, left = common.long_work, [None] * times

    class Pressing:
        def __init__(self, device):
            self.inner = long_work(device)

        def __enter__(self):
            asked = self.inner.__enter__()

            def on_progress(name, done, total):
                asked["on_progress"](name, done, total)
                if name.startswith(phase) and left:
                    left.pop()
                    os.kill(os.getpid(), signal.SIGINT)

            return {**asked, "on_progress": on_progress}

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(common, "long_work", Pressing)


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("error", "centred_term"),
        ("tokens", "tokens"),
        ("paths", "covariance"),
        ("networks", "covariance"),
        ("training, E-SPA", "training"),
        ("training, softmax", "training"),
    ],
)
def test_ctrl_c_in_any_part_writes_the_page_with_what_there_is(tmp_path, monkeypatch, phase, name):
    press(monkeypatch, phase)
    result, parts, page = run(tmp_path, "--steps", "40")
    assert result.exit_code == 130, result.output
    index = ORDER.index(name)
    expected = ["done"] * index + ["interrupted"] + ["not run"] * (3 - index)
    assert [parts[name]["status"] for name in ORDER] == expected
    assert f"Interrupted. {parts[name]['reason']}" in page.words
    assert parts[name]["reason"] in result.stdout
    for done in ORDER[:index]:
        assert demo._prose(parts[done]["claim"]) in page.words
    if phase == "tokens":
        assert parts["tokens"]["settings"]["networks"] == 1 and "after 1 of 3" in page.words
    if phase == "training, softmax":
        assert parts["training"]["runs"]["E-SPA"]["step"] == 40
        assert parts["training"]["compared_step"] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def only(monkeypatch, **parts):
    """Leave out all parts but these."""
    fakes = {name: lambda work: demo.Part() for name in ORDER}
    monkeypatch.setattr(demo, "PARTS", {**fakes, **parts})


def test_a_second_ctrl_c_leaves_the_parts_before(tmp_path, monkeypatch):
    def interrupted(work):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    only(monkeypatch, centred_term=demo.measure_centred_term, tokens=interrupted)
    result, parts, _ = run(tmp_path)
    assert result.exit_code == 1 and "Aborted" in result.output
    assert parts["centred_term"]["status"] == "done"
    assert parts["tokens"]["status"] == "not run"


def test_a_part_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    def failing(work):
        raise RuntimeError("<b>boom</b> & more")

    only(monkeypatch, centred_term=failing, tokens=demo.follow_tokens)
    result, parts, page = run(tmp_path)
    assert result.exit_code == 1
    assert "Failed. RuntimeError: <b>boom</b> & more" in page.words
    assert "<b>boom" not in page.text
    assert "in failing" in parts["centred_term"]["traceback"]
    assert parts["tokens"]["status"] == "done" and parts["tokens"]["headline"]


def test_training_without_its_packages_says_how_to_get_them(tmp_path, monkeypatch):
    only(monkeypatch, training=demo.train_pair)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result, parts, page = run(tmp_path)
    assert result.exit_code == 1
    assert 'pip install "shaped-attn[train]"' in parts["training"]["reason"]
    assert 'pip install "shaped-attn[train]"' in page.words


@pytest.mark.parametrize(("factor", "shown"), [(1.05, "0.05"), (math.nan, "nan")])
def test_errors_beyond_their_budget_are_counted_and_red(tmp_path, monkeypatch, factor, shown):
    def wrong(*args, **kwargs):
        return factor * shaped_attention(*args, **kwargs)

    only(monkeypatch, centred_term=demo.measure_centred_term)
    monkeypatch.setitem(fidelity.measure.__kwdefaults__, "attention", wrong)
    result, parts, page = run(tmp_path)
    assert result.exit_code == 1
    assert parts["centred_term"]["failures"] > 0
    red = [attributes for attributes in page.all("td") if attributes.get("class") == "bad"]
    assert len(red) == parts["centred_term"]["failures"] + 2  # the centred term is in two tables
    assert f'impl="torch" {shown}' in page.words
    assert f"{parts['centred_term']['failures']} of 24 errors exceed their budget" in page.words


def test_training_that_diverges_is_shown_as_such(tmp_path, monkeypatch):
    only(monkeypatch, training=demo.train_pair)
    monkeypatch.setattr(demo, "TRAINING", {**demo.TRAINING, "learning_rate": 1e30, "clip_norm": 0})
    result, parts, page = run(tmp_path, "--steps", "12")
    assert result.exit_code == 0, result.output
    assert {run["status"] for run in parts["training"]["runs"].values()} == {"diverged"}
    assert parts["training"]["headline"] == ["diverged", "instead of diverged"]
    assert page.words.count("diverged after") == 2


def test_the_time_limit_ends_both_after_the_same_step(tmp_path, monkeypatch):
    only(monkeypatch, training=demo.train_pair)
    # A clock that is asked before every step, and goes slower after the first run.
    ticks = chain(range(28), count(28, 0.5))
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=ticks.__next__))
    result, parts, page = run(tmp_path, "--steps", "40", "--seconds", "50")
    assert result.exit_code == 0, result.output
    runs = parts["training"]["runs"].values()
    assert len({run["step"] for run in runs}) == 1 and 10 <= next(iter(runs))["step"] < 30
    assert parts["training"]["compared_step"] in (10, 20)
    assert "The limit of 50 s ended it" in page.words
    assert f"after {parts['training']['compared_step']} steps" in page.words


def test_an_output_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch):
    only(monkeypatch, centred_term=lambda work: pytest.fail("work was done"))
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--output", tmp_path / "file" / "folder")
    assert result.exit_code == 1
    assert "output must be a folder that can be written" in result.stderr


def test_a_page_that_cannot_be_written_is_an_error_without_a_traceback(tmp_path, monkeypatch):
    only(monkeypatch)
    (tmp_path / demo.PAGE).mkdir()
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path} cannot be written" in result.stderr
    assert (tmp_path / demo.METRICS).exists()
