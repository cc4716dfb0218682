"""Formula == count: FLOPs against torch's own counter, cache entries and bytes against real tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.config import DataConfig, ModelConfig
from mod.data import make_clip
from mod.evaluate import cost_ratios
from mod.layout import Say, lay_out
from mod.live.costs import chunk_flops, dense, held_bytes, layer_tokens
from mod.stream import Stream
from mod.study.costs import (
    activation_bytes,
    average_text,
    decoder_flops,
    forward_flops,
    frame_flops,
    frames_that_fit,
    kv_bytes,
    layer_weights,
    read_bytes,
    training_flops,
    word_flops,
)
from tests.helpers import WORDS_ALL, as_batch, frame_of, offline, random_pixels, small_config, small_model

STREAM = [Say(0, "user", "where ?"), Say(0, "assistant", "now top"), Say(2, "assistant", "red disc moves lower")]


@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
@pytest.mark.parametrize("select", ["learned", "uniform"])
@given(frames=st.integers(1, 6), words=st.integers(0, 6))
def test_flops_equal_torchs_counter(layers, select, frames, words):
    model = small_model(dtype=torch.float32, layers=layers, select=select)
    batch = as_batch(model.config, [(frames, [Say(0, "user", " ".join(["red"] * words))])], torch.float32)
    text = int((frame_of(batch) < 0).sum())
    # The counter knows matrix products; on a CPU it sees attention only when that is written as such.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        offline(model, batch)
    assert counter.get_total_flops() == sum(forward_flops(model.config, frames, text).values())


@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
@pytest.mark.parametrize("select", ["learned", "uniform"])
@pytest.mark.parametrize("gate", ["sigmoid-value", "score-update"])
def test_training_flops_equal_torchs_counter(layers, select, gate):
    """Forward and backward, frozen encoder; the stated limit is 1%, the formula is exact."""
    model = small_model(dtype=torch.float32, layers=layers, select=select, gate=gate)
    model.vit.requires_grad_(False)
    batch = as_batch(model.config, [(5, STREAM)], torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(model(batch)).backward()
    labels, text = sum(batch.counts), int((frame_of(batch) < 0).sum())
    formula = training_flops(model.config, 5, text, labels)
    assert counter.get_total_flops() == sum(formula.values())
    assert sum(formula[part] for part in ("router", "projections", "attention", "ffn")) == 3 * decoder_flops(model.config, 5, text)


def streamed(model, frames: int, words: int) -> Stream:
    """A stream that has seen so many frames, and fed so many words beside its <bos>."""
    stream, pixels = Stream(model, WORDS_ALL), random_pixels(max(1, frames), model.config, dtype=torch.float32)
    for t in range(frames):
        stream.see(pixels[t : t + 1])
    if words:
        stream.feed([[4] * words])
    return stream


@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
@given(cached=st.integers(0, 6), words=st.integers(0, 3))
def test_flops_of_one_more_frame_and_of_one_more_word(layers, cached, words):
    model = small_model(dtype=torch.float32, layers=layers).requires_grad_(False)
    stream = streamed(model, cached, words)
    seen = model.see(random_pixels(1, model.config, dtype=torch.float32))
    for texts, frames, expected in (([[]], seen, frame_flops(model.config, cached, 1 + words)),
                                    ([[4]], None, word_flops(model.config, cached + 1, 1 + words)),
                                    ([[4, 4]], seen, chunk_flops(model.config, 1, 2, cached + 2, 4 + words))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            stream.advance(texts, [frames is not None], frames)
        assert counter.get_total_flops() == expected


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "qkv_bias": True}, {"select": "random"}])
@pytest.mark.parametrize("layers", ["none", "interleaved", "keep:1,0,0.4,1"])
def test_what_is_read_is_the_weights_once_and_the_cache(layers, changes):
    model = small_model(dtype=torch.float32, layers=layers, **changes)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers]
    assert layer_weights(model.config) == weights
    stream = streamed(model, 3, 2)
    everywhere = 4 * sum(weights) + held_bytes(stream.cache)
    assert read_bytes(model.config, 0, 1, 3, 3) == everywhere, "text runs through every layer"
    entered = [number for number, kept in enumerate(model.config.keep_counts) if kept]
    entry = 4 * 2 * model.config.kv_heads * model.config.head_dim
    held = sum(4 * weights[i] + entry * stream.cache.entries()[i] for i in entered)
    skipped = 0 if "select" in changes else 4 * model.config.dim * (model.config.depth - len(entered))
    assert read_bytes(model.config, 1, 0, 3, 3) == held + skipped, "a layer that keeps no vision token is only scored"
    assert read_bytes(model.config, 1, 0, 3, 3, number_bytes=2) * 2 == held + skipped


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"gate": "score-update"}, {"select": "random"}, {"heads": 2, "kv_heads": 2}])
@pytest.mark.parametrize("layers", ["none", "interleaved", "all", "keep:1,0,0.4,1"])
def test_saved_activations_are_the_formulas(layers, changes):
    """Every float tensor that autograd keeps for the backward pass of the layers, counted by its storage."""
    model = small_model(dtype=torch.float32, layers=layers, **changes)
    batch, kept = as_batch(model.config, [(6, STREAM)], torch.float32), {}
    x = torch.randn(*batch.ids.shape, model.config.dim, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.decoder.norm = torch.nn.Identity()
        model.decoder(x * 1.0, batch.plan)
    assert sum(size for size, _ in kept.values()) == activation_bytes(model.config, 6, int((frame_of(batch) < 0).sum()))


@given(budget=st.integers(2000, 40000), text=st.integers(1, 5), layers=st.sampled_from(["none", "interleaved", "all"]))
def test_a_fixed_budget_holds_what_the_formula_says(budget, text, layers):
    """Filled frame by frame until one more would not fit."""
    model = small_model(dtype=torch.float32, layers=layers)
    frames = frames_that_fit(model.config, budget, text)
    stream, pixels = streamed(model, 0, text - 1), random_pixels(1, model.config, dtype=torch.float32)
    while stream.seen[0] < frames:
        stream.see(pixels)
    assert held_bytes(stream.cache) <= max(budget, kv_bytes(model.config, 0, text))
    stream.see(pixels)
    assert held_bytes(stream.cache) > budget


@given(frames=st.integers(1, 6), words=st.integers(0, 9), layers=st.sampled_from(["none", "interleaved", "all"]))
def test_cache_entries_and_bytes_are_exact(frames, words, layers):
    model = small_model(dtype=torch.float32, layers=layers)
    stream = streamed(model, frames, words)
    assert stream.cache.entries() == layer_tokens(model.config, frames, 1 + words)
    assert held_bytes(stream.cache) == kv_bytes(model.config, frames, 1 + words)


def test_the_papers_ratio_on_vision_alone():
    """Half the layers at r = 0.2: (1 + 0.2) / 2 = 0.6 of the cache, so 1.67 times the video (50 tokens a frame)."""
    config = ModelConfig(image_size=56, grid=7)
    assert config.frame_tokens == 50 and kv_bytes(config, 100, 0) / kv_bytes(dense(config), 100, 0) == pytest.approx(0.6)
    assert cost_ratios(config, 100, 0)["kv_ratio"] == pytest.approx(0.6)


@given(frames=st.integers(0, 9), text=st.integers(1, 9), layers=st.sampled_from(["none", "interleaved", "keep:1,0,0.4,1"]),
       select=st.sampled_from(["learned", "uniform"]))
def test_the_cores_ratios_are_the_formulas(frames, text, layers, select):
    config = small_config(layers=layers, select=select)
    expected = {"flop_ratio": decoder_flops(config, frames, text) / decoder_flops(dense(config), frames, text),
                "kv_ratio": kv_bytes(config, frames, text) / kv_bytes(dense(config), frames, text)}
    assert cost_ratios(config, frames, text) == pytest.approx(expected)


def test_average_text_counts_the_layouts_text():
    clips = [make_clip(DataConfig(), ModelConfig(), "validation", 0, index) for index in range(20)]
    layouts = [lay_out(WORDS_ALL, len(clip.frames), 26, clip.said) for clip in clips]
    assert average_text(clips, WORDS_ALL) == round(sum(frame < 0 for layout in layouts for frame in layout.frame) / 20)
