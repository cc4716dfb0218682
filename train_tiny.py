"""Train a tiny VideoLLM-MoD on synthetic streaming video, on a laptop, in minutes.

python train_tiny.py                                   # the default: vision tokens skip every other layer
python train_tiny.py --layers none --out runs/full     # full computation, to compare
python train_tiny.py --gate update --out runs/update   # the paper's gate; watch the router's recall
python train_tiny.py --method list                     # the systems of the field; --method NAME trains one instead
python train_tiny.py --resume                          # go on after Ctrl-C or a crash
python train_tiny.py --preset paper                    # the paper's model: what it takes, and how to train it
python train_tiny.py --llm FOLDER --vision FOLDER --data streams.jsonl --out runs/real    # real weights and videos
torchrun --nproc-per-node 2 train_tiny.py              # several processes share each batch
"""

import os
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path

import torch

from mod.checkpoint import read_config, to_json, write_text
from mod.config import PRESETS, Config, DataConfig, ModelConfig, RealConfig, TrainConfig, UserError
from mod.flags import Parser, add_fields, given, run_script
from mod.metrics import summarize
from mod.parallel import join, leave, meet, rank, world
from mod.real.parts import assemble, is_real, read_words, with_real_sizes
from mod.real.source import real_source
from mod.real.vision import frame_tokens_grid
from mod.related.methods import build as build_method
from mod.related.methods import configure, listing, own_fields
from mod.study.costs import average_text
from mod.study.plan import cost_shares, print_costs, print_paper, print_parameters, print_settings
from mod.study.plots import plot_curve
from mod.train import Source, estimate_seconds, pick_device, synthetic, train
from mod.videollm import VideoLLM

RUN_FILES = (
    "config.json",
    "model.safetensors",
    "state.safetensors",
    "log.jsonl",
    "metrics.json",
    "curve.png",
)
CALIBRATION = ("calibration.json", "calibration.png")  # of stream_tiny.py --calibrate; they go with the weights


EVALUATION = {"threshold", "max_words", "eval_clips", "device", "dtype"}  # what a finished run may be measured with
FIXED = ("seed", "optimizer", "vit_lr", "vit_steps")  # training settings that a run keeps for good


def build_parser() -> Parser:
    parser = Parser(prog="train_tiny.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="named configuration of a new run (default: tiny)",
    )
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="continue the run in --out")
    fate.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    sections = {"model": ModelConfig, "data": DataConfig, "training": TrainConfig, "real parts": RealConfig}
    for title, kind in sections.items():
        add_fields(parser, title, kind)
    parser.add_argument("--frame-tokens", help="another way to say --grid: 1+7x7 is --grid 7")
    return parser


def merge(base: Config, arguments) -> Config:
    """`base` with the given flags on top, and the sizes of the real parts that are named. Raises UserError."""
    own = {
        name: replace(part := getattr(base, name), **given(arguments, type(part))) for name in ("data", "train", "real")
    }
    sizes = given(arguments, ModelConfig)
    if "method" in sizes:  # which may depend on other sizes
        base = replace(base, model=configure(replace(base.model, **sizes), sizes["method"]))
    if idle := sorted(own_fields(base.model) & set(sizes)):
        flag = "--" + idle[0].replace("_", "-")
        raise UserError(f"{flag} does nothing with the method {base.model.method}; leave it out")
    if base.real.vision:  # a run that goes on: its positions may have been interpolated
        sizes.setdefault("image_size", base.model.image_size)
    config = with_real_sizes(replace(base, **own), sizes)
    refuse_idle(config, arguments)
    return config


def refuse_idle(config: Config, arguments) -> None:
    """Raises UserError for a flag that was given and would do nothing."""
    real, no_lora = config.real, config.real.trained != "lora"
    idle = {"curriculum": real.data, "vit_steps": real.vision, "lora_rank": no_lora, "lora_alpha": no_lora,
            "holdout": not real.data, "features": not (real.data and real.vision), "symbols": not real.llm}  # fmt: skip
    for name, is_idle in idle.items():
        if is_idle and hasattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} does nothing with these parts; leave it out")


def choose_config(arguments) -> Config:
    """Flag > checkpoint > preset. Raises UserError when the folder's run must not be touched or is another model's."""
    out, held = arguments.out, [name for name in RUN_FILES if (arguments.out / name).exists()]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out got {out}, which is a file, expected the folder of a run; name another")
    if not arguments.resume:
        if (out / "config.json").exists():
            read_config(out)  # the folder of a checkpoint, say, is not ours to overwrite
        if held and not arguments.overwrite:
            raise UserError(
                f"{out} already holds a run; pass --resume to continue it, --overwrite to replace it, or another --out"
            )
        return merge(PRESETS[arguments.preset or "tiny"], arguments)
    if arguments.preset:
        raise UserError(f"--preset got {arguments.preset}, but the run in {out} goes on as it began; resume without it")
    saved = read_config(out)
    config = merge(saved, arguments)
    for part in ("real", "model", "data"):
        for field in fields(getattr(saved, part)):
            before, now = (getattr(getattr(whole, part), field.name) for whole in (saved, config))
            if before != now:
                flag = "--" + field.name.replace("_", "-")
                message = f"{field.name} got {now}, but the run in {out} has {before}"
                raise UserError(f"{message}; resume without {flag}, or train in another --out")
    for name in FIXED:
        before, now = getattr(saved.train, name), getattr(config.train, name)
        if before != now:
            raise UserError(f"{name} got {now}, but the run in {out} began with {before}; resume without this flag")
    new = {name for name, value in given(arguments, TrainConfig).items() if value != getattr(saved.train, name)}
    if (out / "metrics.json").exists() and config.train.steps == saved.train.steps and new - EVALUATION:
        name = min(new - EVALUATION)
        message = (
            f"{name} got {getattr(config.train, name)}, but the run in {out} has finished its {saved.train.steps} steps"
        )
        raise UserError(f"{message}; ask for more --steps as well, or train in another --out")
    changed = ", ".join(f"{name} = {value}" for name, value in given(arguments, TrainConfig).items())
    print(f"resuming {out}" + (f" with {changed} from the flags" if changed else ""))
    return config


def open_parts(config: Config, device: torch.device) -> tuple[VideoLLM | None, Source]:
    """The model, where parts of it are real (None: train builds the tiny one), and where clips come from."""
    words, model = read_words(config), assemble(config, device) if is_real(config) else None
    return model, real_source(config, words, model) if config.real.data else synthetic(config, words)


def print_plan(config: Config, out: Path, frames: int, text: int, seconds: float | None) -> None:
    """What will be trained, how large it is, what it will cost beside full computation, and about how long it takes."""
    print_settings(config)
    print_parameters(config)
    print_costs(config, frames, text)
    minutes = "the bar will say how long" if seconds is None else f"about {max(1, round(seconds / 60))} min here"
    print(f"\ntraining {config.train.steps} steps into {out}: {minutes}; Ctrl-C saves and stops\n")


def print_table(metrics: dict, real: bool) -> None:
    free = metrics.get("free_running")  # not of a method that must know all frames
    print(f"\n{'validation':<20}{'teacher-forced':>15}" + (f"{'free-running':>15}" if free else ""))
    for name, value in metrics.items():
        if name in summarize([], [], 1.0):
            unit = " s" if name.startswith("time_diff") else "  "
            print(f"{name:<20}{value:>13.3f}{unit}" + (f"{free[name]:>13.3f}{unit}" if free else ""))
    recall = ", ".join(f"layer {layer}: {value:.2f}" for layer, value in metrics["recall"].items()) or "no routed layer"
    if not real:
        print(f"\nsprite patches kept by the router: {recall}")
    print("what each row means: mod/metrics.py; time_diff is better small, lm_ppl is best at 1, the others at 1")


def run(arguments) -> int:
    if getattr(arguments, "method", None) == "list":
        print(listing())
        return 0
    if arguments.frame_tokens:
        grid = frame_tokens_grid(arguments.frame_tokens)
        if getattr(arguments, "grid", grid) != grid:
            raise UserError(
                f"got --frame-tokens {arguments.frame_tokens} and --grid {arguments.grid}; pass one of them"
            )
        arguments.grid = grid
    if arguments.preset == "paper" and not arguments.resume:
        config = merge(PRESETS["paper"], arguments)
        if not is_real(config):
            print_paper(config)
            return 0
        if not (config.real.llm and config.real.vision):
            raise UserError("--preset paper got one of --llm and --vision, expected both, or none to see what it takes")
    config = choose_config(arguments)
    try:
        device = join(pick_device(config.train.device, config.train.dtype))
        with redirect_stdout(open(os.devnull, "w")) if rank() else nullcontext():  # the first process speaks for all
            return train_run(config, arguments, device)
    finally:
        leave()


def train_run(config: Config, arguments, device: torch.device) -> int:
    out = arguments.out
    model, source = open_parts(config, device)
    clips = source.validation(16 if config.real.data else 64)
    frames, text = round(sum(len(clip.frames) for clip in clips) / len(clips)), average_text(clips, source.words)
    split = config.train.fsdp and world() > 1  # what has to be split cannot be tried out whole
    tried = model if model is not None or split else build_method(config.model).to(device)
    seconds = None if split else estimate_seconds(config, tried, source) if config.train.steps else 0.0
    print_plan(config, out, frames, text, seconds)
    meet()  # before the first process writes what others look for
    if arguments.overwrite and rank() == 0:
        for name in (*RUN_FILES, *CALIBRATION):
            (out / name).unlink(missing_ok=True)
    build = build_method if model is None else lambda _: model
    trained, metrics = train(config, out, arguments.resume, build, source)
    if metrics is None:
        return 130
    metrics |= cost_shares(config, frames, text, trained)
    write_text(out / "metrics.json", to_json(metrics, indent=2) + "\n")
    if rank() == 0:
        plot_curve(out)
    print_table(metrics, bool(config.real.data))
    free = "free_running" in metrics
    cost = f"decoder FLOPs {metrics['flop_ratio']:.3f} and KV cache {metrics['kv_ratio']:.3f} of full computation"
    print(f"{cost}, {metrics['seconds']:.0f} seconds")
    where = "" if out == Path("runs/tiny") else f" --checkpoint {out}"
    where += " --video FILE" if config.real.data else ""
    watch = f"now watch it: python stream_tiny.py{where}" if free else "it cannot be streamed: it must know all frames"
    print(f"\nwrote {out}; {watch}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv), "train_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
