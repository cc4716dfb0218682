"""Q-Former and the Perceiver Resampler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mod.related.base import Seen
from mod.related.queries import MODES, QueryResampler
from tests.related_checks import check, check_gradients, seen_of


def with_patches(seen: Seen, patches: torch.Tensor) -> Seen:
    return Seen(torch.cat((seen.tokens[:, :1], patches), dim=1))


def plain(reducer: QueryResampler, queries: list) -> QueryResampler:
    """Every key is alike and every value is what it is the value of; no MLP, no self-attention, no last map."""
    identity = torch.eye(reducer.queries.shape[1])
    with torch.no_grad():
        reducer.queries.copy_(torch.tensor(queries, dtype=torch.float))
        for name, parameter in reducer.named_parameters():
            if name.endswith(("q.weight", "k.weight")) or ".mlp." in name or "last.bias" in name:
                parameter.zero_()
            elif name.endswith(("v.weight", "out.weight")) or (name == "last.weight" and parameter.ndim == 2):
                parameter.copy_(identity)
        if reducer.first.__class__ is nn.LayerNorm:
            reducer.blocks[0].attention.v.weight.zero_()
    return reducer


@settings(max_examples=10)
@given(st.sampled_from(MODES), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_is_a_reducer_and_its_count_is_that_of_the_queries(mode, queries, depth, side, streams, seed):
    seen = seen_of(3 * streams, side, streams=streams, seed=seed)
    reducer = QueryResampler(queries, 12, depth, 2, mode)
    check(reducer, seen)
    out = reducer(seen)
    assert reducer.online and out.merge is None and out.valid.all()
    assert out.valid.shape == (3 * streams, queries) and reducer.most(1 + side * side) == queries
    assert queries > 1 + side * side or (out.place.diff(dim=1) > 0).all()


@settings(max_examples=8)
@given(st.sampled_from(MODES), st.integers(1, 3), st.integers(0, 99))
def test_the_order_of_the_patches_and_the_summary_do_not_matter(mode, depth, seed):
    seen, reducer = seen_of(2, 3, seed=seed), QueryResampler(4, 12, depth, 3, mode)
    x = reducer(seen).x
    torch.testing.assert_close(reducer(with_patches(seen, seen.patches[:, torch.randperm(9)])).x, x)
    other = seen.tokens.clone()
    other[:, 0] += 5
    assert torch.equal(reducer(Seen(other)).x, x)
    other[:, 4, 0] += 5
    assert not torch.allclose(reducer(Seen(other)).x, x, atol=1e-3), "but every patch does"


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 99))
def test_patches_twice_over_are_the_same_to_qformer_only(depth, times, seed):
    """For the Resampler's own queries, among its keys, become fewer among more."""
    seen = seen_of(2, 3, seed=seed)
    often = with_patches(seen, seen.patches.repeat(1, times, 1))
    former, perceiver = (QueryResampler(4, 12, depth, 2, mode) for mode in MODES)
    torch.testing.assert_close(former(often).x, former(seen).x)
    assert (perceiver(often).x - perceiver(seen).x).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_all_parameters_are_reached(mode):
    reducer, seen = QueryResampler(3, 12, 3, 2, mode), seen_of(2, 3)
    # The squares of what a norm gives always add up to the same: unequal weights make the sum say something.
    nn.init.normal_(reducer.last.weight)
    check_gradients(reducer, seen)
    assert all(parameter.grad.abs().max() > 1e-5 for parameter in reducer.parameters())
    assert (reducer.queries.grad.abs().amax(1) > 1e-5).all()


def test_a_hand_computed_qformer():
    """The norm of the query is (1, 1, -1, -1), the patches' mean (1, -3, 1, -3): their sum (2, -2, 0, -4) has the
    mean -1 and the variance 5. Later norms change nothing; two queries, which do not look at each other here."""
    reducer = plain(QueryResampler(2, 4, 1, 1, "qformer"), [[2, 2, 0, 0], [0, 3, 3, 0]])
    tokens = torch.tensor([[[9, 9, 9, 9], [0, -4, 2, -3], [2, -2, 0, -3]]], dtype=torch.float)
    out = reducer(Seen(tokens))
    expected = torch.tensor([[3.0, -1, 1, -3], [1, -1, 3, -3]]) / 5**0.5
    torch.testing.assert_close(out.x[0], expected, atol=1e-4, rtol=0)
    assert out.place.tolist() == [[0, 1]]


def test_a_hand_computed_perceiver():
    """Keys are two patches of norm (1, -1, 1, -1) and the query's (1, 1, -1, -1), together (3, -1, 1, -3) / 3; with
    the query (5, 11/3, 1/3, -1), of mean 2 and variance 53/9."""
    reducer = plain(QueryResampler(1, 4, 1, 1, "perceiver"), [[4, 4, 0, 0]])
    tokens = torch.tensor([[[9, 9, 9, 0], [1, 0, 1, 0], [7, 3, 7, 3]]], dtype=torch.float)
    expected = torch.tensor([9, 5, -5, -9]) / 53**0.5
    torch.testing.assert_close(reducer(Seen(tokens)).x[0, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_comes_last(mode):
    """In every block of Q-Former, before its linear map, and at the end of the Resampler."""
    reducer, seen = QueryResampler(3, 12, 2, 2, mode), seen_of(2, 3)
    if mode == "qformer":
        reducer.last = nn.Identity()
    x = reducer(seen).x
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(-1, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)


def test_patches_that_are_all_alike_give_all_queries_the_same_to_read():
    """Whatever a query looks for, the attention's term is the one value there is."""
    block = QueryResampler(5, 12, 1, 3).blocks[0]
    patches = torch.randn(2, 1, 12).expand(-1, 7, -1)
    read = block.cross(torch.randn(2, 5, 12), context=patches)
    torch.testing.assert_close(read, block.cross.out(block.cross.v(patches[:, :5])))


def test_queries_of_qformer_look_at_each_other_and_every_second_block_at_the_patches():
    reducer, seen = QueryResampler(3, 12, 4, 2), seen_of(1, 3)
    assert [block.cross is not None for block in reducer.blocks] == [True, False, True, False]
    for mode in MODES:
        reducer = QueryResampler(3, 12, 1, 2, mode)
        before = reducer(seen).x
        with torch.no_grad():
            reducer.queries[2] += torch.randn(12)
        assert ((reducer(seen).x - before)[0, :2].abs().amax(1) > 1e-4).all(), mode


def test_places_are_spread_evenly():
    seen = seen_of(2, 4)
    assert QueryResampler(4, 12)(seen).place.tolist() == [[0, 4, 8, 12]] * 2
    assert QueryResampler(34, 12)(seen).place.tolist() == [[index // 2 for index in range(34)]] * 2


@pytest.mark.parametrize("wrong", [{"mode": "q-former"}, {"queries": 0}, {"depth": 0}, {"heads": 5}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="mode must|need a query"):
        QueryResampler(**({"queries": 2, "width": 12} | wrong))
