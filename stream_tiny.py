"""Stream a fresh video through a trained VideoLLM-MoD, frame by frame, and watch it narrate and answer.

python stream_tiny.py                                        # after python train_tiny.py
python stream_tiny.py --seed 7 --ask "6:where is it ?"       # ask after frame 6
python stream_tiny.py --help                                 # windows, pages, real videos and whatever else there is

The first two commands are all here. Any other flag, and any other time to ask at, is a matter of mod/live/watch.py,
which is imported then.
"""

import argparse
import re
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from mod.config import require
from mod.run import Parser, load_run, pick_device, read_config, run_script
from mod.stream import Stream


def build_parser() -> Parser:
    # Help is among the flags of mod/live, so that it tells of all of them.
    parser = Parser(prog="stream_tiny.py", description=__doc__.split("\n")[0], add_help=False)
    add = parser.add_argument_group("what is streamed, and how it runs").add_argument
    add("--checkpoint", type=Path, default=Path("runs/tiny"), help="folder of a trained run (default: %(default)s)")
    add("--seed", type=int, default=0, help="which video; these are never trained on (default: 0)")
    add("--frames", type=int, help="length of the stream; the run's clip length if not given")
    add("--ask", action="append", default=[], metavar="WHEN:WORDS", help="ask after frame 6 (6:...), 2.5 seconds in "
        "(2.5s:...) or before the first frame (start:...): where is it ? where did it appear ? Repeatable")
    add("--threshold", type=float, default=argparse.SUPPRESS, help="speak when the probability of silence is below it "
        "(default: as calibrated, else as trained)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    add("--compile", action="store_true", help="torch.compile the decoder")
    return parser


def say(when: str, said: str | None, truth: str) -> bool:
    """Print a line of the table; returns whether what was said is the truth."""
    right = (said or "") == truth
    print(f"{when:<16}   {said or '.':<34} {truth or '.'}{'' if right else '   <- differs'}", flush=True)
    return right


def run(argv: list[str]) -> int:
    arguments, others = build_parser().parse_known_args(argv)
    asked = [re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\S.*)", ask) for ask in arguments.ask]  # after a frame, by its number
    calibrated = (arguments.checkpoint / "calibration.json").is_file()  # then the threshold is the one found there
    if others or calibrated or None in asked or read_config(arguments.checkpoint).world != "core":
        from mod.live.watch import run as watch

        return watch(argv, build_parser(), __doc__)
    for name, least in (("frames", 1), ("seed", 0)):
        value = getattr(arguments, name)
        require(value is None or value >= least, f"--{name} got {value}, expected at least {least}; pass another")
    device = pick_device(arguments.device, arguments.dtype)
    model, source, config = load_run(arguments.checkpoint, device, arguments.dtype)
    if arguments.compile:
        model.decoder.compile()
    frames, questions = arguments.frames or config.data.frames, []
    for ask in asked:
        frame, question = int(ask[1]), source.words.typed(ask[2])
        require(frame < frames, f"--ask got {ask[0]!r}, but the stream has frames 0 to {frames - 1}; name one of them, "
                "or pass more --frames")
        source.words.encode(question)  # refuses a word that the model does not know
        questions.append((frame, question))
    threshold = getattr(arguments, "threshold", config.train.threshold)
    require(0 <= threshold <= 1, f"threshold must be from 0 to 1, got {threshold}")
    stream = Stream(model, source.words, threshold=threshold, max_words=config.train.max_words)
    print(f"{'frame':>5} {'time':>8}   {'said':<34} truth")
    right, seconds = [], 0.0
    for t, clip in enumerate(islice(source.live(arguments.seed), frames)):
        began = time.perf_counter()
        [said] = stream.narrate(torch.as_tensor(clip.frames))
        seconds += time.perf_counter() - began
        right.append(say(f"{t:>5} {t / config.data.fps:>6.2f} s", said, clip.said[0].text if clip.said else ""))
        for question in (question for frame, question in questions if frame == t):
            print(f"{'':<16}   user: {question}")
            say("", stream.ask([question])[0], clip.truth[0].get(question, "?"))
    print(f"\nright: {sum(right)} of {frames} frames; speed: {frames / seconds:.0f} frames per second on {device}")
    vision, entries = config.model.frame_tokens * frames, stream.cache.entries()
    text = stream.position[0] - vision
    print(f"cache: {' '.join(map(str, entries))} entries in layers 0 to {config.model.depth - 1}; with full "
          f"computation {vision + text} in each")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: run(sys.argv[1:] if argv is None else argv), "stream_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
