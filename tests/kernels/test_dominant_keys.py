"""Plain attention where one key takes all the weight: its value is the result."""

import pytest
import torch
from attention_calls import DTYPES, triton_attention

from shaped_attn import shaped_attention
from shaped_attn.kernels import launch
from shaped_attn.testing import Case, forward_backward, make_inputs, rounding_error

pytestmark = pytest.mark.usefixtures("poison")

PLAIN = {"identity_gain": 0.0, "center_gain": 0.0}
KEYS = 37
STD_OF_LOGITS = 8.0  # enough that an integer above the row maximum is far from it


def seen_keys(kind: str, queries: int, device) -> tuple[dict, torch.Tensor]:
    """Options under which rows see one key, and which key each row sees (-1: several)."""
    rows = torch.arange(queries, device=device)
    if kind == "one_key":
        return {"is_causal": True, "q_offset": 0}, rows
    if kind == "first_row":
        return {"is_causal": True, "q_offset": 0}, torch.where(rows == 0, 0, -1)
    if kind == "key_range":
        options = {"key_start": torch.tensor([20]), "key_end": torch.tensor([21])}
        return {name: x.to(device) for name, x in options.items()}, torch.full_like(rows, 20)
    mask = torch.zeros(queries, KEYS, dtype=torch.bool, device=device)
    keys = (5 * rows + 33) % KEYS  # in the last block of keys first
    mask[rows, keys] = True
    return {"attn_mask": mask}, keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["one_key", "first_row", "key_range", "mask"])
def test_a_row_that_sees_one_key_returns_its_value(kind, dtype, device):
    queries = keys = 1 if kind == "one_key" else KEYS
    case = Case(1, 8, 4, queries, keys, 16, dtype=dtype)
    scale = 0.3
    q, k, v, _ = make_inputs(case, logit_std=STD_OF_LOGITS, scale=scale)
    tensors = {"q": q.to(device), "k": k.to(device), "v": v.to(device)}
    options, seen = seen_keys(kind, queries, device)
    d_out = torch.randn(q.shape).to(device)
    found = forward_backward(triton_attention, tensors, d_out, **PLAIN, scale=scale, **options)

    rows = seen >= 0
    own_v, own_k = (
        tensors[name].repeat_interleave(2, 1)[:, :, seen[rows]].double() for name in ("v", "k")
    )
    out = found["out"][:, :, rows].double()
    if dtype == torch.float32 and not launch.is_interpreted():
        # Three TF32 products keep 22 bits of v.
        assert ((out - own_v).abs() <= 2**-21 * own_v.abs()).all()
    else:
        assert torch.equal(out, own_v)

    # dS = P (dO . v - delta) is the difference of two float32 sums of the same Dv products.
    products = (d_out.to(dtype).double()[:, :, rows] * own_v).abs().sum(-1, keepdim=True)
    largest_d_score = 2 * case.value_dim * torch.finfo(torch.float32).eps * products
    limit = scale * largest_d_score * own_k.abs()
    assert (found["grad q"][:, :, rows].double().abs() <= limit).all()
    if rows.all():
        # Every row adds to dk what its own dS allows.
        limit = torch.zeros(1, 4, keys, 16, dtype=torch.float64, device=device)
        row_limits = scale * largest_d_score * tensors["q"].double().abs()
        limit.index_add_(2, seen, row_limits.unflatten(1, (4, 2)).sum(2))
        assert (found["grad k"].double().abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_rounding_of_a_weight_moves_its_value_against_the_result(is_causal, dtype, device):
    case = Case(1, 2, queries=90, head_dim=16, dtype=dtype, is_causal=is_causal)
    scale = 0.3
    q, k, v = (x.to(device) for x in make_inputs(case, logit_std=20.0, scale=scale)[:3])
    options = {**PLAIN, "scale": scale, "is_causal": is_causal}
    actual = shaped_attention(q, k, v, **options, impl="triton").double()
    q, k, v = (x.double() for x in (q, k, v))
    golden = shaped_attention(q, k, v, **options, impl="reference")

    visible = torch.ones(90, 90, dtype=torch.bool, device=device)
    visible = visible.tril() if is_causal else visible
    scores = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    # A score is a float32 sum of D products, its error moves each value against the result.
    eps = torch.finfo(torch.float32).eps
    score_errors = (case.head_dim + 2) * eps * scale * (q.abs() @ k.abs().mT)
    score_errors = (weights * score_errors)[..., None]
    distances = (v[:, :, None] - golden[:, :, :, None]).abs()
    # The sum of a row holds its weights as rounded, so that a rounding, too, moves a value against
    # the result: that of a dominant key, which is the result, by next to nothing.
    rounded_weights = (weights[..., None] * distances).sum(3)
    float32 = 2 * (score_errors * distances).sum(3) + case.keys * eps * (weights @ v.abs())
    budget = rounding_error(dtype) * (rounded_weights + golden.abs()) + float32
    assert ((actual - golden).abs() <= budget).all()
