"""Small models, random conversations and slow-but-plain reference versions for the tests."""

import torch
from hypothesis import strategies as st

from mod.block import PAD
from mod.cache import KVCache
from mod.config import ModelConfig
from mod.data import WORDS, vocabulary
from mod.decoder import MoDBlock
from mod.layout import Say, collate, lay_out
from mod.videollm import VideoLLM

WORDS_ALL = vocabulary()
SMALL = {
    "image_size": 12, "patch_size": 4, "vit_dim": 16, "vit_depth": 1, "vit_heads": 2, "vit_hidden": 24, "grid": 2,
    "dim": 24, "depth": 4, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_hidden": 40,
}  # fmt: skip


def small_config(**changes) -> ModelConfig:
    """5 tokens a frame, 4 layers of width 24."""
    return ModelConfig(**{**SMALL, **changes})


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Scale weights up and give norms random scales, so that a wrong detail is not hidden by a quiet layer."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "router" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            else:
                parameter.mul_(1.5)
    return model


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> VideoLLM:
    torch.manual_seed(seed)
    return loud(VideoLLM(small_config(**changes))).to(dtype).eval()


def routed(model: VideoLLM) -> list[MoDBlock]:
    return [layer for layer in model.decoder.layers if isinstance(layer, MoDBlock)]


def random_pixels(frames: int, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, config.image_size, config.image_size, generator=generator, dtype=dtype) * 2 - 1


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@st.composite
def conversations(draw, most_frames: int = 5, least_frames: int = 1) -> tuple[int, list[Say]]:
    """A number of frames, and narrations, questions with answers and unanswered questions after any of them."""
    frames, said = draw(st.integers(least_frames, most_frames)), []
    for t in range(frames):
        if draw(st.booleans()):
            said.append(Say(t, "assistant", draw(words)))
        for answered in draw(st.lists(st.booleans(), max_size=2)):
            said.append(Say(t, "user", draw(words)))
            if answered:
                said.append(Say(t, "assistant", draw(words)))
    return frames, said


def as_batch(config: ModelConfig, talks: list[tuple[int, list[Say]]], dtype: torch.dtype = torch.float64):
    """Conversations as one padded batch with random frames; a row's frames depend on its number alone."""
    layouts = [lay_out(WORDS_ALL, frames, config.frame_tokens, said) for frames, said in talks]
    pixels = torch.cat([random_pixels(frames, config, seed, dtype) for seed, (frames, _) in enumerate(talks)])
    return collate(layouts, pixels)


def offline(model: VideoLLM, batch, trace=None) -> torch.Tensor:
    """Logits (B, T, V) of whole streams in one pass."""
    return model.decoder.logits(model(batch.ids, batch.frame, batch.pos, model.see(batch.pixels), trace=trace))


def cut_into_chunks(frame: list[int], frame_tokens: int, random) -> list[range]:
    """Random pieces of a stream that never split a frame."""
    chunks, start, position = [], 0, 0
    while position < len(frame):
        position += frame_tokens if frame[position] >= 0 else 1
        if random.random() < 0.5 or position == len(frame):
            chunks.append(range(start, position))
            start = position
    return chunks


def in_chunks(model: VideoLLM, batch, seen: torch.Tensor, random) -> tuple[torch.Tensor, KVCache]:
    """One row streamed in random pieces that never split a frame: logits (1, T, V), and the cache after it."""
    config, dtype = model.config, next(model.parameters()).dtype
    cache, outs = KVCache(config, frames=len(seen), text=batch.ids.shape[1], dtype=dtype), []
    for chunk in cut_into_chunks(batch.frame[0].tolist(), config.frame_tokens, random):
        part = slice(chunk.start, chunk.stop)
        frames = sorted({int(f) for f in batch.frame[0, part] if f >= 0})
        hidden = model(batch.ids[:, part], batch.frame[:, part], batch.pos[:, part], seen[frames], cache=cache)
        outs.append(model.decoder.logits(hidden))
    return torch.cat(outs, 1), cache


def assert_cache_holds_what_was_kept(cache: KVCache, batch, trace) -> None:
    """Every layer's entries are the tokens that it kept, at their own positions, in order; the rest is empty."""
    kept_of = {routing.layer: routing.kept.flatten() for routing in trace}
    for number, layer in enumerate(cache.layers):
        keep = torch.ones(batch.ids.shape[1], dtype=torch.bool)
        if number in kept_of:
            keep[batch.frame[0] >= 0] = kept_of[number]
        length = int(layer.length)
        assert torch.equal(layer.pos[0, :length], batch.pos[0, keep]), "positions of the kept tokens, in order"
        assert torch.equal(layer.frame[0, :length], batch.frame[0, keep])
        assert (layer.pos[0, length:] == PAD).all()
