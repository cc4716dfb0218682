"""On a CUDA GPU, where there is one: the same equalities, nothing that waits, compiled code, training in bfloat16."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import stream_tiny
import train_tiny
from mod.layout import Say
from mod.stream import Stream
from tests.helpers import WORDS_ALL, as_batch, offline, random_pixels, small_model
from tests.test_scripts import QUICK

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def unwaiting():
    """CUDA itself raises where anything waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("select", ["learned", "random", "uniform"])
def test_streaming_equals_offline_on_the_gpu(select):
    model = small_model(select=select).cuda()
    batch = as_batch(model.config, [(3, [])]).to("cuda")
    stream, pixels = Stream(model, WORDS_ALL), random_pixels(3, model.config)
    logits = [stream.see(pixels[t : t + 1]) for t in range(3)]
    expected = offline(model, batch)[0, [5, 10, 15]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-9, atol=1e-9)


def test_a_batch_keeps_its_parts_on_the_way_to_the_gpu():
    """All index tensors travel in one copy, each with its own type."""
    model = small_model(layers="keep:1,0,0.4,1")
    batch = as_batch(model.config, [(3, [Say(0, "assistant", "red disc moves")]), (2, [])])
    there = batch.to("cuda")
    for name in ("ids", "labelled", "labels", "streaming", "pixels"):
        one, two = getattr(batch, name), getattr(there, name)
        assert two.device.type == "cuda" and torch.equal(one, two.cpu()) and one.dtype == two.dtype
    for one, two in zip(tree_leaves(batch.plan), tree_leaves(there.plan), strict=True):
        if isinstance(one, torch.Tensor):
            assert two.device.type == "cuda" and torch.equal(one, two.cpu()) and one.dtype == two.dtype
    assert (there.counts, there.plan.counts) == (batch.counts, batch.plan.counts)


@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_waits_for_the_gpu(rows, unwaiting):
    """A training step's forward and backward pass, a streamed frame, and a streamed word."""
    model = small_model(dtype=torch.float32).cuda()
    batch = as_batch(model.config, [(3, [Say(0, "assistant", "red disc moves")]), (2, [])], torch.float32)
    text, stream = model(batch.to("cuda"), [])
    ((text + stream) / sum(batch.counts)).backward()
    stream, pixels = Stream(model, WORDS_ALL, rows), random_pixels(rows, model.config, dtype=torch.float32).pin_memory()
    for _ in range(3):
        stream.see(pixels)
        stream.feed([[5]] * rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=["eager", "compiled"])
def test_training_and_streaming_run_on_the_gpu(tmp_path, dtype, flags):
    out = tmp_path / "run"
    assert train_tiny.main([*QUICK[:-1], "cuda", "--dtype", dtype, *flags, "--out", str(out)]) == 0
    assert stream_tiny.main(["--checkpoint", str(out), "--device", "cuda", "--dtype", dtype, *flags]) == 0
