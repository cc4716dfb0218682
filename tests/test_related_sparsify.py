"""VTS-style sparsification: key frames and novelty."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.related.base import Seen
from mod.related.sparsify import MODES, VTS, difference
from tests.related_checks import check, check_gradients, same, seen_of, some_frames

RATIOS = st.sampled_from([0, 0.07, 0.28, 0.5, 0.9, 1.0])


def with_scores(reducer: VTS, z) -> VTS:
    """Scores as given, (F, P), or what a function makes of Seen."""
    reducer.scores = z if callable(z) else lambda seen: torch.as_tensor(z)
    return reducer


def first_entry(seen: Seen) -> torch.Tensor:
    return seen.patches[..., 0]


def keys_of(reducer: VTS, seen: Seen) -> list[int]:
    """Which frames are key frames."""
    reference = reducer.key_frames(seen, reducer.scores(seen))
    return [frame for frame in range(len(reference)) if frame in reference[frame]]


def turned(*degrees: float) -> torch.Tensor:
    """Frames of four patches, all of which look this way."""
    angle = torch.tensor(degrees, dtype=torch.float).deg2rad()
    return torch.stack((angle.cos(), angle.sin()), dim=-1)[:, None].repeat(1, 5, 1)


@settings(max_examples=12)
@given(st.sampled_from(MODES), RATIOS, st.integers(1, 3), st.booleans(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_is_a_reducer_and_its_count_is_the_formulas(mode, rho, keys, novelty, side, streams, seed):
    seen = seen_of(4 * streams, side, streams=streams, seed=seed)
    reducer = VTS(12, rho, mode, keys, tau=1.0, novelty=novelty)
    check(reducer, seen)
    out, key, patches = reducer(seen), keys_of(reducer, seen), side * side
    assert reducer.online == (mode == "stream") and reducer.most(1 + patches) == 1 + patches
    expected = [1 + (patches if frame in key else math.ceil(rho * patches - 1e-9)) for frame in range(4 * streams)]
    assert out.counts.tolist() == expected
    assert mode == "stream" or len(key) == keys * streams
    for row in range(streams):
        assert (seen.rows[key] == row).any(), "every stream has a key frame"
    for frame, count in enumerate(expected):  # one-hot rows, each token once, old places, bit for bit
        place = out.place[frame, :count]
        assert (place.diff() > 0).all() and place[0] == 0
        assert torch.equal(out.x[frame, :count], seen.tokens[frame, place])
        assert torch.equal(out.merge[frame, :count], torch.eye(1 + patches)[place])


@settings(max_examples=6)
@given(st.sampled_from(MODES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_identity_where_everything_is_kept(mode, frames, keys, seed):
    seen = seen_of(frames, 3, seed=seed)
    assert torch.equal(VTS(12, 1.0, mode, keys)(seen).x, seen.tokens)
    one = some_frames(seen, slice(0, 1))
    assert torch.equal(VTS(12, 0.1, mode, keys)(one).x, one.tokens), "a stream of one frame is its own key"
    assert torch.equal(VTS(12, 0.1, "clip", keys=frames)(seen).x, seen.tokens)
    assert torch.equal(VTS(12, 0.1, "stream", tau=-1)(seen).x, seen.tokens)


@settings(max_examples=6)
@given(st.sampled_from(MODES), st.integers(2, 5), st.integers(1, 2), st.integers(0, 99))
def test_equal_frames_show_nothing_new_and_ties_go_by_raster_order(mode, frames, keys, seed):
    seen = seen_of(1, 3, seed=seed)
    still = Seen(seen.tokens.repeat(frames, 1, 1))
    reducer = VTS(12, 0.4, mode, keys, tau=0)
    out, key = reducer(still), keys_of(reducer, still)
    assert len(key) == (1 if mode == "stream" else keys) and (mode == "clip" or key == [0])
    for frame in set(range(frames)) - set(key):
        assert out.place[frame, : out.counts[frame]].tolist() == [0, 1, 2, 3, 4]


def test_a_hand_computed_clip():
    """The second frame has the highest scores. Against it the first frame's patches are new by 0, 1, 2 and 1 - 3/5,
    which the sigmoids 1 (nearly), 1/2, 1/5 and 3/4 turn into 0, 0.5, 0.4 and 0.3."""
    looks = torch.tensor([[3.0, 0], [0, 1], [-2, 0], [6, 8]])
    tokens = torch.cat((torch.full((2, 1, 2), 7.0), torch.stack((looks, torch.tensor([[1.0, 0]]).expand(4, -1)))), dim=1)
    z = torch.tensor([[5, 0, -math.log(4), math.log(3)], [9.0, 9, 9, 9]])
    for rho, places in ((0.25, [0, 2]), (0.5, [0, 2, 3]), (0.75, [0, 2, 3, 4])):
        out = with_scores(VTS(2, rho), z)(Seen(tokens))
        assert out.place[0, : out.counts[0]].tolist() == places and out.counts[1] == 5
        assert torch.equal(out.x[0, : len(places)], tokens[0, places])
    out = with_scores(VTS(2, 0.5, novelty=False), z)(Seen(tokens))
    assert out.place[0, :3].tolist() == [0, 1, 4], "by the scores alone"
    torch.testing.assert_close(difference(looks, torch.tensor([1.0, 0])), torch.tensor([0, 1, 2, 0.4]))


def test_the_key_frame_is_the_one_of_the_largest_mean_softplus():
    """The means of z are 0, 1 and -9 (and the largest z is the third's); those of softplus(z) log 2, 1.31 and 2.75."""
    seen = seen_of(3, 2)
    z = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [11, -15, -16, -16]])
    assert keys_of(with_scores(VTS(12), z), seen) == [2]
    one_bright = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [2, -9, -9, -9]])
    assert keys_of(with_scores(VTS(12), one_bright), seen) == [1], "one bright patch is not yet a bright frame"
    assert keys_of(with_scores(VTS(12, keys=2), z), seen) == [1, 2]
    assert keys_of(with_scores(VTS(12, keys=2), torch.zeros(3, 4)), seen) == [0, 1], "the earlier of equals"


def test_with_several_key_frames_a_patch_is_new_if_it_is_in_none_of_them():
    """The third frame's first patch is as in the first frame, its second as in the second; its third, at 45°, is
    farther from the nearest, though nearer to both together."""
    tokens = turned(0, 90, 45)
    tokens[2, 1:] = torch.stack([tokens[0, 1], tokens[1, 1], tokens[2, 1], tokens[0, 1]])
    z = torch.tensor([[5.0] * 4, [6.0] * 4, [0.0] * 4])
    out = with_scores(VTS(2, 0.25, keys=2), z)(Seen(tokens))
    assert out.counts.tolist() == [5, 5, 2] and out.place[2, :2].tolist() == [0, 3]
    out = with_scores(VTS(2, 0.25, keys=1), z)(Seen(tokens))
    assert out.counts.tolist() == [2, 5, 2] and out.place[2, :2].tolist() == [0, 1], "the first and fourth differ by 1"


def test_hand_computed_key_frames_of_a_stream():
    """With tau = 1 - cos 45°: 60° is too far from 0°, though no frame is from the one before; then 90° is near 60°."""
    reducer, tokens = VTS(2, 0.25, "stream", tau=1 - math.cos(math.radians(45))), turned(0, 30, 60, 90, 120, 80, 0)
    assert keys_of(reducer, Seen(tokens)) == [0, 2, 4, 6]
    assert reducer(Seen(tokens)).counts.tolist() == [5, 2, 5, 2, 5, 2, 5]
    two = Seen(torch.cat((tokens, tokens[1:])), row=torch.tensor([0] * 7 + [1] * 6))
    assert keys_of(reducer, two) == [0, 2, 4, 6, 7, 9, 12], "the second stream begins anew, at 30°"
    assert keys_of(VTS(2, mode="stream", tau=2.1), two) == [0, 7]


def test_the_mean_over_patches_decides_and_the_summary_has_no_say():
    tokens = turned(0, 0, 0)
    tokens[1, 0] = -tokens[1, 0]
    tokens[2, 1] = -tokens[2, 1]  # one patch of four differs by 2: 0.5 in the mean
    assert keys_of(VTS(2, mode="stream", tau=0.49), Seen(tokens)) == [0, 2]
    assert keys_of(VTS(2, mode="stream", tau=0.51), Seen(tokens)) == [0]


@settings(max_examples=8)
@given(RATIOS, st.sampled_from([0.5, 0.9, 1.0, 1.1]), st.integers(0, 99))
def test_a_stream_may_be_cut_off_anywhere(rho, tau, seed):
    seen, reducer = seen_of(6, 2, streams=2, seed=seed), VTS(12, rho, "stream", tau=tau)
    out = reducer(seen)
    for end in range(1, 7):
        same(reducer(some_frames(seen, slice(0, end))), out, slice(0, end))


def test_clip_mode_looks_ahead_and_the_check_would_notice():
    """A late frame that outshines the others is the key frame; without it another is. Stream mode does not care."""
    seen = seen_of(6, 3)
    seen.tokens[5, 1:, 0] = 50
    for mode in MODES:
        reducer = with_scores(VTS(12, 0.5, mode, tau=0.9), first_entry)
        check(reducer, seen)
        reducer.scope = "prefix"  # a claim that is false of clip mode
        if mode == "clip":
            with pytest.raises(AssertionError):
                check(reducer, seen)
        else:
            check(reducer, seen)


@pytest.mark.parametrize("mode", MODES)
def test_the_scorer_is_reached_and_the_gate_leaves_values_alone(mode):
    seen = seen_of(4, 3)
    check_gradients(VTS(12, 0.5, mode, tau=0.9), seen)
    z = torch.randn(4, 9, requires_grad=True)
    out, weight = with_scores(VTS(12, 0.5, mode, tau=0.9), z)(seen), torch.randn(12)
    (out.x @ weight).sum().backward()
    kept = out.merge.sum(1)[:, 1:]
    assert 0 < kept.sum() < kept.numel()
    s = z.detach().sigmoid()
    torch.testing.assert_close(z.grad, kept * (seen.patches @ weight) * s * (1 - s))


def test_the_share_that_is_kept():
    """For 0.6 of the patches of eight frames, one of them key, rho is (0.6 * 8 - 1) / 7."""
    rho, seen = (0.6 * 8 - 1) / 7, seen_of(8, 10)
    kept = int((VTS(12, rho)(seen).counts - 1).sum())
    assert kept == 100 + 7 * math.ceil(rho * 100) and abs(kept / 800 - 0.6) < 0.01
    counts = VTS(12, 0.28)(seen_of(3, 5)).counts.sort().values
    assert counts.tolist() == [8, 8, 26], "0.28 * 25 is 7, though floating point makes a little more of it"


def test_a_score_is_that_of_a_patch_and_its_neighbours():
    seen, reducer = seen_of(2, 5), VTS(12)
    z = reducer.scores(seen)
    assert z.shape == (2, 25)
    seen.tokens[:, 0] += 1
    assert torch.equal(reducer.scores(seen), z), "the summary is not scored"
    seen.tokens[0, 1 + 7] += 1  # row 1, column 2
    moved = (reducer.scores(seen) != z).nonzero().tolist()
    assert moved == [[0, 5 * row + column] for row in range(3) for column in (1, 2, 3)]


@pytest.mark.parametrize("wrong", [{"mode": "window"}, {"rho": 1.1}, {"rho": -0.1}, {"keys": 0}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="mode must|need rho"):
        VTS(12, **wrong)
