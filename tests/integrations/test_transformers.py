"""Tiny models of each family, built from their real config classes, with random weights."""

import copy
import doctest
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from fresh_python import python

transformers = pytest.importorskip("transformers", minversion="5.8")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)

from shaped_attn import ops  # noqa: E402
from shaped_attn.integrations.transformers import (  # noqa: E402
    ATTENTION,
    apply_shaped_attention,
    configure_shaped_attention,
    remove_shaped_attention,
    shaped_attention_forward,
    shaped_attention_mask,
)
from shaped_attn.nn import anneal_gains  # noqa: E402
from shaped_attn.train.data import load_standard_library  # noqa: E402

REPO = Path(__file__).resolve().parents[2]
PLAIN = {"identity_gain": 0.0, "center_gain": 0.0, "scale": "standard"}
VOCABULARY = 97
TEXT = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation runs to its full length
    "initializer_range": 0.3,  # tokens differ between models that differ
}
ROTARY = TEXT | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**ROTARY | options))


def mistral(**options):
    return MistralForCausalLM(MistralConfig(**ROTARY | {"sliding_window": 5} | options))


def qwen2(**options):
    return Qwen2ForCausalLM(Qwen2Config(**ROTARY | options))


def qwen3(**options):
    return Qwen3ForCausalLM(Qwen3Config(**ROTARY | {"head_dim": 16} | options))


def gpt2(**options):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**TEXT | sizes | dropout | options))


def bert(**options):
    config = BertConfig(**ENCODER | {"vocab_size": VOCABULARY, "pad_token_id": 0} | options)
    return BertForMaskedLM(config)


def vit(**options):
    config = ViTConfig(**ENCODER | {"image_size": 12, "patch_size": 4, "num_labels": 3} | options)
    return ViTForImageClassification(config)


DECODERS = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gpt2": gpt2}
TEXT_MODELS = DECODERS | {"bert": bert}
MODELS = TEXT_MODELS | {"vit": vit}
decoders = pytest.mark.parametrize("family", DECODERS)
models = pytest.mark.parametrize("family", MODELS)


def build(family, **options):
    torch.manual_seed(0)
    return MODELS[family](**options).eval()


def inputs_of(family, padding=None, batch=3, length=9):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator)}
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": padding_mask(padding, batch, length)}


def padding_mask(side, batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        if side == "left":
            mask[row, : 2 * row] = 0
        elif side == "right":
            mask[row, length - 2 * row :] = 0
    return mask


def perturb(model):
    """Make every gain differ, so that a wrong order or a lost value shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shaped_gains" in name:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model


def shaped(family, **options):
    return perturb(apply_shaped_attention(build(family), trainable_gains=True, **options))


# --------------------------------------------------------------------------- the function itself


def expected(q, k, v, visible, own, gains, scale):
    """Rows of A = identity I + softmax - center mean, in float64, from the matrices themselves."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double()
    v = v.repeat_interleave(group, 1)
    identity, softmax, center = (torch.as_tensor(g).double().reshape(-1, 1, 1) for g in gains)
    logits = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    mean = visible.double() / visible.sum(-1, keepdim=True)
    matrix = (softmax * logits.softmax(-1) - center * mean).nan_to_num(0.0)  # no key is seen
    eye = torch.nn.functional.one_hot(own, k.shape[2]).double()
    return ((matrix + identity * eye) @ v).transpose(1, 2)


def attention_of(model):
    return model.model.layers[0].self_attn


def error_budget(reference):
    # Sums of up to S + 2 terms of the size of v in float32.
    return 32 * torch.finfo(torch.float32).eps * reference.abs().max().item()


@pytest.mark.parametrize(
    ("queries", "keys", "static"),
    [(6, 6, False), (1, 7, False), (3, 8, False), (4, 9, True), (1, 9, True)],
)
@pytest.mark.parametrize("padding", [None, "left", "right", "hole"])
@pytest.mark.parametrize("window", [None, 4])
def test_every_form_of_mask_gives_the_same_matrix(queries, keys, static, padding, window):
    """Gains per head, grouped heads, and the query's own slot in a cache."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    module = attention_of(shaped("llama"))
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, queries, 8, generator=generator)
    k, v = torch.randn(2, 3, 2, keys, 8, generator=generator)
    offset = 2 if static else keys - queries
    filled = offset + queries
    mask = padding_mask(padding, 3, filled)
    if padding == "hole":
        mask[1, 1] = 0
    position = torch.arange(queries) + offset
    key = torch.arange(keys)
    visible = key <= position[:, None]
    if window is not None:
        visible = visible & (key > position[:, None] - window)
    full = torch.nn.functional.pad(mask.bool(), (0, keys - filled))
    visible = visible & full[:, None, None]
    is_decoding = static and queries == 1
    options = {} if window is None else {"local_size": window}
    if window is not None:
        options["mask_function"] = sliding_window_causal_mask_function(window)
    found = shaped_attention_mask(
        3,
        queries,
        keys,
        torch.tensor(offset) if static else offset,
        attention_mask=None if padding is None else mask.bool(),
        allow_is_causal_skip=not is_decoding,
        **options,
    )
    if window is None and not is_decoding and padding != "hole":  # no T x S matrix
        assert found is None or found.untyped_storage().nbytes() <= 3 * 3 * 8
    out, weights = shaped_attention_forward(module, q, k, v, found, scaling=8**-0.5)
    gains = [getattr(module.shaped_gains, f"{x}_gain") for x in ("identity", "softmax", "center")]
    want = expected(q, k, v, visible, position, gains, 1 / (8 * 2))
    assert weights is None and out.is_contiguous() and out.shape == (3, queries, 4, 8)
    assert (out - want).abs().max() < error_budget(want)
    if padding is None:  # a mask of the caller's tells where a query sits by the last key it sees
        mask = visible.expand(3, 1, queries, keys)
        out, _ = shaped_attention_forward(module, q, k, v, mask, scaling=8**-0.5)
        assert (out - want).abs().max() < error_budget(want)


def test_own_position_survives_a_mask_that_sees_later_keys():
    """Tokens of one image see each other: the last key that a query sees is not its own."""
    module = attention_of(shaped("llama"))
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)

    def blocks(batch, head, query, key):
        return (key <= query) | ((key <= 5) & (query >= 0))

    mask = shaped_attention_mask(
        1, 3, 8, 2, mask_function=blocks, allow_is_causal_skip=False, local_size=None
    )
    position = torch.arange(2, 5)
    visible = torch.arange(8) <= 5
    gains = [getattr(module.shaped_gains, f"{x}_gain") for x in ("identity", "softmax", "center")]
    want = expected(q, k, v, visible.expand(1, 1, 3, 8), position, gains, 1 / 16)
    out, _ = shaped_attention_forward(module, q, k, v, mask)
    assert (out - want).abs().max() < error_budget(want)


# --------------------------------------------------------------------------- models


@models
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_plain_gains_reproduce_the_model(family, padding):
    if family == "vit" and padding is not None:
        pytest.skip("images are not padded")
    model, inputs = build(family), inputs_of(family, padding)
    with torch.no_grad():
        want = model(**inputs).logits
        assert apply_shaped_attention(model, **PLAIN) is model
        found = model(**inputs).logits
        other = apply_shaped_attention(build(family))(**inputs).logits
    if padding is not None:
        real = inputs["attention_mask"].bool()
        found, want, other = found[real], want[real], other[real]
    assert (found - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
    assert (other - want).abs().max() > 0.01 * want.abs().max()


@models
def test_gradients_reach_weights_and_gains(family):
    model = shaped(family, scale="standard").train()
    model(**inputs_of(family, "right")).logits.square().mean().backward()
    gains = {name: p for name, p in model.named_parameters() if "shaped_gains" in name}
    assert len(gains) == 4  # identity and centre, two layers
    for parameter in gains.values():
        assert parameter.shape == (4,)
        assert (parameter.grad != 0).all()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "position" not in n]
    assert all("pooler" in name or "mask_token" in name for name in missing)


@pytest.mark.parametrize("family", TEXT_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side):
    model, inputs = shaped(family), inputs_of(family, side)
    ids, mask = inputs.values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(len(ids)):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            error = (together[row, real] - alone).abs().max()
            assert error < 1e-5 * alone.abs().max()


@decoders
def test_packed_sequences_do_not_see_each_other(family):
    model = shaped(family)
    ids = inputs_of(family)["input_ids"][:1]
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        parts = [model(part, use_cache=False).logits for part in ids.split([4, 5], dim=1)]
    want = torch.cat(parts, dim=1)
    assert (packed - want).abs().max() < 1e-5 * want.abs().max()


def greedy(model, ids, mask, tokens):
    """Generate with the whole sequence in every step."""
    for _ in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@decoders
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_do_not_depend_on_the_cache(family, padding, cache):
    model = shaped(family, scale="standard")
    ids, mask = inputs_of(family, padding).values()
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
    with torch.no_grad():
        want = greedy(model, ids, mask, 7)
        found = model.generate(ids, cache_implementation=cache, **options)
        beams = model.generate(ids, num_beams=3, cache_implementation=cache, **options)
        uncached = model.generate(ids, num_beams=3, use_cache=False, **options)
    assert torch.equal(found, want)
    assert torch.equal(beams, uncached)


@decoders
def test_right_padding_in_a_cache(family):
    """Shorter rows of the batch have padding between the prompt and what follows."""
    model = shaped(family)
    ids, mask = inputs_of(family, "right").values()
    following = torch.full((3, 2), 5)
    positions = mask.sum(-1, keepdim=True) + torch.arange(2)
    everything = torch.nn.functional.pad(mask, (0, 2), value=1)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, 16)):
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            cached = model(
                following,
                attention_mask=everything,
                position_ids=positions,
                past_key_values=cache,
            ).logits
            for row in range(3):
                real = torch.cat([ids[row, mask[row].bool()], following[row]])
                if family == "mistral" and row > 0:
                    continue  # its window counts slots of the cache, padding among them
                want = model(real[None], use_cache=False).logits[0, -2:]
                assert (cached[row] - want).abs().max() < 1e-5 * want.abs().max()


@decoders
def test_chunked_prefill(family):
    model = shaped(family)
    ids = inputs_of(family)["input_ids"]
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, 16)):
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split([4, 3, 2], 1)]
            want = model(ids, use_cache=False).logits
        assert (torch.cat(parts, 1) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("cast", ["model", "autocast"])
def test_bfloat16(cast):
    """Gains have the dtype of the weights, and the model still trains."""
    model, inputs = build("llama").train(), inputs_of("llama", "right")
    model = model.bfloat16() if cast == "model" else model
    apply_shaped_attention(model, trainable_gains=True)
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        cache = DynamicCache(config=model.config)
        model(inputs["input_ids"], past_key_values=cache)
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    gains = attention_of(model).shaped_gains
    assert (gains.identity_gain.grad != 0).all() and (gains.center_gain.grad != 0).all()


@decoders
def test_gradient_checkpointing_changes_nothing(family):
    model, inputs = shaped(family).train(), inputs_of(family, "right")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    want = torch.autograd.grad(loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


# --------------------------------------------------------------------------- saving and loading


@models
@pytest.mark.parametrize("gains", ["fixed", "per_head", "trainable", "annealed"])
def test_from_pretrained_gives_the_same_model(family, gains, tmp_path):
    options = {
        "fixed": {"identity_gain": 0.7, "center_gain": 0.4, "scale": 0.3},
        "per_head": {"identity_gain": [0.1, 0.2, 0.3, 0.4], "scale": "standard"},
        "trainable": {"trainable_gains": True},
        "annealed": {"annealable": True},
    }[gains]
    model = perturb(apply_shaped_attention(build(family), **options))
    if gains == "annealed":
        anneal_gains(model, 0.25)
    inputs = inputs_of(family, "left")
    with torch.no_grad():
        want = model(**inputs).logits
        for folder in ("first", "second"):  # what was loaded saves as well
            model.save_pretrained(tmp_path / folder)
            config = json.loads((tmp_path / folder / "config.json").read_text())
            assert config["attn_implementation"] == ATTENTION
            model = type(model).from_pretrained(tmp_path / folder)
            assert torch.equal(model(**inputs).logits, want)
    assert (
        model.state_dict().keys()
        == apply_shaped_attention(build(family), **options).state_dict().keys()
    )


def test_saved_config_is_refused_where_it_would_load_as_a_plain_model(tmp_path):
    apply_shaped_attention(build("llama")).save_pretrained(tmp_path)
    code = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(tmp_path)!r})"
    )
    assert 'attn_implementation="shaped_attn"' in python("-c", code, status=1)
    with pytest.raises(ValueError, match="attn_implementation must be .shaped_attn.*'sdpa'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


@models
def test_form_before_construction(family):
    model = build(family)
    options = {"trainable_gains": True, "identity_gain": 0.5, "scale": "standard"}
    config = configure_shaped_attention(copy.deepcopy(model.config), **options)
    other = type(model)(config).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("shaped_gains" in name for name in missing)
    apply_shaped_attention(model, **options)
    inputs = inputs_of(family)
    with torch.no_grad():
        want = model(**inputs).logits
        assert torch.equal(other(**inputs).logits, want)


def test_a_plain_checkpoint_loads_into_a_shaped_model(tmp_path):
    """Its gains are not in the file: they have their start values, not whatever memory held."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    config = configure_shaped_attention(
        copy.deepcopy(model.config), identity_gain=0.5, trainable_gains=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    gains = attention_of(loaded).shaped_gains
    assert gains.identity_gain.tolist() == [0.5] * 4
    assert gains.center_gain.tolist() == [1.0] * 4
    assert torch.equal(attention_of(loaded).q_proj.weight, attention_of(model).q_proj.weight)


def test_other_models_are_left_alone():
    model, again = build("llama"), build("llama")
    apply_shaped_attention(again)
    assert model.config._attn_implementation == "sdpa"
    assert not any("shaped" in name for name, _ in model.named_modules())
    inputs = inputs_of("llama")
    assert model(**inputs, output_hidden_states=True).logits.isfinite().all()


def clip_config():
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CLIPConfig(
        text_config=small | {"vocab_size": 50, "max_position_embeddings": 12},
        vision_config=small | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )


def clip_logits(model):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None], pixel_values=pixels).logits_per_image


def test_parts_of_a_composite_model_keep_their_own_choice(tmp_path):
    model = CLIPModel(clip_config()).eval()
    apply_shaped_attention(model.vision_model, identity_gain=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.allclose(clip_logits(loaded), clip_logits(model), atol=1e-5)
    shaped_parts = [n for n, _ in loaded.named_modules() if n.endswith("shaped_gains")]
    assert shaped_parts and all("vision" in name for name in shaped_parts)


def test_all_parts_of_a_composite_model(tmp_path):
    model = CLIPModel(clip_config()).eval()
    built = CLIPModel(configure_shaped_attention(clip_config(), trainable_gains=True)).eval()
    built.load_state_dict(model.state_dict(), strict=False)
    perturb(apply_shaped_attention(model, trainable_gains=True))
    assert torch.allclose(clip_logits(perturb(built)), clip_logits(model), atol=1e-5)
    for number, whole in enumerate((model, built)):  # a part remembers the choice
        whole.text_model.save_pretrained(tmp_path / str(number))
        part = AutoModel.from_pretrained(tmp_path / str(number))
        assert len([name for name, _ in part.named_parameters() if "shaped_gains" in name]) == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.allclose(clip_logits(loaded), clip_logits(model), atol=1e-5)


# --------------------------------------------------------------------------- refusals


@models
def test_output_attentions_is_refused(family):
    model = apply_shaped_attention(build(family))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(**inputs_of(family), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_additive_mask_is_refused():
    model, inputs = apply_shaped_attention(build("llama")), inputs_of("llama")
    mask = torch.zeros(3, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    with pytest.raises(TypeError, match="attention_mask of LlamaAttention must be bool"):
        model(inputs["input_ids"], attention_mask=mask)
    found = model(inputs["input_ids"], attention_mask=mask == 0).logits
    assert torch.allclose(found, model(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("family", sorted(DECODERS.keys() - {"mistral"}))  # its cache is a ring
def test_static_cache_past_its_length(family):
    model = apply_shaped_attention(build(family))
    ids = inputs_of(family)["input_ids"]
    with pytest.raises(ValueError, match="cache must have room for all tokens, 9, got a length"):
        model(ids, past_key_values=StaticCache(model.config, 8))
    cache = StaticCache(model.config, 9)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cache must have room for all tokens, 10"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_trainable_gains_where_autograd_is_off(mode):
    with mode(), pytest.raises(ValueError, match="trainable_gains must be False where autograd"):
        apply_shaped_attention(build("llama"), trainable_gains=True)


def test_dropout_is_refused_in_training():
    model = apply_shaped_attention(build("bert", attention_probs_dropout_prob=0.1))
    inputs = inputs_of("bert")
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="dropout of the attention weights must be 0"):
        model.train()(**inputs)


def test_gains_that_have_moved_are_not_overwritten():
    model = apply_shaped_attention(build("llama"), identity_gain=0.5)
    apply_shaped_attention(model, trainable_gains=True)
    with pytest.raises(ValueError, match="model must not have gains that training or annealing"):
        apply_shaped_attention(model)


def test_another_attention_under_shaped_gains_is_refused():
    """transformers itself exchanges it, for example for continuous batching."""
    model = apply_shaped_attention(build("llama"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation must stay .shaped_attn.*'sdpa'"):
        model(**inputs_of("llama"))


def test_attention_without_gains_is_refused():
    model = build("llama")
    model.set_attn_implementation(ATTENTION)
    with pytest.raises(ValueError, match="must be chosen with apply_shaped_attention"):
        model(**inputs_of("llama"))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "identity_gain", {"identity_gain": "one"}),
        (ValueError, "center_gain must be finite|center_gain", {"center_gain": float("nan")}),
        (ValueError, "identity_gain must be a number or 4", {"identity_gain": [1.0, 2.0]}),
        (ValueError, "scale must be one of", {"scale": "wide"}),
        (TypeError, "scale", {"scale": None}),
        (TypeError, "trainable_gains must be True or False", {"trainable_gains": 1}),
        (ValueError, "annealable must be False", {"trainable_gains": True, "annealable": True}),
    ],
)
def test_wrong_arguments(error, match, options):
    model = build("llama")
    with pytest.raises(error, match=match):
        apply_shaped_attention(model, **options)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, ATTENTION)


def test_not_a_model():
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, got Linear"):
        apply_shaped_attention(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be a PreTrainedConfig"):
        configure_shaped_attention(build("llama"))
    with pytest.raises(TypeError, match=r"configure_shaped_attention\(\) got .*'gain'"):
        configure_shaped_attention(build("llama").config, gain=1.0)


def test_cross_attention_has_no_identity_term():
    config = {"is_decoder": True, "add_cross_attention": True, "vocab_size": VOCABULARY}
    model = BertModel(BertConfig(**ENCODER | config)).eval()
    with pytest.raises(ValueError, match="identity_gain must be 0.0 .*crossattention.*got 1.0"):
        apply_shaped_attention(model)
    inputs = inputs_of("bert", "right")
    inputs["encoder_hidden_states"] = torch.randn(3, 9, 32)
    want = model(**inputs).last_hidden_state
    apply_shaped_attention(model, **PLAIN)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(model(**inputs).last_hidden_state[real], want[real], atol=1e-5)


# --------------------------------------------------------------------------- held-out families

SEQ2SEQ = TEXT | {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "init_std": 0.3,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHER_DECODERS = {
    "Gemma": {},
    "Gemma2": {"attn_logit_softcapping": None, "sliding_window": 5},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "GPTNeoX": {"head_dim": None},
    "Mixtral": EXPERTS,
    "ModernBertDecoder": {"local_attention": 6},
    "Olmo2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Phi": {},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def other_model(name, options, suffix="ForCausalLM", base=ROTARY):
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**base | options)
    torch.manual_seed(0)
    return getattr(transformers, name + suffix)(config).eval()


@pytest.mark.parametrize("name", OTHER_DECODERS)
def test_other_decoders(name):
    model = other_model(name, OTHER_DECODERS[name])
    ids, mask = inputs_of("llama", "left").values()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
        plain = apply_shaped_attention(copy.deepcopy(model), **PLAIN)
        found = plain(ids, attention_mask=mask).logits[mask.bool()]
        assert (found - want).abs().max() < 1e-5 * want.abs().max()
    perturb(apply_shaped_attention(model, trainable_gains=True))
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        want = model.generate(ids, use_cache=False, **options)
        for cache in ("dynamic", "static"):
            found = model.generate(ids, cache_implementation=cache, **options)
            assert torch.equal(found, want), cache


@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    [
        ("Roberta", "bert", {}),
        ("ModernBert", "bert", {"global_attn_every_n_layers": 2, "local_attention": 6}),
        ("DeiT", "vit", {}),
        ("Dinov2", "vit", {}),
        ("CLIPVision", "vit", {}),
    ],
)
def test_other_encoders(name, inputs, options):
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64}
    if inputs == "vit":
        sizes = {"image_size": 12, "patch_size": 4}
    model = other_model(name, options, "Model", ENCODER | sizes)
    arguments = inputs_of(inputs, "right")
    with torch.no_grad():
        want = model(**arguments).last_hidden_state
        found = apply_shaped_attention(copy.deepcopy(model), **PLAIN)(**arguments)[0]
        other = apply_shaped_attention(model)(**arguments)[0]
    if inputs == "bert":
        real = arguments["attention_mask"].bool()
        want, found, other = want[real], found[real], other[real]
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    assert (other - want).abs().max() > 0.01 * want.abs().max()


def test_width_scale_where_the_model_scales_its_queries():
    """OPT hands over scaled queries: "width" is the scale of what they were before."""
    options = OTHER_DECODERS["OPT"]
    found, want = (other_model("OPT", options) for _ in range(2))
    apply_shaped_attention(found)
    apply_shaped_attention(want, scale="standard")
    with torch.no_grad():
        for layer in want.model.decoder.layers:
            for parameter in layer.self_attn.q_proj.parameters():
                parameter.div_((8 * 4) ** 0.5)  # (head_dim sqrt(heads)) / sqrt(head_dim)
        ids = inputs_of("llama")["input_ids"]
        want = want(ids).logits
        assert (found(ids).logits - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "Gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_images_in_text(name, cache):
    """Gemma3 and PaliGemma let the tokens of an image, or of the prompt, see each other."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    image, text = 95, ROTARY | {"num_hidden_layers": 1, "head_dim": 8}
    ids = inputs_of("llama", batch=1, length=20)["input_ids"].clamp(max=90)
    ids[:, 2:18] = image
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    if name == "Llava":
        options = {"text_config": LlamaConfig(**text), "vision_feature_layer": -1}
        options["vision_config"] = transformers.CLIPVisionConfig(**vision)
    else:
        vision |= {"vision_use_head": False, "model_type": "siglip_vision_model"}
        options = {"text_config": text, "vision_config": vision}
        inputs["token_type_ids"] = (ids == image).long()
    if name == "PaliGemma":
        options["text_config"] = text | {"model_type": "gemma"}
        options["projection_dim"] = 32
        inputs["token_type_ids"] *= 0
    if name == "Gemma3":
        options |= {"mm_tokens_per_image": 16, "boi_token_id": 94, "eoi_token_id": 96}
    config = getattr(transformers, f"{name}Config")(image_token_id=image, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    perturb(apply_shaped_attention(model, trainable_gains=True))
    generate = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs, use_cache=False, **generate)
    found = model.generate(**inputs, cache_implementation=cache, **generate)
    assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["Whisper", "Bart"])
def test_encoder_decoder_without_identity_term(name):
    options = {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8}
    model = other_model(name, options, "ForConditionalGeneration", SEQ2SEQ)
    with pytest.raises(ValueError, match=f"identity_gain must be 0.0 .*{name}.*encoder_attn"):
        apply_shaped_attention(model)
    with pytest.raises(ValueError, match="identity_gain must be 0.0 and not trained"):
        apply_shaped_attention(model, identity_gain=0.0, trainable_gains=True)
    inputs = inputs_of("bert", "right")
    if name == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 32)}
    generate = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        plain = model.generate(**inputs, **generate)
        apply_shaped_attention(model, identity_gain=0.0, center_gain=0.6, scale="standard")
        want = model.generate(**inputs, use_cache=False, **generate)
        assert torch.equal(model.generate(**inputs, **generate), want)
        static = model.generate(**inputs, cache_implementation="static", **generate)
    assert torch.equal(static, want)
    assert not torch.equal(plain, want)


@pytest.mark.parametrize(
    ("name", "suffix", "base", "options", "reason"),
    [
        ("Gemma2", "ForCausalLM", ROTARY, {}, "Gemma2Attention. caps its logits"),
        ("GptOss", "ForCausalLM", ROTARY, EXPERTS, "GptOssAttention. has attention sinks"),
        ("Bloom", "ForCausalLM", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, {}, "Bloom"),
        ("Falcon", "ForCausalLM", ROTARY, {"alibi": True}, "Falcon.* does not use"),
        (
            "T5",
            "Model",
            {"d_model": 32, "d_ff": 48, "num_layers": 1},
            {},
            "T5",
        ),
        ("Siglip", "VisionModel", ENCODER, {}, "SiglipMultiheadAttentionPoolingHead. does not"),
        ("Mamba", "ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, {}, "Mamba"),
    ],
)
def test_what_cannot_be_shaped_is_refused_by_name(name, suffix, base, options, reason, monkeypatch):
    monkeypatch.setitem(CONFIGS, "Siglip", "SiglipVisionConfig")
    model = other_model(name, {"vocab_size": 50} | options, suffix, base)
    with pytest.raises(ValueError, match=f"model must have .*got .*{reason}"):
        apply_shaped_attention(model)
    assert not any("shaped_gains" in path for path, _ in model.named_modules())
    config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=reason):
        type(model)(configure_shaped_attention(config))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask"])
def test_what_arrives_only_in_the_call_is_refused(name):
    module = attention_of(apply_shaped_attention(build("llama")))
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match=rf"LlamaAttention, which .* \({name}\)"):
        shaped_attention_forward(module, q, q, q, None, **{name: torch.ones(())})
    with pytest.raises(ValueError, match="output_attentions must be False"):
        shaped_attention_forward(module, q, q, q, None, output_attentions=True)


def test_keys_of_something_else_have_no_identity_term():
    module = attention_of(apply_shaped_attention(build("llama")))
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="identity_gain must be 0.0 in cross-attention"):
        shaped_attention_forward(module, q, k, k, None, is_causal=False)


# --------------------------------------------------------------------------- torch.compile


def small(family, **options):
    layers = {"n_layer": 1, "n_positions": 320} if family == "gpt2" else {"num_hidden_layers": 1}
    return build(family, **layers | options)


@pytest.mark.parametrize(
    ("family", "padding", "lengths"),
    [
        ("llama", "left", (9, 12, 270, 300)),
        ("gpt2", None, (9, 12, 15)),
        ("bert", "right", (9, 12, 15)),
        ("vit", None, (9,)),
    ],
)
def test_compiles_whole_and_no_more_often_than_the_original(family, padding, lengths, monkeypatch):
    monkeypatch.setattr(ops, "_uses_kernels", lambda q: False)  # not in Triton's interpreter
    from torch._dynamo.testing import CompileCounter

    options = {"max_position_embeddings": 320} if family == "bert" else {}
    graphs = []
    for is_shaped in (False, True):
        torch._dynamo.reset()
        model, counter = small(family, **options), CompileCounter()
        if is_shaped:
            perturb(apply_shaped_attention(model, trainable_gains=True))
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for length in lengths:
            inputs = inputs_of(family, padding, length=length)
            want = model(**inputs).logits
            found = compiled(**inputs).logits
            if padding is not None:
                real = inputs["attention_mask"].bool()
                found, want = found[real], want[real]
            assert (found - want).abs().max() < 1e-5 * want.abs().max()
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0]


def test_compiled_decoding_with_a_static_cache():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = perturb(apply_shaped_attention(small("llama"), trainable_gains=True))
    ids, mask = inputs_of("llama", "left").values()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache, length = StaticCache(model.config, 20), ids.shape[1]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        found = [ids, model(ids, **options).logits[:, -1:].argmax(-1)]
        for step in range(4):
            options["attention_mask"] = torch.zeros(3, 20, dtype=torch.long)
            options["attention_mask"][:, : length + step + 1] = 1
            options["attention_mask"][:, :length] = mask
            options["position_ids"] = mask.sum(-1, keepdim=True) + step
            found.append(compiled(found[-1], **options).logits.argmax(-1))
        assert torch.equal(torch.cat(found, 1), greedy(model, ids, mask, 5))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiled_training(family):
    torch._dynamo.reset()
    model, inputs = small(family), inputs_of(family, "right")
    perturb(apply_shaped_attention(model.train(), trainable_gains=True))
    parameters = [p for n, p in model.named_parameters() if "position" not in n]
    losses = [
        f(**inputs, labels=inputs["input_ids"]).loss
        for f in (model, torch.compile(model, fullgraph=True))
    ]
    want, found = (torch.autograd.grad(loss, parameters) for loss in losses)
    budget = 1e-5 * max(gradient.abs().max() for gradient in want)  # some are 0 in exact numbers
    for a, b in zip(want, found, strict=True):
        assert (a - b).abs().max() < budget


# --------------------------------------------------------------------------- annealing


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_annealing_to_plain_and_removing(family, tmp_path):
    original, model = build(family), build(family)
    apply_shaped_attention(model, scale="standard", annealable=True)
    inputs = inputs_of(family, "right")
    with torch.no_grad():
        want = original(**inputs).logits
        assert not torch.allclose(model(**inputs).logits, want, atol=1e-2)
        with pytest.raises(ValueError, match="model must have identity_gain 0"):
            remove_shaped_attention(model)
        anneal_gains(model, 1.0)
        real = inputs["attention_mask"].bool()
        assert torch.allclose(model(**inputs).logits[real], want[real], atol=1e-5)
        assert remove_shaped_attention(model) is model
        assert torch.equal(model(**inputs).logits, want)
    assert model(**inputs, output_attentions=False).logits.shape == want.shape
    assert model.state_dict().keys() == original.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert "shaped" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="model must have shaped attention"):
        remove_shaped_attention(model)
    apply_shaped_attention(model)  # and again


def test_recipe_is_continuous_where_the_attention_is_exchanged():
    """Real text: the sources of Python's standard library."""
    path = REPO / "examples/convert_transformers_model.py"
    spec = importlib.util.spec_from_file_location("convert_transformers_model", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    corpus = load_standard_library(max_bytes=100_000)
    losses = recipe.convert(recipe.tiny_model(), corpus, steps=15, batch=8, length=64)
    # float32 rounding of one forward, at a loss of a few nats
    assert abs(losses["shaped attention put in"] - losses["trained plain"]) < 1e-5
    assert abs(losses["shaped attention taken out"] - losses["annealed to plain"]) < 1e-5
    values = list(losses.values())
    assert values[-1] < values[0]
    assert all(later < earlier + 0.1 for earlier, later in itertools.pairwise(values))


# --------------------------------------------------------------------------- the module


def test_example_of_the_docstring():
    from shaped_attn.integrations.transformers import conversion as module

    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_shaped_attn_does_not_import_transformers():
    code = "import sys, shaped_attn, shaped_attn.nn; assert 'transformers' not in sys.modules"
    python("-c", code)
