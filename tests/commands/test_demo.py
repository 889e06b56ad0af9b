import base64
import io
import json
import math
import os
import re
import signal
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imread
from rich.console import Console

from shaped_attn import commands, fidelity, interrupt
from shaped_attn.commands import demo
from shaped_attn.demo import covariance, figures, page, run, training
from shaped_attn.demo.model import Decoder, ModelConfig
from shaped_attn.commands.common import format_number
from shaped_attn.train.data import load_standard_library

TINY_MODEL = ModelConfig(layers=2, width=32, heads=2, length=32)
TINY_TRAINING = training.TrainingConfig(
    batch=4, learning_rate=1e-2, evaluations=3, validation_windows=6
)
TINY_COVARIANCE = covariance.CovarianceConfig(
    width=12, depth=12, paths=64, networks=40, plain_networks=12, network_chunk=10
)


def settings(device, output, **changes):
    base = run.Settings(
        output=output,
        device=device,
        command="shaped-attn demo --steps 40 <&>",
        check_impls=("torch",),
        steps=40,
        model=TINY_MODEL,
        training=TINY_TRAINING,
        covariance=TINY_COVARIANCE,
        corpus_bytes=200_000,
        logit_stds=(0.1, 1.0),
        check_length=16,
        sample_bytes=20,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def corpus():
    return load_standard_library(max_bytes=200_000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, device):
    """One whole run: its result, its page and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    result = run.run(settings(device, output), console)
    return result, output, console.file.getvalue()


# The models


def test_shaped_and_plain_start_from_the_same_weights(device):
    shaped = training.build(TINY_MODEL, 3, device)
    plain = training.build(replace(TINY_MODEL, attention="plain"), 3, device)
    state = shaped.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, state.pop(name)), name
    assert len(state) == 3 * TINY_MODEL.layers
    assert all(name.endswith("_gain") and (gain == 1).all() for name, gain in state.items())


def test_attention_starts_as_identity_or_as_average(device):
    tokens = torch.arange(16, device=device)
    lower = torch.ones(16, 16).tril()
    for attention, expected in (
        ("shaped", torch.eye(16)),
        ("plain", lower / lower.sum(1, keepdim=True)),
    ):
        model = training.build(replace(TINY_MODEL, attention=attention), 0, device)
        maps = model.attention_maps(tokens)
        assert maps.shape == (2, 2, 16, 16)
        torch.testing.assert_close(maps, expected.expand_as(maps), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["shaped", "plain"])
def test_pictures_are_the_matrices_of_the_formula(attention, device):
    model = training.build(replace(TINY_MODEL, attention=attention), 0, device)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the start, where logits are zero
            parameter += 0.3 * torch.randn(parameter.shape).to(device)
    tokens = torch.randint(256, (24,)).to(device)
    maps = model.attention_maps(tokens)

    first = model.blocks[0]
    with torch.no_grad():
        q, k, _ = first.attention.project(first.attention_norm(model.embedding(tokens[None])))
    logits = (q @ k.mT)[0].double().cpu() / math.sqrt(TINY_MODEL.head_dim)
    hidden = torch.ones(24, 24).triu(1).bool()
    lower = (~hidden).double()
    softmax = logits.masked_fill(hidden, -math.inf).softmax(-1)
    average = lower / lower.sum(1, keepdim=True)
    identity, scale, center = 0.0, 1.0, 0.0
    if attention == "shaped":
        gains = first.attention
        identity, scale, center = (
            gain.detach().double().cpu()[:, None, None]
            for gain in (gains.identity_gain, gains.softmax_gain, gains.center_gain)
        )
    expected = identity * torch.eye(24) + scale * softmax - center * average
    tolerance = 1e-2 if device.type == "cuda" else 1e-5
    torch.testing.assert_close(maps[0].double(), expected, atol=tolerance, rtol=0)
    assert maps[0].abs().sum() > 1


def test_a_decoder_does_not_see_the_future(device):
    model = training.build(TINY_MODEL, 0, device)
    with torch.no_grad():
        model.blocks[0].attention.query_key_value.weight.normal_()
        tokens = torch.randint(256, (1, 20)).to(device)
        changed = tokens.clone()
        changed[0, 12:] = (changed[0, 12:] + 1) % 256
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :12], after[0, :12])
    assert not torch.allclose(before[0, 12:], after[0, 12:])


def test_generation_follows_the_generator_and_goes_past_the_context(device):
    model = training.build(TINY_MODEL, 0, device)
    prompt = torch.tensor(list(b"def "))
    texts = [model.generate(prompt, 40, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 40 > TINY_MODEL.length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "linear"}, 'attention must be "shaped" or "plain", got \'linear\''),
        ({"width": 36, "heads": 4}, "multiple of 2 \\* heads.*width=36, heads=4"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


# Training


def train(device, corpus, steps=6, **options):
    models = {
        name: training.build(replace(TINY_MODEL, attention=name), 0, device)
        for name in ("shaped", "plain")
    }
    return training.train(models, corpus, TINY_TRAINING, device, steps, **options)


def test_training_is_reproducible_and_gives_every_model_the_same_batches(corpus, device):
    first, second = train(device, corpus), train(device, corpus)
    for name in ("shaped", "plain"):
        assert first.runs[name].train_loss == pytest.approx(second.runs[name].train_loss, rel=1e-4)
        assert [step for step, _ in first.runs[name].validation] == [0, 2, 4, 6]
    # Two models of the same kind and start see the same data: their losses agree.
    twins = {name: training.build(TINY_MODEL, 0, device) for name in ("one", "two")}
    runs = training.train(twins, corpus, TINY_TRAINING, device, 3).runs
    assert runs["one"].train_loss == pytest.approx(runs["two"].train_loss, rel=1e-4)
    assert training.paired_difference(runs["one"], runs["two"])[0] == pytest.approx(0, abs=1e-4)


def test_training_moves_the_gains_of_the_shaped_model_only(corpus, device):
    runs = train(device, corpus).runs
    gains = runs["shaped"].model.learned_gains()
    assert len(gains) == TINY_MODEL.layers
    for layer in gains:
        for name, by_head in layer.items():
            assert len(by_head) == TINY_MODEL.heads
            assert all(gain != 1.0 and abs(gain - 1) < 0.5 for gain in by_head), name
    assert runs["plain"].model.learned_gains() == []


def test_a_stop_request_ends_all_models_at_the_same_step(corpus, device):
    stop = interrupt.StopRequest()

    def on_progress(progress):
        stop.is_set = progress.step == 3

    result = train(device, corpus, stop=stop, on_progress=on_progress)
    assert result.stopped == "interrupt"
    assert result.steps == 3
    assert {len(run.train_loss) for run in result.runs.values()} == {3}
    assert {run.validation[-1][0] for run in result.runs.values()} == {3}


def test_the_time_limit_ends_training(corpus, device):
    result = train(device, corpus, time_limit=0.0)
    assert (result.stopped, result.steps) == ("time limit", 0)


def test_the_first_interrupt_is_a_request_and_the_second_an_exception():
    with interrupt.stop_on_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_learning_rate_warms_up_and_decays():
    trainee = training._Trainee(Decoder(TINY_MODEL), training.TrainingConfig(), steps=100)
    rates = []
    for _ in range(101):
        rates.append(trainee.optimizer.param_groups[0]["lr"] / 3e-3)
        trainee.optimizer.step()
        trainee.schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_weight_decay_is_for_matrices():
    model = Decoder(TINY_MODEL)
    config = training.TrainingConfig()
    groups = training.make_optimizer(model, config).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.blocks[0].attention.center_gain)] == config.gain_learning_rate


def test_calibration_fits_steps_into_the_time(corpus, device):
    threads = torch.get_num_threads()
    try:
        configs = {"shaped": TINY_MODEL, "plain": replace(TINY_MODEL, attention="plain")}
        found = training.calibrate(configs, corpus, TINY_TRAINING, device)
    finally:
        torch.set_num_threads(threads)
    assert found.step > 0
    assert found.evaluation > 0
    calibration = training.Calibration(step=0.1, evaluation=2.0)
    assert calibration.steps(seconds=100, evaluations=9) == 800
    assert calibration.steps(seconds=1, evaluations=9) == training.MIN_STEPS
    assert calibration.steps(seconds=1e6, evaluations=9) == training.MAX_STEPS


# The run and its page


class Reader(HTMLParser):
    """Collects tags and checks that they are closed."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline", "circle"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_losses_fall_below_the_start_and_below_byte_frequencies(finished):
    result, _, _ = finished
    for name, trained in result.training.runs.items():
        assert len(trained.train_loss) == result.training.steps == 40
        assert trained.validation[0][1] == pytest.approx(math.log(256), abs=0.1)
        assert result.final_loss(name) < trained.validation[0][1] - 1.5
    assert result.bigram_loss < result.unigram_loss < math.log(256)


def test_the_page_opens_without_a_network(finished):
    _, output, _ = finished
    text = (output / run.PAGE).read_text(encoding="utf-8")
    reader = Reader(text)
    assert not reader.all("script")
    assert not reader.all("link")
    for _, attributes in reader.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_has_the_tables_and_the_pictures(finished):
    result, output, _ = finished
    reader = Reader((output / run.PAGE).read_text(encoding="utf-8"))
    words = "".join(reader.words)
    dtypes, models, times = len(fidelity.DTYPES), 2, 2
    assert len(reader.all("svg")) == dtypes + 2 + 2
    images = reader.all("img")
    assert len(images) == models * times * TINY_MODEL.layers * TINY_MODEL.heads
    assert all(image["alt"] for image in images)
    # The centred term, all quantities per dtype, two of the covariance, the losses, one per gain,
    # set-up and versions.
    assert len(reader.all("table")) == 1 + dtypes + 2 + 1 + 3 + 2
    for quantity in fidelity.QUANTITIES:
        assert fidelity.label(quantity) in words
    for name in ("shaped", "plain"):
        assert f"{result.final_loss(name):.4f}" in words
        assert result.samples[name] in words
    assert f"{result.unigram_loss:.3f}" in words
    assert result.command in words  # escaped, since it has <, > and &
    assert result.environment["libraries"]["torch"] in words
    assert "Interrupted" not in words


def test_the_page_shows_the_matrices_of_the_run(finished):
    result, output, _ = finished
    reader = Reader((output / run.PAGE).read_text(encoding="utf-8"))
    uri = next(
        image["src"]
        for image in reader.all("img")
        if image["alt"] == "Shaped attention, after training: layer 2, head 1"
    )
    pixels = imread(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    matrix = result.maps_after["shaped"][1, 0]
    assert pixels.shape == (*matrix.shape, 4)
    opacity = torch.from_numpy(pixels[..., 3].copy())
    torch.testing.assert_close(opacity, matrix.abs().clamp(max=1).sqrt(), atol=0.003, rtol=0)
    visible = opacity > 0.02
    is_blue = torch.from_numpy((pixels[..., 2] > pixels[..., 0]).copy())
    assert torch.equal(is_blue[visible], (matrix > 0)[visible])


def test_the_metrics_are_those_of_the_page(finished):
    result, output, printed = finished
    metrics = json.loads((output / run.METRICS).read_text(encoding="utf-8"))
    assert metrics["steps"] == 40
    assert metrics["runs"]["plain"]["validation_loss"] == result.final_loss("plain")
    assert len(metrics["runs"]["shaped"]["train_curve"]) == 40
    assert metrics["runs"]["shaped"]["parameters"] - metrics["runs"]["plain"]["parameters"] == 12
    assert len(metrics["fidelity"]["measurements"]) == len(result.fidelity.measurements)
    assert metrics["shaped_minus_plain"]["mean"] == pytest.approx(
        result.final_loss("shaped") - result.final_loss("plain"), abs=1e-6
    )
    assert "validation loss" in printed
    assert metrics["covariance"] == result.covariance.to_dict()
    assert metrics["seconds"]["covariance"] == result.covariance.seconds > 0
    assert "in 40 networks" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("shaped", "plain", "words"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "shaped attention has the lower loss"),
        ([2.0, 2.1, 1.9], [1.0, 1.2, 0.8], "plain attention has the lower loss"),
        ([1.0, 2.0, 3.0], [1.3, 1.6, 3.1], "cannot be told apart"),
    ],
)
def test_the_verdict_follows_the_losses(finished, shaped, plain, words):
    result, _, _ = finished
    runs = {
        name: replace(result.training.runs[name], window_losses=losses)
        for name, losses in (("shaped", shaped), ("plain", plain))
    }
    changed = replace(result, training=replace(result.training, runs=runs))
    assert words in page.render(changed)


def test_a_page_says_what_exceeds_its_budget(finished):
    result, _, _ = finished
    broken = [replace(m, error=1.0) for m in result.fidelity.measurements[:2]]
    report = replace(result.fidelity, measurements=(*broken, *result.fidelity.measurements[2:]))
    text = page.render(replace(result, fidelity=report))
    assert "2 of 72 fidelity measurements exceed" in text
    assert text.count("class=bad") == 3  # the centred term is in two tables


def test_a_page_can_show_a_run_that_diverged(finished):
    result, _, _ = finished
    runs = {
        name: replace(
            trained,
            train_loss=[math.nan] * 40,
            validation=[(0, 5.5), (40, math.nan)],
            window_losses=[math.nan] * 6,
        )
        for name, trained in result.training.runs.items()
    }
    diverged = replace(result, training=replace(result.training, runs=runs))
    text = page.render(diverged)
    Reader(text)
    assert "diverged" in text
    assert "lower loss" not in text


def test_a_model_that_diverged_writes_nothing(device):
    model = training.build(TINY_MODEL, 0, device)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    assert model.generate(torch.tensor([65]), 5, torch.Generator()) == b""


class Interrupting(Console):
    """Presses Ctrl-C when the first validation loss is printed."""

    def print(self, *args, **kwargs):
        super().print(*args, **kwargs)
        if args and "validation loss" in str(args[0]):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_writes_the_page_with_what_there_is(tmp_path, device):
    console = Interrupting(file=io.StringIO(), width=100)
    result = run.run(settings(device, tmp_path), console)
    assert result.training.stopped == "interrupt"
    assert 0 < result.training.steps < 40
    assert result.covariance.is_complete
    text = (tmp_path / run.PAGE).read_text(encoding="utf-8")
    assert f"Interrupted after {result.training.steps} of 40 steps" in text
    assert json.loads((tmp_path / run.METRICS).read_text())["stopped"] == "interrupt"


def interrupt_networks(monkeypatch, share):
    """Press Ctrl-C once a share of the networks with shaped attention is done."""
    measure, pressed = covariance.measure, []

    def measure_and_press(config, *, on_progress, **options):
        def press(phase, done, total):
            on_progress(phase, done, total)
            if phase == "shaped networks" and done >= share * total and not pressed:
                pressed.append(done)
                os.kill(os.getpid(), signal.SIGINT)

        return measure(config, on_progress=press, **options)

    monkeypatch.setattr(covariance, "measure", measure_and_press)


def test_an_interrupt_of_the_networks_shows_those_that_are_finished(tmp_path, monkeypatch, device):
    interrupt_networks(monkeypatch, 0.6)
    console = Console(file=io.StringIO(), width=100)
    result = run.run(settings(device, tmp_path), console)
    assert result.covariance.networks.paths == 20
    assert (result.training.stopped, result.training.steps) == ("interrupt", 0)
    reader = Reader((tmp_path / run.PAGE).read_text(encoding="utf-8"))
    words = "".join(reader.words)
    assert "20 of 40 networks" in words
    assert "Interrupted before training" in words
    assert "Neither was trained" in words
    assert "lower loss" not in words
    assert "demo --steps 40 --seed 0" in words  # --steps 0 would be refused
    metrics = json.loads((tmp_path / run.METRICS).read_text())
    assert metrics["covariance"]["networks"]["paths"] == 20
    assert metrics["covariance"]["is_complete"] is False
    assert "20 of 40 networks" in " ".join(console.file.getvalue().split())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_demo(tmp_path, monkeypatch, device):
    interrupt_networks(monkeypatch, 0.6)
    load = run.load_standard_library

    def press(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return load(*args)

    monkeypatch.setattr(run, "load_standard_library", press)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings(device, tmp_path), Console(file=io.StringIO()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_gets_less_time_if_the_networks_take_long(tmp_path, monkeypatch, device):
    measure, train, clock = covariance.measure, training.train, run.time.perf_counter
    lost, seen = 50.0, {}

    def slow(*args, **options):
        seen["threads"] = torch.get_num_threads()
        result = measure(*args, **options)
        now = SimpleNamespace(perf_counter=lambda: clock() + lost)
        monkeypatch.setattr(run, "time", now)
        return result

    def observed(*args, **options):
        seen["time_limit"] = options["time_limit"]
        torch.set_num_threads(1)  # many are slow on a busy machine
        return train(*args, **options)

    monkeypatch.setattr(covariance, "measure", slow)
    monkeypatch.setattr(training, "train", observed)
    monkeypatch.setattr(training, "calibrate", lambda *_: training.Calibration(1e3, 0.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        begin = clock()
        run.run(settings(device, tmp_path, steps=None, seconds=30.0), Console(file=io.StringIO()))
        whole = clock() - begin
    finally:
        torch.set_num_threads(threads)
    most = 30.0 + run.OVERHEAD_SECONDS - run.AFTER_TRAINING_SECONDS - lost
    assert most - whole <= seen["time_limit"] <= most
    assert seen["threads"] == 1


@pytest.mark.parametrize(
    ("agrees", "words"),
    [
        (True, "no difference found"),
        (False, "they differ"),
        (None, "too few networks to compare"),
    ],
)
def test_the_console_says_what_the_comparison_found(finished, monkeypatch, agrees, words):
    result = finished[0].covariance
    monkeypatch.setattr(covariance.CovarianceResult, "agrees", agrees)
    line, plain = run._covariance_lines(result)
    assert line.endswith(words)
    largest = result.comparison.largest
    assert f"{format_number(largest.ks)} ({largest.name})" in line
    assert f"{format_number(result.distance_from_one('plain')[1])}, with shaped" in plain


@pytest.fixture
def tiny_command(monkeypatch):
    monkeypatch.setattr(run, "preset", lambda device: (TINY_MODEL, TINY_TRAINING))
    monkeypatch.setattr(run, "Settings", partial(run.Settings, covariance=TINY_COVARIANCE))
    monkeypatch.setattr(demo, "default_impls", lambda device: ("torch",))
    monkeypatch.setattr(fidelity, "default_length", lambda impl, device: 16)


def test_the_command_runs_from_end_to_end(tiny_command, tmp_path):
    output = tmp_path / "new" / "folder"
    result = CliRunner().invoke(
        commands.cli, ["demo", "--output", str(output), "--steps", "4", "--seed", "7"]
    )
    assert result.exit_code == 0, result.output
    assert (output / run.PAGE).stat().st_size > 20_000
    metrics = json.loads((output / run.METRICS).read_text())
    assert metrics["training"]["seed"] == metrics["covariance"]["settings"]["seed"] == 7
    assert "Validation loss after 4 steps: shaped" in result.stdout
    assert str(output / run.PAGE) in result.stdout.replace("\n", "")


def test_the_command_exits_with_130_when_interrupted(tiny_command, tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console.Console", Interrupting)
    result = CliRunner().invoke(commands.cli, ["demo", "--output", str(tmp_path), "--steps", "60"])
    assert result.exit_code == 130, result.output
    assert (tmp_path / run.PAGE).exists()


def test_the_command_exits_with_1_when_the_check_fails(tiny_command, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        from shaped_attn import shaped_attention

        return 1.05 * shaped_attention(*args, **kwargs)

    monkeypatch.setitem(fidelity.measure.__kwdefaults__, "attention", wrong)
    result = CliRunner().invoke(commands.cli, ["demo", "--output", str(tmp_path), "--steps", "2"])
    assert result.exit_code == 1, result.output
    assert "exceed their budget" in (tmp_path / run.PAGE).read_text(encoding="utf-8")


def test_an_output_that_is_no_folder_is_found_out_first(tiny_command, tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        commands.cli, ["demo", "--output", str(tmp_path / "file" / "folder")]
    )
    assert result.exit_code == 1
    assert "file" in result.stderr


# The figures


def test_a_chart_maps_its_points_into_the_frame():
    svg = figures.line_chart(
        [figures.Line([(1.0, 0.001), (10.0, 0.01), (100.0, 0.1)], "shaped", markers=True)],
        title="a < b",
        x_label="x & y",
        y_label="y",
        levels=[figures.Level(0.05, "level")],
        x_log=True,
        y_log=True,
    )
    root = ElementTree.fromstring(svg)
    assert root.find("title").text == "a < b"
    points = [
        tuple(float(x) for x in point.split(","))
        for point in root.find("polyline").get("points").split()
    ]
    # Equal ratios are equal distances, and up is smaller in a picture.
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert points[0][1] > points[2][1]
    assert len(root.findall("circle")) == 3
    assert "level" in [text.text for text in root.findall("text")]


@pytest.mark.parametrize(
    ("low", "high", "is_log", "expected"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (2.13, 2.94, False, [2.2, 2.4, 2.6, 2.8]),
        (0.01, 30, True, [0.01, 0.1, 1, 10]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, is_log, expected):
    axis = figures._Axis(low, high, is_log, 0, 100)
    assert [value for value, _ in axis.ticks()] == pytest.approx(expected)


def test_smoothing_is_a_mean_over_the_last_values():
    assert figures.smooth([4.0, 2.0, 0.0, 6.0], 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 3.0)]
