"""A live stream in a file, from which it goes on bit for bit: cache, positions, questions still to be asked.

Read next: costs.py
"""

import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mod.cache import KVCache
from mod.config import UserError, require
from mod.layers import PAD
from mod.live.live import Live, LiveStream
from mod.live.window import WindowCache
from mod.run import read_tensors, write_tensors


def cache_state(cache: KVCache) -> dict[str, Tensor]:
    """Everything that is stored, by name; what was forgotten, and still lies in empty slots, left out. A kind of cache
    that remembers more than keys and values gives the rest by its method `more`, as named tensors."""
    tensors = {f"more.{name}": tensor for name, tensor in cache.more().items()} if hasattr(cache, "more") else {}
    for number, layer in enumerate(cache.layers):
        used = max(layer.lengths)
        empty = rearrange(torch.arange(used) >= torch.tensor(layer.lengths)[:, None], "b s -> b 1 s 1")
        for name in ("k", "v"):
            tensors[f"{number}.{name}"] = getattr(layer, name)[:, :, :used].masked_fill(empty.to(layer.k.device), 0)
        tensors[f"{number}.pos"] = layer.pos[:, :used].clone()
        tensors[f"{number}.length"] = torch.tensor(layer.lengths)
    return tensors


def restore_cache(cache: KVCache, tensors: dict[str, Tensor]) -> None:
    """Put back what `cache_state` gave. Raises UserError, with nothing changed, when it is another model's."""
    saved = []
    for number, layer in enumerate(cache.layers):
        held = {name: tensors.get(f"{number}.{name}") for name in ("k", "v", "pos", "length")}
        fits = all(tensor is not None for tensor in held.values())
        for name in ("k", "v") if fits else ():
            now, then = getattr(layer, name), held[name]
            fits &= then.shape[:2] == now.shape[:2] and then.shape[3:] == now.shape[3:] and then.dtype == now.dtype
            fits &= then.shape[2:3] == held["pos"].shape[1:]
        require(fits, "the saved stream is of another model or number of streams; name another file")
        saved.append(held)
    for layer, held in zip(cache.layers, saved, strict=True):
        used, device = held["pos"].shape[1], layer.k.device
        layer.grow(used + 1)
        layer.pos.fill_(PAD)
        layer.k[:, :, :used], layer.v[:, :, :used] = held["k"].to(device), held["v"].to(device)
        layer.pos[:, :used] = held["pos"].to(device)
        layer.lengths, layer.longest = held["length"].tolist(), used
    if hasattr(cache, "more"):
        cache.restore_more({name.removeprefix("more."): tensor.to(cache.layers[0].k.device)
                            for name, tensor in tensors.items() if name.startswith("more.")})


def stream_state(stream: LiveStream) -> tuple[dict[str, Tensor], dict]:
    """All that the next frame depends on: tensors, and plain numbers."""
    numbers = {name: list(getattr(stream, name)) for name in ("seen", "position", "quiet")}
    window = {"window": stream.cache.state()} if isinstance(stream.cache, WindowCache) else {}
    return cache_state(stream.cache), numbers | window


def restore_stream(stream: LiveStream, tensors: dict[str, Tensor], numbers: dict) -> None:
    """Go on from what `stream_state` gave, bit for bit. Raises UserError when it is another model's."""
    restore_cache(stream.cache, tensors)
    stream.seen, stream.position, stream.quiet = (list(numbers[name]) for name in ("seen", "position", "quiet"))
    if isinstance(stream.cache, WindowCache):
        stream.cache.restore(numbers["window"])


def save(live: Live, path: Path, about: dict) -> None:
    """Write all that the rest depends on, in one safetensors file. The old file is there until the new one is whole.

    `about` says what it is a stream of.
    """
    tensors, numbers = stream_state(live.stream)
    queues = [[(str(time), *rest) for time, *rest in row] for row in live.questions]
    note = {"about": about, "stream": numbers, "last": live.last, "questions": queues, "asked": live.asked,
            "answered": live.answered, "kept": live.kept}
    write_tensors(path, tensors, {"live": json.dumps(note)})


def read_saved(path: Path, about: dict) -> tuple[dict, dict]:
    """The tensors and the note of a saved live stream. Raises UserError when it is damaged or of something else."""
    try:
        tensors, metadata = read_tensors(path)
    except UserError as error:
        why = error.__cause__
        raise UserError(f"{path} is no saved stream, or damaged ({why}); delete it to begin anew") from error
    try:
        note = json.loads(metadata["live"])
        other = [name for name in about if note["about"].get(name) != about[name]]
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path} is no saved stream of this project; name another file") from None
    require("run" not in other,
            f"{path} is a stream of other weights; go on with its own --checkpoint or name another file")
    for name in other:
        raise UserError(f"{path} is a stream with {name} {note['about'].get(name)}, got {about[name]}; go on as it "
                        "began or name another file")
    return tensors, note


def counts(values, number: int, least: int = 0) -> bool:
    """Is it a list of so many whole numbers, of at least `least`?"""
    return (isinstance(values, list) and len(values) == number
            and all(type(value) is int and least <= value < 2**53 for value in values))


def is_queue(row) -> bool:
    """Is it a list of questions as `save` writes them? A time is a fraction, never a power that fills the memory."""
    kinds = [(str, int, str), (str, int, str, bool)]
    return isinstance(row, list) and all(isinstance(entry, list) and tuple(map(type, entry)) in kinds
                                         and re.fullmatch(r"-?\d{1,30}(/[1-9]\d{0,30})?", entry[0]) for entry in row)


def check_note(live: Live, tensors: dict, note: dict) -> None:
    """Raises UserError unless the note is one that `save` writes for such a stream, and fits the tensors."""
    stream, rows, layers = live.stream, live.stream.rows, len(live.stream.cache.layers)
    held = [tensors.get(f"{number}.length") for number in range(layers)]
    kept = [tensors.get(f"{number}.pos") for number in range(layers)]
    good = all(length is not None and pos is not None and length.dtype == pos.dtype == torch.int64
               and length.shape == (rows,) and pos.ndim == 2 and len(pos) == rows
               and int(length.min()) >= 0 and int(length.max()) <= pos.shape[1]
               for length, pos in zip(held, kept, strict=True))
    numbers = note.get("stream")
    good = good and isinstance(numbers, dict) and all(
        counts(numbers.get(name), rows) for name in ("seen", "position", "quiet")
    )
    good = good and counts(note.get("last"), rows, -1) and counts([note.get("asked")], 1)
    for name in ("answered", "questions"):
        good = good and isinstance(note.get(name), list) and len(note[name]) == rows
    good = good and all(isinstance(row, list) and all(counts(pair, 2) for pair in row) for row in note["answered"])
    good = good and all(map(is_queue, note["questions"])) and isinstance(note.get("kept"), dict)
    if good and isinstance(stream.cache, WindowCache):
        good = fits_window(numbers.get("window"), rows, layers, torch.stack(held).T.tolist())
    require(good, "the saved stream is damaged or of another kind; name another file")
    for row in note["questions"]:
        for entry in row:
            stream.words.encode(entry[2])  # or somebody's file could say what no user can


def fits_window(state, rows: int, layers: int, lengths: list[list[int]]) -> bool:
    """Is it what `WindowCache.state` gives, of a cache with so many entries in each row's layers?"""
    parts = [state.get(name) for name in ("segments", "starts", "gone")] if isinstance(state, dict) else [None] * 3
    if not (all(isinstance(part, list) and len(part) == rows for part in parts) and counts(parts[2], rows)):
        return False
    for segments, starts, length in zip(parts[0], parts[1], lengths, strict=True):
        if not (isinstance(segments, list) and segments and counts(starts, layers)):
            return False
        for number, segment in enumerate(segments):
            kinds = tuple(map(type, segment)) if isinstance(segment, list) else ()
            if kinds != (bool, int, list) or segment[1] < 0 or segment[0] != (number > 0):
                return False
            if not counts(segment[2], 0 if number + 1 == len(segments) else layers):
                return False
        before = [sum(entries) for entries in zip(*(segment[2] for segment in segments[:-1]), strict=True)]
        if starts != (before or [0] * layers) or any(map(int.__gt__, starts, length)):
            return False
    return True


def restore(live: Live, tensors: dict, note: dict) -> None:
    """Put a saved stream's state into `live`, whose sources begin with the frames after `note["last"]`. Raises
    UserError, with nothing changed, for what `save` has not written."""
    check_note(live, tensors, note)
    restore_stream(live.stream, tensors, note["stream"])
    live.last, live.asked, live.kept = list(note["last"]), note["asked"], note["kept"]
    live.answered = [[(frames, tokens) for frames, tokens in row] for row in note["answered"]]
    # Older files do not say which are to be answered: all are.
    live.questions = [[(Fraction(time), *[*rest, True][:3]) for time, *rest in row] for row in note["questions"]]


def fingerprint(folder: Path) -> str:
    """Names a run by its configuration and weights; of large files beginning and end are looked at."""
    some, path = 2**24, folder / "model.safetensors"
    with path.open("rb") as file:
        parts = [file.read(some)]
        if (size := path.stat().st_size) > some:
            file.seek(max(some, size - some))
            parts.append(file.read())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("train", None)  # what a finished run may be measured with does not make it another
    return hashlib.sha256(b"".join([json.dumps(config).encode(), *parts, b"%d" % size])).hexdigest()[:16]
