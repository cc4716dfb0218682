"""Synthetic clips as video files with a streams.jsonl, so that all that real videos go through can be tried and tested.

python -m mod.real.make_streams FOLDER --streams 20                  # clip-0000.mp4 ... and streams.jsonl
python -m mod.real.make_streams FOLDER --streams 20 --repeat 5       # each frame five times, at five times the rate
"""

import argparse
import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from einops import rearrange
from tqdm import tqdm

from mod.config import DataConfig, ModelConfig, require
from mod.data import Clip, make_clip
from mod.real.video import import_av
from mod.run import Parser, run_script, unfinished, write_text

# Codec, pixel format, options. The first is off by at most 2 of 255, because colours are rounded, as real videos are;
# the second, for builds of PyAV without it, is exact.
CODECS = (("libx264", "yuv444p", {"crf": "0"}), ("png", "rgb24", {}))


def write_video(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    """frames (F, 3, side, side) in [-1, 1] as an mp4 of `rate` pictures per second, named only when it is whole."""
    av = import_av()
    codec, pixel_format, options = next(choice for choice in CODECS if choice[0] in av.codecs_available)
    pixels = rearrange(((frames + 1) * 127.5).round().astype(np.uint8), "f c h w -> f h w c", c=3)
    temporary = unfinished(path)
    with av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], pixel_format
        for picture in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        file.mux(stream.encode())
    os.replace(temporary, path)


def entry(name: str, clip: Clip, fps: float) -> str:
    """The line of streams.jsonl of a clip."""
    turns = [{"time": say.frame / fps, "role": say.role, "content": say.text} for say in clip.said]
    return json.dumps({"video": name, "conversation": turns})


def build_parser() -> Parser:
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="python -m mod.real.make_streams", description=__doc__.split("\n")[0], formatter_class=shown)
    parser.add_argument("folder", type=Path, help="where the clips and streams.jsonl go; made if it is not there")
    parser.add_argument("--streams", type=int, default=20, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="which clips")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--repeat", type=int, default=1, help="write each frame so often, at as many times the rate")
    return parser


def run(arguments) -> int:
    for name, least in {"streams": 1, "frames": 1, "repeat": 1, "seed": 0}.items():
        value = getattr(arguments, name)
        require(value >= least, f"got --{name} {value}, expected at least {least}; pass a larger number")
    folder, data, model = arguments.folder, DataConfig(), ModelConfig()
    listing = folder / "streams.jsonl"
    require(not listing.exists(),
            f"got {folder}, which holds a streams.jsonl, expected a new folder; name another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = arguments.streams * arguments.frames * arguments.repeat
    seconds = 1 + arguments.streams // 50 + pictures // 4000
    print(f"writing {arguments.streams} clips, {pictures} pictures, to {folder}: about {seconds} s")
    lines = []
    for number in tqdm(range(arguments.streams), unit="clip", disable=None):
        clip = make_clip(data, model, "train", arguments.seed, number, arguments.frames)
        name = f"clip-{number:04}.mp4"
        frames = np.repeat(clip.frames, arguments.repeat, axis=0)
        write_video(folder / name, frames, Fraction(str(data.fps)) * arguments.repeat)
        lines.append(entry(name, clip, data.fps) + "\n")
    write_text(listing, "".join(lines))  # last, so that it only names clips that are there
    print(f"wrote {listing}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_script(lambda: run(arguments), "make_streams")


if __name__ == "__main__":
    sys.exit(main())
