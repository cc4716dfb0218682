"""SeTok: density peaks make clusters, clusters make tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.related.base import Seen
from mod.related.setok import ClusterMerge, Layer, SeTok, dpc_knn, grid_positions
from tests.related_checks import check, check_gradients, seen_of, some_frames


def blobs(groups, width: int = 8, noise: float = 0.02, seed: int = 0) -> torch.Tensor:
    """(1, P, D), patch p near the corner groups[p], corners far apart."""
    torch.manual_seed(seed)
    corners = torch.eye(width) * 10
    return (corners[torch.tensor(groups)] + noise * torch.randn(len(groups), width))[None]


def partition(labels) -> set:
    """Which patches are together, whatever their clusters are called."""
    labels = labels.tolist()
    return {frozenset(p for p in range(len(labels)) if labels[p] == label) for label in labels}


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 2), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@settings(max_examples=8)
def test_setok_is_a_reducer(side, k, tau, fewest, learned, seed):
    seen = seen_of(4, side, streams=2, seed=seed)
    reducer = SeTok(k, tau, fewest, ClusterMerge(12) if learned else None)
    check(reducer, seen)
    out = reducer(seen)
    centres, labels, score = reducer.clusters(seen.patches)
    for frame in range(4):
        where = centres[frame].nonzero()[:, 0].tolist()
        assert out.place[frame, : out.counts[frame]].tolist() == [0, *(1 + p for p in where)]
        passes = int((score[frame] > tau).sum())
        assert len(where) == (passes or min(fewest, side**2))
        assert set(labels[frame].tolist()) == set(where), "no patch without a centre, no centre without a patch"
        assert labels[frame, where].tolist() == where, "a centre is in its own cluster"
    assert torch.equal(out.x[:, 0], seen.tokens[:, 0]), "the CLS stays what it is"
    assert (out.merge is None) == learned


def test_a_hand_computed_case():
    """Patches at 0, 1, 3 and 10 on a line, k = 2. Densities exp(-1/2), the same, exp(-2) and exp(-49/2); the first two
    tie, so the first is the densest and its δ the largest distance; the others' are 1, 2 and 7."""
    x = torch.tensor([[[0.0], [1], [3], [10]]])
    density = torch.tensor([-0.5, -0.5, -2, -24.5]).exp()
    _, _, score = dpc_knn(x, 2, 0.5, 1)
    torch.testing.assert_close(score[0], density * torch.tensor([10.0, 1, 2, 7]))
    for tau, fewest, expected in ((0.5, 1, [0, 1, 1, 1]), (0.7, 1, [0, 0, 0, 0]), (0.2, 1, [0, 1, 2, 2]), (9, 2, [0, 1, 1, 1])):
        centres, labels, _ = dpc_knn(x, 2, tau, fewest)
        assert labels[0].tolist() == expected and centres[0].nonzero()[:, 0].tolist() == sorted(set(expected))
    assert dpc_knn(x.expand(-1, -1, 4), 2, 0.5, 1)[2].allclose(score), "distances are divided by the root of the width"


def test_the_densest_patch_is_as_far_as_the_farthest_two_of_its_own_frame():
    """The third of five on a line: 5 from any, but the ends are 10 apart. A wider frame next to it changes nothing, nor
    does one in which no patch passes."""
    x = torch.tensor([[[0.0], [4], [5], [6], [10]]])
    frames = torch.cat((x, 9 * x, torch.zeros_like(x)))
    centres, _, score = dpc_knn(frames, 3, 0.5, 2)
    torch.testing.assert_close(score[0, 2], 10 * torch.tensor(-2 / 3).exp())
    for frame in range(3):
        alone = dpc_knn(frames[frame : frame + 1], 3, 0.5, 2)
        assert torch.equal(alone[0][0], centres[frame]) and torch.equal(alone[2][0], score[frame])
    assert centres[0].any() and centres[2].sum() == 2


def test_a_hand_computed_merge():
    """Two kinds of patches in a 2×2 grid: each token is the mean of its kind."""
    patches = torch.tensor([[[2.0, 0, 0, 0], [0, 0, 4, 0], [4, 0, 0, 0], [0, 0, 2, 0]]])  # equal in pairs when normed
    out = SeTok(k=2, tau=0.5)(Seen(torch.cat((torch.ones(1, 1, 4), patches), 1)))
    assert out.place.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(out.x[0], torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 0], [0, 0, 3, 0]]))
    torch.testing.assert_close(out.merge[0, 1:], torch.tensor([[0, 0.5, 0, 0.5, 0], [0, 0, 0.5, 0, 0.5]]))


@given(st.lists(st.integers(0, 4), min_size=16, max_size=16), st.integers(0, 99))
@settings(max_examples=15)
def test_planted_blobs_are_found(groups, seed):
    groups = groups + list(range(5)) * 3  # each has at least three
    centres, labels, _ = dpc_knn(blobs(groups, seed=seed), 3, 0.5, 4)
    assert partition(labels[0]) == partition(torch.tensor(groups)) and centres.sum() == 5


@given(st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=10)
def test_shuffling_shifting_turning_and_the_batch_leave_the_clusters(seed, tau):
    x = seen_of(3, width=8, seed=seed).patches.double()
    centres, labels, score = dpc_knn(x, 5, tau, 4)
    order = torch.randperm(25)
    shuffled = dpc_knn(x[:, order], 5, tau, 4)
    turn = torch.linalg.qr(torch.randn(8, 8).double()).Q
    for frame in range(3):
        named = torch.empty(25, dtype=torch.long)
        named[order] = shuffled[1][frame]
        assert partition(named) == partition(labels[frame])
        alone = dpc_knn(x[frame : frame + 1], 5, tau, 4)
        assert torch.equal(alone[1][0], labels[frame])
    for moved in (x + torch.randn(8), x @ turn):
        assert torch.equal(dpc_knn(moved, 5, tau, 4)[1], labels)
        torch.testing.assert_close(dpc_knn(moved, 5, tau, 4)[2], score)
    assert torch.equal(shuffled[0], centres[:, order])


@given(st.integers(0, 99), st.integers(1, 8))
@settings(max_examples=10)
def test_a_lower_tau_never_makes_fewer_clusters(seed, fewest):
    """But for the clusters that are taken where none passes, which may be more than the first that do."""
    x = seen_of(1, seed=seed).patches
    score = dpc_knn(x, 5, 0, 1)[2]
    counts = [int(dpc_knn(x, 5, tau, fewest)[0].sum()) for tau in torch.linspace(0, 1, 9) * score.max() * 0.99]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert dpc_knn(x, 5, float(score.max()) * 1.01, fewest)[0].sum() == fewest
    assert dpc_knn(x, 5, -1, fewest)[0].all()


@pytest.mark.parametrize("fewest", [1, 3, 99])
def test_equal_patches_fall_back(fewest):
    x = torch.randn(7).expand(2, 25, 7)
    centres, labels, score = dpc_knn(x, 5, 0.5, fewest)
    assert (score == 0).all() and centres.sum(1).tolist() == [min(fewest, 25)] * 2 and centres[:, 0].all()
    assert labels[0].tolist() == [p if p < fewest else 0 for p in range(25)], "ties go to the earlier"
    assert torch.equal(dpc_knn(x, 5, 0.0, fewest)[0], centres), "above tau, not at it"


@given(st.integers(0, 99), st.floats(0.1, 0.5))
@settings(max_examples=10)
def test_means_are_means(seed, tau):
    """Convex rows, inside what they are the mean of; a cluster of one is its patch."""
    seen = seen_of(3, seed=seed)
    reducer = SeTok(tau=tau)
    out, labels = reducer(seen), reducer.clusters(seen.patches)[1]
    torch.testing.assert_close(out.merge.sum(-1), out.valid.float())
    for frame in range(3):
        for row in range(1, int(out.counts[frame])):
            members = (labels[frame] == out.place[frame, row] - 1).nonzero()[:, 0]
            inside = seen.patches[frame, members]
            x = out.x[frame, row]
            assert (x >= inside.amin(0) - 1e-6).all() and (x <= inside.amax(0) + 1e-6).all()
            torch.testing.assert_close(x, inside.mean(0))
            if len(members) == 1:
                assert torch.equal(x, inside[0])


def test_the_count_follows_the_frame():
    """And scale does not: patches are normed before distances are taken."""
    plain, busy = blobs([0, 1] * 8), blobs([0, 1, 2, 3, 4, 5, 6, 7] * 2)
    seen = Seen(torch.cat((torch.zeros(2, 1, 8), torch.cat((plain, busy))), 1))
    out = SeTok(k=2)(seen)
    assert out.counts.tolist() == [3, 9] and out.x[0, 3:].eq(0).all()
    louder = SeTok(k=2)(Seen(seen.tokens * 100))
    assert torch.equal(louder.place, out.place) and torch.equal(louder.valid, out.valid)
    assert torch.equal(SeTok(k=1, tau=-1)(seen).x, seen.tokens), "every patch its own"


def test_the_merger_trains_and_the_clusters_do_not():
    seen = seen_of(2)
    reducer = SeTok(tau=0.2, merger=ClusterMerge(12, inner=2, inter=2))
    seen.tokens.requires_grad_()
    check_gradients(reducer, seen)
    assert seen.tokens.grad.abs().sum() > 0
    assert not reducer.clusters(seen.patches)[2].requires_grad
    assert sum(p.numel() for p in SeTok().parameters()) == 0


def test_inside_a_cluster_patches_see_their_own_and_across_clusters_all_do():
    """Without the second part a cluster's token does not depend on the other clusters, with it on them all."""

    def tokens(patches, inner, inter):
        torch.manual_seed(1)
        reducer = SeTok(k=2, merger=ClusterMerge(12, inner, inter))
        return reducer(Seen(torch.cat((torch.zeros(1, 1, 12), patches), 1))).x[0, 1:]

    patches = blobs([0, 1, 2] * 3, width=12, noise=0)  # equal ones, so that the first three are the centres
    changed = patches.clone()
    changed[:, 2::3] += 0.1 * torch.randn(12)  # the third cluster, as a whole
    for inner, inter, moves in ((1, 0, [False, False, True]), (1, 1, [True, True, True]), (0, 0, [False, False, True])):
        apart = tokens(patches, inner, inter) - tokens(changed, inner, inter)
        assert [bool(d) for d in apart.abs().amax(1) > 1e-6] == moves
    # Without layers it is the mean of patches with their positions; with the first ones, patches hear of each other.
    mean = torch.stack([(patches + grid_positions(3, 12))[0, group::3].mean(0) for group in range(3)])
    torch.testing.assert_close(tokens(patches, 0, 0), mean)
    torch.manual_seed(1)
    layer = ClusterMerge(12, 1, 0).inner[0]
    alone = layer((patches + grid_positions(3, 12))[:, 1::3], torch.ones(1, 3, 3, dtype=torch.bool))
    torch.testing.assert_close(tokens(patches, 1, 0)[1], alone[0].mean(0))


def test_padding_is_not_seen():
    """A frame of few clusters is the same next to one of many, and what is in padding does not matter."""
    frames = torch.cat((blobs([0, 1] * 8), blobs([0, 1, 2, 3, 4, 5, 6, 7] * 2)))
    seen = Seen(torch.cat((torch.zeros(2, 1, 8), frames), 1))
    seen.attention = seen.keys = torch.zeros(2, 16)
    reducer = SeTok(k=2, merger=ClusterMerge(8))
    both, alone = reducer(seen), reducer(some_frames(seen, slice(0, 1)))
    assert both.valid.shape[1] == 9 and alone.valid.shape[1] == 3
    torch.testing.assert_close(both.x[:1, :3], alone.x)
    assert (both.x[0, 3:] == 0).all()
    layer, x, sees = Layer(8, 2), torch.randn(1, 4, 8), torch.tensor([[[True, True, True, False]]])
    other = x.clone()
    other[:, 3] = 1e4
    torch.testing.assert_close(layer(x, sees)[:, :3], layer(other, sees)[:, :3])


def test_a_layer_adds_to_what_it_is_given():
    layer, x = Layer(8, 2), torch.randn(1, 4, 8)
    for last in (layer.out, layer.mlp.fc2):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    assert torch.equal(layer(x, torch.ones(1, 4, 4, dtype=torch.bool)), x)


@pytest.mark.parametrize("side, width", [(1, 4), (3, 12), (4, 6), (5, 7)])
def test_positions_tell_rows_and_columns_apart(side, width):
    place = grid_positions(side, width)
    assert place.shape == (side**2, width) and place.abs().max() <= 1
    assert len({tuple(row) for row in place.tolist()}) == side**2
    half = 2 * -(-width // 4)
    grid = place.view(side, side, width)
    assert torch.equal(grid[:, :1, :half].expand(-1, side, -1), grid[..., :half]), "the first half is the row's"
    assert torch.equal(grid[:1, :, half:].expand(side, -1, -1), grid[..., half:]), "the second half is the column's"
    torch.testing.assert_close(grid[0, :, half], torch.arange(side).float().sin())
