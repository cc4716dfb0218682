"""Chapter 5: the cache."""

import torch

from . import Wrong, exercise, instead, looks_like, same, something


class Toy:
    """A small model, a conversation as the decoder is fed it, and what it takes to stream it."""

    def __init__(self, frames: int, seed: int = 0):
        from mod.layout import Say
        from tests.helpers import as_batch, frame_of, small_model

        said = [Say(0, "assistant", "red disc appears top"), Say(1, "user", "where is it ?"), Say(1, "assistant", "now left")]
        self.model = small_model(seed, keep_ratio=0.4)
        self.batch = as_batch(self.model.config, [(frames, said)])
        self.frame = frame_of(self.batch)
        seen = self.model.see(self.batch.pixels).flatten(0, 1)
        x = self.model.decoder.embed(self.batch.ids)[0]
        self.x = x.index_copy(0, self.batch.plan.vision.flatten(), seen)[None]

    def pieces(self) -> list[slice]:
        """A frame or a text token each."""
        frame, cut = self.frame[0].tolist(), []
        while not cut or cut[-1].stop < len(frame):
            start = cut[-1].stop if cut else 0
            cut.append(slice(start, start + (5 if frame[start] >= 0 else 1)))
        return cut

    def plan(self, frame, start: int):
        from mod.layout import make_plan

        return make_plan(frame.numpy(), [start], 5, self.model.config.keep_counts)

    def decode(self, x, plan, cache) -> torch.Tensor:
        if cache is not None:
            cache.begin(plan)
        return self.model.decoder.logits(self.model.decoder(x, plan, cache))[0]

    def feed(self, part: slice, cache) -> torch.Tensor:
        return self.decode(self.x[:, part], self.plan(self.frame[:, part], part.start), cache)


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
    ("def sound(play, pieces, offline, lengths):\n    return True", "Everything passes"),
    ("def sound(play, pieces, offline, lengths):\n    return False", "trusts nobody"),
    (_SOUND.replace("play(pieces)", "play([slice(0, len(offline))])"), "never looks back"),
    (_SOUND.replace("return torch", "return not (torch").replace("== lengths", "== lengths)"), "turned round"),
    (_SOUND.replace("streamed, offline, atol", "streamed[:6], offline[:6], atol"), "too few"),
    (_SOUND.replace("return torch.allclose(streamed, offline, atol=1e-9) and", "torch.testing.assert_close(streamed, offline)\n    return"), "do not raise"),
)
def sound(answer) -> str:
    from contextlib import nullcontext
    from unittest.mock import patch

    from bugs import MaskedByIndex, Renumbered, everybody_cached

    from mod.cache import LayerCache

    class NoPast(LayerCache):
        def append(self, k, v, pos):
            own = slice(self.lengths[0] - k.shape[2], self.lengths[0])
            k, v, sees = super().append(k, v, pos)
            return k[:, :, own], v[:, :, own], sees[..., own]

    def trusted(bug) -> bool:
        with bug, torch.no_grad():
            toy = Toy(4, 28)  # whose first tokens, and next words, two of the sick caches leave as they are
            text = int((toy.frame < 0).sum())

            def play(parts):
                cache = toy.model.new_cache()
                try:
                    logits = torch.cat([toy.feed(part, cache) for part in parts])
                except ValueError:
                    raise Wrong("One of your cuts splits a frame, which the package refuses: cut between pieces only.") from None
                return logits, cache.entries()

            offline = toy.decode(toy.x, toy.batch.plan, None)
            lengths = [kept * 4 + text for kept in toy.model.config.keep_counts]
            with instead(AssertionError, ("",), "It raises where logits differ; return False there, do not raise."):
                return bool(something(answer(play, toy.pieces(), offline, lengths), "sound(...)"))

    if not trusted(nullcontext()):
        if not trusted(everybody_cached()) and not trusted(patch("mod.decoder.Attention", Renumbered)):
            raise Wrong("It trusts nobody, not even the package. If you compare exactly: streamed and offline sums run in another order, so allow for rounding.")
        if trusted(patch("mod.decoder.Attention", Renumbered)):
            raise Wrong("You trust a cache with a bug and not the package: is the answer turned round?")
        raise Wrong("The package itself is not trusted. Streamed and offline sums run in another order, so exact equality is too much: allow for rounding.")
    free = [
        name
        for name, bug in (
            ("renumbered", patch("mod.decoder.Attention", Renumbered)), ("masked by index", patch("mod.cache.LayerCache", MaskedByIndex)),
            ("everybody cached", everybody_cached()), ("no past", patch("mod.cache.LayerCache", NoPast)),
        )
        if trusted(bug)
    ]
    if len(free) == 4:
        raise Wrong("Everything passes, whatever is wrong with it: stream, and compare with offline and with lengths.")
    if {"renumbered", "masked by index"} <= set(free):
        raise Wrong("Caches that renumber or mask by index pass. Counts alone do not show them: compare the logits with offline; or do you compare too few of them? Bugs show from the first gap on.")
    if "no past" in free:
        raise Wrong("A cache that never looks back passes: fed in one chunk, a stream has no past to get wrong. Cut it.")
    if "masked by index" in free:
        raise Wrong("A cache that masks by index passes: it changes no next token, so comparing what the model says is not enough. Compare logits.")
    if "renumbered" in free:
        raise Wrong("A cache that renumbers passes: one chunk and many agree, since it renumbers both. Compare with offline, the pass without a cache.")
    if "everybody cached" in free:
        raise Wrong("A cache that holds everybody passes: it agrees with itself, streamed and offline. Compare the entries with lengths.")
    return "Right: one equality and one count, and all four bugs are found."


_TRY = """import numpy as np
def try_out(model, cache, position, ids):
    mark = cache.mark()
    plan = layout.make_plan(np.full((1, len(ids)), -1), [position], 5, model.config.keep_counts)
    h = model.hidden(torch.tensor([ids]), None, plan, cache)
    cache.rewind(mark)
    return model.decoder.logits(h)[0]"""


@exercise(
    "5.2",
    (_TRY.replace("    cache.rewind(mark)\n", ""), "rewind"),
    (_TRY.replace("[position]", "[0]"), "position 0"),
    (_TRY.replace("[position]", "[cache.entries()[1]]"), "length of a routed layer"),
    (_TRY.replace("plan, cache)", "plan)"), "without the past"),
    (_TRY.replace("[position]", "[position + 1]"), "one later"),
    (_TRY.replace("plan, cache)", "plan._replace(pos=torch.full_like(plan.pos, position)), cache)"), "one position"),
    (_TRY + ".softmax(-1)", "Logits"),
    (_TRY.replace("model.decoder.logits(h)[0]", "h[0]"), "hidden states"),
    (
        "import numpy as np\ndef try_out(model, cache, position, ids):\n    mark, out = cache.mark(), []\n    for i in ids:\n"
        "        plan = layout.make_plan(np.full((1, 1), -1), [position], 5, model.config.keep_counts)\n"
        "        out.append(model.decoder.logits(model.hidden(torch.tensor([[i]]), None, plan, cache))[0])\n"
        "    cache.rewind(mark)\n    return torch.cat(out)",
        "one by one",
    ),
)
def try_out(answer) -> str:
    with torch.no_grad():
        toy = Toy(3)
        model, cache = toy.model, toy.model.new_cache()
        for part in toy.pieces():
            toy.feed(part, cache)
        position, before, ids = toy.x.shape[1], cache.entries(), [3, 7, 9, 1]

        def logits(first: int, past, step: int = 1) -> torch.Tensor:
            mark, plan = cache.mark(), toy.plan(torch.full((1, len(ids)), -1), 0)
            plan = plan._replace(pos=first + step * torch.arange(len(ids))[None])
            found = toy.decode(model.decoder.embed(torch.tensor([ids])), plan, past)
            cache.rewind(mark)
            return found

        def one_by_one() -> torch.Tensor:
            mark, plan = cache.mark(), toy.plan(torch.full((1, 1), -1), position)
            found = [toy.decode(model.decoder.embed(torch.tensor([[i]])), plan, cache) for i in ids]
            cache.rewind(mark)
            return torch.cat(found)

        want = logits(position, cache)
        mistakes = {
            "They were fed at position 0 and on, as if the stream began with them; the first stands at `position`.": logits(0, cache),
            "They were fed at the length of a routed layer. That layer has gaps: only the stream knows the position.": logits(before[1], cache),
            "They were fed one later than asked: the first stands at `position` itself.": logits(position + 1, cache),
            "They were all fed at one position; they stand one after the other.": logits(position, cache, 0),
            "They were fed one by one, all at one position; the position rises by one with each.": one_by_one(),
            "These are probabilities. Logits are asked for, as the model gives them.": want.softmax(-1),
            "They were fed without the past: pass the cache.": logits(position, None),
        }
        got = something(answer(model, cache, position, list(ids)), "try_out(...)")
        after = cache.entries()
        for hint, mistake in mistakes.items():
            looks_like(got, mistake, hint, 1e-9)
        if isinstance(got, torch.Tensor) and got.shape[-1] == model.config.dim != want.shape[-1]:
            raise Wrong("These are hidden states; `model.decoder.logits` makes logits of them.")
        if isinstance(got, torch.Tensor) and got.shape == (1, *want.shape):
            raise Wrong(f"The logits have shape {tuple(got.shape)}, expected {tuple(want.shape)}: take the only row of the batch.")
        same(got, want, "try_out(...)", 1e-9)
        if after != before:
            raise Wrong(f"The logits are right, but the cache now holds {after} entries by layer, before it was {before}: mark it first and "
                        "rewind it to the mark.")
        same(something(answer(model, cache, position, list(ids)), "try_out(...)"), want, "try_out(...), the second time,", 1e-9)
    return "Right, and the cache is as it was; asked twice, it says the same."


_FORGET = """def forget(cache, start):
    for layer in cache.layers:
        pos = layer.pos[0, : layer.lengths[0]]
        stays = ((pos < start) | (pos >= start + 5)).nonzero()[:, 0]
        number = len(stays)
        layer.k[:, :, :number] = layer.k[:, :, stays]
        layer.v[:, :, :number] = layer.v[:, :, stays]
        layer.pos[:, :number] = pos[stays]
        layer.rewind([number])"""


@exercise(
    "5.3",
    (_FORGET.replace("cache.layers:", "cache.layers[:1]:"), "layer 1"),
    (_FORGET.replace("start + 5", "start + 8"), "text entries"),
    (
        _FORGET.replace("layer.k[:, :, stays]", "rotate(layer.k[:, :, stays], Rope().turn(torch.where(pos[stays] > start, -5, 0)[None], 6, torch.float64))")
        .replace("def forget", "from mod.layers import Rope, rotate\ndef forget"),
        "turned",
    ),
    (_FORGET.replace("start + 5", "start + 4"), "one entry"),
    (
        _FORGET.replace("layer.k[:, :, :number] =", "layer.k =").replace("layer.v[:, :, :number] =", "layer.v =")
        .replace("layer.pos[:, :number] = pos[stays]", "layer.pos = pos[stays][None]"),
        "replaced its tensors",
    ),
    (
        "from mod.layers import PAD\ndef forget(cache, start):\n    for layer in cache.layers:\n"
        "        layer.pos[(layer.pos >= start) & (layer.pos < start + 5)] = PAD",
        "into the gap",
    ),
    (_FORGET.replace("pos = layer.pos[0, : layer.lengths[0]]", "pos = torch.arange(layer.lengths[0])").replace("= pos[stays]", "= layer.pos[:, stays]"), "slots as positions"),
    (_FORGET + "\n        layer.pos[layer.pos > start] -= 5 * (layer.pos[layer.pos > start] < 2**62)", "positions were changed"),
    (_FORGET.replace("        layer.rewind([number])", ""), "rewind"),
    (_FORGET.replace("        layer.v[:, :, :number] = layer.v[:, :, stays]\n", ""), "values"),
    (_FORGET.replace("        layer.k[:, :, :number] = layer.k[:, :, stays]\n", ""), "keys did not move"),
    (_FORGET.replace("(pos < start) | (pos >= start + 5)", "pos >= start + 5"), "not of the frame"),
)
def forget(answer) -> str:
    from mod.live.settings import StreamConfig
    from mod.live.window import open_cache

    frames, window = 5, 2
    with torch.no_grad():
        toy = Toy(frames)
        parts, cache = toy.pieces(), toy.model.new_cache()
        for part in parts:
            toy.feed(part, cache)
        starts = [part.start for part in parts if part.stop - part.start == 5]  # where each frame begins
        gone_from, gone_to = starts[1], starts[1] + 5
        storage = cache.layers[0].pos.shape
        held = [(layer.pos[0, : layer.lengths[0]].tolist(), layer.k[0].clone(), layer.v[0].clone()) for layer in cache.layers]
        answer(cache, gone_from)
        for number, (layer, (pos, k, v)) in enumerate(zip(cache.layers, held, strict=True)):
            counted = layer.lengths[0]
            entries = [p for p in layer.pos[0].tolist() if p < 2**62]
            stays = [slot for slot, p in enumerate(pos) if not gone_from <= p < gone_to]
            want = [pos[slot] for slot in stays]
            if len(entries) < counted:
                raise Wrong(f"Layer {number} still counts {counted} entries where {len(entries)} have a position: marking them is not enough. Move later entries into the gap, and say with `layer.rewind` how many are left.")
            if counted == len(pos) and entries[: len(want)] == want:
                raise Wrong(f"Layer {number} still counts {counted} entries, as before: `layer.rewind` says how many are left.")
            if len(entries) == len(want) and entries != want and torch.equal(layer.k[0][:, : len(want)], k[:, stays]):
                raise Wrong(f"Layer {number} has the right entries, but their positions were changed; here they stay what they are.")
            left, gone = sorted(set(entries) - set(want)), sorted(set(want) - set(entries))
            same_slots = [pos[slot] for slot in range(len(pos)) if not gone_from <= slot < gone_to]
            if entries == same_slots != want:
                raise Wrong(f"Layer {number} lost what lies in slots {gone_from} to {gone_to - 1}. You take slots as positions, which they are in dense layers only: look at `layer.pos`.")
            texts = [p for p in gone if toy.frame[0, p] < 0]
            of_text = f", and {len(texts)} text entries have gone. Text stays" if texts else ""
            if left:
                count = "one entry" if len(left) == 1 else f"{len(left)} entries"
                raise Wrong(f"Asked to forget the frame at position {gone_from}, layer {number} still holds {count} of it, at positions {left}{of_text}."
                            f"{' A frame has five tokens: did you stop too soon?' if len(left) == 1 else ''}")
            if gone:
                others = sorted({int(toy.frame[0, p]) for p in gone})
                raise Wrong(f"Layer {number} lost {len(gone)} entries that are not of the frame, at positions {gone}, of frames {others} (-1 is text{of_text}).")
            if not torch.equal(layer.v[0][:, : len(want)], v[:, stays]):
                raise Wrong(f"Layer {number} has the right positions, but the values did not move with them: keys, values and positions belong together.")
            if torch.equal(layer.k[0][:, : len(want)], k[:, : len(want)]):
                raise Wrong(f"Layer {number} has the right positions, but the keys did not move with them: keys, values and positions belong together.")
            if not torch.equal(layer.k[0][:, : len(want)], k[:, stays]):
                raise Wrong(f"Layer {number} has the right entries, but their keys were turned: positions stay what they are, so no RoPE is needed.")
            if layer.pos.shape != storage:
                raise Wrong(f"Layer {number} has {layer.pos.shape[1]} slots left of {storage[1]}: you replaced its tensors, and the free slots went with them. Move entries inside them.")
        # and in a stream: the same logits as the package's window that forgets vision alone
        settings = StreamConfig(window=window, forget="vision", positions="absolute")
        mine, package, come = toy.model.new_cache(), open_cache(toy.model, settings), 0
        for part in parts:
            if part.start in starts:
                come += 1
                if come > window:
                    answer(mine, starts[come - 1 - window])
            same(toy.feed(part, mine), toy.feed(part, package), f"logits at position {part.start} on", 1e-9)
    return "Right: a stream with your function gives the logits of the package's window, chunk by chunk."
