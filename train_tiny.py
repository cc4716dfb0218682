"""Train a tiny VideoLLM-MoD on synthetic streaming video, on a laptop, in minutes.

python train_tiny.py                                         # the default: vision tokens skip every other layer
python train_tiny.py --layers none --out runs/full           # full computation, to compare
python train_tiny.py --gate score-update --out runs/update   # the paper's gate; watch the router's recall
python train_tiny.py --resume                                # go on after Ctrl-C or a crash
python train_tiny.py --help                                  # other systems, harder streams, real weights and videos
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from mod.config import Config, UserError, require
from mod.evaluate import summarize
from mod.layout import lay_out
from mod.run import (
    WORLDS,
    Parser,
    World,
    add_flags,
    find_world,
    flag_of,
    given,
    pick_device,
    read_config,
    run_script,
    sections,
    to_json,
    with_flags,
    write_text,
)
from mod.train import Engine, train

RUN_FILES = ("config.json", "model.safetensors", "state.safetensors", "log.jsonl", "metrics.json", "curve.png",
             "calibration.json", "calibration.png")  # of the run, and of what other commands make of it
EVALUATION = {"threshold", "max_words", "eval_clips", "device", "dtype"}  # what a finished run may be measured with
FIXED = ("seed", "optimizer", "vit_lr", "vit_steps")  # training settings that a run keeps for good


def build_parser(worlds: list[World]) -> Parser:
    """The flags of a run, and of the settings of these kinds of runs. Without any, --help is left for later."""
    parser = Parser(prog="train_tiny.py", description=__doc__.split("\n")[0], add_help=bool(worlds))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: %(default)s)")
    presets = sorted({preset for world in worlds for preset in world.presets})
    parser.add_argument("--preset", choices=presets or None, help="named configuration of a new run (default: tiny)")
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="continue the run in --out")
    fate.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    for world in worlds:
        for title, kind in sections(world.config).items():
            add_flags(parser, title, kind)
    return parser


def choose_world(argv: list[str]) -> tuple[World, object]:
    """The first kind of run that knows all given flags and the preset, the core before others, or the kind of the run
    that goes on; and the parsed flags."""
    first, _ = build_parser([]).parse_known_args(argv)
    names, worlds = [read_config(first.out).world] if first.resume else list(WORLDS), []
    for name in names:
        worlds.append(find_world(name))
        if first.preset in (None, *worlds[-1].presets) and not {"-h", "--help"} & set(argv):
            arguments, unknown = build_parser(worlds[-1:]).parse_known_args(argv)
            if not unknown:
                return worlds[-1], arguments
    build_parser(worlds).parse_args(argv)  # shows all help, or refuses the flag that nobody knows
    raise UserError(f"got {' '.join(argv)}, flags of different kinds of runs; see --help, and leave one kind out")


def choose_config(world: World, arguments) -> Config | None:
    """Flag > run > preset. None when there is nothing to train. Raises UserError when the folder's run must not be
    touched or is another model's."""
    out = arguments.out
    require(not out.exists() or out.is_dir(), f"--out got {out}, which is a file, expected a folder; name another")
    if arguments.resume:
        require(not arguments.preset, f"--preset got {arguments.preset}, but the run in {out} goes on as it began; "
                "resume without it")
        base = read_config(out)
    else:
        base = world.presets[arguments.preset or next(iter(world.presets))]
    names = {name for kind in sections(world.config).values() for name in given(arguments, kind)}
    config = world.settle(with_flags(base, arguments), names)
    if config is None:
        return None
    if arguments.resume:
        refuse_changes(base, config, out)
    else:
        if (out / "config.json").exists():
            read_config(out)  # the folder of a checkpoint, say, is not ours to overwrite
        held = any((out / name).exists() for name in RUN_FILES)
        require(arguments.overwrite or not held, f"{out} already holds a run; pass --resume to continue it, "
                "--overwrite to replace it, or another --out")
    return config


def refuse_changes(saved: Config, config: Config, out: Path) -> None:
    """Raises UserError when a run that goes on would become another one; says what else is new."""
    before, after = ({(part, name): value for part, settings in asdict(one).items() for name, value in settings.items()}
                     for one in (saved, config))
    new = {place: value for place, value in after.items() if value != before[place]}
    for (part, name), value in new.items():
        require(part == "train" and name not in FIXED,
                f"{name} got {value}, but the run in {out} has {before[part, name]}; resume without {flag_of(name)}, "
                "or train in another --out")
    if (out / "metrics.json").exists() and config.train.steps == saved.train.steps:
        for (_, name), value in new.items():
            require(name in EVALUATION,
                    f"{name} got {value}, but the run in {out} has finished its {saved.train.steps} steps; ask for "
                    "more --steps as well, or train in another --out")
    told = ", ".join(f"{name} = {value}" for (_, name), value in new.items())
    print(f"resuming {out}" + (f" with {told} from the flags" if told else ""))


def print_plan(config: Config, model: torch.nn.Module, shares: dict[str, float], stream: str) -> None:
    """What will be trained, how large it is, and what it will cost beside full computation."""
    for part, settings in asdict(config).items():
        print(f"{part:>6}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print("\nparameters: " + ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}"
                                       for name, part in model.named_children()))
    print(f"predicted cost of a stream of {stream}, against full computation: "
          f"decoder FLOPs {shares['flop_ratio']:.3f}, KV cache {shares['kv_ratio']:.3f}\n")


def print_table(metrics: dict) -> None:
    free = metrics.get("free_running")  # not of a method that must know all frames
    print(f"\n{'validation':<20}{'teacher-forced':>15}" + (f"{'free-running':>15}" if free else ""))
    for name in summarize([], [], 1.0):
        unit = " s" if name.startswith("time_diff") else "  "
        print(f"{name:<20}{metrics[name]:>13.3f}{unit}" + (f"{free[name]:>13.3f}{unit}" if free else ""))
    if metrics["recall"]:
        recall = ", ".join(f"layer {layer}: {share:.2f}" for layer, share in metrics["recall"].items())
        print(f"sprite patches kept by the router: {recall}")
    print("what each row means: mod/evaluate.py; time_diff is better small, lm_ppl is best at 1, the others at 1")


def run(argv: list[str]) -> int:
    world, arguments = choose_world(argv)
    config, engine, out = choose_config(world, arguments), Engine(), arguments.out
    if config is None:
        return 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        from mod.parallel import Processes

        engine = Processes(config.train)
    device = engine.device or pick_device(config.train.device, config.train.dtype)
    model, source = world.build(config, device)
    clips = source.validation(16)
    frames = round(sum(len(clip.frames) for clip in clips) / len(clips))
    # With frames of no tokens a layout holds the text alone.
    text = round(sum(len(lay_out(source.words, len(clip.frames), 0, clip.said).ids) for clip in clips) / len(clips))
    stream = f"{frames} frames of {config.model.frame_tokens} tokens and {text} text tokens"
    print_plan(config, model, world.costs(config, frames, text, model), stream)
    print(f"training {config.train.steps} steps into {out}; Ctrl-C saves and stops\n")
    engine.total([0.0])  # all are here before the first process writes what the others look for
    for name in RUN_FILES if arguments.overwrite and engine.rank == 0 else ():
        (out / name).unlink(missing_ok=True)
    metrics = train(config, out, model, source, arguments.resume, engine, world.validate)
    if metrics is None:
        return 130
    metrics |= world.costs(config, frames, text, model)
    if engine.rank == 0:
        write_text(out / "metrics.json", to_json(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"decoder FLOPs {metrics['flop_ratio']:.3f} and KV cache {metrics['kv_ratio']:.3f} of full computation, "
          f"{metrics['seconds']:.0f} seconds")
    where = "" if out == Path("runs/tiny") else f" --checkpoint {out}"
    watch = f"now watch it: python stream_tiny.py{where}{'' if source.live else ' --video FILE'}"
    if "free_running" not in metrics:
        watch = "it cannot be streamed: it must know all frames"
    print(f"\nwrote {out}; {watch}; figures: python -m mod.study.plots{where}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: run(sys.argv[1:] if argv is None else argv), "train_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
