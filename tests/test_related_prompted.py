"""Free Video-LLM: which frames, which region, and what is handed on of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.related.prompted import PromptGuided, box_size, coarse_weights, roi_box, select_frames, spread_frames
from tests.related_checks import check, seen_of

SHARES = st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0])


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(0, 3), SHARES, st.integers(0, 6), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6))
def test_it_is_a_reducer_and_its_counts_are_the_formulas(slow, middle, share, coarse, pool, streams, side):
    seen = seen_of(5 * streams, side, streams=streams, seed=side)
    guided = PromptGuided(slow, middle, share, coarse, pool)
    check(guided, seen)
    detailed, box = guided.detailed(seen), math.prod(box_size(side, -(-side // pool), share))
    plain = 1 + min(coarse, side) ** 2
    assert guided(seen).counts.tolist() == [plain + box * (frame in detailed) for frame in range(5 * streams)]
    assert guided.most(1 + side**2) == plain + box * bool(slow or middle)
    for row in range(streams):
        mine = [frame - 5 * row for frame in detailed if frame // 5 == row]
        assert max(slow, middle) <= len(mine) <= slow + middle and {5 * i // middle for i in range(middle)} <= set(mine)


def plain(seen, guided):
    """Frame by frame in Python: a list of (place, is it detail, vector), in the order in which they have to come."""
    side, out = seen.side, []
    cells = F.adaptive_avg_pool2d(seen.patches.transpose(1, 2).unflatten(2, (side, side)), guided.coarse)
    for frame in range(len(seen.tokens)):
        mine = [f for f in range(len(seen.tokens)) if seen.rows[f] == seen.rows[frame]]
        ask, grid = seen.query[seen.rows[frame]], seen.patches[frame].unflatten(0, (side, side))
        cosine = lambda v, q=ask: float(v @ q / v.norm() / q.norm())  # noqa: E731
        best = sorted(mine, key=lambda f: -cosine(seen.tokens[f, 0]))[: guided.slow]
        tokens = [(0, False, seen.tokens[frame, 0])]
        for a in range(guided.coarse):
            for b in range(guided.coarse):
                start = a * side // guided.coarse * side + b * side // guided.coarse
                tokens.append((1 + start, False, cells[frame, :, a, b]))
        if frame in best or frame in [mine[len(mine) * i // guided.middle] for i in range(guided.middle)]:
            columns = [range(c, min(c + guided.pool, side)) for c in range(0, side, guided.pool)]
            detail = {(y, x): grid[y, list(c)].amax(0) for y in range(side) for x, c in enumerate(columns)}
            hot = sorted(detail, key=lambda at: -cosine(detail[at]))[: max(1, int(guided.share * len(detail)))]
            ends = []
            for axis, length in enumerate((side, len(columns))):
                size = max(1, round(length * guided.share**0.5))
                centre = math.floor(sum(at[axis] for at in hot) / len(hot) + 0.5)
                start = sorted((0, centre - size // 2, length - size))[1]
                ends.append(range(start, start + size))
            tokens += [(1 + y * side + columns[x][0], True, detail[y, x]) for y in ends[0] for x in ends[1]]
        out.append(sorted(tokens, key=lambda token: token[:2]))
    return out


@settings(max_examples=12)
@given(st.integers(1, 2), st.integers(1, 2), SHARES, st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_equals_a_plain_version(slow, middle, share, pool, streams, seed):
    """Catches a grid turned on its side, streams mixed up, frames chosen by another's question, a box shifted."""
    seen = seen_of(4 * streams, 5, streams=streams, seed=seed)
    guided = PromptGuided(slow, middle, share, 3, pool)
    out = guided(seen)
    for frame, expected in enumerate(plain(seen, guided)):
        count = int(out.counts[frame])
        assert out.place[frame, :count].tolist() == [place for place, _, _ in expected]
        torch.testing.assert_close(out.x[frame, :count], torch.stack([vector for _, _, vector in expected]))


def test_a_hand_computed_case():
    """One stream of two frames, 2×2 patches, width 2; the question is (1, 0). Frame 1 is like it, its patch 2 most."""
    seen = seen_of(2, 2, 2)
    seen.query = torch.tensor([[1.0, 0.0]])
    seen.tokens = torch.tensor([[[0.0, 1], [1, 0], [1, 0], [1, 0], [1, 0]], [[2, 0], [0, 1], [0, 3], [4, 0], [0, -4]]])
    out = PromptGuided(slow=1, middle=0, share=0.25, coarse=1, pool=1)(seen)
    assert out.counts.tolist() == [2, 3] and out.place[1].tolist() == [0, 1, 3]
    assert out.x.tolist() == [[[0, 1], [1, 0], [0, 0]], [[2, 0], [1, 0], [4, 0]]]
    assert PromptGuided(slow=0, middle=1, share=0.25, coarse=0, pool=1)(seen).counts.tolist() == [2, 1]
    pair = PromptGuided(slow=1, middle=0, share=0.5, coarse=0, pool=2)(seen)  # rows become (0, 3) and (4, 0), one stays
    assert pair.x[1].tolist() == [[2, 0], [4, 0]] and pair.place[1].tolist() == [0, 3] and pair.merge is None


def test_the_numbers_of_the_official_setting():
    """50 frames of 24×24: 8 regions of 231 and 50 * 16 averages; here a region that two paths chose comes once."""
    seen, guided = seen_of(50, 24, 4), PromptGuided()
    assert box_size(24, 12, 0.8) == (21, 11) and 8 * 231 + 50 * 16 == 2648
    chosen = len(guided.detailed(seen))
    assert 5 <= chosen <= 8 and int((guided(seen).counts - 1).sum()) == chosen * 231 + 50 * 16


def test_everything_may_stay():
    """Regions of all frames, of full size, without pooling: the tokens themselves."""
    seen = seen_of(6, 5, streams=2)
    for slow, middle in ((3, 0), (0, 3), (9, 9)):
        out = PromptGuided(slow, middle, share=1, coarse=0, pool=1)(seen)
        assert torch.equal(out.x, seen.tokens) and torch.equal(out.merge, torch.eye(26).expand(6, -1, -1))


@given(st.integers(1, 9), st.integers(0, 11), st.integers(0, 99))
def test_frames_are_distinct_in_order_and_the_best(number, k, seed):
    torch.manual_seed(seed)
    ask, frames = torch.randn(6, dtype=torch.float64), torch.randn(number, 6, dtype=torch.float64)
    got = select_frames(ask, frames, k)
    assert len(got) == min(k, number) and (got.diff() > 0).all()
    alike = F.cosine_similarity(ask, frames, dim=-1)
    left = torch.ones(number, dtype=torch.bool)
    left[got] = False
    assert not left.any() or k == 0 or alike[got].min() >= alike[left].max()
    scale = torch.rand(number, 1, dtype=torch.float64) + 0.1
    assert torch.equal(got, select_frames(7 * ask, frames * scale, k))
    spread = spread_frames(number, k)
    assert len(spread) == min(k, number) and (spread.diff() > 0).all() and spread.tolist()[:1] == [0][: min(k, 1)]
    assert k < 2 or number < k or int(spread.diff().max() - spread.diff().min()) <= 1


def test_the_earliest_of_equals():
    assert select_frames(torch.ones(2), torch.ones(4, 2), 2).tolist() == [0, 1]
    assert roi_box(torch.ones(3, 3), 0.12) == (0, 1, 0, 1)


@given(st.integers(1, 9), st.integers(1, 9), SHARES, st.integers(0, 99))
def test_a_box_is_inside_and_its_size_does_not_depend_on_the_scores(rows, columns, share, seed):
    torch.manual_seed(seed)
    top, bottom, left, right = roi_box(torch.randn(rows, columns), share)
    assert 0 <= top < bottom <= rows and 0 <= left < right <= columns
    assert (bottom - top, right - left) == box_size(rows, columns, share)
    assert share < 1 or (top, bottom, left, right) == (0, rows, 0, columns)


@given(st.integers(3, 12), st.integers(3, 12), st.sampled_from([0.3, 0.5, 0.8]), st.data())
def test_a_hot_box_is_found(rows, columns, share, data):
    """To within a cell; exactly where as many cells are the best as the box has."""
    height, width = box_size(rows, columns, share)
    top, left = data.draw(st.integers(0, rows - height)), data.draw(st.integers(0, columns - width))
    score = torch.zeros(rows, columns)
    score[top : top + height, left : left + width] = 1
    found = roi_box(score, share)
    assert abs(found[0] - top) <= 1 and abs(found[2] - left) <= 1
    if height * width == int(share * rows * columns):
        assert found == (top, top + height, left, left + width)


def test_hot_boxes_of_even_and_odd_size_are_found_exactly():
    for side, size in ((4, 2), (5, 3), (6, 4)):
        for top in range(side - size + 1):
            score = torch.zeros(side, side)
            score[top : top + size, 1 : 1 + size] = 1
            assert roi_box(score, size**2 / side**2) == (top, top + size, 1, 1 + size)


def test_two_hot_spots_lose_the_better_one():
    """A centre of mass lies between them: the best cell need not be in the box."""
    score = torch.zeros(7, 7)
    score[0, 0], score[6, 6] = 2, 1
    top, bottom, left, right = roi_box(score, 2 / 49)
    assert (top, bottom, left, right) == (3, 4, 3, 4)


def test_another_question_other_frames_and_a_scaled_one_the_same():
    seen = seen_of(8, 5, seed=3)
    guided = PromptGuided(2, 1, 0.4)
    first = guided(seen)
    seen.query = 3 * seen.query
    assert torch.equal(guided(seen).x, first.x)
    seen.query = torch.randn_like(seen.query)
    assert not torch.equal(guided(seen).counts, first.counts)
    assert not guided.online and guided.scope == "query"
    seen.query = None
    with pytest.raises(ValueError, match="question"):
        guided(seen)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 3))
def test_pooled_tokens_lie_between_their_patches(side, coarse, pool):
    weights = coarse_weights(side, min(coarse, side))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    seen = seen_of(3, side)
    out = PromptGuided(1, 1, 1.0, coarse, pool)(seen)
    low, high = seen.tokens.amin(1, keepdim=True), seen.tokens.amax(1, keepdim=True)
    assert ((out.x >= low - 1e-6) & (out.x <= high + 1e-6))[out.valid].all()
    assert torch.equal(out.x[:, 0], seen.tokens[:, 0]), "the summary stays"
