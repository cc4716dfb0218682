"""Files of a run: they survive a crash at any moment, and nothing in them is ever unpickled.

    config.json         every size and switch of model, data and training
    model.safetensors   the weights; those that a real checkpoint has lent stay where they are
    state.safetensors   weights, optimizers, random state and step in one file, so that no crash can mix two moments
    log.jsonl           one line a logged step    metrics.json, curve.png   when training is done

Read next: train.py
"""

import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mod.config import Config, DataConfig, ModelConfig, RealConfig, TrainConfig, UserError
from mod.optim import Muon
from mod.parallel import like, rank, whole


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: readers see the old file or the new one, never half of one.

    Of several processes that train together the first alone writes.
    """
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_json(value, indent: int | None = None) -> str:
    """JSON as every reader takes it: a number that is not one (nothing was counted) becomes null."""

    def plain(part):
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None, alone: bool = True
) -> None:
    """As `write_text`; with `alone` False every process writes, each its own file. Split tensors are put together."""
    writes, together = rank() == 0 or not alone, {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())  # every process must ask; one at a time, or each would hold all
        if writes:
            together[name] = one.contiguous() if one is tensor else one.cpu().contiguous()
    if not writes:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(together, temporary, metadata=note)
        temporary.chmod(0o644)  # as every other file of a run; safetensors leaves it to its owner alone
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); make room there, or name another place") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and note of a safetensors file. Raises UserError, in one sentence, when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"no file {path}; train first (python train_tiny.py) or name another run's folder")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); restore it from a copy or train again"
        ) from error


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters once: a tied output layer is the embedding and is left out, as is what a checkpoint has lent."""
    borrowed = getattr(model, "borrowed", ())
    return {name: parameter for name, parameter in model.named_parameters() if name not in borrowed}


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into the model. Raises UserError naming the first that is missing, left over or misshapen."""
    own = weights(model)
    for name, parameter in own.items():
        if name not in tensors:
            raise UserError(f"{source} lacks the tensor {name}; it belongs to another model")
        if tensors[name].shape != parameter.shape:
            got, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            raise UserError(f"{source}: {name} is {got}, expected {expected}; it belongs to another model")
    for name in tensors:
        if name not in own:
            raise UserError(f"{source} holds the unknown tensor {name}; it belongs to another model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(like(tensors[name], parameter))


def write_config(folder: Path, config: Config) -> None:
    write_text(folder / "config.json", to_json(asdict(config), indent=2) + "\n")


def config_from(parts: dict) -> Config:
    """`asdict(config)` back to a Config; an entry that is not there has its default.

    Raises UserError, KeyError or TypeError when `parts` is no configuration of this project.
    """
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "real": RealConfig}
    parts = {"real": {}, **parts}  # runs from before there were real parts
    for name, kind in sections.items():
        unknown = set(parts[name]) - {field.name for field in fields(kind)}
        if unknown:
            raise UserError(f"unknown entry {name}.{min(unknown)}")
    return Config(**{name: kind(**parts[name]) for name, kind in sections.items()})


def read_config(folder: Path) -> Config:
    """The configuration of a run. Raises UserError when the folder is no run of this project."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"no run in {folder} (config.json is missing); train first (python train_tiny.py) or name a run's folder"
        )
    try:
        return config_from(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the configuration of a run of this project ({error}); name another folder"
        ) from error


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, by the parameter's name: "optimizer/NAME/KEY"."""
    names = parameter_names(model)
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, memory in optimizer.state.items()
        for key, value in memory.items()
    }


def write_state(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float = 0.0
) -> None:
    """Everything that the next step depends on. The data's position is the step: clips are made from their number."""
    tensors = {f"model/{name}": tensor for name, tensor in weights(model).items()}
    tensors |= optimizer_tensors(model, optimizers) | {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    write_tensors(folder / "state.safetensors", tensors, {"step": str(step), "seconds": str(seconds)})


def read_state(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Put model, optimizers and random state back as `write_state` found them; returns the step and the seconds so far.

    Raises UserError when the file is damaged, foreign, or was written by other optimizers.
    """
    path = folder / "state.safetensors"
    tensors, note = read_tensors(path)
    try:
        step, seconds, random = int(note["step"]), float(note["seconds"]), tensors["random/cpu"]
    except (KeyError, ValueError):
        raise UserError(
            f"{path} is no training state of this version of the project; train anew or name another folder"
        ) from None
    load_weights(
        model, {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}, path
    )
    names = parameter_names(model)
    keys: dict[str, set[str]] = {}
    for name in tensors:
        if name.startswith("optimizer/"):
            _, parameter, key = name.split("/")
            keys.setdefault(parameter, set()).add(key)
    for optimizer in optimizers:
        remembers = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[parameter]
            if keys.pop(name, remembers if step == 0 else set()) - remembers:
                raise UserError(f"{path} was written by another optimizer ({name}); resume with the run's own settings")
            for key in sorted(remembers):  # the same order in every process, which share out split tensors together
                if (tensor := tensors.get(f"optimizer/{name}/{key}")) is not None:
                    optimizer.state[parameter][key] = tensor if key == "step" else like(tensor, parameter)
    if keys:
        raise UserError(f"{path} was written by another optimizer ({min(keys)}); resume with the run's own settings")
    torch.set_rng_state(random)
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return step, seconds
