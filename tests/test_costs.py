"""Formula == count: FLOPs against torch's own counter, cache entries and bytes against real tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.cache import KVCache
from mod.config import DataConfig, ModelConfig
from mod.data import clip_layout, make_clip, vocabulary
from mod.layout import Say
from mod.stream import Stream
from mod.study.costs import (
    activation_bytes,
    average_text,
    decoder_flops,
    dense,
    forward_flops,
    frame_flops,
    frames_that_fit,
    kv_bytes,
    layer_tokens,
    ratios,
    training_flops,
)
from mod.videollm import stream_loss
from tests.helpers import WORDS_ALL, as_batch, offline, random_pixels, small_model

STREAM = [Say(0, "user", "where ?"), Say(0, "assistant", "now top"), Say(2, "assistant", "red disc moves lower")]


@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
@pytest.mark.parametrize("select", ["learned", "uniform"])
@given(frames=st.integers(1, 6), words=st.integers(0, 6))
def test_flops_equal_torchs_counter(layers, select, frames, words):
    model = small_model(dtype=torch.float32, layers=layers, select=select)
    batch = as_batch(model.config, [(frames, [Say(0, "user", " ".join(["red"] * words))])], torch.float32)
    text = int((batch.frame < 0).sum())
    # The counter knows matrix products; on a CPU it sees attention only when that is written as such.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        offline(model, batch)
    assert counter.get_total_flops() == sum(forward_flops(model.config, frames, text).values())


@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
@pytest.mark.parametrize("select", ["learned", "uniform"])
@pytest.mark.parametrize("gate", ["value", "update"])
def test_training_flops_equal_torchs_counter(layers, select, gate):
    """Forward and backward, frozen encoder; the stated limit is 1%, the formula is exact."""
    model = small_model(dtype=torch.float32, layers=layers, select=select, gate=gate)
    model.vit.requires_grad_(False)
    batch = as_batch(model.config, [(5, STREAM)], torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(batch.ids, batch.frame, batch.pos, model.connector(model.vit(batch.pixels)))
        stream_loss(model, hidden, batch)[0].backward()
    labels, text = int((batch.labels >= 0).sum()), int((batch.frame < 0).sum())
    formula = training_flops(model.config, 5, text, labels)
    assert counter.get_total_flops() == sum(formula.values())
    assert sum(formula[part] for part in ("router", "projections", "attention", "ffn")) == 3 * decoder_flops(model.config, 5, text)


@pytest.mark.parametrize("layers", ["none", "interleaved", "all"])
@given(cached=st.integers(0, 6))
def test_flops_of_one_more_frame(layers, cached):
    model = small_model(dtype=torch.float32, layers=layers).requires_grad_(False)
    cache, n = KVCache(model.config, frames=cached + 1, text=1), model.config.frame_tokens
    seen = torch.randn(1, n, model.config.dim)

    def feed(pos, frame, seen):
        return model(torch.zeros_like(pos), frame, pos, seen, cache=cache)

    feed(torch.tensor([[0]]), torch.tensor([[-1]]), seen[:0])
    for t in range(cached):
        feed(1 + n * t + torch.arange(n)[None], torch.full((1, n), t), seen)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        feed(1 + n * cached + torch.arange(n)[None], torch.full((1, n), cached), seen)
    assert counter.get_total_flops() == frame_flops(model.config, cached, 1)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"gate": "update"}, {"select": "random"}, {"heads": 2, "kv_heads": 2}])
@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
def test_saved_activations_are_the_formulas(layers, changes):
    """Every float tensor that autograd keeps for the backward pass of the layers, counted by its storage."""
    model = small_model(dtype=torch.float32, layers=layers, **changes)
    batch, kept = as_batch(model.config, [(6, STREAM)], torch.float32), {}
    x = model.embed(batch.ids, batch.frame, model.see(batch.pixels)).detach().requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = x * 1.0
        for layer in model.decoder.layers:
            y = layer(y, batch.pos, batch.frame)
    assert sum(size for size, _ in kept.values()) == activation_bytes(model.config, 6, int((batch.frame < 0).sum()))


@given(budget=st.integers(2000, 40000), text=st.integers(1, 5), layers=st.sampled_from(["none", "interleaved", "all"]))
def test_a_fixed_budget_holds_what_the_formula_says(budget, text, layers):
    """Filled frame by frame until one more would not fit."""
    model = small_model(dtype=torch.float32, layers=layers)
    frames = frames_that_fit(model.config, budget, text)
    stream = Stream(model, WORDS_ALL, frames=frames + 1, text=text)
    stream.feed([[4] * (text - 1)]) if text > 1 else None
    pixels = random_pixels(1, model.config, dtype=torch.float32)
    while stream.seen[0] < frames:
        stream.see(pixels)
    assert stream.cache.bytes() <= max(budget, kv_bytes(model.config, 0, text))
    stream.see(pixels)
    assert stream.cache.bytes() > budget


@given(frames=st.integers(1, 6), words=st.integers(0, 9), layers=st.sampled_from(["none", "interleaved", "all"]))
def test_cache_entries_and_bytes_are_exact(frames, words, layers):
    model = small_model(dtype=torch.float32, layers=layers)
    stream = Stream(model, WORDS_ALL, frames=frames, text=1 + words)
    for t in range(frames):
        stream.see(random_pixels(frames, model.config, dtype=torch.float32)[t : t + 1])
    stream.feed([[4] * words]) if words else None
    assert stream.cache.lengths() == layer_tokens(model.config, frames, 1 + words)
    assert stream.cache.bytes() == kv_bytes(model.config, frames, 1 + words)


def test_the_papers_ratio_on_vision_alone():
    """Half the layers at r = 0.2: (1 + 0.2) / 2 = 0.6 of the cache, so 1.67 times the video (50 tokens a frame)."""
    config = ModelConfig(image_size=56, grid=7)
    assert config.frame_tokens == 50 and ratios(config, 100, 0)["kv_ratio"] == pytest.approx(0.6)
    assert ratios(dense(config), 10, 10) == {"flop_ratio": 1.0, "kv_ratio": 1.0}
    assert decoder_flops(config, 10, 5) < decoder_flops(dense(config), 10, 5)


def test_average_text_counts_the_layouts_text():
    clips = [make_clip(DataConfig(), ModelConfig(), "validation", 0, index) for index in range(20)]
    lengths = [sum(frame < 0 for frame in clip_layout(vocabulary(), clip, 26).frame) for clip in clips]
    assert average_text(clips) == round(sum(lengths) / 20)
