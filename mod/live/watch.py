"""A live stream from its flags: what is streamed, what it remembers, and how it is shown.

python stream_tiny.py --ask "2.5s:where did it appear ?"     # ask 2.5 seconds into the stream
python stream_tiny.py --html stream.html                     # a page to play it on, with what each routed layer kept
python stream_tiny.py --draw                                 # the same in the terminal; --save stream.png: as a picture
python stream_tiny.py --json                                 # one JSON object per line, for programs
python stream_tiny.py --frames 5000 --window 8               # a long stream in constant memory
python stream_tiny.py --frames 5000 --window 8 --state live.safetensors    # goes on where a crash has cut it off
python stream_tiny.py --streams 8                            # several videos at once, in one batch
python stream_tiny.py --calibrate                            # when to speak: sets the default threshold
python stream_tiny.py --video clip.mp4 --fps 2               # a real video; - is standard input, /dev/video0 a camera
python stream_tiny.py --llm FOLDER --text "The capital of France is"     # no video: a real language model goes on

`stream_tiny.py` calls `run` when a flag is not its own, or the run is not the core's. Videos and language models are
those of mod/real, which is imported when one of them is asked for.
"""

import argparse
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

from mod.config import Config, ModelConfig, require
from mod.data import Source
from mod.layout import Vocabulary, assistant_ids, user_ids
from mod.live import calibrate, saved
from mod.live.ask import Question, Told, parse_told
from mod.live.costs import window_that_fits
from mod.live.draw import terminal
from mod.live.live import Live, LiveStream, Paced
from mod.live.page import check_file, check_page, write_page
from mod.live.picture import draw_stream, save
from mod.live.record import Moment, Recorder
from mod.live.settings import StreamConfig
from mod.live.show import Printer, Synthetic
from mod.run import Parser, add_flags, given, load_run, pick_device
from mod.videollm import VideoLLM

ENDLESS = 1000  # frames of a source that does not know its length, unless --frames says more or a window bounds it
MOST_PICTURED, MOST_PAGED = 24, 5000  # frames; a picture, a page, of more could not be looked at


def extend(parser: Parser, doc: str) -> Parser:
    """Add the flags of all that this folder does. `doc` shows how the core is used, and so do the lines above."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(line for line in (doc + __doc__).splitlines() if line.startswith("python "))
    if not parser.add_help:
        parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    add_flags(parser, "a live stream", StreamConfig)
    add = parser.add_argument_group("other streams").add_argument
    add("--streams", type=int, default=1, help="so many videos at once, --seed and the seeds after it (default: 1)")
    add("--video", action="append", help="stream this file instead, the whole of it if there is no --frames; - is "
        "standard input, /dev/video0 a camera. Repeatable: all at once")
    add("--fps", type=float, help="frames to look at per second of --video; the run's if not given")
    add("--tell", action="append", dest="ask", type=Told, default=argparse.SUPPRESS, metavar="WHEN:WORDS", help="as "
        "--ask, but the model is only told, and speaks when it is time: start:where is it ?. Repeatable")
    add = parser.add_argument_group("surviving, calibrating").add_argument
    add("--state", type=Path, help="keep the live stream in this file, and go on from it if it is there")
    add("--state-every", type=int, default=1, metavar="FRAMES", help="frames between two savings, which is what a "
        "crash loses at most (default: 1)")
    add("--calibrate", action="store_true", help="sweep the threshold over validation streams, print and draw what it "
        "does, and make the best one the run's default")
    add = parser.add_argument_group("what is shown").add_argument
    add("--html", type=Path, help="write a page to play the stream on, e.g. stream.html")
    add("--save", type=Path, help="write a picture of the stream, e.g. stream.png")
    add("--draw", action="store_true", help="draw each frame and its kept patches in the terminal")
    add("--json", action="store_true", help="one JSON object per line")
    add = parser.add_argument_group("a language model alone").add_argument
    add("--llm", help="folder or hub name of a Llama-type checkpoint; with --text")
    add("--text", help="continue this text with the language model of --llm, greedily, without video")
    add("--max-tokens", type=int, default=20, help="length of the continuation (default: 20)")
    return parser


def go_on(arguments) -> int:
    """Continue a text with a real language model, so that anyone can see that its weights are loaded right."""
    from mod.real.llm import continue_text, find, load_llm, read_llm_config
    from mod.real.tokenizer import TextTokenizer

    require(arguments.llm is not None and arguments.text is not None,
            "--llm and --text go together; got only one of them")
    require(arguments.max_tokens >= 1, f"--max-tokens must be at least 1, got {arguments.max_tokens}")
    device, folder = pick_device(arguments.device, arguments.dtype), find(arguments.llm)
    config = replace(read_llm_config(folder, ModelConfig()), layers="none")
    tokenizer = TextTokenizer(folder, symbols=None)
    ids = tokenizer.prompt(arguments.text)
    require(len(ids) > 0, "--text got an empty text, expected some words")
    require(max(ids) < config.vocab_size,
            f"{folder}: its tokenizer makes the id {max(ids)}, but vocab_size is {config.vocab_size}")
    decoder = load_llm(folder, config, getattr(torch, arguments.dtype), device)
    new = continue_text(decoder, ids, arguments.max_tokens, tokenizer.stop)
    if arguments.json:
        added = tokenizer.continuation(ids, new)
        print(json.dumps({"text": arguments.text, "continuation": added, "ids": ids, "new_ids": new}))
    else:
        print(tokenizer.decode([*ids, *new]))
    return 0


@dataclass
class Setting:
    """All that a stream needs: the parts of a run, where pictures come from, and what the flags asked for.

    sources        one per stream: a Synthetic, which knows the truth, or a Video of mod/real
    frames         how many there will be at most; infinite when nothing bounds the stream
    question_room  tokens that remembered questions and answers may take up; None for any number
    kept           tensors and note of the live stream that goes on, if one does
    """

    model: VideoLLM
    words: Vocabulary
    config: Config
    sources: Sequence
    fps: Fraction
    frames: float
    settings: StreamConfig
    question_room: int | None
    questions: list[tuple[Question, bool]]  # True: to be answered at once
    about: dict
    kept: tuple[dict, dict] | None

    @property
    def knows_truth(self) -> bool:
        return isinstance(self.sources[0], Synthetic)


def is_camera(name: str) -> bool:
    return name.startswith(("/dev/video", "camera:"))


def stream_settings(arguments, config: Config) -> StreamConfig:
    """The flags' StreamConfig; the threshold is the calibrated one, else the run's, and a camera skips late frames."""
    default = {}
    if not hasattr(arguments, "threshold"):
        known = calibrate.calibrated(arguments.checkpoint)
        default["threshold"] = config.train.threshold if known is None else known
    if any(map(is_camera, arguments.video or ())):
        default["on_late"] = "skip"  # what a camera has seen in vain is old
    return StreamConfig(**default | given(arguments, StreamConfig))


def divide_memory(arguments, settings: StreamConfig, config: Config, asked: int,
                  longest: int) -> tuple[StreamConfig, int]:
    """--memory-mb as a window and the room for questions: `asked` tokens of those that are known, or two long ones;
    the longest response takes up `longest`.

    Raises UserError when not even one frame fits.
    """
    rows = len(arguments.video or range(arguments.streams))
    room, number_bytes = max(asked, 2 * (16 + longest)), getattr(torch, arguments.dtype).itemsize
    if settings.contiguous:
        number_bytes = (number_bytes + 4) / 2  # keys that are turned are kept in float32
    budget = int(settings.memory_mb * 1e6) // rows
    window = window_that_fits(config.model, budget, longest, 1 + room, settings.sinks, number_bytes)
    require(window >= 1, f"--memory-mb got {settings.memory_mb:g}, which does not hold a single frame; allow more")
    return replace(settings, window=window, memory_mb=0.0), room


def how_long(arguments, sources: Sequence, remembers_all: bool) -> float:
    """The most frames that are streamed. A file ends by itself: the length that its header gives is an estimate."""
    if not arguments.video or arguments.frames is not None:
        return arguments.frames
    if not remembers_all:
        return math.inf
    most = math.inf if all(source.about_frames for source in sources) else ENDLESS
    for asked, limit in ((arguments.save, MOST_PICTURED), (arguments.html, MOST_PAGED)):
        most = min(most, limit) if asked else most
    return most


def open_sources(arguments, config: Config, source: Source, fps: Fraction, opened: ExitStack) -> Sequence:
    if arguments.video:
        from mod.real.video import Video
        return [opened.enter_context(Video(name, fps, config.model.image_size)) for name in arguments.video]
    require(source.live is not None, f"the run in {arguments.checkpoint} has no endless stream of its own; name a "
            "video with --video")
    seeds = range(arguments.seed, arguments.seed + arguments.streams)
    return [Synthetic(source, seed, arguments.frames) for seed in seeds]


def run(argv: list[str], parser: Parser, doc: str) -> int:
    """Parse, stream and show; returns the exit code. `parser` has the flags of the core, `doc` shows them all."""
    arguments = extend(parser, doc).parse_args(argv)
    if arguments.llm is not None or arguments.text is not None:
        return go_on(arguments)
    check_flags(arguments)
    device = pick_device(arguments.device, arguments.dtype)
    model, source, config = load_run(arguments.checkpoint, device, arguments.dtype)
    if arguments.calibrate:
        return sweep(arguments, model, source, config)
    settings = stream_settings(arguments, config)
    check_method(arguments, settings, config)
    if arguments.compile:
        model.decoder.compile()
    if not arguments.video and arguments.frames is None:
        arguments.frames = config.data.frames
    with ExitStack() as opened:
        fps = Fraction(str(arguments.fps or config.data.fps))
        sources = open_sources(arguments, config, source, fps, opened)
        frames = how_long(arguments, sources, not (settings.window or settings.memory_mb))
        if arguments.save:
            check_file("--save", arguments.save, (".png", ".pdf", ".svg", ".jpg"))
            require(frames <= MOST_PICTURED,
                    f"--save draws at most {MOST_PICTURED} frames, got {frames}; pass fewer --frames")
        require(not arguments.html or frames <= MOST_PAGED or frames == math.inf,
                f"--html shows at most {MOST_PAGED} frames, got {frames}; pass fewer --frames")
        # Nobody knows when a video ends before it has: what was to be asked later is told then.
        there = frames if arguments.frames is not None else math.inf
        questions = [parse_told(ask, there, fps, source.words) for ask in arguments.ask]
        about = {name: getattr(settings, name) for name in ("window", "memory_mb", "sinks", "forget", "positions")}
        about |= {"run": saved.fingerprint(arguments.checkpoint), "fps": str(fps), "dtype": arguments.dtype,
                  "source": arguments.video or [f"seed {arguments.seed + i}" for i in range(arguments.streams)]}
        goes_on = arguments.state and arguments.state.is_file()
        kept, room = saved.read_saved(arguments.state, about) if goes_on else None, None
        if kept and settings.memory_mb:
            before = kept[1]["kept"]
            settings, room = replace(settings, window=before["window"], memory_mb=0.0), before["question_room"]
        elif settings.memory_mb:
            longest = config.train.max_words + len(assistant_ids(source.words, ""))
            asked = sum(len(user_ids(source.words, question.text)) + longest * answered
                        for question, answered in questions)
            settings, room = divide_memory(arguments, settings, config, asked, longest)
        return watch(arguments, Setting(model, source.words, config, sources, fps, frames, settings, room, questions,
                                        about, kept))


def check_flags(arguments) -> None:
    """Raises UserError, before anything is loaded, for flags that make no sense."""
    fps = arguments.fps
    require(fps is None or arguments.video and 0 < fps < math.inf,
            f"--fps got {fps}, expected more than 0, with --video; a synthetic stream has its run's")
    for name, least in (("frames", 1), ("seed", 0), ("streams", 1), ("state_every", 1)):
        value = getattr(arguments, name)
        require(value is None or value >= least,
                f"--{name.replace('_', '-')} got {value}, expected at least {least}; pass another")
    several = arguments.streams > 1 or len(arguments.video or ()) > 1
    require(not (arguments.streams > 1 and arguments.video),
            f"--streams got {arguments.streams} with --video; name several --video instead")
    require(not (several and (arguments.save or arguments.html or arguments.draw)),
            "--save, --html and --draw show one stream, got several; leave them out")
    require(not (arguments.json and arguments.draw),
            "got --json and --draw, which both write to the terminal; leave one out")
    if arguments.html:
        check_page(arguments.html)
    StreamConfig(**given(arguments, StreamConfig))
    if path := arguments.state:
        fits = not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
        require(fits, f"--state got {path}, expected a file in a folder that can be written to; name another")
    forgets = getattr(arguments, "window", 0) or getattr(arguments, "memory_mb", 0)
    for name in ("sinks", "forget", "positions"):
        require(forgets or not hasattr(arguments, name),
                f"--{name} does nothing when everything is remembered; pass --window, or leave it out")
    require(arguments.state_every == 1 or arguments.state,
            f"--state-every got {arguments.state_every}, but no --state to save; name a file")


def check_method(arguments, settings: StreamConfig, config: Config) -> None:
    """Raises UserError for what is built for this project's own method alone."""
    method = getattr(config.model, "method", "mod")
    if method == "mod":
        return
    require(not arguments.html,
            f"--html shows what routed layers keep, but this run's method is {method}; pass --save or --draw")
    require(not settings.memory_mb and (settings.forgets_text or not settings.window),
            f"--memory-mb and --forget vision count on whole frames, but {method} was trained; pass --window")


def sweep(arguments, model: VideoLLM, source: Source, config: Config) -> int:
    clips = source.validation(config.train.eval_clips)
    print(f"streaming {len(clips)} validation clips at each of {len(calibrate.THRESHOLDS)} thresholds")
    result = calibrate.sweep(model, source.words, clips, config.train.max_words)
    print(calibrate.table(result))
    calibrate.write(result, arguments.checkpoint)
    print(f"wrote {arguments.checkpoint / 'calibration.json'} and calibration.png")
    return 0


def begin(arguments, setting: Setting, stream: LiveStream) -> tuple[Live, list[Paced]]:
    """The live stream, from its beginning or as --state has kept it, and its clocks."""
    tensors, note = setting.kept or ({}, {"last": [-1] * stream.rows})
    paced = []
    for name, source, last in zip(setting.about["source"], setting.sources, note["last"], strict=True):
        # A camera goes on with what it sees now; anything else is gone through again up to where the stream was.
        passed = 0 if arguments.video and is_camera(name) else last + 1
        pictures = iter(source)
        for _ in islice(pictures, passed):
            pass
        left = None if setting.frames == math.inf else max(0, setting.frames - last - 1)
        paced.append(Paced(islice(pictures, left), setting.fps, setting.settings.on_late, first=last + 1))
    live = Live(stream, paced, [setting.fps] * stream.rows, setting.question_room)
    if setting.kept:
        saved.restore(live, tensors, note)
        print(f"going on after frame {max(note['last'])}, as {arguments.state} has it", file=sys.stderr)
    known = live.kept.get("given", [])  # answered already, or in the queue
    asked = list(known)
    for question, answered in setting.questions:
        given_as = [str(question.time), question.text, *([] if answered else ["told"])]
        if given_as in known:
            continue
        asked.append(given_as)
        for row in range(stream.rows):
            live.ask(row, question.time, question.text, answered)
    live.kept = {"given": asked, "window": setting.settings.window, "question_room": setting.question_room}
    return live, paced


def watch(arguments, setting: Setting) -> int:
    """Let the stream happen and show it; then, or after Ctrl-C, what it came to."""
    shows = bool(arguments.html or arguments.save or arguments.draw)
    trace: list | None = [] if shows else None
    stream = LiveStream(setting.model, setting.words, len(setting.sources), settings=setting.settings,
                        max_words=setting.config.train.max_words, trace=trace)
    if hasattr(stream.cache, "announce") and setting.frames < math.inf:  # a method that must know the length before
        stream.cache.announce(setting.frames)
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
                saved.save(live, arguments.state, setting.about)
                unsaved = 0
            started, slept = time.perf_counter(), sum(one.slept for one in paced)
            if arguments.html and len(moments) >= MOST_PAGED:
                print(f"stopped after {MOST_PAGED} frames, the most that a page can show", file=sys.stderr)
                break
    except KeyboardInterrupt:  # the usual end of an endless stream; what was shown is kept
        print("interrupted" + (f"; go on with --state {arguments.state}" if arguments.state else ""), file=sys.stderr)
        code = 130
    if arguments.state and unsaved and not code:
        saved.save(live, arguments.state, setting.about)
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
        for name, video in zip(setting.about["source"], setting.sources, strict=True):
            for remark in video.remarks():
                note(f"{name}: {remark}")
    if late := [text for queue in live.questions for _, _, text, _ in queue]:
        note(f"never asked, because the video ended first: {', '.join(late)}")
    if arguments.save and moments:
        save(draw_stream(moments, model), arguments.save)
        note(f"wrote {arguments.save}")
    if arguments.html and moments:
        name = ", ".join(arguments.video) if arguments.video else f"synthetic video {arguments.seed}"
        write_page(arguments.html, moments, model, f"{name}, streamed through {arguments.checkpoint}")
        note(f"wrote {arguments.html}")
