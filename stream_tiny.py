"""Stream a fresh video through a trained VideoLLM-MoD, frame by frame, and watch it narrate and answer.

python stream_tiny.py                                        # after python train_tiny.py
python stream_tiny.py --seed 7 --ask "6:where is it ?"       # ask after frame 6
python stream_tiny.py --ask "2.5s:where did it appear ?"     # ask 2.5 seconds into the stream
python stream_tiny.py --html stream.html                     # a page to play it on, with what each routed layer kept
python stream_tiny.py --draw                                 # the same in the terminal; --save stream.png: as a picture
python stream_tiny.py --json                                 # one JSON object a line, for programs
python stream_tiny.py --frames 5000 --window 8               # a long stream in constant memory
python stream_tiny.py --frames 5000 --window 8 --state live.safetensors    # goes on where a crash has cut it off
python stream_tiny.py --streams 8                            # several videos at once, in one batch
python stream_tiny.py --calibrate                            # when to speak: sets the default threshold
python stream_tiny.py --video clip.mp4 --fps 2               # a real video; - is standard input, /dev/video0 a camera
python stream_tiny.py --llm FOLDER --text "The capital of France is"     # no video: a real language model goes on
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from mod.config import Config, ModelConfig, StreamConfig, UserError
from mod.flags import Parser, add_fields, check_file, given, run_script
from mod.layout import Vocabulary, user_ids
from mod.live import Live, Paced, read_saved, restore
from mod.real.llm import continue_text, find, load_llm, read_llm_config
from mod.real.parts import fingerprint, load_run
from mod.real.source import real_source
from mod.real.tokenizer import TextTokenizer
from mod.real.video import Video
from mod.stream import Stream
from mod.study.calibrate import calibrated, sweep, table, write
from mod.study.costs import window_that_fits
from mod.study.page import check_page, write_page
from mod.study.record import Moment, Recorder
from mod.study.show import Printer, Synthetic, picture, terminal
from mod.train import pick_device, synthetic
from mod.videollm import VideoLLM

ENDLESS = 1000  # frames of a source that does not know its length, unless --frames says more or a window bounds it
ROOM = 10**9  # frames, tokens: no limit; memory is taken as it fills
MOST_PICTURED, MOST_PAGED = 24, 5000  # frames; a picture, a page, of more could not be looked at


def build_parser() -> Parser:
    parser = Parser(prog="stream_tiny.py", description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what is streamed")
    what.add_argument("--checkpoint", type=Path, default=Path("runs/tiny"),
                      help="folder of a trained run (default: %(default)s)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="which video; these are never trained on (default: 0)")
    what.add_argument("--frames", type=int, help="length of the stream; the run's clip length if not given, or the "
                      "whole --video")  # fmt: skip
    what.add_argument("--streams", type=int, default=1, help="so many videos at once, --seed and the seeds after it "
                      "(default: 1)")  # fmt: skip
    what.add_argument("--video", action="append", help="stream this file instead; - is standard input, /dev/video0 a "
                      "camera. Repeatable: all at once")  # fmt: skip
    what.add_argument("--fps", type=float, help="frames to look at in a second of --video; the run's if not given")
    what.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="WHEN:QUESTION",
        help="ask after frame 6 (6:...), 2.5 seconds in (2.5s:...) or before the first frame (start:...): where is "
        "it ? where did it appear ? Repeatable",
    )
    add_fields(parser, "a live stream", StreamConfig)
    live = parser.add_argument_group("surviving, calibrating")
    live.add_argument("--state", type=Path, help="keep the live stream in this file, and go on from it if it is there")
    live.add_argument("--state-every", type=int, default=1, metavar="FRAMES",
                      help="frames between two savings, which is what a crash loses at most (default: 1)")  # fmt: skip
    live.add_argument("--calibrate", action="store_true", help="sweep the threshold over validation streams, print and "
                      "draw what it does, and make the best one the run's default")  # fmt: skip
    shown = parser.add_argument_group("what is shown, and how it runs")
    shown.add_argument("--html", type=Path, help="write a page to play the stream on, e.g. stream.html")
    shown.add_argument("--save", type=Path, help="write a picture of the stream, e.g. stream.png")
    shown.add_argument("--draw", action="store_true", help="draw each frame and its kept patches in the terminal")
    shown.add_argument("--json", action="store_true", help="one JSON object a line")
    shown.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    shown.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    text = parser.add_argument_group("a language model alone")
    text.add_argument("--llm", help="folder or hub name of a Llama-type checkpoint; with --text")
    text.add_argument("--text", help="continue this text with the language model of --llm, greedily, without video")
    text.add_argument("--max-tokens", type=int, default=20, help="length of the continuation (default: 20)")
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
    time: Fraction  # seconds
    text: str


def parse_ask(ask: str, frames: float, fps: Fraction, words: Vocabulary) -> Question:
    """ "6:where is it ?" is after frame 6, "2.5s:..." after the last frame that came by 2.5 seconds, "start:..." before
    the first. `frames`: how many there will be."""
    when, colon, text = ask.partition(":")
    when, text = when.strip(), text.strip()
    if isinstance(words, Vocabulary):
        text = " ".join(text.lower().replace("?", " ? ").split())
    expected = 'expected WHEN:QUESTION such as "6:where is it ?" (frame), "2.5s:where is it ?" (seconds) or "start:..."'
    try:
        seconds = when.removesuffix("s") if when != "start" else "-1"
        moment = Fraction(seconds) if seconds != when else int(when) / fps
    except (ValueError, OverflowError, ZeroDivisionError):
        raise UserError(f"--ask got {ask!r}, {expected}") from None
    if not colon or not text:
        raise UserError(f"--ask got {ask!r}, {expected}")
    if when != "start" and not 0 <= moment * fps < frames:
        there = f"frames 0 to {frames - 1} (0 to {float((frames - 1) / fps):g} s)"
        raise UserError(f"--ask got {ask!r}, but the stream has {there}; ask earlier or pass more --frames")
    words.encode(text)
    return Question(moment, text)


def check_picture(path: Path, frames: float) -> None:
    """Raises UserError, before anything is streamed, when the picture could not be written afterwards."""
    check_file("--save", path, (".png", ".pdf", ".svg", ".jpg"))
    if frames > MOST_PICTURED:
        raise UserError(f"--save draws at most {MOST_PICTURED} frames, got {frames}; pass fewer --frames")


@dataclass
class Setting:
    """All that a stream needs: the parts of a run, where pictures come from, and what the flags asked for.

    frames         how many there will be at most; infinite when nothing bounds the stream
    question_room  tokens that remembered questions and answers may take up; None for any number
    saved          tensors and note of the live stream that goes on, if one does
    """

    model: VideoLLM
    words: Vocabulary | TextTokenizer
    config: Config
    sources: Sequence[Synthetic | Video]
    fps: Fraction
    frames: float
    settings: StreamConfig
    question_room: int | None
    questions: list[Question]
    about: dict
    saved: tuple[dict, dict] | None

    @property
    def knows_truth(self) -> bool:
        return isinstance(self.sources[0], Synthetic)


def is_camera(name: str) -> bool:
    return name.startswith(("/dev/video", "camera:"))


def stream_settings(arguments, config: Config) -> StreamConfig:
    """The flags' StreamConfig; the threshold is the calibrated one, else the run's, and a camera skips late frames."""
    default = {}
    if not hasattr(arguments, "threshold"):
        known = calibrated(arguments.checkpoint)
        default["threshold"] = config.train.threshold if known is None else known
    if any(map(is_camera, arguments.video or ())):
        default["on_late"] = "skip"  # what a camera has seen in vain is old
    return StreamConfig(**{**default, **given(arguments, StreamConfig)})


def divide_memory(arguments, settings: StreamConfig, config: Config, asked: int) -> tuple[StreamConfig, int]:
    """--memory-mb as a window and the room for questions: `asked` tokens of those that are known, or two long ones.

    Raises UserError when not even one frame fits.
    """
    longest, rows = config.train.max_words + 2, len(arguments.video or range(arguments.streams))
    room, number_bytes = max(asked, 2 * (16 + longest)), getattr(torch, arguments.dtype).itemsize
    if settings.contiguous:
        number_bytes = (number_bytes + 4) / 2  # keys that are turned are kept in float32
    budget = int(settings.memory_mb * 1e6) // rows
    window = window_that_fits(config.model, budget, longest, 1 + room, settings.sinks, number_bytes)
    if window < 1:
        raise UserError(f"--memory-mb got {settings.memory_mb:g}, which does not hold a single frame; allow more")
    return replace(settings, window=window, memory_mb=0.0), room


def how_long(arguments, sources: Sequence[Synthetic | Video], remembers_all: bool) -> tuple[float, float]:
    """The most frames that are streamed, and how many there will be as far as is known, which questions go by."""
    known = [source.about_frames for source in sources if isinstance(source, Video)]
    there = max(known) if all(known) and known else math.inf
    if arguments.frames is not None or not arguments.video:
        return arguments.frames, arguments.frames
    if not remembers_all:
        return math.inf, there
    # The length of a file is an estimate, and being cut off would cost more than some room.
    most = there + 2 if there < math.inf else ENDLESS
    for asked, limit in ((arguments.save, MOST_PICTURED), (arguments.html, MOST_PAGED)):
        most = min(most, limit) if asked else most
    return most, there


def open_stream(setting: Setting, trace: list | None) -> Stream:
    """A stream with room for a longest response after every frame that it remembers, and for the questions."""
    settings, longest, text = setting.settings, setting.config.train.max_words + 2, ROOM
    if setting.question_room is not None:
        text = 1 + setting.question_room + (settings.most_frames + 1) * longest
    frames = ROOM if setting.frames == math.inf else setting.frames
    return Stream(setting.model, setting.words, len(setting.sources), frames=frames, text=text, settings=settings,
                  max_words=setting.config.train.max_words, trace=trace)  # fmt: skip


def run(arguments) -> int:
    if arguments.llm is not None or arguments.text is not None:
        return go_on(arguments)
    check_flags(arguments)
    device = pick_device(arguments.device, arguments.dtype)
    model, words, config = load_run(arguments.checkpoint, device, arguments.dtype, any_method=True)
    if arguments.calibrate:
        return calibrate(arguments, model, words, config)
    settings = stream_settings(arguments, config)
    check_method(arguments, settings, config.model.method)
    if not arguments.video and arguments.frames is None:
        arguments.frames = config.data.frames
    with ExitStack() as opened:
        fps = Fraction(str(arguments.fps or config.data.fps))
        seeds = range(arguments.seed, arguments.seed + arguments.streams)
        if arguments.video:
            sources = [opened.enter_context(Video(name, fps, config.model.image_size)) for name in arguments.video]
        else:
            sources = [Synthetic(config, seed, arguments.frames) for seed in seeds]
        frames, there = how_long(arguments, sources, not (settings.window or settings.memory_mb))
        if arguments.save:
            check_picture(arguments.save, frames)
        if arguments.html and MOST_PAGED < frames < math.inf:
            raise UserError(f"--html shows at most {MOST_PAGED} frames, got {frames}; pass fewer --frames")
        questions = [parse_ask(ask, there, fps, words) for ask in arguments.ask]
        rule = {name: getattr(settings, name) for name in ("window", "memory_mb", "sinks", "forget", "positions")}
        about = {"run": fingerprint(arguments.checkpoint), "fps": str(fps), "dtype": arguments.dtype, **rule,
                 "source": arguments.video or [f"seed {seed}" for seed in seeds]}  # fmt: skip
        saved = read_saved(arguments.state, about) if arguments.state and arguments.state.is_file() else None
        room = None
        if saved and settings.memory_mb:
            kept = saved[1]["kept"]
            settings, room = replace(settings, window=kept["window"], memory_mb=0.0), kept["question_room"]
        elif settings.memory_mb:
            asked = sum(len(user_ids(words, question.text)) + config.train.max_words + 2 for question in questions)
            settings, room = divide_memory(arguments, settings, config, asked)
        return watch(
            arguments, Setting(model, words, config, sources, fps, frames, settings, room, questions, about, saved)
        )


def check_flags(arguments) -> None:
    """Raises UserError, before anything is loaded, for flags that make no sense."""
    if arguments.fps is not None and (not arguments.video or not 0 < arguments.fps < math.inf):
        raise UserError(
            f"--fps got {arguments.fps}, expected more than 0, with --video; a synthetic stream has its run's"
        )
    for name, least in (("frames", 1), ("seed", 0), ("streams", 1), ("state_every", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            least = f"at least {least}" if least else "0 or more"
            raise UserError(f"--{name.replace('_', '-')} got {value}, expected {least}; pass another")
    several = arguments.streams > 1 or len(arguments.video or ()) > 1
    if arguments.streams > 1 and arguments.video:
        raise UserError(f"--streams got {arguments.streams} with --video; name several --video instead")
    if several and (arguments.save or arguments.html or arguments.draw):
        raise UserError("--save, --html and --draw show one stream, got several; leave them out")
    if arguments.json and arguments.draw:
        raise UserError("got --json and --draw, which both write to the terminal; leave one out")
    if arguments.html:
        check_page(arguments.html)
    StreamConfig(**given(arguments, StreamConfig))
    if path := arguments.state:
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--state got {path}, expected a file in a folder that can be written to; name another")
        for left in path.parent.glob(f"{path.name}.*.tmp"):  # of a stream that was killed while it was saved
            left.unlink()
    forgets = getattr(arguments, "window", 0) or getattr(arguments, "memory_mb", 0)
    for name in ("sinks", "forget", "positions"):
        if hasattr(arguments, name) and not forgets:
            raise UserError(f"--{name} does nothing when everything is remembered; pass --window, or leave it out")
    if arguments.state_every != 1 and not arguments.state:
        raise UserError(f"--state-every got {arguments.state_every}, but no --state to save; name a file")


def check_method(arguments, settings: StreamConfig, method: str) -> None:
    """Raises UserError for what is built for this project's own method alone."""
    if method == "mod":
        return
    if arguments.html:
        raise UserError(
            f"--html shows what routed layers keep, but this run's method is {method}; pass --save or --draw"
        )
    if settings.memory_mb or (settings.window and not settings.forgets_text):
        raise UserError(
            f"--memory-mb and --forget vision count on whole frames, but {method} was trained; pass --window"
        )


def calibrate(arguments, model: VideoLLM, words: Vocabulary | TextTokenizer, config: Config) -> int:
    source = real_source(config, words, model) if config.real.data else synthetic(config, words)
    clips = source.validation(config.train.eval_clips)
    print(f"streaming {len(clips)} validation clips at each threshold, about a minute for the tiny model")
    result = sweep(model, words, clips, config.train.max_words)
    print(table(result))
    write(result, arguments.checkpoint)
    print(f"wrote {arguments.checkpoint / 'calibration.json'} and calibration.png")
    return 0


def begin(arguments, setting: Setting, stream: Stream) -> tuple[Live, list[Paced]]:
    """The live stream, from its beginning or as --state has kept it, and its clocks."""
    tensors, note = setting.saved or ({}, {"last": [-1] * stream.rows})
    paced = []
    for name, source, last in zip(setting.about["source"], setting.sources, note["last"], strict=True):
        # A camera goes on with what it sees now; anything else is gone through again up to where the stream was.
        passed = 0 if arguments.video and is_camera(name) else last + 1
        pictures = iter(source)
        for _ in islice(pictures, passed):
            pass
        left = None if setting.frames == math.inf else setting.frames - last - 1
        paced.append(Paced(islice(pictures, left), setting.fps, setting.settings.on_late, first=last + 1))
    live = Live(stream, paced, [setting.fps] * stream.rows, setting.question_room)
    if setting.saved:
        restore(live, tensors, note)
        print(f"going on after frame {max(note['last'])}, as {arguments.state} has it", file=sys.stderr)
    known = live.kept.get("given", [])  # answered already, or in the queue
    new = [question for question in setting.questions if [str(question.time), question.text] not in known]
    for question in new:
        for row in range(stream.rows):
            live.ask(row, question.time, question.text)
    given = known + [[str(question.time), question.text] for question in new]
    live.kept = {"given": given, "window": setting.settings.window, "question_room": setting.question_room}
    return live, paced


def watch(arguments, setting: Setting) -> int:
    """Let the stream happen and show it; then, or after Ctrl-C, what it came to."""
    shows = bool(arguments.html or arguments.save or arguments.draw)
    trace: list | None = [] if shows else None
    stream = open_stream(setting, trace)
    live, paced = begin(arguments, setting, stream)
    printer = Printer(stream, arguments.json, setting.knows_truth)
    recorder, moments = Recorder(stream, 0, trace), []
    began = list(stream.position)
    frames, spent, unsaved, fed, code = 0, 0.0, 0, list(began), 0
    try:
        started, slept = time.perf_counter(), 0.0
        while happened := live.step():
            seconds = time.perf_counter() - started
            for one in happened:
                truth = setting.sources[one.row].truth(one) if setting.knows_truth else None
                asked = len(user_ids(setting.words, one.question)) if one.question else stream.model.config.frame_tokens
                printer.show(one, truth, max(0, stream.position[one.row] - fed[one.row] - asked))
                fed[one.row] = stream.position[one.row]
                if shows:
                    moments += recorder.note(one, truth, moments[-1] if moments else None, seconds)
                    if arguments.draw and one.question is None:
                        print(terminal(moments[-1], stream.model.config), flush=True)
                    if not (arguments.html or arguments.save):
                        del moments[:-1]
            if happened[0].question is None:
                frames, unsaved = frames + len(happened), unsaved + 1
                spent += seconds - (sum(one.slept for one in paced) - slept)
            if arguments.state and (happened[0].question or unsaved >= arguments.state_every):
                live.save(arguments.state, setting.about)
                unsaved = 0
            started, slept = time.perf_counter(), sum(one.slept for one in paced)
            if arguments.html and len(moments) >= MOST_PAGED:
                print(f"stopped after {MOST_PAGED} frames, the most that a page can show", file=sys.stderr)
                break
    except KeyboardInterrupt:  # the usual end of an endless stream; what was shown is kept
        print("interrupted" + (f"; go on with --state {arguments.state}" if arguments.state else ""), file=sys.stderr)
        code = 130
    if arguments.state and unsaved and not code:
        live.save(arguments.state, setting.about)
    finish(arguments, setting, live, sum(fed) > sum(began), moments)
    printer.summary(frames, spent, paced)
    return code


def finish(arguments, setting: Setting, live: Live, happened: bool, moments: list[Moment]) -> None:
    """When the stream has ended: write the pictures, and say what did not happen."""
    model, note = live.stream.model.config, partial(print, file=sys.stderr)
    if not happened:
        note(f"nothing to stream: it has ended after frame {max(live.last)}; pass more --frames")
    if not setting.knows_truth:
        if arguments.frames is None and max(live.last) + 1 == setting.frames:
            note(f"stopped after {setting.frames} frames; for more pass --frames")
        if damaged := sum(video.skipped for video in setting.sources):
            note(f"skipped {damaged} damaged packets or pictures")
    if late := [text for queue in live.questions for _, _, text in queue]:
        note(f"never asked, because the video ended first: {', '.join(late)}")
    if arguments.save and moments:
        picture(arguments.save, moments, model)
        note(f"wrote {arguments.save}")
    if arguments.html and moments:
        name = ", ".join(arguments.video) if arguments.video else f"synthetic video {arguments.seed}"
        write_page(arguments.html, moments, model, f"{name}, streamed through {arguments.checkpoint}")
        note(f"wrote {arguments.html}")


def main(argv: list[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv), "stream_tiny.py")


if __name__ == "__main__":
    sys.exit(main())
