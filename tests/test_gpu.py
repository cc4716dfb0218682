"""On a CUDA GPU, where there is one: the same equalities, and training in bfloat16."""

import pytest
import torch

import train_tiny
from mod.stream import Stream
from tests.helpers import WORDS_ALL, as_batch, offline, random_pixels, small_model
from tests.test_scripts import QUICK

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("select", ["learned", "random", "uniform"])
def test_streaming_equals_offline_on_the_gpu(select):
    model = small_model(select=select).cuda()
    batch = as_batch(model.config, [(3, [])]).to("cuda")
    stream = Stream(model, WORDS_ALL, frames=3, text=1)
    pixels = random_pixels(3, model.config)
    logits = [stream.see(pixels[t : t + 1]) for t in range(3)]
    expected = offline(model, batch)[0, [5, 10, 15]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_runs_on_the_gpu(tmp_path, dtype):
    flags = [*QUICK[:-1], "cuda", "--dtype", dtype, "--out", str(tmp_path / "run")]
    assert train_tiny.main(flags) == 0
