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

from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.block import PAD, Rope
from mod.cache import KVCache
from mod.config import ModelConfig, StreamConfig, UserError
from mod.decoder import Decoder
from mod.layout import Vocabulary
from mod.related.base import Reducer, Seen, VisionTokens
from mod.related.depths import gather, scatter
from mod.related.depths import replace as replace_layers
from mod.related.fastv import FastV
from mod.related.tiles import TileTokens, grid_for, partition
from mod.related.voco import Masked, VoCo, VoCoCache, owner, visible
from mod.related.window_extension import visual_rope
from mod.videollm import VideoLLM
from mod.vit import ViT, pictures

SPEAKS = Vocabulary(()).assistant  # the token with which a response begins


def begins(frame: Tensor) -> Tensor:
    """frame (B, T) of each vision token, -1 for text -> where a frame begins, (B, T) bool."""
    return (frame >= 0) & (frame != F.pad(frame[:, :-1], (1, 0), value=-1))


class Fewer(VideoLLM):
    """A VideoLLM whose frames enter the decoder as other tokens than the encoder's. Subclasses say which."""

    def tokens_of(self, seen, ids: Tensor, frame: Tensor, pos: Tensor, cache) -> VisionTokens:
        """What becomes of the frames that `see` saw; x (F, n, D) in the decoder's width."""
        raise NotImplementedError

    def open_cache(
        self, rows: int, frames: int, text: int, settings: StreamConfig | None = None, kind: type[KVCache] = KVCache
    ) -> KVCache:
        """See VideoLLM. Raises UserError for a window that forgets frames and not their text: where a frame ends is
        known by its number of tokens, which differs here."""
        if settings and settings.window and not settings.forgets_text:
            raise UserError("forget got vision, expected all for frames of various numbers of tokens; leave it out")
        return super().open_cache(rows, frames, text, settings, kind)

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen, cache=None, trace=None) -> Tensor:
        """As `VideoLLM.forward`; at empty places the result means nothing."""
        x, filled = self.decoder.embed(ids), frame < 0
        if not isinstance(seen, Tensor):  # what a stream passes along when there is text alone
            tokens = self.tokens_of(seen, ids, frame, pos, cache)
            if int(tokens.counts.max()) > self.config.frame_tokens:
                raise ValueError(
                    f"{int(tokens.counts.max())} tokens of a frame that has {self.config.frame_tokens} places"
                )
            row, start = begins(frame).nonzero(as_tuple=True)
            last = (start + self.config.frame_tokens)[:, None]
            place = last - tokens.counts[:, None] + torch.arange(tokens.x.shape[1], device=x.device)
            row, place = row[:, None].expand_as(place)[tokens.valid], place[tokens.valid]
            x[row, place] = tokens.x[tokens.valid].to(x.dtype)
            filled[row, place] = True
        short = gather(x, pos, frame, filled)
        hidden = self.decoder(short.h, short.pos, short.frame, cache=cache, trace=trace)
        return scatter(x.to(hidden.dtype), short, hidden)


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


class Remembering(KVCache):
    """A KVCache that also keeps, of each stream, one frame that a Reducer compares later ones with."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.remembered: dict[int, Tensor] = {}  # row -> (N, D)
        self.coming: dict[int, Tensor] = {}  # what will be remembered once the frames have been stored

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"remembered.{row}": tokens for row, tokens in self.remembered.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        device = self.layers[0].k.device
        self.remembered = {
            int(name.removeprefix("remembered.")): tokens.to(device)
            for name, tokens in tensors.items()
            if name.startswith("remembered.")
        }


class Reduced(Fewer):
    """A Reducer between encoder and connector, or behind the connector when it compares tokens with words."""

    def __init__(self, config: ModelConfig, reducer: Reducer, behind: bool = False):
        super().__init__(config)
        self.reducer, self.behind, self.online = reducer, behind, reducer.online

    def open_cache(
        self, rows: int, frames: int, text: int, settings: StreamConfig | None = None, kind: type[KVCache] = Remembering
    ) -> KVCache:
        return super().open_cache(rows, frames, text, settings, kind)

    def see(self, frames: Tensor) -> Seen:
        tokens = frames if frames.ndim == 3 else self.vit(frames.to(self.vit.position.dtype))
        attention, keys = summary_looks(self.vit, tokens[:, 1:]) if self.reducer.looks else (None, None)
        tokens = tokens.to(self.connector.fc1.weight.dtype)
        return Seen(self.connector(tokens) if self.behind else tokens, attention, keys)

    def question(self, ids: Tensor, frame: Tensor, pos: Tensor) -> Tensor:
        """Mean embedding of each stream's words before its first frame, (B, D); zeros where there are none."""
        before = ((frame >= 0).cumsum(1) == 0) & (pos < PAD) & (pos > 0)  # at 0 is <bos>
        words = self.decoder.embed(ids) * before[..., None]
        return words.sum(1) / before.sum(1, keepdim=True).clamp(min=1)

    def tokens_of(self, seen: Seen, ids: Tensor, frame: Tensor, pos: Tensor, cache) -> VisionTokens:
        row, start = begins(frame).nonzero(as_tuple=True)
        query = self.question(ids, frame, pos) if self.reducer.scope == "query" else None
        seen = replace(seen, row=row, number=frame[row, start], query=query)
        tokens = self.reducer(seen) if cache is None else self.go_on(seen, cache.remembered, cache.coming)
        return tokens if self.behind else replace(tokens, x=self.connector(tokens.x))

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen, cache=None, trace=None) -> Tensor:
        hidden = super().forward(ids, frame, pos, seen, cache, trace)
        if cache is not None:  # a full cache has raised before
            cache.remembered |= cache.coming
            cache.coming.clear()
        return hidden

    def go_on(self, seen: Seen, remembered: dict[int, Tensor], coming: dict[int, Tensor]) -> VisionTokens:
        """The next frames of streams: each stream's remembered frame is shown once more before them, and left out of
        what comes out. What is to be remembered next is put into `coming`."""
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
            coming[row] = tokens[keys[last]].detach().clone()
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

    def tokens_of(self, seen: VisionTokens, ids: Tensor, frame: Tensor, pos: Tensor, cache) -> VisionTokens:
        return seen


class Beside(torch.autograd.Function):
    """The identity on hidden states; backwards it adds the gradient of another loss."""

    @staticmethod
    def forward(context, hidden: Tensor, loss: Tensor) -> Tensor:
        context.one = torch.ones_like(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, context.one


class Causal:
    """Stands in for a cache in one pass: stores nothing, and a token sees those that are not after it. To the blocks of
    depths.py a past means that tokens come in time, and that each must be let through or not by itself."""

    def __init__(self, depth: int):
        self.layers = [self] * depth

    def make_room(self, pos: Tensor, frame: Tensor) -> None:
        pass

    def places(self, pos: Tensor) -> Tensor:
        return pos

    def append(self, k: Tensor, v: Tensor, pos: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k, v, rearrange(rearrange(pos, "b s -> b 1 s") <= rearrange(pos, "b t -> b t 1"), "b t s -> b 1 t s")


class Deeper(VideoLLM):
    """A VideoLLM with make(dense block, layer) in some layers; their auxiliary losses are added to the main one.

    online   whether the choice can be made while frames come
    causal   whether that is another choice than training's: then it is the one made in all evaluation, too
    """

    def __init__(self, config: ModelConfig, layers, make, online: bool = True, causal: bool = False):
        super().__init__(config)
        replace_layers(self.decoder, layers, make)
        self.online, self.causal = online, causal

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen: Tensor, cache=None, trace=None) -> Tensor:
        if cache is None and self.causal and not self.training:
            cache = Causal(len(self.decoder.layers))
        hidden = super().forward(ids, frame, pos, seen, cache, trace)
        if self.training and torch.is_grad_enabled():
            for layer in self.decoder.layers:
                if getattr(layer, "auxiliary", None) is not None:
                    hidden = Beside.apply(hidden, layer.auxiliary)
        return hidden


class Thinned(VideoLLM):
    """FastV around the decoder. The token that looks is the one that the last answer begins with: what stands behind it
    is not known when it is asked. What came before has been thinned by it, too, so all must be there at once."""

    def __init__(self, config: ModelConfig, after: int, drop: float):
        super().__init__(config)
        self.decoder, self.online = FastV(self.decoder, after, drop), False

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen: Tensor, cache=None, trace=None) -> Tensor:
        token, begins_answer = (
            torch.arange(ids.shape[1], device=ids.device),
            (ids == SPEAKS) & (frame < 0) & (pos < PAD),
        )
        last = (pos < PAD).sum(1) - 1
        asks = torch.where(begins_answer.any(1), (token * begins_answer).amax(1), last).clamp(min=0)
        return self.decoder(self.embed(ids, frame, seen), pos, frame, asks=asks)  # no routed layers to trace


class Compressed(VideoLLM):
    """VoCo-LLaMA: the last k places of a frame are its VoCo tokens, the very last of which decides whether to speak. So
    these see what was said and the VoCo tokens of earlier frames (`recurrent`, ours): from one frame alone nobody could
    tell what is new in it."""

    def __init__(self, config: ModelConfig, k: int):
        super().__init__(config)
        self.voco = VoCo(config.dim, k)

    def open_cache(self, rows: int, frames: int, text: int, settings: StreamConfig | None = None) -> VoCoCache:
        if settings and settings.window:
            raise UserError(f"a window got {settings.window} frames, but VoCo's cache holds no frames; leave it out")
        return VoCoCache(super().open_cache(rows, frames, text, settings), len(self.voco.tokens), recurrent=True)

    def see(self, frames: Tensor) -> Tensor:
        seen = super().see(frames)
        return torch.cat((seen, self.voco.tokens.to(seen.dtype).expand(len(seen), -1, -1)), dim=1)

    def codes(self, frame: Tensor) -> Tensor:
        """frame (B, T) of each vision token with its VoCo tokens among them -> `voco.codes`."""
        number = self.config.frame_tokens
        last = torch.arange(number, device=frame.device) >= number - len(self.voco.tokens)
        voco = torch.zeros_like(frame, dtype=torch.bool)
        voco[frame >= 0] = last.repeat(int(begins(frame).sum()))
        return torch.where(voco, -2 - frame, frame)

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen: Tensor, cache=None, trace=None) -> Tensor:
        x, code = self.embed(ids, frame, seen), self.codes(frame)
        if cache is None:
            first = pos.where(owner(code) >= 0, PAD).amin(1)
            sees = visible(pos, code, pos, code, first, recurrent=True) | (pos == PAD)[:, :, None]
            return self.decoder(x, pos, code, cache=Masked(sees, len(self.decoder.layers)))
        hidden = self.decoder(x, pos, code, cache=cache)
        if (code <= -2).any():
            cache.evict()
        return hidden


@contextmanager
def turning(decoder: Decoder, rope: Rope):
    """Let every layer turn by `rope` for a while."""
    attentions = [layer.attention for layer in decoder.layers]
    before = [attention.rope for attention in attentions]
    try:
        for attention in attentions:
            attention.rope = rope
        yield
    finally:
        for attention, rope in zip(attentions, before, strict=True):
            attention.rope = rope


class Measured(KVCache):
    """A KVCache that knows how many frames its stream was opened for."""

    def __init__(self, *args, frames: int, **options):
        super().__init__(*args, frames=frames, **options)
        self.frames = frames

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"frames": torch.tensor(self.frames)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if (frames := int(tensors["frames"])) != self.frames:
            raise UserError(
                f"the saved stream was opened for {frames} frames, got {self.frames}; ask for as many again"
            )
        super().restore(tensors)


class Extended(VideoLLM):
    """Visual Context Window: streams that are longer than any in training turn more slowly.

    How long a stream will be must be known before it begins: offline from its frames, online from the room asked for.
    """

    def __init__(self, config: ModelConfig, low: float = 0.5, high: float = 4.0):
        super().__init__(config)
        self.low, self.high = low, high
        self.longest = nn.Parameter(torch.zeros(()), requires_grad=False)  # frames; saved with the weights

    def open_cache(self, rows: int, frames: int, text: int, settings: StreamConfig | None = None) -> KVCache:
        if settings and settings.window:
            raise UserError(
                f"a window got {settings.window} frames, but keys that turn more slowly cannot be moved; leave it out"
            )
        return super().open_cache(rows, frames, text, settings, kind=Measured)

    def rope(self, frames: int) -> Rope:
        """For a stream of so many frames."""
        trained, target = (round(number) * self.config.frame_tokens for number in (self.longest.item(), frames))
        plain = Rope.of(self.config)
        return visual_rope(plain, trained, target, self.low, self.high) if 0 < trained < target else plain

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen: Tensor, cache=None, trace=None) -> Tensor:
        if cache is not None:
            with turning(self.decoder, self.rope(cache.frames)):
                return super().forward(ids, frame, pos, seen, cache, trace)
        lengths = frame.amax(1) + 1
        if self.training:
            self.longest.data.clamp_(min=float(lengths.max()))
        ropes = [self.rope(number) for number in lengths.tolist()]
        if len(set(ropes)) > 1:  # then each row alone: what one is must not depend on another
            parts = zip(ids.split(1), frame.split(1), pos.split(1), seen.split(lengths.tolist()), strict=True)
            return torch.cat([self.forward(*part) for part in parts])
        with turning(self.decoder, ropes[0]):
            return super().forward(ids, frame, pos, seen, cache, trace)
