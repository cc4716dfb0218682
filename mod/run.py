"""A run's flags and files: files survive a crash at any moment, and nothing in them is ever unpickled.

    config.json         every size and switch of model, data and training
    model.safetensors   the weights
    state.safetensors   weights, optimizers, random state and step in one file, so that no crash can mix two moments
    log.jsonl           one line per logged step    metrics.json   when training is done

Flags come from the fields of the configuration: name, type, default and remark are written once, there. A flag that is
not given stays out of the parsed arguments, so that a preset or a run can fill it in: flag > run > preset.

Read next: train.py
"""

import argparse
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mod.config import Config, UserError, require
from mod.evaluate import cost_ratios

# Where each kind of run is put together, by the name that config.json notes. All but the core's are imported here
# alone, when a flag or a run asks for them.
WORLDS = {"core": "mod.train", "related": "mod.related.world", "real": "mod.real.world"}


@dataclass(frozen=True)
class World:
    """One way to put a run together: its configuration, its presets, and who builds.

    build     (config, device) -> (VideoLLM, Source)
    settle    (config, names of the given flags) -> the config that these flags mean, or None when there is nothing to
              train, which it has then explained
    validate  as `train.validate`
    costs     (config, frames, text tokens, model) -> shares of full computation, as `evaluate.cost_ratios`
    """

    config: type[Config]
    presets: Mapping[str, Config]
    build: Callable
    validate: Callable
    settle: Callable = lambda config, given: config
    costs: Callable = lambda config, frames, text, model: cost_ratios(config.model, frames, text)


def find_world(name: str) -> World:
    return importlib.import_module(WORLDS[name]).WORLD


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is told in one sentence (exit code 2), with the nearest flag when the name is wrong."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            message = f"got the unknown flag {flag}; {f'did you mean {near[0]}?' if near else 'see --help'}"
        self.exit(2, f"{self.prog}: {message}\n")


def remarks(kind: type) -> dict[str, str]:
    """What stands behind each field of a dataclass, and of those it extends, as a comment."""
    sources = [inspect.getsource(one) for one in reversed(kind.__mro__) if one is not object]
    return {name: text for source in sources for name, text in re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M)}


def add_flags(parser: argparse.ArgumentParser, title: str, kind: type) -> None:
    """One flag for every field of a dataclass that has a remark and no flag yet."""
    group, hints, said = parser.add_argument_group(title), get_type_hints(kind), remarks(kind)
    known = {option for action in parser._actions for option in action.option_strings}
    for each in fields(kind):
        flag, hint = flag_of(each.name), hints[each.name]
        if each.name not in said or flag in known:
            continue
        told = "none" if each.default == "" else each.default
        options = {"default": argparse.SUPPRESS, "help": f"{said[each.name]} (default: {told})".replace("%", "%%")}
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(flag, type=type(each.default), choices=get_args(hint) or None, **options)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def sections(config: type[Config]) -> dict[str, type]:
    """The parts of a configuration, by name, with the dataclass of each."""
    return {each.name: type(each.default) for each in fields(config)}


def given(arguments: argparse.Namespace, kind: type) -> dict:
    """The fields of a dataclass that were given as flags."""
    return {each.name: getattr(arguments, each.name) for each in fields(kind) if hasattr(arguments, each.name)}


def with_flags(config: Config, arguments: argparse.Namespace) -> Config:
    """`config` with the given flags on top. Raises UserError when they do not fit together."""
    kinds = sections(type(config)).items()
    return replace(config, **{name: replace(getattr(config, name), **given(arguments, kind)) for name, kind in kinds})


def run_script(script: Callable[[], int], name: str) -> int:
    """Call a script; a user's mistake becomes one sentence on stderr and exit code 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # what a terminal cannot show ends no stream
        return script()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"{name}: not enough memory ({error}); ask for less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = ", and an unfinished run goes on with --resume" if name == "train_tiny.py" else ""
        print(f"{name}: interrupted; nothing is half written{goes_on}", file=sys.stderr)
        return 130


def pick_device(name: str, dtype: str = "float32") -> torch.device:
    """Raises UserError when the device is not there, or cannot do the dtype."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    require(there[name], f"device got {name}, but torch finds none here; use --device auto or cpu")
    require(dtype == "float32" or name == "cuda",
            f"dtype {dtype} needs a CUDA GPU, got device {name}; use --dtype float32")
    return torch.device(name)


def unfinished(path: Path) -> Path:
    """The temporary name of a file that is being written; its own may be as long as the file system allows."""
    return path.with_name(path.name[-60:] + ".tmp")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: readers see the old file or the new one, never half of one."""
    temporary = unfinished(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_json(value, indent: int | None = None) -> str:
    """JSON as every reader takes it: a number that is not one (nothing was counted) becomes null."""

    def plain(part):
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent)


def write_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """As `write_text`. Raises UserError when there is no room."""
    temporary = unfinished(path)
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata=note)
        temporary.chmod(0o644)  # as every other file of a run; safetensors leaves it to its owner alone
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); make room there, or name another place") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and note of a safetensors file. Raises UserError, in one sentence, when it is missing or damaged."""
    require(path.is_file(), f"no file {path}; train first (python train_tiny.py) or name another run's folder")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); restore it or train again") from error


def load_weights(own: dict[str, Tensor], tensors: dict[str, Tensor], source: Path, like: Callable = Tensor.to,
                 advice: str = "it belongs to another model") -> None:
    """Copy tensors into parameters, or into an optimizer's memory. Raises UserError, with the advice, naming the
    first that is missing, left over, misshapen or not floating point. `like` splits a tensor as its parameter is split,
    where several processes share it."""
    for name, parameter in own.items():
        require(name in tensors, f"{source} lacks the tensor {name}; {advice}")
        got, expected = tuple(tensors[name].shape), tuple(parameter.shape)
        require(got == expected, f"{source}: {name} is {got}, expected {expected}; {advice}")
        kind = tensors[name].dtype
        require(kind.is_floating_point, f"{source}: {name} is of {kind}, expected floating point; {advice}")
    for name in tensors:
        require(name in own, f"{source} holds the unknown tensor {name}; {advice}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(like(tensors[name], parameter))


def write_config(folder: Path, config: Config) -> None:
    write_text(folder / "config.json", to_json({"world": config.world} | asdict(config), indent=2) + "\n")


def config_from(parts: dict) -> Config:
    """What `write_config` wrote back to a Config; an entry that is not there has its default.

    Raises UserError, KeyError or TypeError when `parts` is no configuration of this project.
    """
    kind = find_world(parts.get("world", "core")).config
    read = {}
    for name, section in sections(kind).items():
        unknown = set(parts.get(name, {})) - {each.name for each in fields(section)}
        require(not unknown, f"unknown entry {name}.{min(unknown, default='')}")
        read[name] = section(**parts.get(name, {}))
    return kind(**read)


def read_config(folder: Path) -> Config:
    """The configuration of a run. Raises UserError when the folder is no run of this project."""
    path = folder / "config.json"
    require(path.is_file(), f"no run in {folder} (config.json is missing); train first (python train_tiny.py) or name "
            "a run's folder")
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        if "model" not in parts or "train" not in parts:
            raise ValueError("it has no model and training settings")
        return config_from(parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        told = f"{path} is not the configuration of a run of this project ({error}); name another folder"
        raise UserError(told) from error


def load_run(folder: Path, device: torch.device, dtype: str = "float32"):
    """A trained run: model, source of clips, configuration. Raises UserError when it is missing, unfinished, damaged or
    another project's."""
    config, path = read_config(folder), folder / "model.safetensors"
    finished = path.is_file() or not (folder / "state.safetensors").is_file()
    require(finished, f"the run in {folder} is not finished; finish it: python train_tiny.py --out {folder} --resume")
    config = replace(config, train=replace(config.train, dtype=dtype))
    tensors, _ = read_tensors(path)
    if config.world != "real":  # such a run holds only what was trained, on top of its checkpoints
        # A size that no weight has is refused before a model of that size asks for memory.
        sizes = config.model
        widths = {sizes.vocab_size, sizes.dim, sizes.ffn_hidden, sizes.heads * sizes.head_dim, sizes.vit_dim,
                  sizes.vit_hidden, sizes.patches_per_side**2, sizes.patch_size}
        strange = widths - {side for tensor in tensors.values() for side in tensor.shape}
        require(not strange, f"{folder}: its config.json says {max(strange, default=0)}, a size that no weight there "
                "has; it belongs to another model")
    model, source = find_world(config.world).build(config, device)
    load_weights(model.weights(), tensors, path)
    return model.to(getattr(torch, dtype)).eval(), source, config
