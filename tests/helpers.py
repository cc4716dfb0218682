"""Small models, random conversations, and what tests read out of batches, caches and traces."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from mod.cache import KVCache
from mod.config import ModelConfig
from mod.data import COLOURS, SHAPES, SIDES, WORDS, Clip
from mod.decoder import MoDBlock
from mod.layers import PAD
from mod.layout import NO_LABEL, PADDING, TEXT, Batch, Layout, Plan, Say, Vocabulary, collate, lay_out, make_plan
from mod.videollm import VideoLLM

WORDS_ALL = Vocabulary(WORDS)
SMALL = {"image_size": 12, "patch_size": 4, "vit_dim": 16, "vit_depth": 1, "vit_heads": 2, "vit_hidden": 24, "grid": 2,
         "dim": 24, "depth": 4, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_hidden": 40}


def small_config(**changes) -> ModelConfig:
    """5 tokens per frame, 4 layers of width 24."""
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


def random_pixels(frames: int, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
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


def as_batch(config: ModelConfig, talks: list[tuple[int, list[Say]]], dtype: torch.dtype = torch.float64) -> Batch:
    """Conversations as one padded batch with random frames; a row's frames depend on its number alone."""
    layouts = [lay_out(WORDS_ALL, frames, config.frame_tokens, said) for frames, said in talks]
    pixels = torch.cat([random_pixels(frames, config, seed, dtype) for seed, (frames, _) in enumerate(talks)])
    return collate(layouts, pixels, config.frame_tokens, config.keep_counts)


def frame_of(batch: Batch) -> Tensor:
    """The number, within its row, of the frame that each token belongs to, (B, T), or TEXT, or PADDING."""
    rows, length = batch.ids.shape
    frame = torch.full((rows * length,), TEXT)
    frame[batch.plan.pos.flatten() >= PAD] = PADDING
    so_far = [0] * rows
    for places in batch.plan.vision:
        row = int(places[0]) // length
        frame[places] = so_far[row]
        so_far[row] += 1
    return frame.view(rows, length)


def streaming_of(layout: Layout) -> list[bool]:
    """Is each label of a layout a speak-or-stay-silent decision? Those stand at vision tokens."""
    return [at >= 0 and label != NO_LABEL for at, label in zip(layout.frame, layout.labels, strict=True)]


def labels_of(batch: Batch) -> Tensor:
    """The label of each token, (B, T), NO_LABEL where there is none."""
    labels = torch.full((batch.ids.numel(),), NO_LABEL)
    labels[batch.labelled] = batch.labels
    return labels.view_as(batch.ids)


def offline(model: VideoLLM, batch: Batch, trace=None) -> Tensor:
    """Logits (B, T, V) of whole streams in one pass."""
    return model.decoder.logits(model.hidden(batch.ids, model.see(batch.pixels), batch.plan, trace=trace))


def cut_into_chunks(frame: list[int], frame_tokens: int, random) -> list[range]:
    """Random pieces of a stream that never split a frame."""
    chunks, start, position = [], 0, 0
    while position < len(frame):
        position += frame_tokens if frame[position] >= 0 else 1
        if random.random() < 0.5 or position == len(frame):
            chunks.append(range(start, position))
            start = position
    return chunks


def plan_of(config: ModelConfig, frame: Tensor, start: list[int] | None = None) -> Plan:
    """The plan of tokens whose frames are `frame` (B, T)."""
    return make_plan(frame.numpy(), start or [0] * len(frame), config.frame_tokens, config.keep_counts)


def in_chunks(model: VideoLLM, batch: Batch, seen: Tensor, random,
              cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
    """One row streamed in random pieces that never split a frame: logits (1, T, V), and the cache after it."""
    config, frame, outs = model.config, frame_of(batch), []
    cache = model.new_cache() if cache is None else cache
    for chunk in cut_into_chunks(frame[0].tolist(), config.frame_tokens, random):
        part = slice(chunk.start, chunk.stop)
        frames = sorted({int(f) for f in frame[0, part] if f >= 0})
        plan = plan_of(config, frame[:, part], [chunk.start])
        outs.append(model.decoder.logits(model.hidden(batch.ids[:, part], seen[frames], plan, cache)))
    return torch.cat(outs, 1), cache


def assert_cache_holds_what_was_kept(cache: KVCache, batch: Batch, trace) -> None:
    """Every layer's entries are the tokens that it kept, at their own positions, in order; the rest is empty."""
    kept_of = {routing.layer: routing.kept.flatten() for routing in trace}
    vision = frame_of(batch)[0] >= 0
    for number, layer in enumerate(cache.layers):
        keep = torch.ones_like(vision)
        if number in kept_of:
            keep[vision] = kept_of[number]
        [length] = layer.lengths
        assert torch.equal(layer.pos[0, :length], batch.plan.pos[0, keep]), "positions of the kept tokens, in order"
        assert (layer.pos[0, length:] >= PAD).all()

def shown(some, t):
    """What the patch labels of a frame say: (colour, shape) -> (row, column)."""
    labels = some.patch_labels[t][some.patch_labels[t][:, 0] > 0]
    return {(list(COLOURS)[c - 1], SHAPES[s - 1]): (h - 1, x - 1) for c, s, h, x, *_ in labels}


def assert_it_is_the_one_last_spoken_of(some: Clip) -> None:
    """Every question of a clip has the answer that narrations and patch labels give; others than "it" go by name."""
    topic, first = None, {}
    for t, truth in enumerate(some.truth):
        here = shown(some, t)
        for say in some.said:
            if say.frame == t and say.role == "assistant" and say.text.split()[0] in COLOURS:
                colour, shape, verb, *rest = say.text.split()
                topic = (rest[0], shape) if verb == "turns" else (colour, shape)
                if verb == "appears":
                    first[topic] = SIDES[here[topic][1]]
                elif verb == "turns":
                    first[topic] = first.pop((colour, shape))
        assert truth["where is it ?"] == (f"now {SIDES[here[topic][1]]}" if topic in here else "nowhere")
        assert truth["where did it appear ?"] == (f"first {first[topic]}" if topic else "nowhere")
        others = {name: place for name, place in here.items() if name != topic}
        named = {f"where is the {c} {s} ?": f"now {SIDES[place[1]]}" for (c, s), place in others.items()}
        named |= {f"where did the {c} {s} appear ?": f"first {first[c, s]}" for c, s in others}
        assert {question: truth[question] for question in truth if " the " in question} == named
