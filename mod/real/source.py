"""Clips from real videos: a streams.jsonl becomes pieces of at most --frames frames, each a stream of its own.

Nothing is read before a clip is asked for. A frozen real encoder sees every video once: its features are kept on disk,
named by all that decides them, and training reads only the piece that it needs. An encoder that is trained sees the
pictures, decoded again in every step.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mod.config import UserError
from mod.data import WORDS, Clip, Source, synthetic
from mod.layout import Say, Vocabulary
from mod.real.align import align
from mod.real.config import RealRun
from mod.real.sentences import make_spoken_clip, spoken_endless
from mod.real.streams import Conversation, pieces, placed, read_streams
from mod.real.tokenizer import TextTokenizer
from mod.real.video import Video
from mod.run import write_tensors
from mod.videollm import VideoLLM

AT_ONCE = 16  # frames through the encoder
FORMAT = 2  # to be raised when frames are made in another way


@dataclass(frozen=True)
class Piece:
    """Part of a stream: `frames` frames of a video from frame `first` on, and what is said in them.

    `features` is the file of the video's features, None where the pictures themselves are wanted.
    """

    video: Path
    features: Path | None
    first: int
    frames: int
    said: list[Say]


def features_file(video: Path, config: RealRun) -> Path:
    """Where a video's features are kept: the name changes with the video, the encoder and how frames are made."""
    held = [video.resolve(), *sorted(Path(config.real.vision).glob("*.safetensors"))]
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in held]
    seen = {name: value for name, value in asdict(config.model).items()
            if name.startswith(("vit", "image", "patch", "grid"))}
    stem = os.fsencode(video.stem)[:100].decode(errors="ignore")  # for people; names of files end at 255 bytes
    key = json.dumps([FORMAT, stamps, config.data.fps, seen, config.train.dtype])
    return Path(config.real.features) / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def video_frames(video: Path, config: RealRun) -> Iterator[np.ndarray]:
    """Frames (3, side, side) in [-1, 1]; then a line on stderr says what was damaged or odd about the video."""
    with Video(str(video), config.data.fps, config.model.image_size) as frames:
        yield from frames
        for remark in frames.remarks():
            tqdm.write(f"{video}: {remark}", file=sys.stderr)


@torch.inference_mode()
def encode(frames: Iterator[np.ndarray], model: VideoLLM) -> Tensor:
    """Features (F, N, vit_dim) of all frames, in the encoder's precision, on the CPU."""
    weight = model.vit.position
    batches = (torch.from_numpy(np.stack(some)).to(weight.device, weight.dtype) for some in in_batches(frames, AT_ONCE))
    return torch.cat([model.vit(batch).cpu() for batch in batches])


def in_batches(frames: Iterator, size: int) -> Iterator[list]:
    while some := list(islice(frames, size)):
        yield some


def is_whole(path: Path, config: RealRun) -> bool:
    """Does the file hold features as this run's encoder makes them? A damaged one is made again."""
    try:
        with safe_open(path, framework="pt") as file:
            held = file.get_slice("features")
            frames, *rest = held.get_shape()
            fits = frames > 0 and rest == [config.model.frame_tokens, config.model.vit_dim]
            return fits and held.get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[config.train.dtype]
    except (OSError, SafetensorError, ValueError):
        return False


def keep_features(videos: list[Path], config: RealRun, model: VideoLLM) -> None:
    """Compute what is not on disk yet; of several processes each takes its share of the videos."""
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    missing = {video for video in videos if not is_whole(features_file(video, config), config)}
    if missing and rank == 0:
        tqdm.write(f"{len(missing)} of {len(videos)} videos to encode once, into {config.real.features}")
    Path(config.real.features).mkdir(parents=True, exist_ok=True)
    # By place in the whole list: what is missing looks different to a process that comes later.
    share = [video for video in videos[rank::world] if video in missing]
    for video in tqdm(share, desc="features", unit="video", leave=False, disable=True if rank else None):
        features = encode(video_frames(video, config), model)
        write_tensors(features_file(video, config), {"features": features})
    if several:
        dist.barrier()


def count_frames(video: Path, features: Path | None, config: RealRun) -> int:
    if features is None:
        return sum(1 for _ in video_frames(video, config))
    with safe_open(features, framework="pt") as file:
        return file.get_slice("features").get_shape()[0]


def read_piece(piece: Piece, config: RealRun) -> Clip:
    """A piece as a clip: with features, or with pictures."""
    last = piece.first + piece.frames
    if piece.features is None:
        frames = np.stack(list(islice(video_frames(piece.video, config), piece.first, last)))
    else:
        with safe_open(piece.features, framework="pt") as file:
            frames = file.get_slice("features")[piece.first : last]
    return Clip(frames, piece.said)


def cut(conversations: list[Conversation], config: RealRun, frozen: bool,
        words: Vocabulary | TextTokenizer) -> list[Piece]:
    """The pieces of all videos. Raises UserError as `placed` and `check_words`."""
    cuts = []
    for talk in conversations:
        features = features_file(talk.video, config) if frozen else None  # once: its name takes a look at every file
        number = count_frames(talk.video, features, config)
        said = placed(talk, config.data.fps, number)
        check_words(talk.video, said, config, words)  # once more: turns beyond the last frame have joined it
        cuts += [Piece(talk.video, features, *piece) for piece in pieces(said, number, config.data.frames)]
    return cuts


def check_words(video: Path, said: list[Say], config: RealRun, words: Vocabulary | TextTokenizer) -> None:
    """Raises UserError for what is too long to be said after one frame, or whose words nobody may say."""
    for say in said:
        what = f"{config.real.data}: got {say.text!r} about {video.name}"
        try:
            ids = words.encode(say.text)
        except UserError as error:
            raise UserError(f"{config.real.data}, about {video.name}: {error}") from None
        if say.role == "assistant" and len(ids) > config.train.max_words:
            raise UserError(f"{what}, {len(ids)} tokens after one frame, but --max-words is {config.train.max_words}; "
                            "raise it")


def open_pieces(config: RealRun, words: Vocabulary | TextTokenizer, model: VideoLLM) -> tuple[list[Piece], list[Piece]]:
    """What to train on and what to validate on: the last videos of the file, `holdout` of them, or all.

    model is asked for the features when its encoder is a real one that is not trained. Raises UserError for anything
    wrong with the file, a video, or a word that the vocabulary lacks.
    """
    talks = read_streams(Path(config.real.data))
    for talk in talks:
        # Before any video is read, which may take hours.
        check_words(talk.video, placed(talk, config.data.fps, math.inf), config, words)
    frozen = bool(config.real.vision) and not config.train.vit_lr
    videos = list(dict.fromkeys(talk.video for talk in talks))
    if frozen:
        keep_features(videos, config, model)
    held = min(len(videos) - 1, max(1, round(config.real.holdout * len(videos)))) if config.real.holdout else 0
    kept_back = set(videos[len(videos) - held :])  # whole videos: one may stand in several lines
    training = cut([talk for talk in talks if talk.video not in kept_back], config, frozen, words)
    validation = cut([talk for talk in talks if talk.video in kept_back], config, frozen, words) or training
    of = "others than" if held else "the same as"
    tqdm.write(f"{len(training)} pieces of {len(videos) - held} videos to train on; validation on {of} these")
    return training, validation


def real_source(config: RealRun, words: Vocabulary | TextTokenizer, model: VideoLLM) -> Source:
    """Clips of `config.real.data`, or of synthetic streams when it names nothing. The first clip asked for opens
    the file, and raises what `open_pieces` raises."""
    def warmed(model: VideoLLM) -> None:
        if config.real.align_steps:
            left = align(model, source_of_frames, config.real.align_steps)
            tqdm.write(f"connector warmed up: {left:.3f} of what its tokens should say is missing")

    source_of_frames = replace(synthetic(config), words=words)
    if not config.real.data:
        spoken = (WORDS, make_spoken_clip, spoken_endless) if config.real.sentences else ()
        return replace(synthetic(config, *spoken), words=words, warmed=warmed)

    @cache
    def opened() -> tuple[list[Piece], list[Piece]]:
        return open_pieces(config, words, model)

    def at(place: int) -> Piece:
        """Pieces in an order that is drawn anew every time that all have been seen; the place alone decides it."""
        own, _ = opened()
        epoch, index = divmod(place, len(own))
        return own[np.random.default_rng([config.train.seed, epoch]).permutation(len(own))[index]]

    def training(step: int) -> list[Clip]:
        first = step * config.train.batch_size
        return [read_piece(at(first + i), config) for i in range(config.train.batch_size)]

    def validation(number: int) -> list[Clip]:
        return [read_piece(piece, config) for piece in opened()[1][:number]]

    return Source(words, training, validation, warm_up=None if config.real.vision else source_of_frames.warm_up,
                  warmed=warmed)
