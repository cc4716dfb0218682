"""LongVA's UniRes pooling, and the base of all reducers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.related.base import chosen
from mod.related.pooling import UniRes, pooling_weights
from tests.related_checks import check, seen_of


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_unires_is_a_reducer_and_its_count_is_the_formulas(side, k, streams, seed):
    seen = seen_of(3 * streams, side, streams=streams, seed=seed)
    check(UniRes(k), seen)
    out = UniRes(k)(seen)
    assert out.valid.all() and out.valid.shape[1] == 1 + (-(-side // k)) ** 2 == UniRes(k).most(1 + side * side)
    torch.testing.assert_close(out.merge.sum(-1), torch.ones(out.valid.shape))


def test_a_hand_computed_case():
    """A 3×3 grid in 2×2 cells: four, two, two and one patch."""
    expected = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0, 0],
                             [0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    torch.testing.assert_close(pooling_weights(3, 2), expected / expected.sum(1, keepdim=True))


def test_pooling_by_one_changes_nothing_and_a_constant_stays():
    seen = seen_of()
    assert torch.equal(UniRes(1)(seen).x, seen.tokens)
    seen.tokens[:] = 3.5
    torch.testing.assert_close(UniRes(3)(seen).x, seen.tokens[:, :5])


def test_chosen_tokens_are_copies_in_their_order():
    tokens = torch.randn(2, 4, 3)
    out = chosen(tokens, torch.tensor([[True, False, True, False], [False, False, False, True]]))
    assert torch.equal(out.x[0], tokens[0, [0, 2]]) and torch.equal(out.x[1, 0], tokens[1, 3]) and (out.x[1, 1] == 0).all()
    assert out.counts.tolist() == [2, 1] and out.place[0].tolist() == [0, 2]
    with pytest.raises(NotImplementedError):
        from mod.related.base import Reducer

        Reducer().most(3)
