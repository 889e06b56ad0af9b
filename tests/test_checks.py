"""The checks that arguments and settings share."""

import math
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from shaped_attn.checks import (
    check_choice,
    check_choice_or_number,
    check_divides,
    check_flag,
    check_head_gain,
    check_int,
    check_kind,
    check_not_empty,
    check_number,
    check_numbers,
    check_positive,
    check_shape,
    check_size,
)


@pytest.mark.parametrize(
    ("check", "value", "wanted"),
    [
        *((check_number, x, float(x)) for x in (0, -2.5, Fraction(1, 3), np.float32(0.1))),
        (check_positive, 1e-300, 1e-300),
        (check_int, np.int64(-3), -3),
        (check_size, 1, 1),
        (check_numbers, [1, Fraction(1, 2)], (1.0, 0.5)),
        (check_numbers, torch.tensor([2.0, 1.0]), (2.0, 1.0)),
        (check_numbers, np.array([2, 1]), (2.0, 1.0)),
        (partial(check_head_gain, heads=2), 1, 1.0),
        (partial(check_head_gain, heads=2), torch.tensor([1, 2]), (1.0, 2.0)),
        (check_flag, False, False),
        (partial(check_choice_or_number, choices=("a",)), "a", "a"),
        (partial(check_choice_or_number, choices=("a",)), 1, 1.0),
    ],
)
def test_a_value_comes_back_in_its_normal_type(check, value, wanted):
    found = check("x", value)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (check_number, ("1",), TypeError, "x must be a number, got '1'"),
        (check_number, (True,), TypeError, "x must be a number, got True"),
        (check_number, (torch.ones(()),), TypeError, "got a Tensor of shape ()"),
        (check_number, (math.nan,), ValueError, "x must be finite, got nan"),
        (check_number, (2, 3.0), ValueError, "x must be at least 3, got 2"),
        (check_number, (2, 0.0, 0.5), ValueError, "x must be from 0 to 0.5, got 2"),
        (check_positive, (0,), ValueError, "x must be greater than 0, got 0"),
        (check_positive, (2, 1.0), ValueError, "x must be at most 1, got 2"),
        (check_kind, (3, str, "Quote it."), TypeError, "x must be a str, got int"),
        (check_not_empty, ([],), ValueError, "x must not be empty, got none"),
        (check_int, (1.0,), TypeError, "x must be an int, got 1.0"),
        (check_int, (True,), TypeError, "x must be an int, got True"),
        (check_int, (-1, 0, 2**63 - 1), ValueError, "x must be from 0 to 9223372036854775807, got"),
        (check_size, (0,), ValueError, "x must be at least 1, got 0"),
        (check_numbers, (1.0,), TypeError, "x must be a sequence of numbers, got 1.0"),
        (check_numbers, ("12", 2), TypeError, "x must be 2 numbers, got '12'"),
        (check_numbers, ((),), ValueError, "x must be a sequence of numbers, got 0 of them"),
        (check_numbers, ((1, 2), 3), ValueError, "x must be 3 numbers, got 2 of them"),
        (check_numbers, ((1, "2"),), TypeError, "x must be a number, got '2'"),
        (check_numbers, ((0, 2), 2, 0, 1), ValueError, "x must be from 0 to 1, got 2"),
        (check_numbers, ((1, 1), 2, 0, 1, True), ValueError, "x must ascend, got (1.0, 1.0)"),
        (check_head_gain, ((1, 2), 3), ValueError, "must be a number or 3 numbers, one per head"),
        (check_head_gain, ("1", 1), TypeError, "x must be a number, got '1'"),
        (check_flag, (1,), TypeError, "x must be True or False, got 1"),
        (check_choice, ("c", ("a", None)), ValueError, "x must be one of 'a', None, got 'c'"),
        (check_choice, ([], {"a": 1}), ValueError, "x must be one of 'a', got []"),
        (check_choice_or_number, ("b", ("a",)), ValueError, "x must be one of 'a', got 'b'"),
        (check_choice_or_number, (None, ("a",)), TypeError, "x must be a number, got None"),
        (check_divides, (4, "y", 6), ValueError, "x must divide y, 6, got 4"),
        (check_shape, (torch.ones(2, 3), ("B", 4)), ValueError, "(B, 4), got shape (2, 3)"),
        (check_shape, (torch.ones(2), ("B", 4)), ValueError, "(B, 4), got shape (2,)"),
    ],
)
def test_error(check, arguments, error, message):
    with pytest.raises(error, match=re.escape(message) + r".*\. \S.*\.$"):
        check("x", *arguments)
