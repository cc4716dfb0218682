"""VoCo-LLaMA: the mask, and that dropping what it hides is the same computation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.layout import Plan
from mod.live.costs import held_bytes
from mod.related.ragged import run_layers
from mod.related.voco import VoCo, VoCoCache, codes, lay_out, stays
from mod.related.voco import mask as batch_mask
from tests.helpers import as_batch as batch_of
from tests.helpers import conversations, small_model
from tests.helpers import frame_of as frame_of_batch

MODEL = small_model(layers="none")
CONFIG = MODEL.config
N, DIM = CONFIG.frame_tokens, CONFIG.dim


def frame_of(talk) -> torch.Tensor:
    return frame_of_batch(batch_of(CONFIG, [talk]))[0]


def mask(frame, voco, recurrent: bool = False, official_prefix: bool = False) -> torch.Tensor:
    """Who sees whom in a whole stream: frame, voco (T,) -> (T, T) bool, query by key."""
    return batch_mask(torch.arange(len(frame))[None], codes(frame, voco)[None], recurrent, official_prefix)[0]


def under(sees, x) -> torch.Tensor:
    """The decoder on x (B, T, D) when sees (T, T) says who sees whom."""
    pos = torch.arange(x.shape[1]).expand(len(x), -1)
    turn = MODEL.decoder.rope.turn(pos, CONFIG.head_dim, x.dtype)
    return MODEL.decoder.norm(run_layers(MODEL.decoder, x, turn, pos, mask=sees[None]))


@st.composite
def streams(draw, most_frames: int = 3):
    """(T,) frame of each token, with text of any length before, between and after; and the rule."""
    parts = [torch.full((draw(st.integers(1, 3)),), -1)]
    for number in range(draw(st.integers(1, most_frames))):
        parts += [torch.full((N,), number), torch.full((draw(st.integers(0, 2)),), -1)]
    return torch.cat([*parts, torch.full((2,), -1)])


RULES = st.fixed_dictionaries({"recurrent": st.booleans(), "official_prefix": st.booleans()})


def setting(frame, k: int, rows: int = 1, seed: int = 0):
    """Random vectors with VoCo tokens put in: x (B, T', D), frame, voco (T',)."""
    torch.manual_seed(seed)
    voco = VoCo(DIM, k).double()
    torch.nn.init.normal_(voco.tokens)
    return voco(torch.randn(rows, len(frame), DIM, dtype=torch.float64), frame)


def offline(x, frame, voco, **rule):
    """One pass over everything under the mask."""
    return under(mask(frame, voco, **rule), x)


def pieces(frame, voco, random) -> list[slice]:
    """Random cuts, none of them inside a frame and its VoCo tokens."""
    of = torch.where(voco >= 0, voco, frame).tolist()
    edges = [i for i in range(1, len(of)) if (of[i] < 0 or of[i] != of[i - 1]) and random.random() < 0.6]
    return [slice(a, b) for a, b in zip([0, *edges], [*edges, len(of)], strict=True)]


def evicted(x, frame, voco, k, parts, **rule):
    """The stream: after every piece what has been compressed is dropped. Also the entries held after each piece."""
    cache = VoCoCache(CONFIG, len(x), x.dtype, k=k, **rule)
    outs, held, code = [], [], codes(frame, voco).expand(len(x), -1)
    for part in parts:
        pos = torch.arange(part.start, part.stop).expand(len(x), -1)
        cache.coming(pos, code[:, part])
        outs.append(MODEL.decoder(x[:, part], Plan(pos, torch.zeros(0, N), {}, {}), cache))
        cache.evict()
        held.append(cache.entries())
    return torch.cat(outs, 1), held, cache


@settings(max_examples=8)
@given(frame=streams(), k=st.integers(0, 3), rule=RULES, random=st.randoms())
def test_masked_whole_equals_evicted_stream(frame, k, rule, random):
    """The key test: every output, text's among them, for two streams at a time, however the stream is cut."""
    x, frame, voco = setting(frame, k, rows=2)
    streamed, held, cache = evicted(x, frame, voco, k, pieces(frame, voco, random), **rule)
    torch.testing.assert_close(streamed, offline(x, frame, voco, **rule), rtol=1e-9, atol=1e-9)
    frames, text = int(frame.max()) + 1, int(((frame < 0) & (voco < 0)).sum())
    assert held[-1] == [frames * k + text] * CONFIG.depth
    layer = cache.layers[0]
    assert torch.equal(layer.pos[1, : layer.lengths[1]], (frame < 0).nonzero()[:, 0]), "original positions"


def test_a_hand_made_mask():
    """<bos> v v c | text | v v c | text, two vision tokens and one VoCo token a frame."""
    frame, voco, source = lay_out(torch.tensor([-1, 0, 0, -1, 1, 1, -1]), 1)
    assert frame.tolist() == [-1, 0, 0, -1, -1, 1, 1, -1, -1]
    assert voco.tolist() == [-1, -1, -1, 0, -1, -1, -1, 1, -1] and source.tolist() == [0, 1, 2, -1, 3, 4, 5, -1, 6]
    assert codes(frame, voco).tolist() == [-1, 0, 0, -2, -1, 1, 1, -3, -1]
    alike = ["100000000", "110000000", "111000000", "111100000", "100110000"]
    text_last = "100110011"
    expected = {
        (False, False): [*alike, "100001000", "100001100", "100001110", text_last],
        (True, False): [*alike, "100111000", "100111100", "100111110", text_last],
        (False, True): [*alike[:4], "000110000", "100001000", "100001100", "100001110", "000110011"],
    }
    for (recurrent, official), rows in expected.items():
        sees = mask(frame, voco, recurrent, official)
        assert ["".join(map(str, row)) for row in sees.int().tolist()] == rows


@given(streams(most_frames=4), st.integers(0, 3), RULES)
def test_who_sees_whom(frame, k, rule):
    frame, voco, _ = lay_out(frame, k)
    sees, of = mask(frame, voco, **rule), torch.where(voco >= 0, voco, frame)
    causal = torch.ones_like(sees).tril()
    text, vision = of < 0, frame >= 0
    assert not (sees & ~causal).any() and sees.diagonal().all()
    assert not sees[text][:, vision].any(), "text never sees vision"
    for t in range(int(frame.max()) + 1):
        mine = of == t
        assert torch.equal(sees[mine][:, mine], causal[mine][:, mine]), "the whole frame, and VoCo all of its vision"
        assert not sees[~mine][:, mine & vision].any(), "a frame's vision is seen by no other token"
        after = text & (torch.arange(len(of)) > int(mine.nonzero()[-1]))
        assert sees[after][:, voco == t].all(), "text sees all VoCo tokens before it"
        prefix = text & (torch.arange(len(of)) < int((of >= 0).nonzero()[0]))
        assert sees[mine][:, prefix].all()
        earlier = voco[None, :].expand_as(sees)[mine]
        earlier = (earlier >= 0) & (earlier < t)
        assert sees[mine][earlier].all() if rule["recurrent"] else not sees[mine][earlier].any()
        assert not (rule["official_prefix"] and sees[after][:, prefix].any())
        assert rule["official_prefix"] or sees[after][:, prefix].all()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
def test_official_prefix_with_one_image_is_the_authors_rule(prefix, k, text):
    """Up to the last VoCo: keys up to it; after it: keys from the first VoCo on; both causal."""
    frame, voco, _ = lay_out(torch.tensor([-1] * prefix + [0] * N + [-1] * text), k)
    first, last = prefix + N, prefix + N + k - 1
    q, key = torch.arange(len(frame))[:, None], torch.arange(len(frame))[None, :]
    expected = (key <= q) & torch.where(q <= last, key <= last, key >= first)
    assert torch.equal(mask(frame, voco, official_prefix=True), expected)


@given(conversations(most_frames=4, least_frames=2), st.integers(0, 3))
def test_without_voco_tokens_or_frames_nothing_is_lost_or_added(talk, k):
    frame = frame_of(talk)
    same, none, source = lay_out(frame, 0)
    assert torch.equal(same, frame) and (none == -1).all() and torch.equal(source, torch.arange(len(frame)))
    _, voco, source = lay_out(frame, k)
    assert int((voco >= 0).sum()) == k * talk[0] and torch.equal(source[source >= 0], torch.arange(len(frame)))
    text = frame[frame < 0]
    assert torch.equal(mask(text, text), torch.ones(len(text), len(text), dtype=torch.bool).tril())


class TestDependence:
    frame = torch.tensor([-1, -1, *[0] * N, -1, *[1] * N, -1, *[2] * N, -1, -1])

    def outputs(self, k, changed, **rule):
        """Outputs before and after frame `changed` is another."""
        x, frame, voco = setting(self.frame, k)
        other = x.clone()
        other[:, frame == changed] = torch.randn_like(other[:, frame == changed])
        return offline(x, frame, voco, **rule)[0], offline(other, frame, voco, **rule)[0], frame, voco

    @pytest.mark.parametrize("recurrent", [False, True])
    def test_a_frame_changes_later_voco_only_if_recurrent(self, recurrent):
        before, after, _, voco = self.outputs(2, 1, recurrent=recurrent)
        changed = [not torch.equal(before[voco == t], after[voco == t]) for t in range(3)]
        assert changed == [False, True, recurrent]

    @pytest.mark.parametrize("rule", [{"recurrent": False}, {"recurrent": True}])
    def test_with_no_voco_tokens_text_knows_nothing_of_frames_and_with_them_it_does(self, rule):
        for k in (0, 1):
            before, after, frame, voco = self.outputs(k, 0, **rule)
            text = (frame < 0) & (voco < 0)
            assert torch.equal(before[text], after[text]) == (k == 0)

    def test_hiding_the_voco_columns_makes_text_blind(self):
        x, frame, voco = setting(self.frame, 2)
        sees = mask(frame, voco, recurrent=True)
        text, compress = (frame < 0) & (voco < 0), voco >= 0
        sees[text[:, None] & compress[None, :]] = False
        other = torch.where((frame >= 0)[None, :, None], torch.randn_like(x), x)
        outs = [under(sees, each) for each in (x, other)]
        assert torch.equal(outs[0][:, text], outs[1][:, text])

    def test_gradient_reaches_frames_through_voco_alone(self):
        torch.manual_seed(0)
        voco = VoCo(DIM, 2).double()
        x = torch.randn(1, len(self.frame), DIM, dtype=torch.float64, requires_grad=True)
        with_voco, frame, number = voco(x, self.frame)
        offline(with_voco, frame, number)[:, -1].square().sum().backward()
        assert voco.tokens.grad.abs().sum(-1).min() > 1e-9, "every VoCo token"
        assert x.grad[0, self.frame >= 0].abs().sum(-1).min() > 1e-12, "every vision token of every frame"
        x.grad = None
        with_voco, frame, number = VoCo(DIM, 0).double()(x, self.frame)
        offline(with_voco, frame, number)[:, -1].square().sum().backward()
        assert (x.grad[0, self.frame >= 0] == 0).all()


def test_the_same_embeddings_stand_after_every_frame():
    voco = VoCo(3, 2)
    x = torch.randn(2, 5, 3)
    out, frame, number = voco(x, torch.tensor([-1, 0, 0, 1, -1]))
    assert frame.tolist() == [-1, 0, 0, -1, -1, 1, -1, -1, -1] and number.tolist() == [-1, -1, -1, 0, 0, -1, 1, 1, -1]
    assert torch.equal(out[:, [0, 1, 2, 5, 8]], x)
    for row in range(2):
        assert torch.equal(out[row, 3:5], voco.tokens) and torch.equal(out[row, 6:8], voco.tokens)


class TestWhatStays:
    def test_by_hand(self):
        """Frame 0 has its two VoCo tokens, frame 1 only one, frame 2 none."""
        code = torch.tensor([[-1, 0, 0, -2, -2, -1, 1, 1, -3, 2, 2]])
        assert stays(code, 2).int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
        assert stays(code, 1).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]]
        assert stays(code, 0).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0]]

    def test_a_frame_stays_until_its_voco_tokens_are_there(self):
        """A cut between a frame and its VoCo tokens is allowed: they still find it."""
        frame = torch.tensor([-1, *[0] * N, *[1] * N, -1, -1])
        x, frame, voco = setting(frame, 2)
        edges = [0, 1, 1 + N, 2 + N, 3 + N, 3 + 2 * N, len(frame)]
        parts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        streamed, held, _ = evicted(x, frame, voco, 2, parts)
        torch.testing.assert_close(streamed, offline(x, frame, voco))
        assert [each[0] for each in held] == [1, 1 + N, 2 + N, 3, 3 + N, 7]

    def test_an_endless_stream_grows_by_k_a_frame(self):
        frame = torch.tensor([-1] + [t for t in range(6) for _ in range(N)])
        x, frame, voco = setting(frame, 1)
        parts = [slice(0, 1), *(slice(1 + t * (N + 1), 1 + (t + 1) * (N + 1)) for t in range(6))]
        _, held, cache = evicted(x, frame, voco, 1, parts)
        assert [each[0] for each in held] == [1, 2, 3, 4, 5, 6, 7]
        assert held_bytes(cache) == 7 * CONFIG.depth * 2 * CONFIG.kv_heads * CONFIG.head_dim * 8
        cache.evict()
        assert cache.entries() == [7] * CONFIG.depth, "nothing left to drop"
