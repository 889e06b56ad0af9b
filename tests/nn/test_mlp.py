"""`Projection`, the shaped ReLU and `ShapedMLP`, against their formulas in float64."""

import math
from functools import partial

import modules
import pytest
import torch
from modules import count, double

from shaped_attn.nn import MLP, Projection, ShapedMLP, gaussian, orthogonal, shaped_relu

WIDTH = 12
SKIP, BRANCH = 0.8, 0.6


assert_equal = partial(modules.assert_equal, sums=2 * WIDTH)


# Projection


def stacked(projection, networks):
    weight = double(projection.weight.device, networks, *projection.weight.shape)
    projection.weight = torch.nn.Parameter(weight)
    return projection


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("skip, branch", [(1.0, 1.0), (SKIP, BRANCH), (0.0, -2.0)])
def test_projection_equals_the_formula(shape, skip, branch, device):
    projection = Projection(WIDTH, 7, dtype=torch.float64).to(device)
    x, residual = double(device, *shape, WIDTH), double(device, *shape, 7)
    product = x @ projection.weight.T
    assert_equal(projection(x), product)
    assert_equal(projection(x, branch_gain=branch), branch * product)
    out = projection(x, residual, skip, branch)
    assert_equal(out, skip * residual + branch * product)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_stack_of_projections_equals_the_formula(shape, device):
    projection = stacked(Projection(WIDTH, 7).to(device), 3)
    x, residual = double(device, 3, *shape, WIDTH), double(device, 3, *shape, 7)
    product = torch.einsum("n...i,noi->n...o", x, projection.weight)
    assert_equal(projection(x), product)
    out = projection(x, residual, SKIP, BRANCH)
    assert_equal(out, SKIP * residual + BRANCH * product)


def test_projection_mixes_in_one_operator(device):
    projection = Projection(WIDTH, 7, dtype=torch.float64).to(device)
    x, residual = double(device, 3, 5, WIDTH), double(device, 3, 5, 7)
    assert count(lambda: projection(x, residual, SKIP, BRANCH)) == {"addmm": 1}
    assert count(lambda: projection(x)) == {"mm": 1}
    stacked(projection, 3)
    assert count(lambda: projection(x, residual, SKIP, BRANCH)) == {"baddbmm": 1}


@pytest.mark.parametrize("networks", [None, 3])
def test_tensor_gains_of_a_projection_get_gradients(networks, device):
    projection = Projection(WIDTH, 7, dtype=torch.float64).to(device)
    if networks:
        stacked(projection, networks)
    x, residual = double(device, 3, 5, WIDTH), double(device, 3, 5, 7)
    skip, branch = (
        torch.tensor(g, dtype=torch.float64, device=device).requires_grad_() for g in (SKIP, BRANCH)
    )
    out = projection(x, residual, skip, branch)
    assert_equal(out, projection(x, residual, SKIP, BRANCH))
    gradients = torch.autograd.grad((out * out.detach()).sum(), (skip, branch))
    assert_equal(gradients[0], (out * residual).sum(), sums=105)
    assert_equal(gradients[1], (out * projection(x)).sum(), sums=105 + WIDTH)


@pytest.mark.parametrize("branch", [BRANCH, torch.tensor(BRANCH)])
def test_projection_keeps_a_wider_residual(branch, device):
    projection = Projection(WIDTH, 7, dtype=torch.bfloat16).to(device)
    if isinstance(branch, torch.Tensor):
        branch = branch.to(device)
    x, residual = torch.randn(5, WIDTH).to(device).bfloat16(), torch.randn(5, 7).to(device)
    out = projection(x, residual, SKIP, branch)
    assert out.dtype == torch.float32
    # The product is the only thing that is rounded to bfloat16.
    expected = SKIP * residual + BRANCH * projection(x).float()
    assert_equal(out, expected, sums=4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = projection(x.float(), residual, SKIP, branch)
    assert torch.equal(under_autocast, out)


def test_projection_errors(device):
    projection = Projection(WIDTH, 7).to(device)
    x = torch.randn(5, WIDTH).to(device)
    with pytest.raises(ValueError, match=r"residual must have the shape of the result, \(5, 7\)"):
        projection(x, torch.randn(7).to(device))
    with pytest.raises(ValueError, match="skip_gain acts on residual, which is None"):
        projection(x, skip_gain=2.0)
    stacked(projection, 3)
    with pytest.raises(ValueError, match=r"x must have shape \(networks, ..., in\) with netw.* 3"):
        projection(double(device, 2, 5, WIDTH))


def test_projection_repr():
    projection = Projection(WIDTH, 7, law=gaussian)
    assert repr(projection) == "Projection(in_features=12, out_features=7, law=gaussian)"
    assert "networks=3" in repr(stacked(projection, 3))
    assert "law=orthogonal" in repr(Projection(WIDTH, WIDTH, law=orthogonal))


# The shaped ReLU


@pytest.mark.parametrize("s_minus", [1.0, 0.75, 0.0, -0.5])
@pytest.mark.parametrize("s_plus", [1.0, 1.25, 0.0, -0.5])
def test_shaped_relu_equals_the_formula(s_plus, s_minus, device):
    x = double(device, 101)
    x[0] = 0.0
    expected = s_plus * x.clamp(min=0) + s_minus * x.clamp(max=0)
    slopes = [torch.tensor(s, dtype=torch.float64, device=device) for s in (s_plus, s_minus)]
    assert_equal(shaped_relu(x, s_plus, s_minus), expected, sums=3)
    assert_equal(shaped_relu(x, *slopes), expected, sums=3)


@pytest.mark.parametrize("is_tensor", [False, True])
def test_shaped_relu_has_the_slopes_as_derivative(is_tensor, device):
    x = torch.tensor([-2.0, 0.0, 3.0], device=device, requires_grad=True)
    slopes = torch.tensor([1.5, 0.25], device=device).unbind() if is_tensor else (1.5, 0.25)
    (gradient,) = torch.autograd.grad(shaped_relu(x, *slopes).sum(), x)
    assert gradient.tolist() == [0.25, 0.25, 1.5]


def test_shaped_relu_of_fixed_slopes_is_one_operator(device):
    x = torch.randn(5).to(device)
    assert count(lambda: shaped_relu(x, 1.0, 0.9)) == {"leaky_relu": 1}
    assert count(lambda: shaped_relu(x, 1.1, 0.9)) == {"leaky_relu": 1, "mul": 1}


@pytest.mark.parametrize("is_tensor", [False, True])
def test_shaped_relu_does_not_round_the_slopes(is_tensor, device):
    """Their distance from 1 is what shapes, and bfloat16 has three digits."""
    slopes = (1.0, 1.0 - 1 / math.sqrt(768))
    x = -(1 + torch.rand(100_000).to(device)).bfloat16()
    given = torch.tensor(slopes, device=device).unbind() if is_tensor else slopes
    out = shaped_relu(x, *given)
    assert out.dtype == torch.bfloat16
    ratio = out.double() / x.double()
    standard_error = ratio.std() / math.sqrt(x.numel())
    # Elements are rounded, up and down; a slope that is rounded is off in all of them.
    offset = (ratio.mean() - slopes[1]).abs()
    assert offset <= 5 * standard_error + 2e-3 * (1 - slopes[1])


# The plain MLP


@pytest.mark.parametrize("mlp_ratio", [1.0, 4, 0.5])
@pytest.mark.parametrize("activation", [None, torch.nn.Tanh()])
def test_plain_mlp_equals_the_formula(activation, mlp_ratio, device):
    mlp = MLP(WIDTH, mlp_ratio, activation=activation, dtype=torch.float64).to(device)
    x, residual = double(device, 2, 3, 5, WIDTH)
    hidden = x @ mlp.pre.weight.T
    expected = (hidden if activation is None else hidden.tanh()) @ mlp.post.weight.T
    sums = WIDTH + mlp.hidden_width
    assert_equal(mlp(x), expected, sums=sums)
    out = mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    assert_equal(out, SKIP * residual + BRANCH * expected, sums=sums)
    operators = count(lambda: mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH))
    assert operators == {"mm": 1, "addmm": 1} | ({} if activation is None else {"tanh": 1})


@pytest.mark.parametrize("law", ["gaussian", "orthogonal", "gpt2"])
def test_law_of_a_plain_mlp(law):
    mlp = MLP(WIDTH, 2, law=law)
    assert {mlp.pre.law.__name__, mlp.post.law.__name__} == {law}
    assert repr(mlp).startswith(f"MLP(\n  width={WIDTH}, hidden_width={2 * WIDTH}\n")
    with pytest.raises(ValueError, match="law must be one of 'gaussian', 'orthogonal', 'gpt2'"):
        MLP(WIDTH, law="normal")


# The MLP with the shaped ReLU


def formula(mlp, x, residual, skip, branch, c_plus, c_minus):
    s_plus, s_minus = (1 + c / math.sqrt(WIDTH) for c in (c_plus, c_minus))
    hidden = x @ mlp.pre.weight.T
    hidden = s_plus * hidden.clamp(min=0) + s_minus * hidden.clamp(max=0)
    c_n = 2 / (s_plus**2 + s_minus**2)
    return skip * residual + branch * c_n**0.5 * (hidden @ mlp.post.weight.T)


@pytest.mark.parametrize("trainable_slopes", [False, True])
@pytest.mark.parametrize("c_plus, c_minus", [(0.0, -1.0), (0.5, -2.0), (-1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("mlp_ratio", [1.0, 4, 0.5, 5 / 3])
def test_equals_the_formula(mlp_ratio, c_plus, c_minus, trainable_slopes, device):
    """The slopes depend on the width, also where the hidden width is another."""
    options = {"c_plus": c_plus, "c_minus": c_minus, "trainable_slopes": trainable_slopes}
    mlp = ShapedMLP(WIDTH, mlp_ratio, dtype=torch.float64, **options).to(device)
    hidden = round(mlp_ratio * WIDTH)
    assert mlp.pre.weight.shape == (hidden, WIDTH) and mlp.post.weight.shape == (WIDTH, hidden)
    x, residual = double(device, 2, 3, 5, WIDTH)
    out = mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    expected = formula(mlp, x, residual, SKIP, BRANCH, c_plus, c_minus)
    assert_equal(out, expected, sums=WIDTH + hidden)
    s_plus, s_minus = (1 + c / math.sqrt(WIDTH) for c in (c_plus, c_minus))
    activation = mlp.hidden(x)
    assert_equal(activation, shaped_relu(mlp.pre(x), s_plus, s_minus))
    assert_equal(mlp(x), formula(mlp, x, 0 * x, 1, 1, c_plus, c_minus), sums=WIDTH + hidden)


@pytest.mark.parametrize("trainable_slopes", [False, True])
def test_gradients_equal_those_of_the_formula(trainable_slopes, device):
    """c_n follows the slopes that are trained."""
    mlp = ShapedMLP(
        WIDTH, 2, c_plus=0.5, trainable_slopes=trainable_slopes, dtype=torch.float64
    ).to(device)
    x, residual = (x.requires_grad_() for x in double(device, 2, 5, WIDTH))
    leaves = {"x": x, "residual": residual, **dict(mlp.named_parameters())}
    assert set(leaves) - {"x", "residual", "pre.weight", "post.weight"} == (
        {"c_plus", "c_minus"} if trainable_slopes else set()
    )
    out = mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    expected = formula(mlp, x, residual, SKIP, BRANCH, mlp.c_plus, mlp.c_minus)
    d_out = double(device, 5, WIDTH)
    actual = torch.autograd.grad((out * d_out).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected * d_out).sum(), list(leaves.values()))
    for name, found, gradient in zip(leaves, actual, wanted, strict=True):
        assert gradient.norm() > 0, name
        # The gradient of a slope is one sum over all elements of the hidden layer, and cancels
        # with that of c_n.
        assert_equal(found, gradient, sums=3 * WIDTH if gradient.ndim else 5 * 2 * WIDTH)


def test_fixed_slopes_are_mixed_in_the_last_product(device):
    mlp = ShapedMLP(WIDTH, dtype=torch.float64).to(device)
    x, residual = double(device, 2, 5, WIDTH)
    operators = count(lambda: mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH))
    assert operators == {"mm": 1, "leaky_relu": 1, "addmm": 1}


def test_output_scale_keeps_the_mean_square(device):
    """c_n E[sigma_s(g)^2] = 1 for g ~ N(0, 1), whatever the slopes."""
    g = torch.randn(200_000, dtype=torch.float64).to(device)
    for c_plus, c_minus in ((0.0, -1.0), (2.0, -3.0)):
        mlp = ShapedMLP(16, c_plus=c_plus, c_minus=c_minus).to(device)
        square = (mlp.output_scale() * shaped_relu(g, *mlp.slopes())).square()
        assert (square.mean() - 1).abs() <= 4 * square.std() / math.sqrt(g.numel())


@pytest.mark.parametrize("trainable_slopes", [False, True])
def test_autocast_keeps_the_residual_wide(trainable_slopes, device):
    mlp = ShapedMLP(WIDTH, trainable_slopes=trainable_slopes).to(device)
    x, residual = torch.randn(2, 5, WIDTH).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = mlp(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
        skip = mlp(0 * x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    assert out.dtype == torch.float32
    assert torch.equal(skip, SKIP * residual)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mlp.parameters())


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"width": -1}, "width must be at least 1, got -1"),
        (ValueError, {"mlp_ratio": 0.3}, "mlp_ratio times width = 12 must be a whole number"),
        (ValueError, {"mlp_ratio": 0.0}, "mlp_ratio must be greater than 0"),
        (TypeError, {"mlp_ratio": "4"}, "mlp_ratio must be a number"),
        (ValueError, {"c_plus": math.nan}, "c_plus must be finite"),
        (TypeError, {"c_minus": None}, "c_minus must be a number, got None"),
        (TypeError, {"trainable_slopes": 1}, "trainable_slopes must be True or False"),
        (
            ValueError,
            {"width": 16, "c_plus": -4.0, "c_minus": -4.0},
            r"c_plus and c_minus must not both be -sqrt\(width\) = -4",
        ),
    ],
)
def test_argument_errors(error, options, message):
    with pytest.raises(error, match=message):
        ShapedMLP(**({"width": WIDTH} | options))


def test_wrong_width_of_the_input():
    with pytest.raises(ValueError, match=r"x must have shape \(..., 12\), got shape \(5, 11\)"):
        ShapedMLP(WIDTH)(torch.randn(5, 11))


def test_extra_repr():
    assert "width=12, hidden_width=24, c_plus=0, c_minus=-1\n" in repr(ShapedMLP(WIDTH, 2))
    text = repr(ShapedMLP(WIDTH, trainable_slopes=True))
    assert "c_plus=0 (trained), c_minus=-1 (trained)" in text
