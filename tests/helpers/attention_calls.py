"""Calls of attention: implementations, dtypes of cases, and budgets of everything they return."""

import dataclasses
from functools import partial

import torch

from shaped_attn import shaped_attention
from shaped_attn.testing import Case, assert_within_budget, assert_within_spread
from shaped_attn.validation import GAIN_NAMES as GAINS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

triton_attention = partial(shaped_attention, impl="triton")
reference_attention = partial(shaped_attention, impl="reference")


def of_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in a dtype, which is also that of a residual of dtype `...`."""
    residual_dtype = dtype if case.residual_dtype is ... else case.residual_dtype
    return dataclasses.replace(case, dtype=dtype, residual_dtype=residual_dtype)


def assert_right(actual: dict, golden: dict, eager: dict, spread: dict) -> None:
    """Check results and gradients; those of gains against the spread that roundings give them."""
    assert actual.keys() == golden.keys()
    for name, value in actual.items():
        value = value.to(golden[name].device)
        if name.removeprefix("grad ") in GAINS:
            assert_within_spread(value, golden[name], spread[name], name=name)
            continue
        rounding = None
        if name.startswith("grad"):
            # Two roundings: of one factor of the product, and of its result.
            rounding = torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps
        assert_within_budget(
            value, golden[name], eager[name], factor=2, name=name, rounding=rounding
        )
