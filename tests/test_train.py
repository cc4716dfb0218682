"""The training loop: exact resume, exact accumulation, and that it learns."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mod.config import Config, DataConfig, TrainConfig
from mod.data import Source, clip_batch, make_clip, synthetic
from mod.decoder import MoDBlock
from mod.evaluate import summarize, teacher_forced
from mod.layout import NO_LABEL, Say
from mod.optim import Muon, make_optimizers, orthogonalize, schedule
from mod.related.narrowing import keep, narrowed
from mod.run import flag_of, read_config, read_tensors, remarks
from mod.train import Engine, build, entry_of, read_state, train, train_step, write_state
from mod.videollm import VideoLLM
from tests.helpers import WORDS_ALL, as_batch, labels_of, offline, small_config, small_model

ROOT = Path(__file__).parent.parent
TINY = Config(
    small_config(image_size=20, patch_size=4, grid=5),
    DataConfig(frames=3),
    TrainConfig(steps=6, batch_size=2, vit_steps=2, save_every=2, eval_every=3, eval_clips=4, warmup=2, device="cpu"),
)


def train_tiny(config, folder, resume=False):
    """As the script: build the model, then train it."""
    return train(config, folder, *build(config, torch.device("cpu")), resume)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, train_tiny(TINY, folder)


@pytest.mark.parametrize("stop", range(0, 6))
def test_killed_at_any_step_and_resumed_ends_bitwise_the_same(tmp_path, uninterrupted, monkeypatch, stop):
    """Killed before step `stop` + 1: the last saved state, or the start, is where it goes on."""
    import mod.train as module

    def dying(model, optimizers, config, source, step, engine):
        if step == stop:
            raise SystemExit("killed")
        return train_step(model, optimizers, config, source, step, engine)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", dying)
        with pytest.raises(SystemExit):
            train_tiny(TINY, tmp_path)
    torch.manual_seed(123)  # whatever the new process's random state is
    train_tiny(read_config(tmp_path), tmp_path, resume=True)
    whole, _ = uninterrupted
    for name in ("model.safetensors", "state.safetensors"):
        assert same(read_tensors(tmp_path / name)[0], read_tensors(whole / name)[0])
    one, two = ([json.loads(line) | {"seconds": None} for line in (folder / "log.jsonl").open()]
                for folder in (tmp_path, whole))
    assert one == two


def test_sigkill_and_ctrl_c_in_a_real_process(tmp_path):
    """SIGKILL at whatever moment, resume, Ctrl-C, resume: bitwise the weights of the run that nobody disturbed."""
    flags = [f"{flag_of(name)}={value}" for part in (TINY.model, TINY.data) for name, value in vars(part).items()
             if not isinstance(value, bool) and name in remarks(type(part))]
    flags += ["--steps=60", "--batch-size=2", "--vit-steps=2", "--save-every=5", "--eval-every=0", "--eval-clips=2",
              "--device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        command = [sys.executable, "train_tiny.py", f"--out={out}", *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)

    def wait_for(path, process):
        while not path.is_file():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)

    whole = start(tmp_path / "whole", *flags)
    killed = start(tmp_path / "killed", *flags)
    wait_for(tmp_path / "killed" / "state.safetensors", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    stopped = start(tmp_path / "killed", "--resume")
    while "resumed at step" not in (line := stopped.stdout.readline()):
        assert line, "ended before it resumed"
    time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    output, _ = stopped.communicate()
    assert "Traceback" not in output and stopped.returncode in (0, 130), output
    if stopped.returncode == 130:
        assert "continue with --resume" in output
        last = start(tmp_path / "killed", "--resume")
        assert last.wait() == 0, last.communicate()[0]
    assert whole.wait() == 0, whole.communicate()[0]
    one, two = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "killed"))
    assert same(one, two)


def test_state_round_trip(tmp_path):
    model, engine = small_model(dtype=torch.float32), Engine()
    optimizers = make_optimizers(dict(model.named_parameters()), "muon", 0.02, 1e-3)
    sum(model(as_batch(model.config, [(2, [])], torch.float32))).backward()
    for optimizer in optimizers:
        optimizer.step()
    write_state(tmp_path, model, optimizers, 7, 1.5, engine)
    other = small_model(1, dtype=torch.float32)
    fresh = make_optimizers(dict(other.named_parameters()), "muon", 0.02, 1e-3)
    torch.manual_seed(99)
    assert read_state(tmp_path, other, fresh, engine) == (7, 1.5)
    drawn = torch.rand(3)
    read_state(tmp_path, other, make_optimizers(dict(other.named_parameters()), "muon", 0.02, 1e-3), engine)
    assert torch.equal(drawn, torch.rand(3)), "the random state comes back as well"
    with pytest.raises(ValueError, match="another optimizer"):
        read_state(tmp_path, other, make_optimizers(dict(other.named_parameters()), "adamw", 0.02, 1e-3), engine)
    assert same(model.weights(), other.weights())
    for one, two in zip(optimizers, fresh, strict=True):
        assert len(one.state) == len(two.state) > 0
        for p, q in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
            assert same(dict(one.state[p]), dict(two.state[q]))


def loss_of(fetched: dict, weight: float = 1.0) -> float:
    text, stream = fetched["sums"].tolist()
    return (text + weight * stream) / sum(fetched["counts"])


@pytest.mark.parametrize("layers", ["interleaved", "none"])
def test_accumulation_equals_one_large_batch(layers):
    """Parts are weighted by their labels, so that how a batch is split changes nothing but rounding."""
    steps = []
    for accumulate in (1, 3):
        settings = replace(TINY.train, batch_size=5, accumulate=accumulate, optimizer="adamw", clip=1e9)
        config = replace(TINY, train=settings, model=replace(TINY.model, layers=layers))
        torch.manual_seed(0)
        model = VideoLLM(config.model).double()
        optimizers = [torch.optim.SGD(model.decoder.parameters(), lr=1.0)]
        optimizers[0].param_groups[0]["peak"] = 1.0
        fetched = train_step(model, optimizers, config, synthetic(config), 0, Engine())
        assert len(fetched["clips"]) == 5 and len(fetched["trace"]) == accumulate * 2 * (layers != "none")
        steps.append((fetched, model.weights()))
    assert loss_of(steps[0][0]) == pytest.approx(loss_of(steps[1][0]), rel=1e-6)
    assert steps[0][0]["counts"] == steps[1][0]["counts"]
    for name, tensor in steps[0][1].items():
        torch.testing.assert_close(tensor, steps[1][1][name], rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_before_the_step(monkeypatch):
    """Guards against clipping after it, which changes nothing."""
    import mod.train as module

    config, norms = replace(TINY, train=replace(TINY.train, clip=0.01)), []
    model = VideoLLM(config.model)
    optimizers = make_optimizers(dict(model.decoder.named_parameters()), "adamw", 1e-3, 1e-3)

    def spy(some, factor):
        grads = [p.grad for o in some for group in o.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    monkeypatch.setattr(module, "optimizer_step", spy)
    fetched = train_step(model, optimizers, config, synthetic(config), 0, Engine())
    assert norms == [pytest.approx(0.01, rel=1e-3)] and fetched["gnorm"] > 0.01


def test_loss_is_lm_plus_weighted_streaming_over_labels():
    """The model's two sums, and the step's weighing of them, against cross-entropy written out over all places."""
    model = small_model()
    said = Say(1, "assistant", "red disc moves"), Say(0, "user", "where is it ?")
    batch = as_batch(model.config, [(3, [said[0]]), (2, [said[1]])])
    labels = labels_of(batch)
    nll = -offline(model, batch).float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    after_a_frame = torch.zeros(labels.numel(), dtype=torch.bool)
    after_a_frame[batch.plan.vision[:, -1]] = True
    streaming = after_a_frame.view_as(labels) & (labels != NO_LABEL)
    text, stream = model(batch)
    torch.testing.assert_close(stream.float(), nll[streaming].sum())
    torch.testing.assert_close(text.float(), nll[(labels != NO_LABEL) & ~streaming].sum())
    assert batch.counts == (int((labels != NO_LABEL).sum() - streaming.sum()), int(streaming.sum()))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_step_weighs_the_streaming_loss(weight):
    config = replace(TINY, train=replace(TINY.train, stream_weight=weight, clip=1e9))
    torch.manual_seed(0)
    model, source = VideoLLM(config.model), synthetic(config)
    before, batch = model.state_dict(keep_vars=False), clip_batch(source.words, source.training(0), config.model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    optimizers = [torch.optim.SGD(model.decoder.parameters(), lr=1.0)]
    optimizers[0].param_groups[0]["peak"] = 1.0
    fetched = train_step(model, optimizers, config, source, 0, Engine())
    entry = entry_of(fetched, config, source, 1, Engine())
    plain = VideoLLM(config.model)
    plain.load_state_dict(before)
    text, stream = plain(batch)
    loss = (text + weight * stream) / sum(batch.counts)
    loss.backward()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["lm"] == pytest.approx(text.item() / batch.counts[0], rel=1e-5)
    assert entry["stream"] == pytest.approx(stream.item() / batch.counts[1], rel=1e-5)
    factor = schedule(0, config.train.steps, config.train.warmup)
    for p, q in zip(model.decoder.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(p, q - factor * q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", ["interleaved", "none"])
def test_it_learns_four_clips_by_heart(layers):
    """The loss of a few clips seen again and again goes to nearly nothing, with and without MoD."""
    config = replace(TINY, model=replace(TINY.model, layers=layers))
    torch.manual_seed(0)
    model, words = VideoLLM(config.model), WORDS_ALL
    optimizers = make_optimizers(dict(model.named_parameters()), "muon", 0.02, 3e-3)
    unfrozen = replace(config, train=replace(config.train, steps=150, vit_lr=1.0, batch_size=4))
    clips = [make_clip(config.data, config.model, "train", 0, index) for index in range(4)]
    source = Source(words, lambda step: clips, lambda number: clips)
    losses = [loss_of(train_step(model, optimizers, unfrozen, source, step, Engine())) for step in range(150)]
    assert losses[0] > 2.0 and losses[-1] < 0.05, (losses[0], losses[-1])
    turns, silent = teacher_forced(model, words, clips)
    summary = summarize(turns, silent, 2.0)
    assert summary["narration_exact"] == summary["silence_accuracy"] == summary["speak_accuracy"] == 1.0


def test_frozen_encoder_does_not_move():
    torch.manual_seed(0)
    model = VideoLLM(TINY.model)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("vit.")}
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.vit.requires_grad_(False)
    train_step(model, make_optimizers(trained, "muon", 0.02, 1e-3), TINY, synthetic(TINY), 0, Engine())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("vit."), name


def test_clips_of_different_steps_never_meet():
    source = synthetic(TINY)
    seen = [clip.frames[0].tobytes() for step in range(6) for clip in source.training(step)]
    seen += [clip.frames[0].tobytes() for clip in source.validation(4)]
    seen += [clip.frames[0].tobytes() for step in range(2) for clip in source.warm_up(step)]
    seen += [next(source.live(seed)).frames[0].tobytes() for seed in range(3)]
    assert len(seen) == len(set(seen)) == 6 * 2 + 4 + 2 * 32 + 3
    one, two = ([clip.frames.tobytes() for clip in source.training(3)] for _ in range(2))
    assert one == two


def test_orthogonalize_pushes_singular_values_to_one():
    for shape in ((3, 8, 20), (2, 20, 8), (1, 6, 6)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert (values > 0.3).all() and (values < 1.3).all()


def test_muon_treats_equal_shapes_together_as_one_by_one():
    grads = [torch.randn(6, 10) for _ in range(3)]
    together, alone = ([torch.nn.Parameter(torch.zeros(6, 10)) for _ in grads] for _ in range(2))
    optimizers = [Muon(together, lr=0.1), *[Muon([p], lr=0.1) for p in alone]]
    for _ in range(2):
        for params in (together, alone):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_schedule():
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1 and max(factors) == 1.0 and 0 <= factors[-1] < 0.001
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(0, 1, 0) == 1.0


class TestNarrowing:
    CONFIG = replace(TINY, model=replace(TINY.model, layers="keep:0.2,1,0,0.5"),
                     train=replace(TINY.train, steps=8, dense_steps=3, narrow_steps=4, vit_steps=0))

    def test_routed_layers_begin_dense_and_come_down_to_their_share(self):
        ratios = [narrowed(self.CONFIG, step).model.keep_ratios for step in range(9)]
        assert ratios[:4] == [(1.0, 1.0, 1.0, 1.0)] * 4, "dense, and those that will be skipped as well"
        assert all(one[layer] > two[layer] for one, two in pairwise(ratios[3:8]) for layer in (0, 2, 3))
        one_token = 1 / self.CONFIG.model.frame_tokens
        assert ratios[5] == pytest.approx((0.2**0.5, 1.0, one_token**0.5, 0.5**0.5))
        assert ratios[7] == ratios[8] == self.CONFIG.model.keep_ratios and narrowed(TINY, 0) is TINY

    def test_a_run_narrows_its_routers_sleep_before_and_it_ends_as_it_is_asked_to(self, tmp_path, monkeypatch):
        import mod.train as module

        seen, step_here = [], module.train_step

        def spy(model, optimizers, config, source, step, engine):
            routers = [layer.router for layer in model.decoder.layers if isinstance(layer, MoDBlock)]
            fetched = step_here(model, optimizers, config, source, step, engine)
            kept = {routing.layer: int(routing.kept.sum(1).unique()) for routing in fetched["trace"]}
            asleep = {bool((router.weight(torch.ones(1, 1)) == 1).all()) for router in routers}
            seen.append((kept, asleep,
                         [router.w.weight.detach().clone() for router in routers]))
            return fetched

        monkeypatch.setattr(module, "train_step", spy)
        torch.manual_seed(0)
        model = VideoLLM(self.CONFIG.model)
        assert train(self.CONFIG, tmp_path, model, synthetic(self.CONFIG))["steps"] == 8
        for step, (kept, asleep, _) in enumerate(seen):
            assert kept == {layer: narrowed(self.CONFIG, step).model.keep_counts[layer] for layer in (0, 2, 3)}
            assert asleep == {step < 3}
        for still, later, weights in zip(seen[0][2], seen[2][2], seen[-1][2], strict=True):
            assert torch.equal(still, later) and not torch.equal(later, weights)
            assert still.abs().max() < 0.01, "a decoder that can look already is not disturbed"
        routers = [layer.router for layer in model.decoder.layers if isinstance(layer, MoDBlock)]
        assert [router.kept for router in routers] == [self.CONFIG.model.keep_counts[layer] for layer in (0, 2, 3)]

    def test_asleep_a_layer_that_keeps_all_is_the_dense_one(self):
        torch.manual_seed(0)
        model = VideoLLM(self.CONFIG.model)
        dense = replace(self.CONFIG.model, layers="keep:1,1,0,1")
        batch = clip_batch(WORDS_ALL, synthetic(self.CONFIG).validation(2), dense)
        other = VideoLLM(dense)
        mine = dict(model.named_parameters())
        for name, p in other.named_parameters():  # layer 2 is skipped, and has a router, in both
            theirs = re.sub(r"layers\.([013])\.", r"layers.\1.block.", name) if name not in mine else name
            p.data.copy_(mine[theirs])
        keep(model, dense.keep_counts, sleep=True)
        torch.testing.assert_close(model.predict(batch), other.predict(batch), rtol=1e-5, atol=1e-5)


def test_routers_learn_at_a_rate_of_their_own():
    """Adam's first step is as long as the rate, whatever the gradient."""
    model = VideoLLM(TINY.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("vit.")}
    config = replace(TINY, train=replace(TINY.train, warmup=0, router_rate=0.1))
    model.vit.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if name in before}
    train_step(model, make_optimizers(trained, "adamw", 0.02, 1e-3, 0.1), config, synthetic(config), 0, Engine())
    moved = {name: (p - before[name]).abs().max().item() for name, p in trained.items()}
    for name, far in moved.items():
        assert far == pytest.approx(1e-4 if "router" in name else 1e-3, rel=0.02), name


def test_every_trained_parameter_has_one_optimizer():
    model = small_model(dtype=torch.float32)
    optimizers = make_optimizers(dict(model.named_parameters()), "muon", 0.02, 1e-3)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    for name, p in model.named_parameters():
        special = any(part in name for part in ("embed", "router", "position"))
        assert (id(p) in muon) == (p.ndim == 2 and not special), name
