"""No shape depends on the data: nothing in a training step, a streamed frame or a streamed word waits for the device,
and torch.compile makes one graph of the decoder for all sizes."""

import warnings
from typing import get_args
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mod.config import Config, DataConfig, Gate, TrainConfig
from mod.data import synthetic
from mod.evaluate import free_running, teacher_forced
from mod.layout import Say
from mod.optim import make_optimizers
from mod.related.chance import ROUTERS
from mod.stream import Stream
from mod.train import Engine, entry_of, train_step
from mod.videollm import VideoLLM
from tests.helpers import WORDS_ALL, as_batch, conversations, random_pixels, small_config, small_model

# Operations whose result's shape, or value in Python, depends on what a tensor holds: on a GPU each of them waits.
WAITING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal",
           "aten::masked_select", "aten::repeat_interleave.Tensor", "aten::_unique", "aten::_unique2",
           "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::allclose"}


class Unwaiting(TorchDispatchMode):
    """Raises at the first operation that would wait for the device."""

    def __enter__(self):
        def wait(*_):
            raise AssertionError("a tensor read in Python waits for the device")

        self.patches = [mock.patch.object(torch.Tensor, name, wait) for name in ("tolist", "numpy", "cpu")]
        for patch in self.patches:  # which read the memory of a CPU and are no operation
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        lists = [part for part in args if isinstance(part, (list, tuple))] if "index" in name else []
        indices = sum(map(list, lists), [])
        masks = [index for index in indices if getattr(index, "dtype", None) in (torch.bool, torch.uint8)]
        assert name not in WAITING and not masks, f"{name} waits for the device"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.unique(),
    lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])), lambda x: torch.equal(x, x), lambda x: x.sum().tolist(),
    lambda x: x.index_put((x > 0,), torch.zeros(())), lambda x: x.masked_select(x > 0), lambda x: torch.where(x > 0),
    lambda x: range(int(x[0])), lambda x: x.numpy(), lambda x: 1 if x[0] else 2,
])
def test_the_guard_sees_what_waits(wait):
    x = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(AssertionError, match="waits for the device"), Unwaiting():
        wait(x)


CASES = [{"layers": "none"}, *({"layers": "keep:0.2,1,0,0.4", "select": select, "gate": gate}
                               for select in ROUTERS for gate in get_args(Gate)),
         {"layers": "all", "keep_last": True, "take_turns": 2}]


def name_of(changes: dict) -> str:
    return " ".join(map(str, changes.values())) or "default"



@pytest.mark.parametrize("changes", CASES, ids=name_of)
@settings(max_examples=6)
@given(st.lists(conversations(most_frames=3), min_size=1, max_size=3))
def test_a_training_step_waits_for_nothing(changes, talks):
    """Forward, loss and backward of ragged batches."""
    model = small_model(dtype=torch.float32, **changes)
    batch = as_batch(model.config, talks, torch.float32)
    trace = []
    with Unwaiting():
        text, stream = model(batch, trace)
        ((text + stream) / sum(batch.counts)).backward()
    assert len(trace) == sum(ratio < 1 for ratio in model.config.keep_ratios)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", CASES, ids=name_of)
def test_a_streamed_frame_and_a_streamed_word_wait_for_nothing(changes, rows, monkeypatch):
    """With everything that changes between frames: some rows alone, texts of different lengths, a cache that grows and
    rewinds. Which word is likeliest is what a stream must ask for, outside of `see` and `feed`."""
    monkeypatch.setattr("mod.cache.FIRST", 16)
    model = small_model(dtype=torch.float32, **changes)
    pixels = random_pixels(rows, model.config, dtype=torch.float32)
    with Unwaiting():
        stream = Stream(model, WORDS_ALL, rows)
        for t in range(4):
            stream.see(pixels)
            stream.feed([[5]] * rows)
            stream.feed([list(range(5, 6 + (row + t) % 3)) for row in range(rows)])
            some = [row == t % rows for row in range(rows)]
            stream.see(pixels[some.index(True)][None], some)
        stream.score(["red disc"] * rows)
        stream.hear(["where is it ?", *[None] * (rows - 1)])
    assert max(stream.cache.entries()) > 16


def a_run(depth: int = 4, **settings) -> tuple:
    """The pieces of a training run of three clips per step."""
    model_config = small_config(image_size=20, grid=5, depth=depth)
    train_config = TrainConfig(batch_size=3, eval_clips=3, device="cpu", **settings)
    config = Config(model_config, DataConfig(frames=3), train_config)
    torch.manual_seed(0)
    model = VideoLLM(config.model)
    model.vit.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return config, model, make_optimizers(trained, config.train.optimizer, 0.02, 1e-3), synthetic(config)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"optimizer": "adamw"}], ids=name_of)
def test_a_step_of_the_loop_waits_for_nothing_until_it_is_logged(changes, monkeypatch):
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self: None)  # torch's own; it counts its steps on the host
    config, model, optimizers, source = a_run(**changes)
    with Unwaiting():
        for step in range(2):
            fetched = train_step(model, optimizers, config, source, step, Engine())
    with pytest.raises(AssertionError, match="waits for the device"), Unwaiting():
        entry_of(fetched, config, source, 1, Engine())


def compiled(model) -> CompileCounter:
    """Compile the model's decoder, with the real tracing and guards but run as it is; counts the graphs."""
    torch.compiler.reset()
    counter = CompileCounter()
    model.decoder.compile(backend=counter)
    return counter


@pytest.fixture
def quiet():
    """Nothing warns. And what compiling has changed for the whole process is put back."""
    with torch.fx.experimental._config.patch(use_duck_shape=True), torch._dynamo.config.patch(recompile_limit=8), \
            warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    torch.compiler.reset()
    assert not [str(warning.message) for warning in told]


COMPILED = [{"layers": layers, "select": select, "depth": 2} for layers, select in (
    ("none", "learned"), ("interleaved", "learned"), ("keep:0,0.4", "learned"), ("all", "random"), ("all", "uniform"))]
COMPILED.append({"layers": "all", "take_turns": 2, "depth": 3})


@pytest.mark.parametrize("changes", COMPILED, ids=name_of)
def test_ragged_batches_of_all_sizes_are_one_graph(changes, quiet):
    """Other numbers of rows, tokens and frames, with every combination of equal and different sizes: the same graph,
    and the loss and the gradients of the decoder that nobody compiled."""
    model, plain = (small_model(dtype=torch.float32, **changes) for _ in range(2))
    counter = compiled(model)
    narrated, asked = Say(0, "assistant", "red disc moves"), Say(0, "user", "where is it ?")
    for talks in ([(2, [narrated]), (2, [])], [(4, []), (1, [asked]), (2, [])], [(5, [narrated])] * 5,
                  [(2, []), (1, [narrated])]):
        batch = as_batch(model.config, talks, torch.float32)
        one, two = ([], [])
        losses = [sum(either(batch, trace)) for either, trace in ((model, one), (plain, two))]
        torch.testing.assert_close(*losses)
        for a, b in zip(one, two, strict=True):
            assert a.layer == b.layer and torch.equal(a.kept, b.kept)
        for loss in losses:
            loss.backward()
        assert counter.frame_count == 1
    for (name, p), q in zip(model.decoder.named_parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("changes", "rows"), [(COMPILED[0], 1), (COMPILED[1], 1), (COMPILED[1], 2), (COMPILED[2], 1)])
def test_a_stream_is_one_graph_for_frames_and_one_for_words(changes, rows, quiet, monkeypatch):
    """However long it gets: the caches of its layers grow past the slots they begin with, at different moments."""
    monkeypatch.setattr("mod.cache.FIRST", 24)
    model, plain = (small_model(dtype=torch.float32, **changes) for _ in range(2))
    counter = compiled(model)
    pixels = random_pixels(rows, model.config, dtype=torch.float32)
    one, two = (Stream(either, WORDS_ALL, rows, trace=[]) for either in (model, plain))
    graphs = []
    for t in range(10):
        torch.testing.assert_close(one.see(pixels), two.see(pixels), rtol=1e-3, atol=1e-3)
        graphs.append(counter.frame_count)
        word = [[5 + t % 20]] * rows if t % 3 else [[5], []][:rows]
        torch.testing.assert_close(one.feed(word), two.feed(word), rtol=1e-3, atol=1e-3)
        graphs.append(counter.frame_count)
    assert graphs == [2] * len(graphs), "<bos> is a word"
    assert len(one.trace) == len(two.trace) == 10 * sum(ratio < 1 for ratio in model.config.keep_ratios)
    grown = [layer.pos.shape[1] > 24 for layer in one.cache.layers]
    assert grown == [kept >= 2 for kept in model.config.keep_counts]


def test_what_is_compiled_is_evaluated_as_well(quiet):
    """Validation in between streams, looks ahead and has batches of one clip; a second one compiles nothing more."""
    _, model, _, source = a_run(depth=2)
    counter, words, graphs = compiled(model.eval()), WORDS_ALL, []
    for _ in range(2):
        trace = []
        teacher_forced(model, words, source.validation(3), rows=2, trace=trace)
        free_running(model, words, source.validation(3), rows=2)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] < 16
