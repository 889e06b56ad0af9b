import json
import math
from dataclasses import fields

import pytest

from shaped_attn.train.schedule import learning_rate_factor
from shaped_attn.train.settings import TrainSettings, read_config


def test_the_learning_rate_is_that_of_the_formulas():
    options = {"warmup_steps": 4, "final_share": 0.1}
    for schedule in ("cosine", "linear", "constant"):
        found = [learning_rate_factor(k, 14, schedule=schedule, **options) for k in range(15)]
        assert found[:4] == [0.25, 0.5, 0.75, 1.0]
        for step in range(4, 15):
            p = (step - 4) / 10
            expected = {
                "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2,
                "linear": 0.1 + 0.9 * (1 - p),
                "constant": 1.0,
            }[schedule]
            assert found[step] == pytest.approx(expected, rel=1e-14)
    assert learning_rate_factor(0, 10, warmup_steps=0, final_share=0.0) == 1.0
    assert learning_rate_factor(9, 10, warmup_steps=10, final_share=0.0) == 1.0


def test_the_warm_up_follows_from_the_steps():
    assert TrainSettings(steps=1000).warmup_steps == 50
    assert TrainSettings(steps=10).warmup_steps == 0
    assert TrainSettings(steps=10, warmup_steps=3).warmup_steps == 3


def test_every_setting_of_the_model_reaches_it():
    settings = TrainSettings(
        method="pre_ln",
        depth=3,
        width=24,
        heads=2,
        skip=False,
        normalization=True,
        positions="learned",
        mlp_ratio=2.0,
        context=20,
    )
    config = settings.model_config()
    assert (config.vocab_size, config.kind, config.head) == (256, "decoder", "causal_lm")
    assert (config.method, config.depth, config.width, config.heads) == ("pre_ln", 3, 24, 2)
    assert (config.has_skip, config.has_normalization) == (False, True)
    assert (config.positions, config.mlp_ratio, config.max_length) == ("learned", 2.0, 20)


def test_settings_survive_a_file(tmp_path):
    settings = TrainSettings(method="e_spa", skip=False, warmup_steps=7, data="a.txt")
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings.to_dict()))
    assert TrainSettings(**read_config(path)) == settings


def test_differences_name_what_the_weights_depend_on():
    known = TrainSettings(seed=1).to_dict()
    assert TrainSettings(seed=1).differences(known) == []
    assert TrainSettings(seed=2, depth=3).differences(known) == [
        "depth: 12, now 3",
        "seed: 1, now 2",
    ]
    other = TrainSettings(seed=1, data="copy.txt", keep_checkpoints=5, evaluate_every=7)
    assert other.differences(known) == []


@pytest.mark.parametrize("name", [f.name for f in fields(TrainSettings)])
def test_no_setting_takes_a_value_of_another_type(name):
    with pytest.raises((TypeError, ValueError), match=name):
        TrainSettings(**{name: ["x"]})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"depth": True}, TypeError, "depth must be an int"),
        ({"steps": 2.5}, TypeError, "steps must be an int, got 2.5"),
        ({"context": 1}, ValueError, "context must be at least 2"),
        ({"batch_size": 8, "accumulation": 3}, ValueError, "accumulation must divide batch_size"),
        ({"steps": 5, "warmup_steps": 6}, ValueError, "warmup_steps must be at most steps, 5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
        ({"seed": 2**63}, ValueError, "seed must be from 0 to"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be greater than 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be finite"),
        ({"final_share": 1.5}, ValueError, "final_share must be from 0 to 1"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be at least 0"),
        ({"schedule": "step"}, ValueError, "schedule must be one of 'cosine'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'fp32', 'bf16'"),
        ({"method": "rezero"}, ValueError, "method must be one of 'shaped'"),
        ({"method": "simplified", "skip": True}, ValueError, 'for method="simplified"'),
        ({"width": 100, "heads": 3}, ValueError, "heads"),
    ],
)
def test_impossible_settings_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        TrainSettings(**values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rat": 1}, "learning_rat is not a setting. Did you mean learning_rate?"),
        ({"no_skip": True}, "Write skip = false."),
        ({"layers": 3}, "Write depth."),
        ({"output": "here"}, "Give --output on the command line."),
        ({"learning_rates": [1]}, "Give --learning-rates on the command line."),
    ],
)
def test_a_file_with_other_names_is_refused(content, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_config(path)
