"""Chapter 5: the cache."""

import torch

from . import Wrong, exercise, looks_like, same, something


def toy(frames: int, stream=None):
    """A small model, a conversation, its embedded row, and an empty cache for it."""
    from mod.cache import KVCache
    from mod.layout import Say
    from tests.helpers import as_batch, small_model

    model = small_model(keep_ratio=0.4)
    said = [Say(0, "assistant", "red disc appears top"), Say(1, "user", "where is it ?"), Say(1, "assistant", "now left")]
    batch = as_batch(model.config, [(frames, said)])
    x = model.embed(batch.ids, batch.frame, model.see(batch.pixels))
    return model, batch, x, KVCache(model.config, frames=frames, text=60, stream=stream, dtype=torch.float64)


def pieces(batch) -> list[slice]:
    """A frame or a text token each."""
    frame, cut = batch.frame[0].tolist(), []
    while not cut or cut[-1].stop < len(frame):
        start = cut[-1].stop if cut else 0
        cut.append(slice(start, start + (5 if frame[start] >= 0 else 1)))
    return cut


def feed(model, batch, x, part, cache) -> torch.Tensor:
    hidden = model.decoder(x[:, part], batch.pos[:, part], batch.frame[:, part], cache=cache)
    return model.decoder.logits(hidden)[0]


@exercise(
    "5.1",
    ("def sees(query, key):\n    return key[None, :] < query[:, None]", "itself"),
    ("def sees(query, key):\n    return key[None, :] >= query[:, None]", "future"),
    ("def sees(query, key):\n    return torch.ones(len(query), len(key)).tril(len(key) - len(query)).bool()", "counted from the end"),
    ("def sees(query, key):\n    return torch.ones(len(query), len(key)).tril().bool()", "first key"),
    ("def sees(query, key):\n    return torch.arange(len(key))[None, :] <= query[:, None]", "places in the list"),
    ("def sees(query, key):\n    return key[:, None] <= query[None, :]", "turned round"),
)
def sees(answer) -> str:
    # A dense layer's query that has no key of its own, as when tokens were skipped, makes the square mask wrong as well.
    query, key = torch.tensor([6, 8, 9, 13]), torch.tensor([0, 1, 3, 6, 9, 10, 13])
    want = key[None, :] <= query[:, None]
    got = something(answer(query.clone(), key.clone()), "sees(query, key)")
    if isinstance(got, torch.Tensor) and got.shape == want.T.shape:
        raise Wrong("The mask is turned round, (S, T): a row for each query, a column for each key is asked for.")
    hints = {
        "No token sees itself: p' ≤ p, not p' < p. (A first token would see nothing, and its softmax would be nan.)":
            key[None, :] < query[:, None],
        "Queries see the future and nothing else; turn the comparison.": key[None, :] >= query[:, None],
        "This is a triangle counted from the end, as if the last keys belonged to the queries one by one. With gaps they do not: "
        "compare positions.": torch.ones(4, 7).tril(3).bool(),
        "This is a triangle that begins with the first key: what `is_causal` gives when there is a past. Compare positions.":
            torch.ones(4, 7).tril().bool(),
        "These are places in the list of keys, compared with positions: bug 2 of this chapter. Compare key with query.":
            torch.arange(7)[None, :] <= query[:, None],
    }  # fmt: skip
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, want, "sees(query, key)")
    return "Right, gaps and all; nothing but positions was needed."


@exercise(
    "5.2",
    (
        "def try_out(model, cache, position, ids):\n    ids = torch.tensor([ids])\n    pos = torch.arange(position, position + ids.shape[1])[None]\n"
        "    return model.decoder.logits(model.decoder(model.decoder.embed(ids), pos, torch.full_like(ids, -1), cache=cache))[0]",
        "rewind",
    ),
    (
        "def try_out(model, cache, position, ids):\n    mark = cache.mark()\n    ids = torch.tensor([ids])\n    pos = torch.arange(ids.shape[1])[None]\n"
        "    h = model.decoder(model.decoder.embed(ids), pos, torch.full_like(ids, -1), cache=cache)\n    cache.rewind(mark)\n"
        "    return model.decoder.logits(h)[0]",
        "position 0",
    ),
    (
        "def try_out(model, cache, position, ids):\n    mark = cache.mark()\n    ids = torch.tensor([ids])\n"
        "    pos = cache.lengths()[1] + torch.arange(ids.shape[1])[None]\n"
        "    h = model.decoder(model.decoder.embed(ids), pos, torch.full_like(ids, -1), cache=cache)\n    cache.rewind(mark)\n"
        "    return model.decoder.logits(h)[0]",
        "length of a routed layer",
    ),
    (
        "def try_out(model, cache, position, ids):\n    ids = torch.tensor([ids])\n    pos = torch.arange(position, position + ids.shape[1])[None]\n"
        "    h = model.decoder(model.decoder.embed(ids), pos, torch.full_like(ids, -1))\n    return model.decoder.logits(h)[0]",
        "without the past",
    ),
)
def try_out(answer) -> str:
    with torch.no_grad():
        model, batch, x, cache = toy(3)
        for part in pieces(batch):
            feed(model, batch, x, part, cache)
        position, before, ids = x.shape[1], cache.lengths(), [3, 7, 9, 1]

        def logits(first: int, past) -> torch.Tensor:
            mark, tokens = cache.mark(), torch.tensor([ids])
            pos = torch.arange(first, first + len(ids))[None]
            hidden = model.decoder(model.decoder.embed(tokens), pos, torch.full_like(tokens, -1), cache=past)
            cache.rewind(mark)
            return model.decoder.logits(hidden)[0]

        want = logits(position, cache)
        mistakes = {
            "They were fed at position 0 and on, as if the stream began with them; the first stands at `position`.": logits(0, cache),
            "They were fed at the length of a routed layer. That layer has gaps: only the stream knows the position.": logits(before[1], cache),
            "They were fed without the past: hand the cache to the decoder.": logits(position, None),
        }
        got = something(answer(model, cache, position, list(ids)), "try_out(...)")
        after = cache.lengths()
        for hint, mistake in mistakes.items():
            looks_like(got, mistake, hint, 1e-9)
        if isinstance(got, torch.Tensor) and got.shape == (1, *want.shape):
            raise Wrong(f"The logits have shape {tuple(got.shape)}, expected {tuple(want.shape)}: take the only row of the batch.")
        same(got, want, "try_out(...)", 1e-9)
        if after != before:
            raise Wrong(f"The logits are right, but the cache now holds {after} entries by layer, before it was {before}: mark it first and "
                        "rewind it to the mark.")  # fmt: skip
        same(something(answer(model, cache, position, list(ids)), "try_out(...)"), want, "try_out(...), the second time,", 1e-9)
    return "Right, and the cache is as it was; asked twice, it says the same."


@exercise(
    "5.3",
    (
        "def forget(cache, frame):\n    layer = cache.layers[0]\n    places = layer.pos[layer.frame == frame]\n"
        "    layer.forget(places.min()[None], places.max()[None] + 1, None)",
        "layer 1",
    ),
    (
        "def forget(cache, frame):\n    start = torch.tensor([1 + 5 * frame])\n    for layer in cache.layers:\n"
        "        layer.forget(start, start + 5, None)",
        "text",
    ),
    (
        "from mod.block import Rope\ndef forget(cache, frame):\n    for layer in cache.layers:\n        places = layer.pos[layer.frame == frame]\n"
        "        layer.forget(places.min()[None], places.max()[None] + 1, Rope.of(cache.config))",
        "turned",
    ),
    (
        "def forget(cache, frame):\n    for layer in cache.layers:\n        places = layer.pos[layer.frame == frame]\n"
        "        layer.forget(places.min()[None], places.max()[None], None)",
        "one entry",
    ),
)
def forget(answer) -> str:
    from mod.config import StreamConfig

    frames, window = 5, 2
    with torch.no_grad():
        model, batch, x, cache = toy(frames)
        parts = pieces(batch)
        for part in parts:
            feed(model, batch, x, part, cache)
        held = [(layer.pos[layer.pos < 2**62], layer.frame[layer.pos < 2**62], layer.k[0, 0].clone()) for layer in cache.layers]
        answer(cache, 1)
        for number, (layer, (pos, frame, k)) in enumerate(zip(cache.layers, held, strict=True)):
            entries, want = layer.pos[layer.pos < 2**62].tolist(), pos[frame != 1].tolist()
            left, gone = sorted(set(entries) - set(want)), sorted(set(want) - set(entries))
            texts = [p for p in gone if p in pos[frame < 0].tolist()]
            of_text = (f", and {len(texts)} text entries have gone. Text comes between frames, so a frame's positions cannot be "
                       "reckoned from its number: look at `layer.frame`.") if texts else ""  # fmt: skip
            if left:
                count = "one entry" if len(left) == 1 else f"{len(left)} entries"
                raise Wrong(f"Asked to forget frame 1, layer {number} still holds {count} of it, at positions {left}{of_text or '.'}"
                            f"{' The stop is not included in a span.' if left == pos[frame == 1][-1:].tolist() else ''}")  # fmt: skip
            if gone:
                others = sorted({int(f) for p, f in zip(pos.tolist(), frame.tolist(), strict=True) if p in gone})
                raise Wrong(f"Layer {number} lost entries of {others} (-1 is text), not of frame 1 alone, at positions {gone}.")
            if not torch.equal(layer.k[0, 0, : len(want)], k[: len(pos)][frame != 1]):
                raise Wrong(f"Layer {number} has the right entries, but their keys were turned: positions stay what they are, so no RoPE is "
                            "to be given.")  # fmt: skip
        # and in a stream: the same logits as the package's window that forgets vision alone
        settings = StreamConfig(window=window, forget="vision", positions="absolute")
        model, batch, x, mine = toy(frames)
        _, _, _, package = toy(frames, settings)
        for part in parts:
            frame = int(batch.frame[0, part.start])
            if frame >= window:
                answer(mine, frame - window)
            same(feed(model, batch, x, part, mine), feed(model, batch, x, part, package), f"logits at position {part.start} on", 1e-9)
    return "Right: a stream with your function gives the logits of the package's window, chunk by chunk."
