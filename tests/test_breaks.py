"""Claims about the runner of the seeded breaks: only an assertion of a law counts as the law having seen the break."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pykalm.learn.losses import completion_loss_sum
from tests.laws import breaks
from tests.laws.test_law_02_cached import largest_difference


def module_whose_check(check: Any) -> Any:
    return SimpleNamespace(CHECKS={"a break": "check"}, BREAKS={"a break": contextlib.nullcontext}, check=check)


def test_an_assertion_of_a_law_turns_it_red_and_none_leaves_it_green() -> None:
    law = module_whose_check(lambda: largest_difference({"a": torch.ones(1)}, {"b": torch.ones(1)}))
    assert breaks.turns_red(law, "a break")
    assert breaks.turns_red(module_whose_check(lambda: pytest.fail("no error came")), "a break")
    assert not breaks.turns_red(module_whose_check(lambda: None), "a break")


def test_an_assertion_of_the_product_does_not_count() -> None:
    with pytest.raises(AssertionError):
        breaks.turns_red(
            module_whose_check(lambda: completion_loss_sum(torch.ones(1, 2).half(), torch.ones(1))), "a break"
        )
