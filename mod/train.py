"""The training loop: warm up the vision encoder, then train the stream, step by step, so that any crash can be resumed.

A step depends on nothing but the weights, the optimizers' memory and its own number (clips are made from their number),
so a run that is killed and resumed ends with the same weights, bit for bit (same machine, same number of threads).

Read next: live.py
"""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from mod.block import PAD
from mod.checkpoint import read_state, to_json, weights, write_config, write_state, write_tensors, write_text
from mod.config import Config, ModelConfig, TrainConfig, UserError
from mod.data import CELLS, SPARK_LABEL, Clip, clip_batch, clip_pixels, label_sizes, make_clip, vocabulary
from mod.evaluate import free_running, router_recall, sprite_patches, teacher_forced
from mod.layout import NO_LABEL, Batch, Vocabulary
from mod.metrics import summarize
from mod.optim import Muon, schedule
from mod.parallel import join, rank, spread, together, total, whole, world
from mod.videollm import VideoLLM, stream_loss
from mod.vit import ViT

LOG_EVERY = 20  # steps
WARM_UP_CLIPS, WARM_UP_FRAMES = 32, 2  # a warm-up batch: clips, and frames of each
WARM_UP_RATES = 0.05, 5e-3  # Muon's and AdamW's learning rates there: hasty, for a task that is simple
AT_ONCE = 10_000  # vision tokens in a batch of validation, at most
BACKGROUND = 0.1  # weight of an empty patch's label in the warm-up: most patches are empty


def pick_device(name: str, dtype: str = "float32") -> torch.device:
    """Raises UserError when the device is not there, or cannot do the dtype."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[name]:
        raise UserError(f"device got {name}, but torch finds none here; use --device auto or cpu")
    if dtype != "float32" and name != "cuda":
        raise UserError(f"dtype {dtype} needs a CUDA GPU, got device {name}; use --dtype float32")
    return torch.device(name)


@dataclass(frozen=True)
class Source:
    """Where clips come from, and the words in which their conversations are written."""

    words: Vocabulary
    training: Callable[[int], list[Clip]]  # step -> its clips; nothing but the step decides which
    validation: Callable[[int], list[Clip]]  # a number -> at most so many clips


def synthetic(config: Config, words: Vocabulary | None = None) -> Source:
    return Source(words or vocabulary(), partial(step_clips, config), partial(validation_clips, config))


def prepare(config: Config, words: Vocabulary) -> torch.device:
    """Where to train. Raises UserError when the configuration cannot be trained here."""
    if len(words) > config.model.vocab_size:
        message = f"vocab_size must be at least {len(words)}, the words of the stream, got {config.model.vocab_size}"
        raise UserError(message)
    if config.model.image_size < 4 * CELLS:
        raise UserError(f"image_size must be at least {4 * CELLS} to show a sprite, got {config.model.image_size}")
    device = join(pick_device(config.train.device, config.train.dtype))
    smallest = min(number_of_clips(config, step) for step in (0, config.train.steps))
    if smallest < world() * config.train.accumulate:
        raise UserError(
            f"a step's {smallest} clips cannot be shared by {world()} processes in {config.train.accumulate} parts; "
            "raise --batch-size"
        )
    return device


def make_optimizers(
    named: dict[str, nn.Parameter], kind: str, lr: float, adam_lr: float, vit_lr: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of linear layers, AdamW for embeddings, norms, biases, routers, patches and low-rank
    changes; AdamW at `vit_lr`, when that is given, for all of the vision encoder."""
    vision = [parameter for name, parameter in named.items() if vit_lr and name.startswith("vit.")]
    matrices, others = [], []
    for name, parameter in named.items():
        if not (vit_lr and name.startswith("vit.")):
            special = any(part in name for part in ("embed", "router", "position", "decoder.head", "lora_"))
            matrix = parameter.ndim == 2 and name.endswith("weight") and not special
            (matrices if kind == "muon" and matrix else others).append(parameter)
    groups = [{"params": others, "lr": adam_lr}] + ([{"params": vision, "lr": vit_lr}] if vision else [])
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def trainable(optimizers: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    return [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]


def make_ready(model: VideoLLM, config: Config) -> None:
    """Before training: the encoder needs no gradient unless it has a learning rate; blocks recompute if asked."""
    if not config.train.vit_lr:
        model.vit.requires_grad_(False)
    for layer in model.decoder.layers:
        block = getattr(layer, "block", layer)  # a routed layer wraps one
        block.recompute = config.train.recompute


def optimizers_of(model: VideoLLM, settings: TrainConfig, speed: float = 1.0) -> list[torch.optim.Optimizer]:
    """Optimizers of everything that has a gradient, at `speed` times the learning rates."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = settings.lr, settings.adam_lr, settings.vit_lr
    return make_optimizers(trained, settings.optimizer, *(speed * rate for rate in rates))


def set_up(model: VideoLLM, config: Config) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A model ready for `train_step`: frozen where it should be, and spread over the processes if there are several."""
    make_ready(model, config)
    lesson = spread(Lesson(model, config.train.stream_weight), list(model.decoder.layers), config.train.fsdp)
    return lesson, optimizers_of(model, config.train)  # after spreading, which may put split parameters in their place


def optimizer_step(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Step at `factor` times the peak learning rate, then forget the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()
        optimizer.zero_grad()


def warm_up_vit(vit: ViT, config: Config) -> float:
    """Teach the encoder, on single frames, to say what each patch shows: a sprite's colour, shape, place, or nothing.

    DEVIATION: stands in for the paper's pretrained encoder. Returns the share of sprites whose labels its patches and
    its CLS token get right in the last batch.
    """
    device, width, sizes = vit.position.device, config.model.vit_dim, label_sizes(config.data)
    heads = nn.ModuleDict({name: nn.Linear(width, sum(sizes)) for name in ("patch", "cls")}).to(device)
    named = {**dict(vit.named_parameters()), **{f"{name}_head": p for name, p in heads.named_parameters()}}
    optimizers = make_optimizers(named, config.train.optimizer, *WARM_UP_RATES)
    steps, right = config.train.vit_steps, 0.0
    busy = replace(config.data, event_rate=0.9)
    for step in tqdm(range(steps), desc="vision warm-up", unit="step", leave=False, disable=None):
        first = step * WARM_UP_CLIPS
        clips = [
            make_clip(busy, config.model, "warm-up", config.train.seed, first + i, WARM_UP_FRAMES)
            for i in range(WARM_UP_CLIPS)
        ]
        pixels = clip_pixels(clips).to(device)
        truth = torch.cat([torch.from_numpy(clip.patch_labels) for clip in clips]).to(device)
        patches = vit.patches(pixels)
        tokens = {"patch": patches, "cls": vit.head(patches)}
        # A frame's CLS should know what is in the frame: of its one sprite (of several, a mixture) the largest labels.
        # Sparks it should overlook, as a summary does with what is small: only patches show them.
        truths = {"patch": truth, "cls": truth.amax(1, keepdim=True)}
        truths["cls"][..., SPARK_LABEL] = 0
        loss, correct = torch.zeros((), device=device), []
        for name, head in heads.items():
            all_right = truths[name][..., 0] > 0
            for logits, label in zip(head(tokens[name]).split(sizes, dim=-1), truths[name].unbind(-1), strict=True):
                weight = torch.ones(logits.shape[-1], device=device)
                weight[0] = BACKGROUND if name == "patch" else 1.0
                loss = loss + F.cross_entropy(
                    rearrange(logits, "f p v -> (f p) v"), rearrange(label, "f p -> (f p)"), weight=weight
                )
                all_right = all_right & (logits.argmax(-1) == label)
            correct.append(all_right.sum() / (truths[name][..., 0] > 0).sum())
        loss.backward()
        optimizer_step(optimizers, schedule(step, steps, warmup=10))
        right = min(correct).item()
    return right


def number_of_clips(config: Config, step: int) -> int:
    """Shorter clips are batched more, so that every step has as many frames."""
    longest = config.data.frames
    return config.train.batch_size * longest // config.train.frames_at(step, longest)


def step_clips(config: Config, step: int) -> list[Clip]:
    """The training clips of a step; the numbers of different steps never meet."""
    longest, first = config.data.frames, step * config.train.batch_size * config.data.frames
    return [
        make_clip(
            config.data, config.model, "train", config.train.seed, first + i, config.train.frames_at(step, longest)
        )
        for i in range(number_of_clips(config, step))
    ]


def half(config: Config, device: torch.device):
    """Autocast, when the run asks for another precision than float32."""
    return torch.autocast(device.type, getattr(torch, config.train.dtype), config.train.dtype != "float32")


class Lesson(nn.Module):
    """One forward pass and its loss as a module, which is what PyTorch's engines for many processes wrap."""

    def __init__(self, model: VideoLLM, weight: float):
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, batch: Batch, labels: int, trace: list) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.model(batch.ids, batch.frame, batch.pos, self.model.see(batch.pixels), trace=trace)
        return stream_loss(self.model, hidden, batch, self.weight, labels)


def train_step(
    lesson: nn.Module, optimizers: list[torch.optim.Optimizer], config: Config, source: Source, step: int
) -> dict:
    """One step of a `Lesson`, or of one that is spread over processes. Returns what the log says about it."""
    device, settings = next(lesson.parameters()).device, config.train
    clips = source.training(step)
    # Every process takes its share of every part; with one process and one part that is all of them, in order.
    parts = [clips[rank() + world() * part :: world() * settings.accumulate] for part in range(settings.accumulate)]
    batches = [clip_batch(source.words, part, config.model.frame_tokens) for part in parts]
    counts = [sum(int((batch.labels != NO_LABEL).sum()) for batch in batches),
              sum(int(batch.streaming.sum()) for batch in batches),
              sum(int((batch.pos < PAD).sum()) for batch in batches)]  # fmt: skip
    labels, decisions, tokens = map(int, total(counts, device))
    sums, trace = torch.zeros(3, dtype=torch.float64), []
    for batch in batches:
        of_part: list = []  # empty for every part: an engine may hand on a copy of a list that holds tensors
        with half(config, device):
            losses = lesson(batch.to(device), labels, of_part)
        trace += of_part
        (losses[0] * world()).backward()  # the engines take the mean over processes, and the loss is a sum
        sums += torch.tensor([part.item() for part in losses], dtype=torch.float64)
    mine = [clip for part in parts for clip in part]
    recalls, sprites = router_recall(trace, mine, config.model.grid), sum(map(sprite_patches, mine))
    found = [value * sprites if sprites else 0.0 for value in recalls.values()]
    loss, text, stream, sprites, *found = total([*sums.tolist(), sprites, *found], device)
    recalled = zip(recalls, found, strict=True)
    norm = whole(nn.utils.clip_grad_norm_(trainable(optimizers), settings.clip))
    factor = schedule(step, settings.steps, settings.warmup)
    peak = settings.lr if settings.optimizer == "muon" else settings.adam_lr
    optimizer_step(optimizers, factor)
    return {
        "kind": "train", "step": step + 1, "loss": loss, "lm": text / max(1, labels - decisions),
        "stream": stream / max(1, decisions), "lr": factor * peak, "gnorm": float(norm),
        "recall": {str(layer): value / sprites if sprites else math.nan for layer, value in recalled}, "tokens": tokens,
    }  # fmt: skip


def estimate_seconds(config: Config, model: VideoLLM | None = None, source: Source | None = None) -> float:
    """About how long training will take here: a step at learning rate zero times the steps, and a tenth for the rest.

    Of `model`, which stays as it is, or of one that is thrown away.
    """
    source = source or synthetic(config)
    device = prepare(config, source.words)
    model = model or VideoLLM(config.model).to(device)
    make_ready(model, config)
    optimizers = optimizers_of(model, config.train, speed=0.0)
    once = replace(config, train=replace(config.train, compile=False))
    lesson = Lesson(model, config.train.stream_weight)
    train_step(lesson, optimizers, once, source, 0)
    started = time.monotonic()
    train_step(lesson, optimizers, once, source, 1)
    return 1.1 * config.train.steps * (time.monotonic() - started) + 10


def validation_clips(config: Config, number: int) -> list[Clip]:
    return [make_clip(config.data, config.model, "validation", 0, index) for index in range(number)]


def validate(model: VideoLLM, config: Config, source: Source, number: int, free: bool = False) -> dict:
    """Metrics on at most `number` validation clips, teacher-forced, and with `free` also free-running.

    Every process does the same, because a model that is split needs all of them.
    """
    model.eval()
    settings, clips, trace = config.train, source.validation(number), []
    rows = max(1, min(2 * settings.batch_size, AT_ONCE // (config.data.frames * config.model.frame_tokens)))
    with half(config, next(model.parameters()).device):
        turns, silent = teacher_forced(model, source.words, clips, settings.threshold, rows, trace)
        metrics = summarize(turns, silent, config.data.fps)
        recall = router_recall(trace, clips, config.model.grid)
        metrics["recall"] = {str(layer): value for layer, value in recall.items()}
        if free and model.online:
            turns, silent = free_running(model, source.words, clips, settings.threshold, 2 * rows, settings.max_words)
            metrics["free_running"] = summarize(turns, silent, config.data.fps)
    model.train()
    return metrics


class Log:
    """log.jsonl, the same lines for people above the progress bar, and nothing twice after a resume."""

    def __init__(self, path: Path, step: int | None, steps: int):
        """Keep what an earlier run logged up to `step`, where this one goes on; None begins anew."""
        self.path, kept = path, []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
                repeated = entry["kind"] == "eval" and entry["step"] == steps  # this process evaluates the end again
                if step is not None and entry["step"] <= step and not repeated:
                    kept.append(line)
            except (ValueError, TypeError, KeyError):
                pass  # a crash has cut this line
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, entry: dict, line: str) -> None:
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(entry) + "\n")
            tqdm.write(line)


def train_line(entry: dict, steps: int, speed: float, eta: float) -> str:
    recall = " ".join(f"{value:.2f}" for value in entry["recall"].values()) or "-"
    losses = f"loss {entry['loss']:.3f} (lm {entry['lm']:.3f} stream {entry['stream']:.3f})"
    pace = f"{speed / 1e3:.1f}k tok/s | eta {int(eta) // 60}:{int(eta) % 60:02d}"
    rates = f"lr {entry['lr']:.1e} | gnorm {entry['gnorm']:.2f} | recall {recall}"
    return f"step {entry['step']:>5}/{steps} | {losses} | {rates} | {pace}"


def eval_line(metrics: dict, step: int, steps: int) -> str:
    recall = " ".join(f"{value:.2f}" for value in metrics["recall"].values()) or "-"
    names = {"narration": "narration_exact", "questions": "question_accuracy", "speak": "speak_accuracy",
             "silence": "silence_accuracy", "ppl": "lm_ppl"}  # fmt: skip
    values = " | ".join(f"{name} {metrics[key]:.3f}" for name, key in names.items())
    return f"eval {step:>5}/{steps} | {values} | recall {recall}"


@contextmanager
def patient_interrupt():
    """Ctrl-C fills the yielded list instead of raising, so that a step is never cut in half; a second one raises."""
    pressed: list[bool] = []

    def note(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: leave signals alone
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    config: Config,
    out: Path,
    resume: bool = False,
    build: Callable[[ModelConfig], VideoLLM] = VideoLLM,
    source: Source | None = None,
) -> tuple[VideoLLM, dict | None]:
    """Train a run in folder `out`, or go on with the one that is there. `build` makes the model: with a router of your
    own, or with parts that have been trained already (and vit_steps 0). `source` gives the clips; default synthetic.

    Returns the model and its metrics (teacher-forced, free-running, seconds, steps); None for the metrics when Ctrl-C
    ended it early: the state is saved then, and `resume` continues it. Raises UserError, with nothing written, when the
    run in `out` cannot be continued with this configuration, and when training has diverged.
    """
    started, settings = time.monotonic(), config.train
    source = source or synthetic(config)
    device = prepare(config, source.words)
    torch.manual_seed(settings.seed)
    model = build(config.model).to(device)

    step, state = None, out / "state.safetensors"
    if resume and state.is_file():
        lesson, optimizers = set_up(model, config)
        step, before = read_state(out, model, optimizers)
        if step > settings.steps:
            raise UserError(f"the run in {out} is at step {step} already, got --steps {settings.steps}; ask for more")
        started -= before
        tqdm.write(f"resumed at step {step} of {settings.steps}")
    elif resume and (out / "model.safetensors").exists():
        raise UserError(f"{state} is missing, so the run in {out} cannot be continued; train anew with --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    write_config(out, config)
    log = Log(out / "log.jsonl", step, settings.steps)
    if step is None:
        step = 0
        if settings.vit_steps:
            tqdm.write(f"first the vision encoder, {settings.vit_steps} steps on single frames")
            right, passed = warm_up_vit(model.vit, config), time.monotonic() - started
            line = f"vision warm-up: {right:.0%} of sprites named and placed right, {passed:.0f} s"
            log.write({"kind": "warm-up", "step": 0, "right": right}, line)
        lesson, optimizers = set_up(model, config)
        write_state(out, model, optimizers, step, time.monotonic() - started)
    if settings.compile:
        model.decoder.compile(dynamic=True)
    model.train()
    bar = tqdm(total=settings.steps, initial=step, desc="training", unit="step", disable=True if rank() else None)
    with patient_interrupt() as stop, bar:
        mark, mark_step, tokens = time.monotonic(), step, 0
        while step < settings.steps:
            entry = train_step(lesson, optimizers, config, source, step)
            step, tokens = step + 1, tokens + entry["tokens"]
            bar.update()
            if not math.isfinite(entry["loss"]):
                raise UserError(
                    f"the loss became {entry['loss']} at step {step}; lower --lr or --adam-lr and train anew"
                )
            if step % LOG_EVERY == 0 or step == settings.steps:
                pace = (time.monotonic() - mark) / (step - mark_step)
                speed = tokens / (step - mark_step) / pace
                log.write(entry, train_line(entry, settings.steps, speed, pace * (settings.steps - step)))
                mark, mark_step, tokens = time.monotonic(), step, 0
            if settings.eval_every and step % settings.eval_every == 0 and step < settings.steps:
                with together(lesson):
                    metrics = validate(model, config, source, max(1, settings.eval_clips // 4))
                log.write({"kind": "eval", "step": step, **metrics}, eval_line(metrics, step, settings.steps))
                mark, mark_step, tokens = time.monotonic(), step, 0
            [stopping] = total([float(bool(stop))], device)  # one process stops: all do, at the same step
            if stopping or step % settings.save_every == 0 or step == settings.steps:
                write_state(out, model, optimizers, step, time.monotonic() - started)
            if stopping:
                break
    if step < settings.steps:
        tqdm.write(f"stopped at step {step} of {settings.steps}; continue with --resume")
        return model, None
    write_tensors(out / "model.safetensors", weights(model))
    with together(lesson):
        metrics = validate(model, config, source, settings.eval_clips, free=True)
    log.write({"kind": "eval", "step": step, **metrics}, eval_line(metrics, step, settings.steps))
    metrics |= {"seconds": time.monotonic() - started, "steps": step, "seed": settings.seed,
                "params": sum(p.numel() for p in model.parameters())}  # fmt: skip
    model.eval()
    return model, metrics
