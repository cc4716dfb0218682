"""Train a tiny VideoLLM-MoD on synthetic streaming video, on a laptop, in minutes.

python train_tiny.py                                   # the default: vision tokens skip every other layer
python train_tiny.py --layers none --out runs/full     # full computation, to compare
python train_tiny.py --gate update --out runs/update   # the paper's gate; watch the router's recall
python train_tiny.py --resume                          # go on after Ctrl-C or a crash
"""

import sys
from dataclasses import asdict, fields
from pathlib import Path

from mod.checkpoint import read_config, to_json, write_text
from mod.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig, UserError
from mod.flags import Parser, add_fields, given, merge, run_script
from mod.study.costs import average_text, dense, kv_bytes, ratios
from mod.study.plots import plot_curve
from mod.train import estimate_seconds, train, validation_clips
from mod.videollm import VideoLLM

RUN_FILES = (
    "config.json",
    "model.safetensors",
    "state.safetensors",
    "log.jsonl",
    "metrics.json",
    "curve.png",
)


FIXED = ("seed", "optimizer", "vit_lr", "vit_steps")  # training settings that a run keeps for good


def build_parser() -> Parser:
    parser = Parser(prog="train_tiny.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="tiny",
        help="named configuration of a new run (default: %(default)s)",
    )
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="continue the run in --out")
    fate.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    for title, kind in (("model", ModelConfig), ("data", DataConfig), ("training", TrainConfig)):
        add_fields(parser, title, kind)
    return parser


def choose_config(arguments) -> Config:
    """Flag > checkpoint > preset. Raises UserError when the folder's run must not be touched or is another model's."""
    out, held = arguments.out, [name for name in RUN_FILES if (arguments.out / name).exists()]
    if not arguments.resume:
        if held and not arguments.overwrite:
            raise UserError(
                f"{out} already holds a run; pass --resume to continue it, --overwrite to replace it, or another --out"
            )
        return merge(PRESETS[arguments.preset], arguments)
    saved = read_config(out)
    config = merge(saved, arguments)
    for part in ("model", "data"):
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
    changed = ", ".join(f"{name} = {value}" for name, value in given(arguments, TrainConfig).items())
    print(f"resuming {out}" + (f" with {changed} from the flags" if changed else ""))
    return config


def print_plan(config: Config, out: Path) -> None:
    """What will be trained, how large it is, what it will cost beside full computation, and about how long it takes."""
    for part in ("model", "data", "train"):
        print(f"{part:>6}: " + ", ".join(f"{name} {value}" for name, value in asdict(getattr(config, part)).items()))
    model = VideoLLM(config.model)
    print("\nparameters")
    parts = {"vision encoder": model.vit, "connector": model.connector, "decoder": model.decoder}
    for name, module in parts.items():
        print(f"  {name:<15}{sum(p.numel() for p in module.parameters()):>10,}")
    print(f"  {'all':<15}{sum(p.numel() for p in model.parameters()):>10,}")
    frames, text = config.data.frames, average_text(validation_clips(config, 64))
    share, full = ratios(config.model, frames, text), dense(config.model)
    mod_bytes, full_bytes = kv_bytes(config.model, frames, text), kv_bytes(full, frames, text)
    stream = f"{frames} frames of {config.model.frame_tokens} tokens and {text} text tokens"
    print(f"\npredicted cost of a stream of {stream}, against full computation")
    print(f"  keep ratio of each layer      {', '.join(f'{ratio:g}' for ratio in config.model.keep)}")
    print(f"  decoder FLOPs                 {share['flop_ratio']:.3f} of full")
    print(f"  KV cache                      {share['kv_ratio']:.3f} of full ({mod_bytes:,} of {full_bytes:,} bytes)")
    minutes = max(1, round(estimate_seconds(config) / 60)) if config.train.steps else 1
    print(f"\ntraining {config.train.steps} steps into {out}: about {minutes} min here; Ctrl-C saves and stops\n")


def print_table(metrics: dict) -> None:
    print(f"\n{'validation':<20}{'teacher-forced':>15}{'free-running':>15}")
    for name, value in metrics["free_running"].items():
        unit = " s" if name.startswith("time_diff") else "  "
        print(f"{name:<20}{metrics[name]:>13.3f}{unit}{value:>13.3f}{unit}")
    recall = ", ".join(f"layer {layer}: {value:.2f}" for layer, value in metrics["recall"].items()) or "no routed layer"
    print(f"\nsprite patches kept by the router: {recall}")
    print("what each row means: mod/metrics.py; time_diff is better small, lm_ppl is best at 1, the others at 1")


def run(arguments) -> int:
    config = choose_config(arguments)
    print_plan(config, arguments.out)
    if arguments.overwrite:
        for name in RUN_FILES:
            (arguments.out / name).unlink(missing_ok=True)
    _, metrics = train(config, arguments.out, resume=arguments.resume)
    if metrics is None:
        return 130
    metrics |= ratios(config.model, config.data.frames, average_text(validation_clips(config, 64)))
    write_text(arguments.out / "metrics.json", to_json(metrics, indent=2) + "\n")
    plot_curve(arguments.out)
    print_table(metrics)
    cost = f"decoder FLOPs {metrics['flop_ratio']:.3f} and KV cache {metrics['kv_ratio']:.3f} of full computation"
    print(f"{cost}, {metrics['seconds']:.0f} seconds")
    where = "" if arguments.out == Path("runs/tiny") else f" --checkpoint {arguments.out}"
    print(f"\nwrote {arguments.out}; now watch it: python stream_tiny.py{where}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv), "train_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
