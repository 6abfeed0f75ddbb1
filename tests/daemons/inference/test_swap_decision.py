"""What is done about CURRENT, by what it names, which adapter is active and which were rolled back."""

import pytest

from specl.daemons.inference.swap_decision import Activate, RollBack, decide

A, B, C = "000001", "000002", "000003"
WORSE = "its predecessor did better"


@pytest.mark.parametrize(
    ("current", "active", "previous", "rolled_back", "action"),
    [
        (A, A, "", {}, None),
        ("", "", "", {}, None),
        (B, A, "", {}, Activate(B)),
        ("", A, "", {}, Activate("")),
        (A, B, A, {B: WORSE}, RollBack(B, A, WORSE)),  # the trainer has moved CURRENT back
        (B, B, A, {B: WORSE}, RollBack(B, A, WORSE)),  # killed before CURRENT moved
        (B, B, B, {B: WORSE}, RollBack(B, "", WORSE)),
        (C, C, B, {B: WORSE, C: WORSE}, RollBack(C, "", WORSE)),  # never back to one that was rolled back
        (B, "", A, {B: WORSE}, RollBack(B, A, None)),  # a start: nothing was active
        (B, A, A, {B: WORSE}, RollBack(A, A, None)),
    ],
)
def test_action_follows_from_ids_and_marks(current, active, previous, rolled_back, action):
    assert decide(current, active, previous, rolled_back) == action
