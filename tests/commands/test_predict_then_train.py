"""What `predict` writes is a configuration of `train`, `predict` and `compare`."""

import argparse
import json

import command_line
import pytest

from shaped_attn.nn import ShapedTransformer
from shaped_attn.nn.config import ModelConfig, model_of
from shaped_attn.sde.prediction import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--depth", 16, "--width", 16, "--heads", 2, "--tokens", 3, "--paths", 64)
STRONG = ("--branch-gain", 0.9, "--seed", 3)
SHORT = ("--steps", 2, "--context", 8, "--batch-size", 2, "--evaluation-windows", 2)
SHORT += ("--data", argparse.__file__, "--data-bytes", 50_000)


def invoke(command, *args):
    return command_line.invoke(command, "--device", "cpu", *args)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """The file of a prediction whose branch gain leaves the band, and its content."""
    path = tmp_path_factory.mktemp("predicted") / "p.json"
    result = invoke("predict", *SMALL, *STRONG, "--output", path)
    assert result.exit_code == 0, result.output
    return path, result, json.loads(path.read_text())


def train(output, *args):
    result = invoke("train", *args, *SHORT, "--output", output)
    assert result.exit_code == 0, result.output
    return ShapedTransformer.from_pretrained(output).config, result.stderr


def test_the_recommended_model_is_trained(predicted, tmp_path):
    path, result, found = predicted
    asked, recommended = found["model"], found["recommended"]
    interval = found["tuning"]["branch_gain"]
    low, high = (interval[end]["candidate"]["branch_gain"] for end in ("low", "high"))
    assert asked["branch_gain"] == 0.9 > high
    assert recommended == asked | {"branch_gain": high}
    assert f"Recommended: branch_gain {high:g} (asked: 0.9)" in result.stdout

    config, said = train(tmp_path / "run", "--config", path)
    assert model_of(config) == recommended
    block = ShapedTransformer.from_pretrained(tmp_path / "run").blocks[0]
    assert (block.branch_gain, block.skip_gain) == (high, pytest.approx((1 - high**2) ** 0.5))
    assert f"{path}: branch_gain {high:g}, as predict recommends (asked: 0.9)\n" in said

    config, said = train(tmp_path / "own", "--config", path, "--branch-gain", 0.7)
    assert model_of(config) == asked | {"branch_gain": 0.7}
    assert "recommends" not in said


@pytest.mark.parametrize("command", ["predict", "compare"])
def test_other_commands_take_it_too(command, predicted):
    path, _, found = predicted
    options = {"predict": ("--no-tune",), "compare": ("--networks", 60, "--against", "network")}
    result = invoke(command, "--config", path, *options[command], "--json")
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["model"] == found["recommended"]
    assert again["settings"]["tokens"] == 3
    assert "as predict recommends" in result.stderr


def test_every_default_of_a_prediction_can_be_trained(tmp_path):
    result = invoke("predict", "--json", "--paths", 64)
    path = tmp_path / "p.json"
    path.write_text(result.stdout)
    assert json.loads(result.stdout)["recommended"] == json.loads(json.dumps(model_of(Settings())))
    config, said = train(tmp_path / "run", "--config", path)
    assert model_of(config) == model_of(ModelConfig())
    assert "predict" not in said


def test_without_a_recommendation_what_was_asked_is_trained(tmp_path):
    path = tmp_path / "p.json"
    band = ("--band", -0.5, -0.49)  # no network comes there
    result = invoke("predict", *SMALL, *band, "--tau0", 2, "--output", path)
    assert "Recommended: none of these" in result.stdout
    config, said = train(tmp_path / "run", "--config", path)
    assert (config.branch_gain, config.tau0) == (0.5, 2.0)
    assert "predict recommends no gains; those that were asked for are taken." in said
    assert invoke("predict", *SMALL, "--no-tune", "--output", path).exit_code == 0
    assert "predict" not in train(tmp_path / "other", "--config", path)[1]


def test_settings_of_a_prediction_alone_are_known(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"depth": 2, "width": 16, "paths": 64, "tokens": 3, "causal": True}))
    config, said = train(tmp_path / "run", "--config", path)
    assert (config.depth, config.width) == (2, 16)
    assert f"{path}: of a prediction alone, and unused: paths, tokens, causal\n" in said


@pytest.mark.parametrize("name", ["attention", "mlp", "causal"])
def test_a_network_that_is_no_decoder_is_not_trained(name, tmp_path):
    path, flat = tmp_path / "p.json", tmp_path / "c.json"
    result = invoke("predict", *SMALL, "--no-tune", f"--no-{name}", "--output", path)
    assert result.exit_code == 0, result.output
    flat.write_text(json.dumps({name: False}))
    for config in (path, flat):
        result = invoke("train", "--config", config, *SHORT, "--output", tmp_path / "run")
        assert result.exit_code == 2
        text = " ".join(result.stderr.split())
        assert f"{config}: {name} must be true, got false. What is trained is a decoder" in text
    assert not (tmp_path / "run").exists()
