"""LLaVA-PruMerge and PruMerge+: outliers of the CLS attention, their neighbours folded in, and the tail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.related.base import Seen
from mod.related.prumerge import PruMerge, grid_step, neighbours, outliers
from tests.related_checks import check, seen_of


def planted(peaks, side: int = 5, frames: int = 1) -> Seen:
    """Attention that is nearly even but for the patches `peaks`."""
    seen = seen_of(frames, side)
    attention = 1 + 0.01 * torch.arange(side * side) / side**2
    attention[list(peaks)] = 5 + torch.arange(len(peaks)).float()
    seen.attention = (attention / attention.sum()).expand(frames, -1)
    return seen


@given(st.integers(1, 6), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 5), st.booleans(), st.integers(0, 99))
@settings(max_examples=10)
def test_prumerge_is_a_reducer_and_its_count_is_the_formulas(side, k, plus, normalise, floor, tail, seed):
    seen = seen_of(4, side, streams=2, seed=seed)
    reducer = PruMerge(k, plus, normalise, floor, tail)
    check(reducer, seen)
    out, patches = reducer(seen), side**2
    for frame in range(4):
        number = max(int(outliers(seen.attention)[frame]), min(floor, patches))
        picked = set(seen.attention[frame].argsort(descending=True)[:number].tolist())
        if plus:
            picked |= set(range(0, patches, max(1, int(int(patches / max(1, number)) / 3))))
        has_tail = tail and len(picked) < patches
        assert out.place[frame, : out.counts[frame]].tolist() == [0, *(1 + p for p in sorted(picked)), *[patches] * has_tail]
    assert torch.equal(out.x[:, 0], seen.tokens[:, 0]), "the CLS stays what it is"


def test_a_hand_computed_case():
    """Of a 3×3 grid patches 1 and 6 stand out; each takes in the one patch whose key points nearly as its own does."""
    attention = torch.tensor([[0.05, 0.3, 0.05, 0.05, 0.05, 0.05, 0.35, 0.05, 0.05]])
    angle = torch.tensor([0, 1.0, 1.1, 2, 2.3, 4, 4.2, 5, 5.4])  # 1 is nearest to 2, 6 to 5
    keys = torch.stack((angle.cos(), angle.sin()), -1)[None] * torch.arange(1, 10)[:, None]  # their length is of no matter
    seen = Seen(torch.arange(10.0)[None, :, None], attention, keys)  # patch p is worth p + 1
    out = PruMerge(k=1)(seen)
    assert out.place.tolist() == [[0, 2, 7, 9]]
    tail = 0.05 * (1 + 3 + 4 + 5 + 6 + 8 + 9)
    torch.testing.assert_close(out.x[0, :, 0], torch.tensor([0, 2 + 0.05 * 3, 7 + 0.05 * 6, tail]))
    mean = PruMerge(k=1, normalise=True)(seen)
    torch.testing.assert_close(mean.x[0, :, 0], torch.tensor([0, 2.15 / 1.05, 7.3 / 1.05, tail / 0.05 / 7]))
    # Two outliers of nine: every ⌊⌊9/2⌋/3⌋-th patch is added, which is every one.
    assert PruMerge(k=1, plus=True)(seen).counts.tolist() == [10]
    # Quartiles of 0, 1, 2, 3, 4 are 1 and 3, the fence 6 or, with the last one moved, the same: 6 is not above it.
    assert outliers(torch.tensor([[0, 1, 2, 3, 4.0], [0, 1, 2, 3, 6], [0, 1, 2, 3, 6.01]])).tolist() == [0, 0, 1]


@given(st.sets(st.integers(0, 24), min_size=1, max_size=5))
@settings(max_examples=10)
def test_planted_outliers_are_what_is_selected(peaks):
    seen = planted(peaks)
    assert PruMerge().select(seen.attention)[0].nonzero()[:, 0].tolist() == sorted(peaks)
    plus = PruMerge(plus=True).select(seen.attention)[0]
    step = max(1, 25 // len(peaks) // 3)
    assert set(plus.nonzero()[:, 0].tolist()) == set(peaks) | set(range(0, 25, step))


@given(st.lists(st.integers(0, 30), min_size=25, max_size=25), st.integers(-3, 3), st.integers(-50, 50))
@settings(max_examples=20)
def test_what_is_selected_does_not_depend_on_scale_or_shift(values, power, shift):
    attention = torch.tensor([values]).float()  # whole numbers and powers of two: exact
    picked = PruMerge(floor=0).select(attention)
    assert torch.equal(PruMerge(floor=0).select(attention * 2.0**power + shift), picked)
    assert picked.sum() == outliers(attention) <= PruMerge(floor=0, tail=False).most(26) - 1


def test_without_outliers_the_floor_is_selected():
    seen = seen_of(2)
    seen.attention = torch.full((2, 25), 1 / 25)
    assert outliers(seen.attention).tolist() == [0, 0]
    for floor in (1, 2, 99):
        out = PruMerge(floor=floor, tail=False)(seen)
        assert out.place[0].tolist() == list(range(1 + min(floor, 25))), "of equals the earlier ones"
    none = PruMerge(floor=0)(seen)
    assert none.counts.tolist() == [2, 2], "the CLS and the tail"
    torch.testing.assert_close(none.x[:, 1], seen.patches.mean(1))


def test_the_floor_takes_those_with_the_most_attention():
    attention = torch.tensor([[3.0, 1, 4, 2, 5, 2, 4, 1, 3]])
    assert PruMerge(floor=2).select(attention)[0].nonzero()[:, 0].tolist() == [2, 4]


@given(st.integers(0, 99), st.booleans())
@settings(max_examples=10)
def test_shuffled_patches_give_the_same_tokens_in_another_order(seed, normalise):
    seen = seen_of(2, seed=seed)
    order = torch.randperm(25)
    shuffled = Seen(torch.cat((seen.tokens[:, :1], seen.patches[:, order]), 1), seen.attention[:, order], seen.keys[:, order])
    reducer = PruMerge(normalise=normalise)
    one, two = reducer(seen), reducer(shuffled)
    for frame in range(2):
        last = int(one.counts[frame]) - 1
        assert two.counts[frame] == last + 1
        back = order[two.place[frame, 1:last] - 1].argsort()
        torch.testing.assert_close(two.x[frame, 1:last][back], one.x[frame, 1:last])
        torch.testing.assert_close(two.x[frame, last], one.x[frame, last])


@given(st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=5)
def test_weights(seed, k):
    """A token has its own patch with weight 1 and k others by their attention, whether these are selected or not; the
    tail has all that is not selected. Normalised, all are means."""
    seen = seen_of(3, seed=seed)
    raw, mean = PruMerge(k, plus=True)(seen), PruMerge(k, plus=True, normalise=True)(seen)
    for frame in range(3):
        last, attention, merge = int(raw.counts[frame]) - 1, seen.attention[frame], raw.merge[frame]
        if last == 25:  # all are selected, there is no tail
            continue
        kept = raw.place[frame, 1:last]
        own = merge[torch.arange(1, last), kept]
        torch.testing.assert_close(own, torch.ones(last - 1))
        for row in range(1, last):
            likeness = torch.cosine_similarity(seen.keys[frame], seen.keys[frame, kept[row - 1] - 1][None])
            likeness[kept[row - 1] - 1] = -2
            near = likeness.topk(k).indices
            others = merge[row].clone()
            others[kept[row - 1]] = 0
            torch.testing.assert_close(others[1 + near], attention[near])
            assert (others > 0).sum() == k and others[0] == 0
        unseen = torch.ones(26)
        unseen[kept], unseen[0] = 0, 0
        torch.testing.assert_close(merge[last], unseen * torch.cat((torch.zeros(1), attention)))
    torch.testing.assert_close(mean.merge.sum(-1), mean.valid.float())
    assert torch.equal(mean.place, raw.place)


@given(st.integers(0, 99), st.integers(1, 3))
@settings(max_examples=10)
def test_prumerge_plus_keeps_what_prumerge_keeps(seed, floor):
    attention = seen_of(4, seed=seed).attention
    less, more = PruMerge(floor=floor).select(attention), PruMerge(floor=floor, plus=True).select(attention)
    assert (more | ~less).all() and (more.sum(1) > less.sum(1)).all() and more[:, 0].all()
    assert grid_step(576, 40) == 4 and grid_step(9, 9) == 1 == grid_step(1, 0)


def test_without_neighbours_and_tail_it_selects_and_with_all_selected_it_changes_nothing():
    seen = seen_of()
    out = PruMerge(k=0, tail=False)(seen)
    for frame in range(4):
        count = out.counts[frame]
        assert torch.equal(out.x[frame, :count], seen.tokens[frame, out.place[frame, :count]])
    for normalise in (False, True):
        assert torch.equal(PruMerge(k=0, floor=25, normalise=normalise)(seen).x, seen.tokens)


def test_more_neighbours_than_patches_are_all_the_others():
    assert torch.equal(neighbours(seen_of(1, 3).keys, 99)[0], ~torch.eye(9, dtype=torch.bool))
    assert not neighbours(seen_of(1, 1).keys, 4).any()


def test_a_neighbour_that_nobody_looks_at_adds_nothing_and_a_frame_nobody_looks_at_has_a_mean():
    seen = planted([7])
    own = neighbours(seen.keys, 3)[0, 7]
    assert own.sum() == 3 and not own[7]
    seen.attention = seen.attention.masked_fill(own, 0)
    torch.testing.assert_close(PruMerge(3)(seen).x[:, 1], seen.tokens[:, 8])
    seen.attention = torch.zeros(1, 25)
    torch.testing.assert_close(PruMerge(floor=0, normalise=True)(seen).x[:, 1], seen.patches.mean(1))


def test_frames_of_a_batch_do_not_share_their_count():
    seen = planted([3], frames=2)
    seen.attention = torch.cat((seen.attention[:1], planted([3, 9, 20, 21]).attention))
    out = PruMerge()(seen)
    assert out.counts.tolist() == [3, 6] and (out.x[0, 3:] == 0).all()


def test_for_a_fixed_selection_it_is_linear_in_the_tokens():
    seen = seen_of()
    out = PruMerge()(seen)
    seen.tokens = seen.tokens.clone().requires_grad_()
    twice = PruMerge()(Seen(2 * seen.tokens + 1, seen.attention, seen.keys))
    torch.testing.assert_close(twice.x, 2 * out.x + out.merge.sum(-1, keepdim=True))
    twice.x.sum().backward()
    torch.testing.assert_close(seen.tokens.grad, 2 * out.merge.sum(1)[..., None].expand_as(seen.tokens))


@pytest.mark.parametrize("side, plus, most", [(1, False, 2), (2, False, 3), (5, False, 8), (24, False, 146), (8, True, 65)])
def test_the_most_that_can_come_out(side, plus, most):
    """At most a quarter lies above the third quartile, and that many can."""
    patches = side**2
    assert PruMerge(plus=plus).most(1 + patches) == most
    above = -(-(patches - 1) // 4)
    attention = torch.arange(patches).float()[None] * 1e-3
    attention[:, patches - above :] = 1e4
    if side in (1, 5):  # (P - 1) / 4 is whole: the quartile is a patch's own
        assert int(PruMerge().select(attention).sum()) == max(1, above)


def test_types_stay():
    seen = seen_of()
    half = Seen(seen.tokens.bfloat16(), seen.attention.bfloat16(), seen.keys.bfloat16())
    assert PruMerge()(half).x.dtype == torch.bfloat16
    wide = Seen(seen.tokens.double(), seen.attention, seen.keys)
    assert PruMerge()(wide).x.dtype == PruMerge()(wide).merge.dtype == torch.float64
