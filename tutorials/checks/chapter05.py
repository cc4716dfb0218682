"""Chapter 5: the cache."""

import torch

from . import Wrong, exercise, instead, looks_like, same, something


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


_SOUND = (
    "def sound(play, pieces, offline, lengths):\n    streamed, held = play(pieces)\n"
    "    return torch.allclose(streamed, offline, atol=1e-9) and held == lengths"
)


@exercise(
    "5.1",
    (_SOUND.replace("torch.allclose(streamed, offline, atol=1e-9)", "torch.equal(streamed, offline)"), "rounding"),
    (_SOUND.replace(" and held == lengths", ""), "lengths"),
    (_SOUND.replace("torch.allclose(streamed, offline, atol=1e-9)", "torch.equal(streamed.argmax(-1), offline.argmax(-1))"), "what the model says"),
    (_SOUND.replace("play(pieces)", "play([slice(i, i + 1) for i in range(pieces[-1].stop)])"), "splits a frame"),
    (_SOUND.replace("torch.allclose(streamed, offline, atol=1e-9) and ", ""), "Counts alone"),
    (
        "def sound(play, pieces, offline, lengths):\n    one, held = play([slice(0, pieces[-1].stop)])\n    many, _ = play(pieces)\n"
        "    return torch.allclose(one, many, atol=1e-9) and held == lengths",
        "without a cache",
    ),
    ("def sound(play, pieces, offline, lengths):\n    return True", "Everything goes free"),
    ("def sound(play, pieces, offline, lengths):\n    return False", "trusts nobody"),
    (_SOUND.replace("play(pieces)", "play([slice(0, len(offline))])"), "never looks back"),
    (_SOUND.replace("return torch", "return not (torch").replace("== lengths", "== lengths)"), "turned round"),
    (_SOUND.replace("streamed, offline, atol", "streamed[:6], offline[:6], atol"), "too few"),
    (_SOUND.replace("return torch.allclose(streamed, offline, atol=1e-9) and", "torch.testing.assert_close(streamed, offline)\n    return"), "do not raise"),
)
def sound(answer) -> str:
    from contextlib import nullcontext
    from unittest.mock import patch

    from bugs import EverybodyCached, MaskedByIndex, Renumbered

    from mod.cache import LayerCache

    class NoPast(LayerCache):
        def append(self, k, v, pos, frame):
            old = int(self.length.max())
            k, v, sees = super().append(k, v, pos, frame)
            return k[:, :, old:], v[:, :, old:], sees[..., old:]

    def trusted(bug) -> bool:
        with bug, torch.no_grad():
            model, batch, x, _ = toy(4)
            cut, text = pieces(batch), int((batch.frame < 0).sum())

            def play(parts):
                _, _, _, cache = toy(4)
                try:
                    logits = torch.cat([feed(model, batch, x, part, cache) for part in parts])
                except ValueError:
                    raise Wrong("One of your cuts splits a frame, which the package refuses: cut between pieces only.") from None
                return logits, cache.lengths()

            offline = model.decoder.logits(model.decoder(x, batch.pos, batch.frame))[0]
            lengths = [kept * 4 + text for kept in model.config.kept]
            with instead(AssertionError, ("",), "It raises where logits differ; return False there, do not raise."):
                return bool(something(answer(play, list(cut), offline, lengths), "sound(...)"))

    if not trusted(nullcontext()):
        if not trusted(patch("mod.decoder.MoDBlock", EverybodyCached)) and not trusted(patch("mod.cache.LayerCache", Renumbered)):
            raise Wrong("It trusts nobody, not even the package. If you compare exactly: streamed and offline sums run in another order, so allow for rounding.")
        if trusted(patch("mod.cache.LayerCache", Renumbered)):
            raise Wrong("You trust a sick cache and not the package: is the answer turned round?")
        raise Wrong("The package itself is not trusted. Streamed and offline sums run in another order, so exact equality is too much: allow for rounding.")
    free = [
        name
        for name, bug in (
            ("renumbered", patch("mod.cache.LayerCache", Renumbered)), ("masked by index", patch("mod.cache.LayerCache", MaskedByIndex)),
            ("everybody cached", patch("mod.decoder.MoDBlock", EverybodyCached)), ("no past", patch("mod.cache.LayerCache", NoPast)),
        )
        if trusted(bug)
    ]  # fmt: skip
    if len(free) == 4:
        raise Wrong("Everything goes free, whatever is wrong with it: stream, and compare with offline and with lengths.")
    if {"renumbered", "masked by index"} <= set(free):
        raise Wrong("Caches that renumber or mask by index go free. Counts alone do not show them: compare the logits with offline; or do you compare too few of them? Bugs wait for the first gap.")
    if "no past" in free:
        raise Wrong("A cache that never looks back goes free: fed in one chunk, a stream has no past to get wrong. Cut it.")
    if "masked by index" in free:
        raise Wrong("A cache that masks by index goes free: it changes no next token, so comparing what the model says is not enough. Compare logits.")
    if "renumbered" in free:
        raise Wrong("A cache that renumbers goes free: one chunk and many agree, since it renumbers both. Compare with offline, the pass without a cache.")
    if "everybody cached" in free:
        raise Wrong("A cache that holds everybody goes free: it agrees with itself, streamed and offline. Compare the entries with lengths.")
    return "Right: one equality and one count, and none of the four escapes."


_TRY = (
    "def try_out(model, cache, position, ids):\n    mark = cache.mark()\n    ids = torch.tensor([ids])\n"
    "    pos = torch.arange(position, position + ids.shape[1])[None]\n"
    "    h = model.decoder(model.decoder.embed(ids), pos, torch.full_like(ids, -1), cache=cache)\n    cache.rewind(mark)\n"
    "    return model.decoder.logits(h)[0]"
)


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
    (_TRY.replace("torch.arange(position,", "1 + torch.arange(position,"), "one later"),
    (_TRY.replace("torch.arange(position, position + ids.shape[1])[None]", "torch.full_like(ids, position)"), "one position"),
    (_TRY + ".softmax(-1)", "Logits"),
)
def try_out(answer) -> str:
    with torch.no_grad():
        model, batch, x, cache = toy(3)
        for part in pieces(batch):
            feed(model, batch, x, part, cache)
        position, before, ids = x.shape[1], cache.lengths(), [3, 7, 9, 1]

        def logits(first: int, past, step: int = 1) -> torch.Tensor:
            mark, tokens = cache.mark(), torch.tensor([ids])
            pos = first + step * torch.arange(len(ids))[None]
            hidden = model.decoder(model.decoder.embed(tokens), pos, torch.full_like(tokens, -1), cache=past)
            cache.rewind(mark)
            return model.decoder.logits(hidden)[0]

        want = logits(position, cache)
        mistakes = {
            "They were fed at position 0 and on, as if the stream began with them; the first stands at `position`.": logits(0, cache),
            "They were fed at the length of a routed layer. That layer has gaps: only the stream knows the position.": logits(before[1], cache),
            "They were fed one later than asked: the first stands at `position` itself.": logits(position + 1, cache),
            "They were all fed at one position; they stand one after the other.": logits(position, cache, 0),
            "These are probabilities. Logits are asked for, as the model gives them.": want.softmax(-1),
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
    (
        "from mod.block import PAD\ndef forget(cache, frame):\n    for layer in cache.layers:\n        layer.pos[layer.frame == frame] = PAD",
        "closes ranks",
    ),
    (
        "def forget(cache, frame):\n    places = cache.layers[1].pos[cache.layers[1].frame == frame]\n    for layer in cache.layers:\n"
        "        layer.forget(places.min()[None], places.max()[None] + 1, None)",
        "from a routed layer",
    ),
    (
        "def forget(cache, frame):\n    for layer in cache.layers:\n        places = layer.pos[layer.frame == frame]\n"
        "        layer.forget(places.min()[None], places.max()[None] + 1, None)\n"
        "        later = (layer.pos > places.max()) & (layer.pos < 2**62)\n        layer.pos[later] -= 5",
        "positions were changed",
    ),
    (
        "def forget(cache, frame):\n    for layer in cache.layers:\n        places = layer.pos[layer.frame == frame]\n"
        "        layer.forget(int(places.min()), int(places.max()) + 1, None)",
        "tensors",
    ),
    (
        "def forget(cache, frame):\n    for layer in cache.layers:\n        places = layer.pos[layer.frame == frame]\n"
        "        layer.forget(places.min(), places.max() + 1, None)",
        "tensors",
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
        spans = "The start and the stop that `layer.forget` is given are tensors (1,), such as places.min()[None], not whole numbers."
        with instead((TypeError, IndexError), ("subscriptable", "dimension", "indices"), spans):
            answer(cache, 1)
        for number, (layer, (pos, frame, k)) in enumerate(zip(cache.layers, held, strict=True)):
            entries, want = layer.pos[layer.pos < 2**62].tolist(), pos[frame != 1].tolist()
            counted = int(layer.length)
            if len(entries) < counted:
                raise Wrong(f"Layer {number} still counts {counted} entries where {len(entries)} have a position: marking them is not enough; `layer.forget` closes ranks.")
            if sorted(layer.frame[0, :counted].tolist()) == sorted(frame[frame != 1].tolist()) and entries != want:
                raise Wrong(f"Layer {number} has entries of the right frames, but their positions were changed; here they stay what they are.")
            left, gone = sorted(set(entries) - set(want)), sorted(set(want) - set(entries))
            texts = [p for p in gone if p in pos[frame < 0].tolist()]
            of_text = (f", and {len(texts)} text entries have gone. Text comes between frames, so a frame's positions cannot be "
                       "reckoned from its number: look at `layer.frame`.") if texts else ""  # fmt: skip
            if left:
                count = "one entry" if len(left) == 1 else f"{len(left)} entries"
                raise Wrong(f"Asked to forget frame 1, layer {number} still holds {count} of it, at positions {left}{of_text or '.'}"
                            f"{' The stop is not included in a span; or was the span taken from a routed layer, which does not hold the whole frame?' if len(left) < int((frame == 1).sum()) and left == pos[frame == 1][-len(left):].tolist() else ''}")  # fmt: skip
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
