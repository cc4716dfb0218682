"""Properties that every Reducer must have, whatever it does; tests/test_related_*.py run them."""

import torch

from mod.related.base import Reducer, Seen


def seen_of(frames: int = 4, side: int = 5, width: int = 12, streams: int = 1, seed: int = 0, query: bool = True) -> Seen:
    """Random frames, divided evenly among streams, with everything that a system may look at."""
    torch.manual_seed(seed)
    attention = torch.randn(frames, side * side).softmax(-1)
    return Seen(
        torch.randn(frames, 1 + side * side, width), attention, torch.randn(frames, side * side, 6),
        torch.arange(frames) * streams // frames, torch.randn(streams, width) if query else None,
    )


def some_frames(seen: Seen, which) -> Seen:
    """The frames `which` (a slice or an index) alone."""
    parts = {name: getattr(seen, name)[which] for name in ("tokens", "attention", "keys")}
    return Seen(**parts, row=seen.rows[which], query=seen.query)


def check(reducer: Reducer, seen: Seen) -> None:
    """Shapes, order and padding; weights; causality; determinism; each stream alone is what it is in the batch."""
    out, tokens = reducer(seen), seen.tokens
    frames, number, width = tokens.shape
    assert out.x.shape == (*out.valid.shape, width) and out.place.shape == out.valid.shape and out.valid.dtype == torch.bool
    assert out.valid.shape[1] <= reducer.most(number) and (out.counts >= 0).all()
    assert (out.valid.int().diff(dim=1) <= 0).all(), "the real tokens come first"
    rising = out.place.diff(dim=1)[out.valid[:, 1:]]
    assert (rising >= 0).all() and (out.place[out.valid] < number).all(), "in the order of the frame"
    assert (out.x[~out.valid] == 0).all(), "padding is nothing"
    again = reducer(seen)
    assert torch.equal(out.x, again.x) and torch.equal(out.valid, again.valid)
    if out.merge is not None:
        assert out.merge.shape == (*out.valid.shape, number) and (out.merge >= 0).all() and (out.merge[~out.valid] == 0).all()
        torch.testing.assert_close(out.merge @ tokens, out.x)
    if reducer.scope == "frame":
        same(reducer(some_frames(seen, slice(1, None))), out, slice(1, None))
    if reducer.online:  # frames that come later change nothing
        later = some_frames(seen, slice(None))
        last = seen.rows == seen.rows[-1]
        cut = int(last.nonzero()[0]) + int(last.sum()) // 2
        later.tokens = tokens.clone()
        later.tokens[cut:] = torch.randn_like(tokens[cut:])
        later.attention = torch.cat((seen.attention[:cut], seen.attention[cut:].flip(1)))
        same(reducer(later), out, slice(0, cut))
    for row in seen.rows.unique().tolist():  # a stream alone is what it is in a batch
        mine = seen.rows == row
        alone = some_frames(seen, mine)
        alone.row = torch.zeros(int(mine.sum()), dtype=torch.long)
        alone.query = seen.query[row : row + 1] if seen.query is not None else None
        same(reducer(alone), out, mine)


def same(one, whole, which) -> None:
    """`one` is what `whole` says about the frames `which`; their padding may differ in length. (Where `one` has been
    given more frames than `which`, its first ones are meant.)"""
    valid, x, place = whole.valid[which], whole.x[which], whole.place[which]
    for frame in range(len(valid)):
        count = int(valid[frame].sum())
        assert count == int(one.valid[frame].sum())
        torch.testing.assert_close(one.x[frame, :count], x[frame, :count])
        assert torch.equal(one.place[frame, :count], place[frame, :count])


def check_gradients(reducer: Reducer, seen: Seen) -> None:
    """Every trainable parameter is reached from the tokens that come out."""
    reducer(seen).x.square().sum().backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
