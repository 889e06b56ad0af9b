"""Launches of a signature that came before go to the compiled kernels, with the same arguments."""

import textwrap

import pytest
from fresh_python import python

# Without the interpreter: Triton compiles for a stand-in, which keeps what it would launch.
PREPARE = """
    from unittest import mock
    import torch
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor
    from shaped_attn import ESPA, shaped_attention, validation
    from shaped_attn.kernels import launch
    from shaped_attn.kernels.families import use_family
    from shaped_attn.kernels.stand_in import StandInDriver

    stand_in = StandInDriver(ARCH)
    driver.set_active(stand_in)
    compilations = []
    through_triton = JITFunction.run
    def run(self, *args, **kwargs):
        compilations.append(self.fn.__name__)
        return through_triton(self, *args, **kwargs)
    mock.patch.object(JITFunction, "run", run).start()
    mock.patch.object(validation, "is_interpreted", lambda: True).start()

    def tensors(length=40, kv_heads=1):
        q = torch.randn(1, 2, length, 16).bfloat16()
        k, v = torch.randn(2, 1, kv_heads, length, 16).bfloat16()
        return [x.requires_grad_() for x in (q, k, v)]

    def describe(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.shape, x.stride()
        if isinstance(x, TensorDescriptor | GluonDescriptor):
            return "descriptor", describe(x.base), tuple(x.block_shape)
        return tuple(map(describe, x)) if isinstance(x, tuple) else x

    def call(*inputs, **options):
        "Launch a forward and a backward; return what was launched and what went through Triton."
        stand_in.launches.clear()
        compilations.clear()
        with launch.assume_architecture(ARCH), use_family(FAMILY):
            out = shaped_attention(*inputs, impl="triton", **options)
            out.sum().backward()
        # All but the metadata, a new object for each launch.
        return [describe((*x[:6], *x[7:])) for x in stand_in.launches], list(compilations)
"""


def run(script, arch=80, family="portable"):
    parts = (f"ARCH = {arch}; FAMILY = {family!r}", PREPARE, script)
    python("-c", "\n".join(map(textwrap.dedent, parts)), TRITON_INTERPRET=None)


@pytest.mark.parametrize("arch, family", [(80, "portable"), (90, "portable"), (90, "hopper")])
@pytest.mark.parametrize(
    "options",
    [
        "is_causal=True",
        "softmax_gain=torch.ones(2, requires_grad=True), scale=torch.ones(()).requires_grad_()",
        "attn_mask=torch.ones(40, 40).bool(), center_gain=0.0",
        "prior=ESPA(0.5, torch.tensor([0.1, 0.2], requires_grad=True)), is_causal=True",
    ],
    ids=["causal", "learned_gains", "mask", "learned_prior"],
)
def test_the_second_call_launches_what_the_first_did(options, arch, family):
    run(
        f"""
        options = dict({options})
        first, compiled = call(*tensors(), **options)
        assert len(first) == len(compiled) >= 4, compiled
        second, compiled = call(*tensors(), **options)
        assert compiled == [], compiled
        assert second == first
        assert all(x[4] for x in second)  # the function to launch
        # Where the hardware has them, a new tensor gets a new descriptor.
        described = [x for y in second for x in y if isinstance(x, tuple) and "descriptor" in x]
        assert bool(described) == (ARCH == 90)
        hopper = "attn_mask" not in options and "prior" not in options and FAMILY == "hopper"
        assert any(isinstance(x, GluonDescriptor) for y in stand_in.launches for x in y) == hopper
    """,
        arch,
        family,
    )


def test_the_fused_backward_launches_again_what_it_did_first():
    run(
        """
        from shaped_attn.kernels.attention import AttentionGradients, Call, Needs
        from shaped_attn.kernels.hopper.attention_bwd import BackwardPlan
        from shaped_attn.visibility import Visibility

        q, k, v, d_out = torch.randn(4, 1, 2, 100, 128).bfloat16()
        terms = torch.randn(3, 1, 2, 128)
        gains = (1.0, 1.0, 1.0, 1.0, 1.0, 0.1)
        call = Call(q, k, v, None, gains, Visibility(is_causal=True, q_offset=0))
        gradients = AttentionGradients(*map(torch.empty_like, (q, k, v)), None)
        with launch.assume_architecture(ARCH):
            plan = BackwardPlan(call, d_out, Needs(scale=True), is_deterministic=False)
        plan.preprocess = lambda *_: (terms, None, None)
        made = []
        for _ in range(2):
            stand_in.launches.clear()
            compilations.clear()
            plan(call, None, d_out, None, gradients)
            launched = [describe((*x[:6], *x[7:])) for x in stand_in.launches]
            made.append((launched, list(compilations)))
        kernels = ["attention_bwd_dkdv_kernel", "convert_dq_kernel"]
        assert made == [(made[0][0], kernels), (made[0][0], [])]
        assert len(made[0][0]) == 2
    """,
        90,
    )


def test_what_triton_may_compile_for_is_in_the_signature():
    run("""
        q, k, v = tensors()
        call(q, k, v, is_causal=True)
        assert call(q, k, v, is_causal=True)[1] == []
        shifted = torch.randn(2 * 40 * 16 + 1).bfloat16()[1:].view(1, 2, 40, 16).requires_grad_()
        changes = [
            ((shifted, k, v), {}),
            ((q.detach().mT.contiguous().mT.requires_grad_(), k, v), {}),
            (tensors(24), {}),
            (tensors(kv_heads=2), {}),
            ([x.detach().half().requires_grad_() for x in (q, k, v)], {}),
            ((q, k, v), {"center_gain": 0.0}),
            ((q, k, v), {"center_gain": torch.ones(2)}),
            ((q, k, v), {"center_gain": torch.ones(())}),
            ((q, k, v), {"q_offset": 3, "identity_gain": 0.0}),
            ((q, k, v), {"key_start": torch.zeros(1, dtype=torch.int32)}),
            ((q, k, v), {"key_start": torch.zeros(1, dtype=torch.int64)}),
            ((q, k, v, torch.randn(1, 2, 40, 16)), {}),
        ]
        for inputs, options in changes:
            launches, compiled = call(*inputs, is_causal=True, **options)
            assert len(compiled) == len(launches), options
        # But not the value of a number.
        assert call(q, k, v, is_causal=True, scale=0.3, center_gain=0.2)[1] == []
    """)


def test_the_alignment_of_what_was_saved_is_in_the_signature():
    run("""
        q, k, v = (x.detach() for x in tensors())
        with launch.assume_architecture(ARCH):
            out, lse, *saved = torch.ops.shaped_attn.attention(q, k, v, is_causal=True)

            def through_triton_in_backward(excess):
                compilations.clear()
                given = {"excess": excess, "center": saved[1], "row_stats": saved[2]}
                d_out = torch.ones_like(out)
                backward = torch.ops.shaped_attn.attention_backward
                backward(d_out, None, q, k, v, **given, is_causal=True)
                return list(compilations)

            assert len(through_triton_in_backward(saved[0])) == 5
            assert through_triton_in_backward(saved[0]) == []
            shifted = saved[0].new_empty(saved[0].numel() + 1)[1:].view(saved[0].shape)
            assert len(through_triton_in_backward(shifted)) == 5
    """)
