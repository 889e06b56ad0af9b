"""Generation with a key-value cache, and models that are saved and loaded."""

import json

import pytest
import torch
from modules import MODELS
from safetensors.torch import load_file, save_file

from shaped_attn.nn import (
    METHODS,
    KeyValueCache,
    ShapedAttention,
    ShapedTransformer,
    ShapedTransformerConfig,
    anneal_gains,
    pad_left,
)
from shaped_attn.nn.generation import sample
from shaped_attn.testing import assert_within_spread, rounding_spread

VOCABULARY = 13
POSITIONS = ("rotary", "learned", "none")


def build(device="cpu", dtype=torch.float64, **options):
    """A model away from its start, where queries are 0 and softmax gains may be."""
    options = {"width": 16, "depth": 3, "heads": 2, "max_length": 20, **options}
    model = ShapedTransformer(
        ShapedTransformerConfig(vocab_size=VOCABULARY, **options), dtype=dtype
    )
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model.to(device)


def draw_prompts(device, *lengths):
    return [torch.randint(VOCABULARY, (length,)).to(device) for length in lengths]


@torch.no_grad()
def generate_uncached(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens


# Cache


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_logits_with_a_cache_are_those_without(method, positions, device):
    model = build(device, torch.float32, method=method, positions=positions)
    double = ShapedTransformer(model.config, dtype=torch.float64).to(device)
    double.load_state_dict(model.state_dict())
    # On a GPU "auto" is Triton, which has no float64.
    for block in double.blocks:
        block.attention.impl = "torch"
    tokens, key_start = pad_left(draw_prompts(device, 5, 9, 2))
    real = torch.arange(9, device=device) >= key_start[:, None]
    with torch.no_grad():
        golden, spread = rounding_spread(
            lambda: {"logits": double(tokens, key_start=key_start).logits[real]}, torch.float32
        )
        cache = KeyValueCache(9, key_start=key_start)
        parts = [model(part, cache=cache).logits for part in tokens.split((4, 1, 1, 3), dim=1)]
    assert cache.length == 9
    logits = torch.cat(parts, dim=1)[real]
    assert_within_spread(logits, golden["logits"], spread["logits"], name="logits")


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2, "heads": 4, "head_dim": 6, "out_proj": "gaussian", "norm": "rms"},
        {"gain_scheme": "recover", "tie_embeddings": True},
        {"gain_scheme": "learn", "softmax_gain": (0.5, 1.5), "activation_checkpointing": True},
    ],
)
def test_tokens_of_other_architectures_are_those_without_a_cache(options):
    model = build(**options)
    tokens = torch.stack(draw_prompts("cpu", 4, 4))
    assert torch.equal(model.generate(tokens, 6), generate_uncached(model, tokens, 6))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_padded_prompts_go_on_as_each_by_itself(method, positions):
    model = build(method=method, positions=positions)
    prompts = draw_prompts("cpu", 6, 1, 4)
    tokens, key_start = pad_left(prompts, pad_token=7)
    found = model.generate(tokens, 8, key_start=key_start)
    assert found.shape == (3, 14) and found.dtype == tokens.dtype
    assert torch.equal(found[:, :6], tokens)
    for row, start, prompt in zip(found, key_start, prompts, strict=True):
        assert torch.equal(row[start:], generate_uncached(model, prompt[None], 8)[0])


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    model = build()
    tokens = draw_prompts("cpu", 6)[0][None]
    cache = KeyValueCache(6)
    with torch.no_grad():
        expected = model(tokens).logits[:, 3:]
        model(tokens[:, :3], cache=cache)
        broken = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(1 - tokens[:, :1].clamp(max=1), cache=cache)
        broken.remove()
        assert cache.length == 3
        found = model(tokens[:, 3:], cache=cache).logits
    torch.testing.assert_close(found, expected)


def test_the_cache_keeps_the_dtype_of_autocast():
    model = build(dtype=torch.float32, method="pre_ln")
    tokens = draw_prompts("cpu", 6)[0][None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = KeyValueCache(8)
        model(tokens[:, :3], cache=cache)
        keys, values = cache.layer(0)._parts
        assert keys.dtype == values.dtype == torch.bfloat16
        model(tokens[:, 3:], cache=cache)
        with (
            torch.autocast("cpu", enabled=False),
            pytest.raises(TypeError, match=r"cache must be of torch.float32 .* got torch.bfloat16"),
        ):
            model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("name", ["labels", "key_start", "key_end", "attn_mask"])
def test_a_cache_takes_the_place_of_arguments(name):
    model, tokens = build(), torch.zeros(1, 3, dtype=torch.long)
    value = {
        "labels": tokens,
        "attn_mask": torch.ones(3, 3, dtype=torch.bool),
    }.get(name, torch.zeros(1, dtype=torch.long))
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{name} must be None beside a cache"):
        model(tokens, cache=KeyValueCache(4), **{name: value})


def test_what_a_cache_cannot_do():
    model, tokens = build(), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"cache is written in place and needs torch.no_grad"):
        model(tokens, cache=KeyValueCache(4))
    encoder = build(kind="encoder", head="masked_lm")
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cache needs is_causal=True: what earlier tokens"):
            encoder(tokens, cache=KeyValueCache(4))
        cache = KeyValueCache(4)
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match=r"room for 6 tokens, 3 of them .* got capacity 4"):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match=r"cache must be of \(B, heads, D\) = \(1, 2, 8\)"):
            model(tokens[:1, :1], cache=cache)
        learned = build(positions="learned", max_length=4)
        cache = KeyValueCache(9)
        learned(tokens, cache=cache)
        with pytest.raises(ValueError, match=r"at most max_length = 4 .* got 6"):
            learned(tokens, cache=cache)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KeyValueCache(0)
    attention = ShapedAttention(4)
    with torch.no_grad(), pytest.raises(ValueError, match="needs is_causal=True"):
        attention(torch.zeros(1, 2, 4), cache=KeyValueCache(2).layer(0))


# Sampling


def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    count = 40_000
    for temperature, top_k, top_p, kept in (
        (1.0, None, None, [0, 1, 2, 3]),
        (0.5, None, None, [0, 1, 2, 3]),
        (1.0, 2, None, [0, 3]),
        # Of 0.224, 0.030, 0.136 and 0.609 the two largest are 0.834.
        (1.0, None, 0.83, [0, 3]),
        (1.0, None, 0.84, [0, 2, 3]),
        (1.0, None, 1.0, [0, 1, 2, 3]),
        # The larger of two is 0.731 of them.
        (1.0, 2, 0.73, [3]),
        (1.0, 2, 0.74, [0, 3]),
    ):
        generator = torch.Generator().manual_seed(0)
        drawn = sample(logits.expand(count, -1), temperature, top_k, top_p, generator)
        shares = torch.bincount(drawn, minlength=4).double() / count
        expected = torch.zeros(4, dtype=torch.float64)
        expected[kept] = (logits[kept] / temperature).softmax(-1)
        # Five standard deviations of a share.
        allowed = 5 * (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() <= allowed).all(), (temperature, top_k, top_p)


def test_equal_logits_do_not_widen_top_k():
    logits = torch.zeros(200, 5)
    drawn = sample(logits, 1.0, 2, None, torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == [0, 1]


@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_small_temperature_is_the_most_likely_token(temperature):
    logits = torch.randn(3, 9)
    assert torch.equal(sample(logits, temperature, None, None, None), logits.argmax(-1))
    assert torch.equal(sample(logits, 0.0, None, None, None), logits.argmax(-1))


def test_equal_generators_give_equal_tokens(device):
    model = build(device, torch.float32)
    tokens = torch.stack(draw_prompts(device, 3, 3))
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9}

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return model.generate(tokens, 12, generator=generator, **options)

    state = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    first = model.generate(tokens, 12, **options)
    torch.manual_seed(2)
    assert torch.equal(model.generate(tokens, 12, **options), first)


def test_an_end_token_ends_sequences():
    model = build()
    tokens = torch.stack(draw_prompts("cpu", 4, 4, 4))
    full = model.generate(tokens, 10)
    new = full[:, 4:].tolist()
    end = next(token for token in new[0] if token not in new[1])  # ends one and not another
    found = model.generate(tokens, 10, end_token=end)
    assert found.shape == full.shape
    for row, expected in zip(found[:, 4:].tolist(), new, strict=True):
        stop = expected.index(end) if end in expected else len(expected)
        assert row[:stop] == expected[:stop]
        assert all(token == end for token in row[stop:])
    # Alone, the first needs no more tokens than that.
    alone = model.generate(tokens[:1], 10, end_token=end)
    assert alone.shape == (1, 4 + new[0].index(end) + 1)


def test_generation_keeps_no_gradient():
    model = build()
    calls = []
    model.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0].shape[1], out)))
    model.generate(torch.zeros(1, 4, dtype=torch.int32), 3)
    assert torch.is_grad_enabled()
    assert [length for length, _ in calls] == [4, 1, 1]  # each token is read once
    assert not any(out.logits.requires_grad for _, out in calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"tokens must have shape \(B, T\) with"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, r"tokens must .* got \(3,\)"),
        ({"tokens": torch.zeros(1, 21, dtype=torch.long)}, r"max_length = 20 .* got 21 \+ 3"),
        ({"max_new_tokens": 18}, r"max_length = 20 .* got 3 \+ 18. Cut the prompt"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": 3}, "top_k has no effect at temperature 0"),
        ({"top_p": 0.5}, "top_p has no effect at temperature 0"),
        ({"generator": torch.Generator()}, "generator has no effect at temperature 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be from 1 to 13, got 0"),
        ({"temperature": 1.0, "top_k": 14}, "top_k must be from 1 to 13, got 14"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be greater than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"key_start": torch.tensor([3])}, r"key_start must be from 0 to T - 1 = 2, .* got \[3\]"),
        ({"key_start": torch.tensor([-1])}, r"key_start must be from 0 to T - 1 = 2"),
        ({"key_start": torch.tensor([0, 0])}, r"key_start must be a Tensor of shape \(B,\)"),
        ({"end_token": 13}, "end_token must be from 0 to 12, got 13"),
        ({"tokens": torch.full((1, 3), 13)}, "tokens must be from 0 to 12, got 13"),
    ],
)
def test_errors_name_argument_rule_value_and_remedy(options, message):
    model = build(positions="learned")
    arguments = {"tokens": torch.zeros(1, 3, dtype=torch.long), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_models_that_predict_no_token_do_not_generate():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    for options in ({"kind": "encoder", "head": "masked_lm"}, {"head": None}):
        with pytest.raises(ValueError, match='generate needs a model with head="causal_lm"'):
            build(**options).generate(tokens, 1)
    model = build()
    with torch.no_grad():
        model.head.weight[2, 3] = torch.inf
    with pytest.raises(ValueError, match="model must give finite logits"):
        model.generate(tokens, 1)
    with pytest.raises(TypeError, match="end_token must be an int, got 1.5"):
        build().generate(tokens, 1, end_token=1.5)


def test_pad_left():
    tokens, key_start = pad_left([torch.tensor([5, 6]), torch.tensor([1, 2, 3])], pad_token=9)
    assert tokens.tolist() == [[9, 5, 6], [1, 2, 3]] and key_start.tolist() == [1, 0]
    for wrong in ([], [torch.tensor([1]), torch.zeros(0)], [torch.zeros(1, 2)]):
        with pytest.raises(ValueError, match="sequences must be at least one Tensor of shape"):
            pad_left(wrong)


# Saving and loading


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_is_the_same_bit_for_bit(options, dtype, tmp_path):
    model = build(dtype=dtype, **options)
    if model.config.gain_scheme == "recover":
        anneal_gains(model, 0.25)
    model.save_pretrained(tmp_path / "made" / "model")
    state = torch.get_rng_state()
    again = ShapedTransformer.from_pretrained(str(tmp_path / "made" / "model"))
    assert torch.equal(torch.get_rng_state(), state)  # no weight is drawn
    assert again.config == model.config
    expected = model.state_dict()
    assert list(again.state_dict()) == list(expected)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    assert all(p.requires_grad for p in again.parameters())
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_is_loaded_in_another_dtype_and_place(tmp_path, device):
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    other = ShapedTransformer.from_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
    for name, tensor in other.state_dict().items():
        assert tensor.device == device
        assert torch.equal(tensor.cpu(), model.state_dict()[name].bfloat16()), name


def test_the_file_has_a_version(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    values = json.loads((tmp_path / "model.json").read_text())
    assert values.pop("format_version") == 1
    # Without one, as written by hand.
    assert ShapedTransformerConfig.from_json(json.dumps(values)) == model.config
    (tmp_path / "model.json").write_text(json.dumps({"format_version": 2, **values}))
    with pytest.raises(ValueError, match=r"model\.json .*: format_version must be 1, .* got 2"):
        ShapedTransformer.from_pretrained(tmp_path)


def test_a_model_is_not_written_over(tmp_path):
    build().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"folder must not have a model yet, got .*json"):
        build(depth=2).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="folder must be a folder that can be written"):
        build().save_pretrained(tmp_path / "file")


def test_weights_that_the_configuration_does_not_describe_are_not_saved(tmp_path):
    model = build()
    model.blocks[1].mlp.pre.weight = torch.nn.Parameter(torch.zeros(2, 16, 16))
    message = r"got blocks.1.mlp.pre.weight of shape \(2, 16, 16\) for \(64, 16\)"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_that_are_missing_damaged_or_of_another_model(tmp_path):
    load = ShapedTransformer.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"folder must hold .* which does not exist"):
        load(tmp_path / "nothing")
    build().save_pretrained(tmp_path)
    config, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    text, state = config.read_text(), load_file(weights)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"folder must hold .* without model.json"):
        load(tmp_path)
    for wrong, message in (
        ("{", "Expecting property name"),
        ("[]", "must be the JSON of a dict of fields, got list"),
        (text.replace('"width"', '"wide"'), "unknown 'wide'"),
        (text.replace('"depth": 3', '"depth": 0'), "depth must be at least 1, got 0"),
    ):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=rf"model\.json is not a configuration.*{message}"):
            load(tmp_path)
    config.write_text(text.replace('"depth": 3', '"depth": 2'))
    message = r"model\.safetensors must have .* got blocks.2.* unknown; .* and \d+ more"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    config.write_text(text)
    save_file({name: x for name, x in state.items() if name != "head.weight"}, weights)
    with pytest.raises(ValueError, match="got no head.weight"):
        load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(tmp_path)
    weights.unlink()
    message = r"without model.safetensors. If it is that of a run .* it has not finished"
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    for call in (build().save_pretrained, ShapedTransformer.from_pretrained):
        with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
            call(tmp_path)


def test_the_folder_of_a_training_run_is_a_model(tmp_path, one_thread):
    from shaped_attn.train.settings import TrainSettings
    from shaped_attn.train.trainer import train

    text = tmp_path / "text.txt"
    text.write_text("abcd" * 400)
    settings = TrainSettings(
        depth=1, width=16, heads=2, context=8, steps=60, batch_size=16, data=str(text),
        mlp_ratio=1.0, learning_rate=1e-2, evaluate_every=60, checkpoint_every=60,
    )  # fmt: skip
    train(settings, tmp_path / "run", device="cpu")
    model = ShapedTransformer.from_pretrained(tmp_path / "run")
    assert model.config == settings.model_config()
    prompt = torch.tensor([list(b"abca")])
    assert bytes(model.generate(prompt, 4)[0].tolist()) == b"abcabcda"
