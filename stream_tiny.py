"""Stream a fresh video through a trained VideoLLM-MoD, frame by frame, and watch it narrate and answer.

python stream_tiny.py                                        # after python train_tiny.py
python stream_tiny.py --seed 7 --ask "6:where is it ?"       # ask after frame 6
python stream_tiny.py --ask "2.5s:where did it appear ?"     # ask 2.5 seconds into the stream
python stream_tiny.py --save stream.png                      # a picture of what each routed layer kept
python stream_tiny.py --json                                 # one JSON object a line, for programs
python stream_tiny.py --video clip.mp4 --fps 2               # a real video; - is standard input, /dev/video0 a camera
python stream_tiny.py --llm FOLDER --text "The capital of France is"     # no video: a real language model goes on
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mod.checkpoint import load_weights, read_config, read_tensors
from mod.config import Config, ModelConfig, StreamConfig, UserError
from mod.data import Clip, make_clip
from mod.flags import Parser, run_script
from mod.layout import Vocabulary, user_ids
from mod.real.llm import continue_text, find, load_llm, read_llm_config
from mod.real.parts import assemble, read_words
from mod.real.tokenizer import TextTokenizer
from mod.real.video import Video
from mod.stream import Stream
from mod.study.costs import dense, kv_bytes, layer_tokens
from mod.study.plots import plot_stream
from mod.train import pick_device
from mod.videollm import VideoLLM

ENDLESS = 1000  # frames of a source that does not know its length, unless --frames says more
MOST_PICTURED = 100  # frames; a picture of more could not be looked at


def build_parser() -> Parser:
    parser = Parser(
        prog="stream_tiny.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/tiny"), help="folder of a trained run")
    parser.add_argument("--seed", type=int, default=0, help="which video; these are never trained on")
    parser.add_argument(
        "--frames", type=int, help="length of the stream; the run's clip length if not given, or the whole --video"
    )
    parser.add_argument("--video", help="stream this file instead; - is standard input, /dev/video0 a camera")
    parser.add_argument("--fps", type=float, help="frames to look at in a second of --video; the run's if not given")
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="WHEN:QUESTION",
        help="ask after frame 6 (6:...) or 2.5 seconds in (2.5s:...): where is it ? where did it appear ? Repeatable",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="speak when the probability of silence is below it; the run's if not given",
    )
    parser.add_argument("--llm", help="folder or hub name of a Llama-type checkpoint; with --text")
    parser.add_argument("--text", help="continue this text with the language model of --llm, greedily, without video")
    parser.add_argument("--max-tokens", type=int, default=20, help="length of the continuation of --text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    parser.add_argument("--save", type=Path, help="write a picture of the stream, e.g. stream.png")
    return parser


def go_on(arguments) -> int:
    """Continue a text with a real language model, so that anyone can see that its weights are loaded right."""
    if arguments.llm is None or arguments.text is None:
        raise UserError("--llm and --text go together; got only one of them")
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, got {arguments.max_tokens}")
    device, folder = pick_device(arguments.device, arguments.dtype), find(arguments.llm)
    config = replace(read_llm_config(folder, ModelConfig()), layers="none")
    tokenizer = TextTokenizer(folder, symbols=None)
    ids = tokenizer.prompt(arguments.text)
    if not ids:
        raise UserError("--text got an empty text, expected some words")
    if max(ids) >= config.vocab_size:
        raise UserError(f"{folder}: its tokenizer makes the id {max(ids)}, but vocab_size is {config.vocab_size}")
    decoder = load_llm(folder, config, getattr(torch, arguments.dtype), device)
    new = continue_text(decoder, ids, arguments.max_tokens, tokenizer.stop)
    if arguments.json:
        print(json.dumps({"text": arguments.text, "continuation": tokenizer.decode(new), "ids": ids, "new_ids": new}))
    else:
        print(tokenizer.decode([*ids, *new]))
    return 0


@dataclass
class Question:
    frame: int  # asked after this frame
    text: str


def parse_ask(ask: str, frames: int, fps: float, words: Vocabulary) -> Question:
    """ "6:where is it ?" is after frame 6, "2.5s:..." after the last frame that came by 2.5 seconds."""
    when, colon, text = ask.partition(":")
    when, text = when.strip(), text.strip()
    if isinstance(words, Vocabulary):
        text = " ".join(text.lower().replace("?", " ? ").split())
    expected = 'expected WHEN:QUESTION such as "6:where is it ?" (frame) or "2.5s:where is it ?" (seconds)'
    try:
        frame = math.floor(float(when[:-1]) * fps + 1e-9) if when.endswith("s") else int(when)
    except (ValueError, OverflowError):
        raise UserError(f"--ask got {ask!r}, {expected}") from None
    if not colon or not text:
        raise UserError(f"--ask got {ask!r}, {expected}")
    if not 0 <= frame < frames:
        there = f"frames 0 to {frames - 1} (0 to {(frames - 1) / fps:g} s)"
        raise UserError(f"--ask got {ask!r}, but the stream has {there}; ask earlier or pass more --frames")
    words.encode(text)
    return Question(frame, text)


def check_picture(path: Path, frames: int) -> None:
    """Raises UserError, before anything is streamed, when the picture could not be written afterwards."""
    kinds = (".png", ".pdf", ".svg", ".jpg")
    if path.suffix not in kinds:
        raise UserError(f"--save got {path}, expected a file name that ends with {', '.join(kinds)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(
            f"--save got {path}, but its folder does not exist or it is one itself; name a file in a folder"
        )
    if frames > MOST_PICTURED:
        raise UserError(f"--save draws at most {MOST_PICTURED} frames, got {frames}; pass fewer --frames")


def load(folder: Path, device: torch.device, dtype: str) -> tuple[VideoLLM, Vocabulary | TextTokenizer, Config]:
    """A trained run: model, words, configuration. Raises UserError when it is missing, damaged or another project's."""
    config = read_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file() and (folder / "state.safetensors").is_file():
        raise UserError(f"the run in {folder} is not finished; finish it: python train_tiny.py --out {folder} --resume")
    model = assemble(replace(config, train=replace(config.train, dtype=dtype)), device)
    load_weights(model, read_tensors(path)[0], path)
    return model.to(getattr(torch, dtype)).eval(), read_words(config), config


class Printer:
    """Prints what happens, for people or for programs, and counts what was right, where the truth is known."""

    def __init__(self, stream: Stream, fps: float, as_json: bool, knows_truth: bool):
        self.stream, self.fps, self.as_json, self.knows_truth = stream, fps, as_json, knows_truth
        self.right = {"narrations": [], "silent frames": [], "answers": []}
        if not as_json:
            print(f"{'frame':>5} {'time':>8}   {'said':<34} {'truth' if knows_truth else ''}".rstrip())

    def event(
        self, frame: int, role: str, text: str | None, truth: str | None = None, *, judge: str | None = None
    ) -> None:
        """One line. `judge` names the count that this line belongs to; right means equal to the truth."""
        judged = self.knows_truth and truth != "?"
        if judge and judged:
            self.right[judge].append(text == truth)
        if self.as_json:
            role = "silence" if text is None else role
            entry = {
                "frame": frame,
                "time": frame / self.fps,
                "role": role,
                "text": text or "",
                "cache_entries": self.stream.cache.lengths(),
            }
            print(json.dumps(entry), flush=True)
        elif role == "user":
            print(f"{'':>5} {'':>8}   user: {text}", flush=True)
        else:
            mark = "   <- differs" if judged and text != truth else ""
            label = f"{frame:>5} {frame / self.fps:>6.2f} s" if judge != "answers" else f"{'':>5} {'':>8}"
            known = (truth or ".") if self.knows_truth else ""
            said = "." if text is None else text or "(nothing)"
            print(f"{label}   {said:<34} {known}{mark}".rstrip(), flush=True)


def run(arguments) -> int:
    if arguments.llm is not None or arguments.text is not None:
        return go_on(arguments)
    if arguments.fps is not None and (arguments.video is None or not 0 < arguments.fps < math.inf):
        raise UserError(
            f"--fps got {arguments.fps}, expected more than 0, with --video; a synthetic stream has its run's"
        )
    device = pick_device(arguments.device, arguments.dtype)
    model, words, config = load(arguments.checkpoint, device, arguments.dtype)
    frames = config.data.frames if arguments.frames is None else arguments.frames
    if frames < 1:
        raise UserError(f"--frames got {frames}, expected at least 1; ask for more")
    if arguments.seed < 0:
        raise UserError(f"--seed got {arguments.seed}, expected 0 or more; pass another")
    if arguments.video is None:
        clip = make_clip(replace(config.data, question_rate=0.0), config.model, "test", arguments.seed, 0, frames)
        return watch(arguments, model, words, config, clip.frames, frames, config.data.fps, clip)
    with Video(arguments.video, arguments.fps or config.data.fps, config.model.image_size) as video:
        frames = arguments.frames or video.about_frames or ENDLESS
        return watch(arguments, model, words, config, video, frames, float(video.fps))


def watch(
    arguments,
    model: VideoLLM,
    words: Vocabulary | TextTokenizer,
    config: Config,
    pictures: Iterable[np.ndarray],
    frames: int,
    fps: float,
    clip: Clip | None = None,
) -> int:
    """Stream at most `frames` pictures (3, side, side), ask what is to be asked, print what happens; `clip` knows the
    truth of a synthetic stream."""
    if arguments.save:
        check_picture(arguments.save, frames)
    questions = [parse_ask(ask, frames, fps, words) for ask in arguments.ask]
    threshold = config.train.threshold if arguments.threshold is None else arguments.threshold
    if clip is None and arguments.frames is None:
        frames += 2  # the length of a file is an estimate, and being cut off would cost more than some room
    longest = config.train.max_words + 2
    asked = sum(len(user_ids(words, question.text)) for question in questions)
    text = 1 + (frames + len(questions)) * longest + asked
    trace: list = []
    stream = Stream(
        model,
        words,
        frames=frames,
        text=text,
        settings=StreamConfig(threshold=threshold),
        max_words=config.train.max_words,
        trace=trace if arguments.save else None,
    )
    printer = Printer(stream, fps, arguments.json, clip is not None)
    spoken, captions, seen, decided = 0.0, [], [], []
    for t, picture in enumerate(islice(pictures, frames)):
        already, started = len(trace), time.perf_counter()
        [said] = stream.frame(torch.as_tensor(picture)[None])
        spoken += time.perf_counter() - started
        # The frame's own routing comes first; the words after it are text and are never routed.
        decided += [routing for routing in trace[already:] if len(routing.kept)]
        truth = next((say.text for say in clip.said if say.frame == t), None) if clip else None
        printer.event(t, "assistant", said, truth, judge="silent frames" if truth is None else "narrations")
        captions.append((said or "").replace(" ", "\n"))
        for question in (question for question in questions if question.frame == t):
            stream.hear([question.text])
            printer.event(t, "user", question.text)
            [answer] = stream.respond([True])
            printer.event(t, "assistant", answer, clip and clip.truth[t].get(question.text, "?"), judge="answers")
            captions[-1] += f"\nQ: {question.text}\nA: {answer}"
        if arguments.save:
            seen.append(picture)
    shown = stream.seen[0]
    if clip is None and shown == frames and arguments.frames is None:
        print(f"stopped after {frames} frames; for more pass --frames", file=sys.stderr)
    if arguments.save:
        plot_stream(arguments.save, np.stack(seen), decided, captions, [t / fps for t in range(shown)], config.model)
    if late := [question.text for question in questions if question.frame >= shown]:
        print(f"never asked, because the video ended first: {', '.join(late)}", file=sys.stderr)
    if clip is None and pictures.skipped:
        print(f"skipped {pictures.skipped} damaged packets or pictures", file=sys.stderr)
    if arguments.json:
        return 0
    fed = stream.held()[1]
    full = dense(config.model)
    print()
    if clip:
        scores = ", ".join(f"{sum(flags)} of {len(flags)} {name}" for name, flags in printer.right.items() if flags)
        print(f"right: {scores}")
    print(f"speed: {shown / spoken:.0f} frames a second on {stream.device}, answers to questions not counted")
    held, whole = " ".join(map(str, stream.cache.lengths())), " ".join(map(str, layer_tokens(full, shown, fed)))
    number = stream.cache.layers[0].k.element_size()
    print(f"cache: {held} entries in layers 0 to {config.model.depth - 1}, {stream.cache.bytes():,} bytes")
    print(f" full: {whole} entries with full computation, {kv_bytes(full, shown, fed, number):,} bytes")
    if arguments.save:
        print(f"wrote {arguments.save}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv), "stream_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
