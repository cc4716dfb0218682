"""Formula == count: FLOPs against torch's own counter, cache entries and bytes against real tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod.config import DataConfig, ModelConfig
from mod.data import clip_layout, make_clip, vocabulary
from mod.layout import Say
from mod.stream import Stream
from mod.study.costs import average_text, decoder_flops, dense, forward_flops, kv_bytes, layer_tokens, ratios
from tests.helpers import WORDS_ALL, as_batch, offline, random_pixels, small_model


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
