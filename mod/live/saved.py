"""A live stream in a file, from which it goes on bit for bit: cache, positions, questions still to be asked.

Read next: costs.py
"""

import hashlib
import json
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
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{path} is no saved stream of this project; name another file") from None
    require("run" not in other,
            f"{path} is a stream of other weights; go on with its own --checkpoint or name another file")
    for name in other:
        raise UserError(f"{path} is a stream with {name} {note['about'].get(name)}, got {about[name]}; go on as it "
                        "began or name another file")
    return tensors, note


def restore(live: Live, tensors: dict, note: dict) -> None:
    """Put a saved stream's state into `live`, whose sources begin with the frames after `note["last"]`."""
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
