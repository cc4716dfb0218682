"""What it really costs: MoD and full computation measured side by side, each figure beside what its formula promises.

    python -m mod.study.bench                     # one CPU core, some minutes; writes results/bench-cpu.json, .md, .png
    python -m mod.study.bench --quick             # small sizes only, under a minute, writes nothing
    python -m mod.study.bench --device cuda --dtype bfloat16 --compile

Everything is measured in one process, MoD and full in turns, so that a busy machine slows both alike; a ratio is the
median over the turns. Only a CPU's peak memory has a process of its own for each model, because there a peak cannot be
taken back. The last line printed is everything as JSON. Where `transformers` is installed, its Llama of the same size
runs beside.

What is timed is the decoder, which is what MoD changes: a training step (forward, loss and backward), one more frame
of a stream, and one more word; frames and words are random vectors. Two formulas promise what streaming takes: FLOPs,
which bound long chunks, and the bytes of weights and cache that must be read, which bound short ones.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mod.cache import KVCache
from mod.config import ModelConfig, UserError, require
from mod.layout import Plan
from mod.live.costs import dense, held_bytes
from mod.run import Parser, run_script, to_json
from mod.study.bench_report import plot, report
from mod.study.common import publish
from mod.study.costs import (
    activation_bytes,
    decoder_flops,
    frame_flops,
    frames_that_fit,
    kv_bytes,
    read_bytes,
    word_flops,
)
from mod.study.machine import Machine, ratio, side_by_side
from mod.study.peer import Peer, PeerLive

TEXT = 24  # text tokens of a measured stream: vision dominates, as in video


@dataclass(frozen=True)
class Size:
    """One size of decoder and of the streams that are measured on it."""

    name: str
    model: ModelConfig
    frames: int  # of a training stream
    rows: int  # streams in a training step
    contexts: tuple[int, ...]  # tokens of full computation's cache at which streaming is timed
    turns: int = 7

    @property
    def tokens(self) -> int:
        return self.frames * self.model.frame_tokens + TEXT

    @property
    def pair(self) -> dict[str, ModelConfig]:
        """The two decoders that are compared."""
        return {"mod": self.model, "full": dense(self.model)}

    def has_peer(self, machine: Machine) -> bool:
        """Does transformers' Llama run beside? Only a Llama's sizes, and nothing that is compiled, compare with it."""
        return self.name != "tiny" and not machine.compile and find_spec("transformers") is not None


def llama_like(**sizes) -> ModelConfig:
    """A Llama with 1 + 7×7 tokens per frame."""
    like = {"qk_norm": False, "tie_embeddings": False, "vocab_size": 512, "rope_base": 500000.0}
    return ModelConfig(image_size=56, grid=7, **like, **sizes)


SIZES = (
    Size("tiny", ModelConfig(), frames=8, rows=16, contexts=(260, 1040)),
    Size("middle", llama_like(dim=256, depth=6, heads=4, kv_heads=4, head_dim=64, ffn_hidden=688),
         frames=20, rows=2, contexts=(1000, 4000)),
    Size("paper-like", llama_like(dim=512, depth=8, heads=8, kv_heads=8, head_dim=64, ffn_hidden=1376),
         frames=20, rows=2, contexts=(1000, 2000, 4000, 8000, 16000)),
)
QUICK = (replace(SIZES[0], rows=2, turns=3), replace(SIZES[1], frames=8, rows=1, contexts=(400, 1000), turns=3))
LONG = (1000, 4000, 16000, 32000)  # contexts on a GPU
PEAKS = {f"{size.name}:{name}": (config, size) for size in SIZES for name, config in size.pair.items()}


def training_step(machine: Machine, decoder: nn.Module, size: Size):
    """A function that runs forward, loss and backward once; every text token and every frame's end has a label."""
    config = decoder.config
    x, plan = machine.stream(config, size.rows, size.frames, TEXT)
    x.requires_grad_()  # as when a connector is trained before the decoder
    ends = torch.arange(config.frame_tokens - 1, size.frames * config.frame_tokens, config.frame_tokens)
    labelled = torch.cat((ends, torch.arange(size.tokens - TEXT, size.tokens))).to(machine.device)
    labels = torch.randint(config.vocab_size, (size.rows * len(labelled),), device=machine.device)

    def step() -> None:
        x.grad = None
        logits = decoder.logits(decoder(x, plan)[:, labelled]).flatten(0, 1)
        nn.functional.cross_entropy(logits.float(), labels).backward()

    return step


def compared(machine: Machine, times: dict[str, list[float]], flops: dict[str, int]) -> dict:
    """Times beside the FLOPs that promise them; on a card that we know, the share of its peak that they use (MFU)."""
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = machine.peak_flops
    return {
        "seconds": seconds,
        "time_ratio": ratio(times, "mod", "full"),
        "flop_ratio": flops["mod"] / flops["full"],
        "flops": flops,
        "mfu": {name: flops[name] / seconds[name] / peak for name in flops} if peak else None,
    }


def bench_training(machine: Machine, size: Size, bar: tqdm) -> dict:
    """Time of a training step, MoD beside full computation (and transformers' Llama)."""
    models = {name: machine.build(config) for name, config in size.pair.items()}
    if size.has_peer(machine):
        models["transformers"] = Peer(machine, size.model, models["full"].logits)
    actions = {name: training_step(machine, model, size) for name, model in models.items()}
    times = side_by_side(machine, actions, size.turns, bar)
    flops = {name: 3 * size.rows * decoder_flops(config, size.frames, TEXT) for name, config in size.pair.items()}
    result = {"tokens": size.tokens, "rows": size.rows, **compared(machine, times, flops)}
    if "transformers" in times:
        result["ours_to_transformers"] = ratio(times, "full", "transformers")
    return result


def peak_bytes(machine: Machine, config: ModelConfig, size: Size) -> int:
    """Peak memory of a training step over rest (weights and gradients are there already), in this process."""
    decoder = machine.build(config)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = training_step(machine, decoder, size)
    training_step(machine, decoder, replace(size, frames=1, rows=1))()  # libraries allocate on first use
    return machine.peak(step)


def peak_apart(machine: Machine, size: Size, name: str) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, "-m", "mod.study.bench", "--peak", f"{size.name}:{name}"]
    done = subprocess.run(command + (["--compile"] if machine.compile else []), capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.split()[-1])


def bench_memory(machine: Machine, size: Size, bar: tqdm) -> dict:
    """Peak of a training step over rest, beside the formula for saved activations."""
    peaks = {}
    for name, config in size.pair.items():
        apart = machine.device == "cpu"
        peaks[name] = peak_apart(machine, size, name) if apart else peak_bytes(machine, config, size)
        bar.update()
    # The formula is float32's: in bfloat16 norms and rotations still keep some of their numbers in float32.
    saved = {name: size.rows * activation_bytes(config, size.frames, TEXT) for name, config in size.pair.items()}
    return {
        "peak_bytes": peaks,
        "peak_ratio": peaks["mod"] / peaks["full"],
        "saved_bytes": saved,
        "saved_ratio": saved["mod"] / saved["full"],
    }


class Live:
    """A decoder with a cache that frames and words are appended to.

    position, mark  of the next token; and where the cache stood before the last chunk
    """

    def __init__(self, machine: Machine, config: ModelConfig):
        self.config, self.decoder, self.position = config, machine.build(config).eval(), 0
        self.cache = KVCache(config, 1, machine.dtype, machine.device)
        self.mark = self.cache.mark(), 0
        self.frame, self.word = machine.stream(config, 1, 1, 0), machine.stream(config, 1, 0, 1)

    @torch.inference_mode()
    def feed(self, x: Tensor, plan: Plan) -> Tensor:
        self.mark = self.cache.mark(), self.position
        plan = plan._replace(pos=plan.pos + self.position)
        self.cache.begin(plan)
        self.position += x.shape[1]
        return self.decoder(x, plan, self.cache)

    def step(self) -> None:
        """One more frame."""
        self.feed(*self.frame)

    def say(self) -> None:
        """One more word."""
        self.feed(*self.word)

    def undo(self) -> None:
        """Forget the last chunk, so that the context of every turn is the same."""
        mark, self.position = self.mark
        self.cache.rewind(mark)

    @torch.inference_mode()
    def skip_to(self, frames: int) -> None:
        """Fill the cache as if so many frames had passed; what is in it does not matter to the clock."""
        for layer in self.cache.layers:
            held = layer.kept * frames
            layer.grow(held + 1)
            layer.k[:, :, :held].normal_()
            layer.v[:, :, :held].normal_()
            layer.pos[:, :held] = torch.arange(held, device=layer.pos.device)
            layer.rewind([held])
        self.position = frames * self.config.frame_tokens


def bench_streaming(machine: Machine, size: Size, bar: tqdm) -> list[dict]:
    """Latency of one more frame, and of one more word, at every context, MoD beside full computation (and transformers'
    Llama)."""
    live = {name: Live(machine, config) for name, config in size.pair.items()}
    if size.has_peer(machine):
        live["transformers"] = PeerLive(machine, size.model)
    undo, points = {name: one.undo for name, one in live.items()}, []
    for context in size.contexts:
        frames = context // size.model.frame_tokens
        for one in live.values():
            one.skip_to(frames)
        held = {name: held_bytes(live[name].cache) for name in size.pair}
        for name, config in size.pair.items():
            assert held[name] == kv_bytes(config, frames, 0, machine.number_bytes), "not the formula's"
        point = {"context": frames * size.model.frame_tokens, "kv_bytes": held}
        for chunk, step, count, new in (("frame", "step", frame_flops, (1, 0)), ("word", "say", word_flops, (0, 1))):
            actions = {name: getattr(one, step) for name, one in live.items()}
            times = side_by_side(machine, actions, size.turns, bar, undo)
            flops = {name: count(config, frames, 0) for name, config in size.pair.items()}
            read = {name: read_bytes(config, *new, frames + new[0], new[1], machine.number_bytes)
                    for name, config in size.pair.items()}
            point[chunk] = compared(machine, times, flops)
            point[chunk] |= {"read_bytes": read, "read_ratio": read["mod"] / read["full"]}
            if "transformers" in times:
                point[chunk] |= {f"transformers_to_{name}": ratio(times, "transformers", name) for name in size.pair}
        points.append(point)
    return points


def fill(machine: Machine, size: Size, bar: tqdm) -> dict:
    """Stream frames until one more would exceed the bytes of 30 frames of full computation; frames that went in."""
    budget, frames = kv_bytes(dense(size.model), 30, 0, machine.number_bytes), {}
    plain = Machine(machine.device, machine.dtype_name)  # compiled or not, the bytes are the same
    for name, config in size.pair.items():
        promised, live = frames_that_fit(config, budget, 0, machine.number_bytes), Live(plain, config)
        while held_bytes(live.cache) <= budget:
            live.step()
        frames[name] = live.position // config.frame_tokens - 1
        assert frames[name] == promised, "not the formula's"
        bar.update()
    return {"budget_bytes": budget, "frames": frames, "ratio": frames["mod"] / frames["full"]}


def measure(machine: Machine, sizes: Sequence[Size], memory: bool) -> dict:
    """All that is measured; the largest size comes last."""
    measured = {}
    steps = sum((size.turns + 1) * (1 + 2 * len(size.contexts)) + (2 if memory else 0) for size in sizes) + 2
    with tqdm(total=steps, unit="turn", disable=None) as bar:
        for size in sizes:
            bar.set_description(size.name)
            measured[size.name] = {
                "model": asdict(size.model),
                "training": bench_training(machine, size, bar),
                "memory": bench_memory(machine, size, bar) if memory else None,
                "streaming": bench_streaming(machine, size, bar),
            }
        return {
            "device": machine.name, "dtype": machine.dtype_name, "compile": machine.compile,
            "torch": torch.__version__, "threads": torch.get_num_threads(), "peak_flops": machine.peak_flops,
            "sizes": measured, "filled": fill(machine, sizes[-1], bar),
        }


def run(arguments) -> int:
    require(arguments.threads >= 1, f"threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    machine = Machine(arguments.device, arguments.dtype, arguments.compile)
    if arguments.peak:
        print(peak_bytes(machine, *PEAKS[arguments.peak]))
        return 0
    sizes, gpu = QUICK if arguments.quick else SIZES, arguments.device == "cuda"
    if gpu and not arguments.quick:
        sizes = [*sizes[:-1], replace(sizes[-1], contexts=LONG)]
    print(f"{len(sizes)} sizes, about {'half a minute' if arguments.quick else 'ten minutes on a CPU core'}")
    results = measure(machine, sizes, arguments.memory and not arguments.quick)
    if arguments.quick:
        print(report(results))
    else:
        dtype, compiled = f"-{arguments.dtype}" if gpu else "", "-compiled" if arguments.compile else ""
        publish(arguments.out / f"bench-{arguments.device}{dtype}{compiled}", results, report(results), plot)
    print(to_json(results))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only; writes nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: %(default)s)")
    parser.add_argument("--peak", choices=PEAKS, help="print only the peak memory of this training step, in bytes")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.bench")


if __name__ == "__main__":
    sys.exit(main())
