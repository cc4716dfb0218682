"""How a system of the field becomes a model: each changes one place of VideoLLM, and nothing of the method knows it.

    Fewer       other tokens of a frame enter the decoder: a Reducer (`Reduced`), tiles (`Tiled`)
    Deeper      other blocks stand in the decoder's layers: MoD for language models, p-MoD, gamma-MoD
    Thinned     the decoder thins the tokens out on the way: FastV
    Compressed  a mask, and eviction: VoCo-LLaMA
    Extended    another RoPE for streams longer than those trained on: Visual Context Window

A frame takes up `config.tokens` places in the stream, as many as it may need. When it needs fewer, its tokens stand at
the last of them, so that the last one still decides whether to speak; the other places stay empty, which costs nothing:
they are left out before the decoder and leave nothing in the cache. Distances between tokens are those of the places.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from mod.cache import KVCache
from mod.config import ModelConfig, require
from mod.layers import PAD, Rope
from mod.layout import Batch, Plan, Vocabulary
from mod.related.base import Reducer, Seen, VisionTokens
from mod.related.data import pictures, squeeze
from mod.related.depths import replace as replace_layers
from mod.related.fastv import FastV
from mod.related.ragged import CountingCache, frame_of, is_vision, numbers_of, rows_of, run_layers, shorten
from mod.related.tiles import TileTokens, grid_for, partition
from mod.related.voco import VoCo, VoCoCache, mask
from mod.related.window_extension import visual_rope
from mod.videollm import VideoLLM
from mod.vit import ViT

SPEAKS = Vocabulary(()).assistant  # the token with which a response begins


class FieldVideoLLM(VideoLLM):
    """A VideoLLM that takes frames of any shape, squeezed to squares.

    online  may frames be seen one by one? A method that must know all of them says no
    static  does the decoder run without asking the data for a shape, so that it can be compiled to one graph?
    """

    online, static = True, True
    cache = KVCache  # its kind of memory

    def new_cache(self, rows: int = 1, **options) -> KVCache:
        """As `VideoLLM.new_cache`. Raises UserError when frames cannot come one by one."""
        require(self.online,
                f"{self.config.method} must know all frames before the first answer; it cannot be streamed")
        weight = self.decoder.embed.weight
        return self.cache(self.config, rows, weight.dtype, weight.device, **options)

    def see(self, frames: Tensor) -> Tensor:
        return super().see(squeeze(frames))

    def embed(self, ids: Tensor, seen: Tensor | None, plan: Plan) -> Tensor:
        """Text ids (B, T) and seen frames (F, N, D), merged into one stream (B, T, D)."""
        x = self.decoder.embed(ids)
        if seen is None:
            return x
        return x.flatten(0, 1).index_copy(0, plan.vision.flatten(), seen.flatten(0, 1).to(x.dtype)).view_as(x)


class Fewer(FieldVideoLLM):
    """A VideoLLM whose frames enter the decoder as other tokens than the encoder's. Subclasses say which."""

    cache = CountingCache

    def tokens_of(self, seen, ids: Tensor, plan: Plan, cache) -> VisionTokens:
        """What becomes of the frames that `see` saw; x (F, n, D) in the decoder's width."""
        raise NotImplementedError

    def hidden(self, ids: Tensor, seen, plan: Plan, cache=None, trace=None) -> Tensor:
        """As `VideoLLM.hidden`; at empty places the result means nothing."""
        x, filled = self.decoder.embed(ids), ~is_vision(plan)
        if len(plan.vision):
            tokens = self.tokens_of(seen, ids, plan, cache)
            most, room = int(tokens.counts.max()), self.config.frame_tokens
            if most > room:
                raise ValueError(f"{most} tokens of a frame that has {room} places")
            step = torch.arange(tokens.x.shape[1], device=x.device)
            place = (plan.vision[:, -1:] + 1 - tokens.counts[:, None] + step)[tokens.valid]
            x = x.flatten(0, 1).index_copy(0, place, tokens.x[tokens.valid].to(x.dtype)).view_as(x)
            filled = filled.flatten().index_fill(0, place, True).view_as(filled)
        short = shorten(filled, plan.pos)
        if cache is not None:
            cache.begin(plan)
            cache.places = short.take(cache.places)
            cache.saw(plan)
        hidden = self.decoder(short.take(x), plan._replace(pos=short.pos), cache)
        return short.put(x.to(hidden.dtype), hidden)


def summary_looks(vit: ViT, patches: Tensor) -> tuple[Tensor, Tensor]:
    """How much the encoder's summary looks at each patch, mean over heads, (F, P), and the keys by which, (F, P, D);
    patches (F, P, D) as its pooling head sees them."""
    attention = vit.head.attention
    split = "f p (h e) -> f h p e"
    q = rearrange(attention.q(vit.head.probe), split, e=attention.head_dim)
    keys = attention.k(patches)
    k = rearrange(keys, split, e=attention.head_dim)
    weights = (q @ rearrange(k, "f h p e -> f h e p") / attention.head_dim**0.5).softmax(-1)
    return rearrange(weights.mean(1), "f 1 p -> f p"), keys


class Remembering(CountingCache):
    """A CountingCache that also keeps, of each stream, one frame that a Reducer compares later ones with."""

    def __init__(self, *size):
        super().__init__(*size)
        self.remembered: dict[int, Tensor] = {}  # row -> (N, D)

    def more(self) -> dict[str, Tensor]:
        return super().more() | {f"remembered.{row}": tokens for row, tokens in self.remembered.items()}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        super().restore_more(tensors)
        self.remembered = {int(name.removeprefix("remembered.")): tokens for name, tokens in tensors.items()
                           if name.startswith("remembered.")}

    def mark(self) -> tuple:
        return super().mark(), dict(self.remembered)

    def rewind(self, mark: tuple) -> None:
        held, remembered = mark
        super().rewind(held)
        self.remembered = dict(remembered)


class Reduced(Fewer):
    """A Reducer between encoder and connector, or behind the connector when it compares tokens with words."""

    cache = Remembering

    def __init__(self, config: ModelConfig, reducer: Reducer, behind: bool = False):
        super().__init__(config)
        self.reducer, self.behind, self.online = reducer, behind, reducer.online

    def see(self, frames: Tensor) -> Seen:
        tokens = frames if frames.ndim == 3 else self.vit(squeeze(frames).to(self.vit.position.dtype))
        attention, keys = summary_looks(self.vit, tokens[:, 1:]) if self.reducer.looks else (None, None)
        tokens = tokens.to(self.connector.fc1.weight.dtype)
        return Seen(self.connector(tokens) if self.behind else tokens, attention, keys)

    def question(self, ids: Tensor, plan: Plan) -> Tensor:
        """Mean embedding of each stream's words before its first frame, (B, D); zeros where there are none."""
        before = (is_vision(plan).cumsum(1) == 0) & (plan.pos < PAD) & (plan.pos > 0)  # at 0 is <bos>
        words = self.decoder.embed(ids) * before[..., None]
        return words.sum(1) / before.sum(1, keepdim=True).clamp(min=1)

    def tokens_of(self, seen: Seen, ids: Tensor, plan: Plan, cache) -> VisionTokens:
        query = self.question(ids, plan) if self.reducer.scope == "query" else None
        numbers = numbers_of(plan, None if cache is None else cache.frames)
        seen = replace(seen, row=rows_of(plan), number=numbers, query=query)
        tokens = self.reducer(seen) if cache is None else self.go_on(seen, cache.remembered)
        return tokens if self.behind else replace(tokens, x=self.connector(tokens.x))

    def go_on(self, seen: Seen, remembered: dict[int, Tensor]) -> VisionTokens:
        """The next frames of streams: each stream's remembered frame is shown once more before them, and left out of
        what comes out. Notes in `remembered` what is to be shown next
        time."""
        rows = seen.rows.tolist()
        shown = [row for row in dict.fromkeys(rows) if row in remembered]
        if not shown and self.reducer.remembered(seen) is None:
            return self.reducer(seen)
        every = torch.cat((torch.tensor(shown, dtype=torch.long, device=seen.rows.device), seen.rows))
        order = every.argsort(stable=True)  # a row's remembered frame comes first
        tokens = torch.cat((*(remembered[row][None] for row in shown), seen.tokens))[order]
        whole = Seen(tokens, row=every[order])
        out, keys, back = self.reducer(whole), self.reducer.remembered(whole), order.argsort()[len(shown) :]
        for row in dict.fromkeys(rows):
            last = int((whole.rows == row).nonzero()[-1])
            remembered[row] = tokens[keys[last]].detach().clone()
        return VisionTokens(out.x[back], out.valid[back], out.place[back])


class Tiled(Fewer):
    """AdaptVision: the whole frame, and the tiles that its shape needs, all through the same encoder."""

    def __init__(self, config: ModelConfig, most: int, group: int):
        super().__init__(config)
        self.tiles, self.most = TileTokens(config.vit_dim, group, most), most

    def see(self, frames: Tensor) -> VisionTokens:
        side, shapes = self.config.image_size, pictures(frames)
        parts: dict[int, tuple[list, list, tuple]] = {}  # frames of one shape: their numbers, pixels, and grid
        for number, picture in enumerate(shapes):
            grid = grid_for(*picture.shape[1:], side, self.most)
            numbers, pixels, _ = parts.setdefault(grid, ([], [], grid))
            whole, tiles, _ = partition(picture, side, self.most)
            numbers.append(number)
            pixels.append(torch.cat((whole[None], tiles)))
        x = self.connector.fc1.weight.new_zeros(len(frames), self.config.frame_tokens, self.config.vit_dim)
        counts = torch.zeros(len(frames), dtype=torch.long, device=x.device)
        for numbers, pixels, grid in parts.values():
            features = self.vit(torch.cat(pixels).to(self.vit.position.dtype))[:, 1:].to(x.dtype)
            features = rearrange(features, "(f t) n d -> f t n d", f=len(numbers))
            tokens = self.tiles(features[:, 0], features[:, 1:], grid)
            x[numbers, : tokens.shape[1]] = tokens.to(x.dtype)
            counts[numbers] = tokens.shape[1]
        step = torch.arange(x.shape[1], device=x.device)
        return VisionTokens(self.connector(x), step < counts[:, None], step.expand(len(x), -1))

    def tokens_of(self, seen: VisionTokens, ids: Tensor, plan: Plan, cache) -> VisionTokens:
        return seen


class Deeper(FieldVideoLLM):
    """A VideoLLM with make(dense block, layer) in some layers; their auxiliary losses are added to the main one.

    online  whether the choice can be made while frames come
    """

    static, cache = False, CountingCache

    def __init__(self, config: ModelConfig, layers, make, online: bool = True):
        super().__init__(config)
        replace_layers(self.decoder, layers, make)
        self.online = online

    def hidden(self, ids: Tensor, seen: Tensor | None, plan: Plan, cache=None, trace=None) -> Tensor:
        return super().hidden(ids, seen, plan, cache)  # the blocks trace tokens, not frames: no routers' recall

    def forward(self, batch: Batch, trace: list | None = None) -> tuple[Tensor, Tensor]:
        """As `VideoLLM.forward`. The auxiliary losses are means, so they count as much as the mean over all labels.
        They change the gradient, and not the loss that is logged."""
        text, stream = super().forward(batch)
        losses = [layer.auxiliary for layer in self.decoder.layers if getattr(layer, "auxiliary", None) is not None]
        if not (self.training and losses):
            return text, stream
        extra = sum(losses).to(text.dtype) * sum(batch.counts)
        return text + (extra - extra.detach()), stream


class Thinned(FieldVideoLLM):
    """FastV around the decoder. The token that looks is the one that the last answer begins with: what stands behind it
    is not known when it is asked. What came before has been thinned by it, too, so all must be there at once."""

    online, static = False, False

    def __init__(self, config: ModelConfig, after: int, drop: float):
        super().__init__(config)
        self.decoder = FastV(self.decoder, after, drop)

    def hidden(self, ids: Tensor, seen: Tensor | None, plan: Plan, cache=None, trace=None) -> Tensor:
        token, real = torch.arange(ids.shape[1], device=ids.device), plan.pos < PAD
        begins_answer = (ids == SPEAKS) & ~is_vision(plan) & real
        last = real.sum(1) - 1
        asks = torch.where(begins_answer.any(1), (token * begins_answer).amax(1), last).clamp(min=0)
        return self.decoder(self.embed(ids, seen, plan), plan, asks=asks)  # no routed layers to trace


class Compressed(FieldVideoLLM):
    """VoCo-LLaMA: the last k places of a frame are its VoCo tokens, the very last of which decides whether to speak. So
    these see what was said and the VoCo tokens of earlier frames (`recurrent`, ours): from one frame alone nobody could
    tell what is new in it."""

    cache = VoCoCache

    def __init__(self, config: ModelConfig, k: int):
        super().__init__(config)
        self.voco = VoCo(config.dim, k)

    def new_cache(self, rows: int = 1, **options) -> KVCache:
        return super().new_cache(rows, k=len(self.voco.tokens), recurrent=True, **options)

    def see(self, frames: Tensor) -> Tensor:
        seen = super().see(frames)
        return torch.cat((seen, self.voco.tokens.to(seen.dtype).expand(len(seen), -1, -1)), dim=1)

    def codes(self, plan: Plan, before: list[int] | None = None) -> Tensor:
        """(B, T) see `voco.codes`; row b has had before[b] frames."""
        code = frame_of(plan, before).flatten()
        places = plan.vision[:, self.config.frame_tokens - len(self.voco.tokens) :].flatten()
        return code.index_copy(0, places, -2 - code[places]).view_as(plan.pos)

    def hidden(self, ids: Tensor, seen: Tensor | None, plan: Plan, cache=None, trace=None) -> Tensor:
        x = self.embed(ids, seen, plan)
        if cache is None:
            turn = self.decoder.rope.turn(plan.pos, self.config.head_dim, x.dtype)
            sees = mask(plan.pos, self.codes(plan), recurrent=True)
            return self.decoder.norm(run_layers(self.decoder, x, turn, plan.pos, mask=sees))
        cache.coming(plan.pos, self.codes(plan, cache.frames))
        hidden = self.decoder(x, plan, cache)
        if len(plan.vision):
            cache.saw(plan)
            cache.evict()
        return hidden


class Announced(KVCache):
    """A KVCache that is told how many frames its stream will have; 0: no more than in training."""

    no_window = "keys that turn more slowly cannot be moved"

    def __init__(self, *size):
        super().__init__(*size)
        self.frames = 0

    def announce(self, frames: int) -> None:
        """So many frames will come. Say so before the first: <bos>, at position 0, is turned by nothing."""
        self.frames = frames

    def more(self) -> dict[str, Tensor]:
        return {"frames": torch.tensor(self.frames)}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        frames = int(tensors["frames"])
        require(frames == self.frames,
                f"the saved stream was opened for {frames} frames, got {self.frames}; ask for as many again")


class Extended(FieldVideoLLM):
    """Visual Context Window: streams that are longer than any in training turn more slowly.

    How long a stream will be must be known before it begins: offline from its frames, online its cache is told.
    """

    cache = Announced

    def __init__(self, config: ModelConfig, low: float = 0.5, high: float = 4.0):
        super().__init__(config)
        self.low, self.high = low, high
        self.longest = nn.Parameter(torch.zeros(()), requires_grad=False)  # frames; saved with the weights

    def rope(self, frames: int) -> Rope:
        """For a stream of so many frames."""
        trained, target = (round(number) * self.config.frame_tokens for number in (self.longest.item(), frames))
        if not 0 < trained < target:
            return self.decoder.rope
        return visual_rope(self.config.rope_base, trained, target, self.low, self.high)

    def hidden(self, ids: Tensor, seen: Tensor | None, plan: Plan, cache=None, trace=None) -> Tensor:
        rows = len(ids)
        if cache is None:
            lengths = torch.bincount(rows_of(plan), minlength=rows).tolist()
            if self.training:
                self.longest.data.clamp_(min=float(max(lengths)))
        else:
            cache.begin(plan)
            lengths = [cache.frames] * rows
        x = self.embed(ids, seen, plan)
        # Each row turns at its own speed: what one is must not depend on another.
        turns = [self.rope(frames).turn(pos, self.config.head_dim, x.dtype)
                 for frames, pos in zip(lengths, plan.pos.split(1), strict=True)]
        return self.decoder.norm(run_layers(self.decoder, x, torch.cat(turns), plan.pos, cache))
