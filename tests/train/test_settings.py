import json
import math

import pytest

from shaped_attn.train.schedule import learning_rate_factor
from shaped_attn.train.settings import TrainSettings


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
        has_skip=False,
        has_normalization=True,
        positions="learned",
        mlp_ratio=2.0,
        kv_heads=1,
        impl="torch",
        context=20,
    )
    config = settings.model_config()
    assert (config.vocab_size, config.kind, config.head) == (256, "decoder", "causal_lm")
    assert (config.method, config.depth, config.width, config.heads) == ("pre_ln", 3, 24, 2)
    assert (config.has_skip, config.has_normalization) == (False, True)
    assert (config.positions, config.mlp_ratio, config.max_length) == ("learned", 2.0, 20)
    assert (config.kv_heads, config.impl) == (1, "torch")
    gains = {"branch_gain": 0.3, "tau0": 2.0, "softmax_gain": (0.5, 1.0), "out_proj": "gaussian"}
    gains |= {"gain_scheme": "learn", "c_minus": -0.5}
    config = TrainSettings(heads=2, **gains).model_config()
    assert {name: getattr(config, name) for name in gains} == gains
    config = TrainSettings(skip_gain=0.9, preserves_variance=False).model_config()
    assert config.block_arguments()["skip_gain"] == 0.9


def test_differences_name_what_the_weights_depend_on():
    known = TrainSettings(seed=1).to_dict()
    assert TrainSettings(seed=1).differences(known) == []
    assert TrainSettings(seed=2, depth=3).differences(known) == [
        "depth: 12, now 3",
        "seed: 1, now 2",
    ]
    other = TrainSettings(seed=1, data="copy.txt", keep_checkpoints=5, evaluate_every=7)
    assert other.differences(known) == []
    # What a run of an earlier version lacks has its default, and names were those of the flags.
    earlier = {name: known[name] for name in known if name not in ("branch_gain", "has_skip")}
    assert TrainSettings(seed=1).differences(earlier | {"skip": None}) == []
    assert TrainSettings(seed=1).differences(earlier | {"skip": False}) == [
        "has_skip: False, now None"
    ]
    gains = TrainSettings(softmax_gain=(1.0,) * 4)
    assert gains.differences(json.loads(json.dumps(gains.to_dict()))) == []


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"context": 1}, ValueError, "context must be at least 2"),
        ({"batch_size": 8, "accumulation": 3}, ValueError, "accumulation must divide batch_size"),
        ({"steps": 5, "warmup_steps": 6}, ValueError, "warmup_steps must be at most steps, 5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
        ({"recover_steps": 5}, ValueError, 'must be left out without gain_scheme "recover"'),
        ({"method": "pre_ln", "tau0": 2.0}, ValueError, 'default for method="pre_ln"'),
        ({"skip_gain": 0.5}, ValueError, "skip_gain must satisfy"),
        ({"softmax_gain": (1.0, 2.0)}, ValueError, "softmax_gain must be a number or 4 numbers"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be greater than 0"),
        ({"final_share": 1.5}, ValueError, "final_share must be from 0 to 1"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be at least 0"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'fp32', 'bf16'"),
        ({"method": "rezero"}, ValueError, "method must be one of 'shaped'"),
        ({"method": "simplified", "has_skip": True}, ValueError, 'for method="simplified"'),
        ({"width": 100, "heads": 3}, ValueError, "heads"),
    ],
)
def test_impossible_settings_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        TrainSettings(**values)
