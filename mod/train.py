"""The training loop: warm up the vision encoder, then train the stream, step by step, so that any crash can be resumed.

A step depends on nothing but the weights, the optimizers' memory, the random state and its own number, from which its
clips are made. So a run that is killed and resumed ends with the same weights, bit for bit, on the same machine with
the same number of threads.
With one process nothing waits for the device between two lines of the log.

Read next: ../train_tiny.py
"""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from mod.config import Config, TrainConfig, UserError, require
from mod.data import Source, clip_batch, clip_pixels, synthetic
from mod.evaluate import free_running, summarize, teacher_forced
from mod.optim import Muon, make_optimizers, optimizer_step, schedule
from mod.run import World, load_weights, read_tensors, to_json, write_config, write_tensors, write_text
from mod.videollm import VideoLLM
from mod.vit import ViT

WARM_UP_RATES = 0.02, 5e-3  # Muon's and AdamW's learning rates in the warm-up
BACKGROUND = 0.1  # weight in the warm-up of a patch that shows nothing: most patches are empty
AT_ONCE = 10_000  # vision tokens in a batch of validation, at most


def warm_up_vit(vit: ViT, source: Source, settings: TrainConfig) -> float:
    """Teach the encoder, on single frames, to say what each patch shows: a sprite's colour, shape, place, or nothing.

    DEVIATION: stands in for the paper's pretrained encoder. Returns the share of sprites whose labels its patches and
    its CLS token get right in the last batch.
    """
    device, sizes, right = vit.position.device, source.label_sizes, torch.zeros(())
    known = {"patch": sizes} | ({"cls": sizes[: source.summary_labels]} if source.summary_labels else {})
    heads = nn.ModuleDict({name: nn.Linear(vit.config.vit_dim, sum(own)) for name, own in known.items()}).to(device)
    named = {**dict(vit.named_parameters()), **{f"{name}_head": p for name, p in heads.named_parameters()}}
    optimizers = make_optimizers(named, settings.optimizer, *WARM_UP_RATES)
    for step in tqdm(range(settings.vit_steps), desc="vision warm-up", unit="step", leave=False, disable=None):
        clips = source.warm_up(step)
        truth = torch.cat([torch.from_numpy(clip.patch_labels) for clip in clips]).to(device)
        patches = vit.patches(clip_pixels(clips).to(device))
        tokens = {"patch": patches, "cls": vit.head(patches)}
        # The CLS token predicts its frame's labels: the maximum over patches, of several sprites a mixture.
        truths = {"patch": truth, "cls": truth.amax(1, keepdim=True)}
        loss, correct = torch.zeros((), device=device), []
        for name, head in heads.items():
            all_right = there = truths[name][..., 0] > 0
            # All labels of a patch weigh the same: that a sprite is no trail must be learned as well as what it is.
            weight = torch.where(truths[name].any(-1), 1.0, BACKGROUND if name == "patch" else 1.0)
            for number, logits in enumerate(head(tokens[name]).split(known[name], dim=-1)):
                label = truths[name][..., number]
                each = F.cross_entropy(rearrange(logits, "f p c -> f c p"), label, reduction="none")
                loss = loss + (weight * each).sum() / weight.sum()
                all_right = all_right & (logits.argmax(-1) == label)
            correct.append(all_right.sum() / there.sum())
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), settings.clip)
        optimizer_step(optimizers, schedule(step, settings.vit_steps, warmup=10))
        right = torch.stack(correct).amin()
    return right.item()


class Engine:
    """Who trains: here one process. For several that share each batch there is another, in mod/parallel.py: its `wrap`
    averages gradients, and splits the weights if asked; `total` sums numbers over all, so it waits for all; `whole`
    puts a split tensor together, `like` splits one; `together` lets parts of a split model be called."""

    rank, world, device = 0, 1, None

    def wrap(self, model: VideoLLM, split: bool) -> nn.Module:
        return model

    def total(self, numbers: list[float]) -> list[float]:
        return numbers

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def like(self, tensor: Tensor, other: Tensor) -> Tensor:
        return tensor.to(other.device)

    def together(self, wrapped: nn.Module):
        return nullcontext()


def half(config: Config, device: torch.device):
    """Autocast, when the run asks for another precision than float32."""
    return torch.autocast(device.type, getattr(torch, config.train.dtype), config.train.dtype != "float32")


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], config: Config, source: Source, step: int,
               engine: Engine) -> dict:
    """One step. The loss is LM loss + omega * streaming loss, both summed over labels and divided by their number
    (paper, section 3.1). Returns what the log needs, as tensors: nothing here waits for them."""
    settings, clips, trace = config.train, source.training(step), []
    device = next(model.parameters()).device
    # Every process takes its share of every part; with one process and one part that is all of them, in order.
    parts = [clips[engine.rank + engine.world * part :: engine.world * settings.accumulate]
             for part in range(settings.accumulate)]
    batches = [clip_batch(source.words, part, config.model) for part in parts]
    counts = engine.total([sum(column) for column in zip(*(batch.counts for batch in batches), strict=True)])
    sums = torch.zeros(2, device=device)
    for batch in batches:
        of_part: list = []  # empty for every part: an engine may hand on a copy of a list that holds tensors
        with half(config, device):
            text, stream = model(batch.to(device), of_part)
        trace += of_part
        # The engines take the mean over processes, and the loss is a sum.
        ((text + settings.stream_weight * stream) / sum(counts) * engine.world).backward()
        sums += torch.stack((text, stream)).detach()
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, settings.clip)
    factor = schedule(step, settings.steps, settings.warmup)
    optimizer_step(optimizers, factor)
    return {"sums": sums, "counts": counts, "gnorm": norm, "factor": factor, "trace": trace, "clips": sum(parts, [])}


def entry_of(fetched: dict, config: Config, source: Source, step: int, engine: Engine) -> dict:
    """The log's entry of a step. Here the process waits for the device. Recall is that of this process's own clips."""
    (text, stream), (texts, decisions) = engine.total(fetched["sums"].tolist()), fetched["counts"]
    settings, weight = config.train, config.train.stream_weight
    peak = settings.lr if settings.optimizer == "muon" else settings.adam_lr
    return {
        "kind": "train", "step": step, "loss": (text + weight * stream) / (texts + decisions),
        "lm": text / max(1, texts), "stream": stream / max(1, decisions), "lr": fetched["factor"] * peak,
        "gnorm": float(engine.whole(fetched["gnorm"])), "recall": source.probe(fetched["trace"], fetched["clips"]),
    }


def validate(model: VideoLLM, config: Config, source: Source, number: int, free: bool = False) -> dict:
    """Metrics on at most `number` validation clips, teacher-forced, and with `free` also free-running.

    Every process does the same, because a model that is split needs all of them.
    """
    model.eval()
    settings, clips, trace = config.train, source.validation(number), []
    rows = max(1, min(2 * settings.batch_size, AT_ONCE // (config.data.frames * config.model.frame_tokens)))
    with half(config, next(model.parameters()).device):
        turns, silent = teacher_forced(model, source.words, clips, settings.threshold, rows, trace)
        metrics = summarize(turns, silent, config.data.fps) | {"recall": source.probe(trace, clips)}
        if free:
            turns, silent = free_running(model, source.words, clips, settings.threshold, 2 * rows, settings.max_words)
            metrics["free_running"] = summarize(turns, silent, config.data.fps)
    model.train()
    return metrics


def earlier_log(path: Path, step: int, steps: int) -> str:
    """What a run logged up to `step`, where it goes on. Its last line may be cut by a crash."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            repeated = entry["kind"] == "eval" and entry["step"] == steps  # this process evaluates the end again
            if entry["step"] <= step and not repeated:
                kept.append(line + "\n")
    return "".join(kept)


SHOWN = {"loss": "loss", "lm": "lm", "stream": "stream", "gnorm": "gnorm", "narration_exact": "narration",
         "question_accuracy": "questions", "speak_accuracy": "speak", "silence_accuracy": "silence", "lm_ppl": "ppl",
         "right": "sprites named and placed right", "seconds": "seconds"}


def line_of(entry: dict, steps: int) -> str:
    """An entry of the log for people."""
    values = " | ".join(f"{name} {entry[key]:.3f}" for key, name in SHOWN.items() if key in entry)
    recall = " ".join(f"{value:.2f}" for value in entry.get("recall", {}).values())
    return f"{entry['kind']:<5} {entry['step']:>5}/{steps} | {values}" + (f" | recall {recall}" if recall else "")


@contextmanager
def patient_interrupt():
    """Ctrl-C fills the yielded list instead of raising, so that no step is cut in half; a second one raises."""
    pressed: list[bool] = []

    def note(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which raises
        pressed.append(True)
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    before = signal.getsignal(signal.SIGINT)
    try:
        with suppress(ValueError):  # outside the main thread signals are left alone
            signal.signal(signal.SIGINT, note)
        yield pressed
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def memory_of(model: VideoLLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, by the parameter's name and theirs for it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}/{key}": value for optimizer in optimizers
            for parameter, memory in optimizer.state.items() for key, value in memory.items()}


def write_state(folder: Path, model: VideoLLM, optimizers: list[torch.optim.Optimizer], step: int, seconds: float,
                engine: Engine) -> None:
    """Everything that the next step depends on. The data's position is the step: clips are made from their number."""
    tensors = {f"model/{name}": tensor for name, tensor in model.weights().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in memory_of(model, optimizers).items()}
    tensors = {name: engine.whole(tensor.detach()) for name, tensor in tensors.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    if engine.rank == 0:
        write_tensors(folder / "state.safetensors", tensors, {"step": str(step), "seconds": str(seconds)})


def read_state(
    folder: Path, model: VideoLLM, optimizers: list[torch.optim.Optimizer], engine: Engine
) -> tuple[int, float]:
    """Put model, optimizers and random state back as `write_state` found them; returns the step and the seconds so far.

    Raises UserError when the file is damaged, foreign, or was written by other optimizers.
    """
    path = folder / "state.safetensors"
    tensors, note = read_tensors(path)
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    try:
        step, seconds = int(note["step"]), float(note["seconds"])
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = tensor
        torch.set_rng_state(kinds["random"]["cpu"])
    except (KeyError, ValueError, TypeError, RuntimeError):
        raise UserError(f"{path} is no training state of this project; train anew or name another folder") from None
    require(0 <= step < 2**53, f"{path} says that it is of step {step}; restore it or train anew")
    load_weights(model.weights(), kinds["model"], path, engine.like)
    trained = {name.rpartition("/")[0] for name in kinds["optimizer"]}  # of the others nothing is remembered yet
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        keys = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if names[p] in trained):
            optimizer.state[parameter] = {key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                                          for key in keys}
    memory = memory_of(model, optimizers)
    load_weights(memory, kinds["optimizer"], path, engine.like,
                 "it belongs to another optimizer; resume with the run's own settings, or restore the file")
    sound = (kinds["optimizer"][name].dtype == value.dtype and (not name.endswith("/step") or 0 <= value < 2**53)
             for name, value in memory.items())
    require(all(sound), f"{path}: the optimizer's memory is damaged; restore the file or train anew")
    if "cuda" in kinds["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(kinds["random"]["cuda"])
    return step, seconds


def train(config: Config, out: Path, model: VideoLLM, source: Source, resume: bool = False,
          engine: Engine | None = None, validate: Callable = validate) -> dict | None:
    """Train `model` in folder `out`, or go on with the run that is there.

    Returns its metrics (teacher-forced, free-running, seconds, steps), or None when Ctrl-C ended it early: the state is
    saved then, and `resume` continues it. Raises UserError, with nothing written, when the run in `out` cannot be
    continued with this configuration, and when training has diverged.
    """
    started, settings, engine = time.monotonic(), config.train, engine or Engine()
    require(settings.batch_size >= engine.world * settings.accumulate,
            f"a step's {settings.batch_size} clips cannot be shared by {engine.world} processes in "
            f"{settings.accumulate} parts; raise --batch-size")
    narrowing = None  # if not asked for, routed layers keep as many tokens in every step
    if settings.dense_steps or settings.narrow_steps:
        from mod.related import narrowing
    state = out / "state.safetensors"
    goes_on = resume and state.is_file()
    require(goes_on or not (resume and (out / "model.safetensors").exists()),
            f"{state} is missing, so the run in {out} cannot be continued; train anew with --overwrite")

    def set_up() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        if not settings.vit_lr:
            model.vit.requires_grad_(False)
        wrapped = engine.wrap(model, settings.fsdp)  # first: it may put split parameters in their place
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        rates = settings.lr, settings.adam_lr, settings.router_rate, settings.vit_lr
        return wrapped, make_optimizers(trained, settings.optimizer, *rates)

    def save() -> None:
        write_state(out, model, optimizers, step, time.monotonic() - started, engine)

    step = 0
    if goes_on:
        wrapped, optimizers = set_up()
        step, before = read_state(out, model, optimizers, engine)
        require(step <= settings.steps,
                f"the run in {out} is at step {step} already, got --steps {settings.steps}; ask for more")
        started -= before
        for stale in ("model.safetensors", "metrics.json") if step < settings.steps and engine.rank == 0 else ():
            (out / stale).unlink(missing_ok=True)  # of a run that was finished, and now goes on
        tqdm.write(f"resumed at step {step} of {settings.steps}")

    def log(entry: dict) -> None:
        """A line for programs, and the same for people above the bar; the first process alone writes."""
        if engine.rank == 0:
            with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(to_json(entry) + "\n")
            tqdm.write(line_of(entry, settings.steps))

    out.mkdir(parents=True, exist_ok=True)
    if engine.rank == 0:
        write_config(out, config)
        write_text(out / "log.jsonl", earlier_log(out / "log.jsonl", step, settings.steps) if goes_on else "")
    if not goes_on:
        if settings.vit_steps and source.warm_up:
            right = warm_up_vit(model.vit, source, settings)
            source.warmed(model)
            log({"kind": "warm-up", "step": 0, "right": right, "seconds": time.monotonic() - started})
        if settings.dense_steps:
            narrowing.quiet(model)
        wrapped, optimizers = set_up()
        save()
    if settings.compile:
        model.decoder.compile()
    model.train()
    bar = tqdm(total=settings.steps, initial=step, desc="training", unit="step", disable=True if engine.rank else None)
    with patient_interrupt() as stop, bar:
        while step < settings.steps:
            with narrowing.routed(model, config, step) if narrowing else nullcontext(config) as now:
                fetched = train_step(wrapped, optimizers, now, source, step, engine)
            step += 1
            bar.update()
            last, stopping = step == settings.steps, bool(engine.total([float(bool(stop))])[0])  # all stop at one step
            saves, logs = stopping or last or step % settings.save_every == 0, last or step % settings.log_every == 0
            if saves or logs:
                entry = entry_of(fetched, config, source, step, engine)
                require(math.isfinite(entry["loss"]) and math.isfinite(entry["gnorm"]),
                        f"the loss became {entry['loss']} and its gradient {entry['gnorm']} at step {step}; lower --lr "
                        "or --adam-lr and train anew")
            if logs:
                log(entry)
            if settings.eval_every and step % settings.eval_every == 0 and not last:
                with engine.together(wrapped):
                    metrics = validate(model, config, source, max(1, settings.eval_clips // 4))
                log({"kind": "eval", "step": step, **metrics})
            if saves:
                save()
            if stopping:
                break
    if step < settings.steps:
        tqdm.write(f"stopped at step {step} of {settings.steps}; continue with --resume")
        return None
    weights = {name: engine.whole(tensor.detach()) for name, tensor in model.weights().items()}
    if engine.rank == 0:
        write_tensors(out / "model.safetensors", weights)
    with engine.together(wrapped):
        metrics = validate(model, config, source, settings.eval_clips, free=True)
    log({"kind": "eval", "step": step, **metrics})
    model.eval()
    return metrics | {"seconds": time.monotonic() - started, "steps": step, "seed": settings.seed,
                      "params": sum(p.numel() for p in model.parameters())}


def build(config: Config, device: torch.device) -> tuple[VideoLLM, Source]:
    """The tiny model, untrained, and the synthetic streams."""
    source = synthetic(config)
    torch.manual_seed(config.train.seed)
    return VideoLLM(config.model).to(device), source


WORLD = World(Config, {"tiny": Config()}, build, validate)
