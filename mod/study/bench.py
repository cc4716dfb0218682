"""What it really costs: MoD and full computation measured side by side, each figure beside what its formula promises.

    python -m mod.study.bench                     # one CPU core, some minutes; writes results/bench-cpu.json, .md, .png
    python -m mod.study.bench --quick             # small sizes only, under a minute, writes nothing
    python -m mod.study.bench --device cuda --dtype bfloat16 --compile

Everything is measured in one process, MoD and full in turns, so that a busy machine slows both alike; a ratio is the
median over the turns. Only peak memory has a process of its own for each model, because a peak cannot be taken back.
The last line printed is everything as JSON. Where `transformers` is installed, its Llama of the same size runs beside.

What is timed is the decoder, which is what MoD changes: forward, loss and backward; frames are random vectors.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from mod.cache import KVCache
from mod.checkpoint import to_json, write_text
from mod.config import ModelConfig, UserError
from mod.decoder import Decoder
from mod.flags import Parser, run_script
from mod.study.costs import activation_bytes, decoder_flops, dense, frame_flops, frames_that_fit, kv_bytes
from mod.study.plots import BLUE, ORANGE, VERMILION, save

TEXT = 24  # text tokens of a measured stream: vision dominates, as in video
LLAMA = {"qk_norm": False, "tie_embeddings": False, "vocab_size": 512, "rope_base": 500000.0}


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


def decoder_config(grid: int, **sizes) -> ModelConfig:
    return ModelConfig(image_size=8 * grid, grid=grid, **LLAMA, **sizes)


SIZES = (
    Size("tiny", ModelConfig(), frames=8, rows=16, contexts=(260, 1040)),
    Size("middle", decoder_config(7, dim=256, depth=6, heads=4, kv_heads=4, head_dim=64, ffn_hidden=688),
         frames=20, rows=2, contexts=(1000, 4000)),
    Size("paper-like", decoder_config(7, dim=512, depth=8, heads=8, kv_heads=8, head_dim=64, ffn_hidden=1376),
         frames=20, rows=2, contexts=(1000, 2000, 4000, 8000, 16000)),
)  # fmt: skip
QUICK = (
    replace(SIZES[0], rows=2, turns=3),
    replace(SIZES[1], frames=8, rows=1, contexts=(400, 1000), turns=3),
)


class Machine:
    """Where and how things run."""

    def __init__(self, device: str, dtype: str, compile: bool):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device got cuda, but no CUDA GPU is here; pass --device cpu")
        if device == "cpu" and dtype != "float32":
            raise UserError(f"dtype got {dtype} on a CPU, expected float32; pass --device cuda for bfloat16")
        self.device, self.dtype, self.compile = device, getattr(torch, dtype), compile

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"

    def build(self, config: ModelConfig) -> Decoder:
        torch.manual_seed(0)
        decoder = Decoder(config).to(self.device, self.dtype)
        if self.compile:
            decoder.compile(dynamic=True)
        return decoder

    def stream(self, config: ModelConfig, rows: int, frames: int, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random tokens x (B, T, D), pos and frame (B, T): all frames, then all text."""
        vision = frames * config.frame_tokens
        x = torch.randn(rows, vision + text, config.dim, device=self.device, dtype=self.dtype)
        frame = torch.arange(vision, device=self.device) // config.frame_tokens
        frame = torch.cat((frame, frame.new_full((text,), -1))).expand(rows, -1)
        return x, torch.arange(vision + text, device=self.device).expand(rows, -1), frame

    def clock(self, action) -> float:
        """Seconds that action() takes."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def side_by_side(machine: Machine, actions: dict, turns: int, bar: tqdm, undo: dict | None = None) -> dict:
    """Seconds of every action in every turn, the actions alternating; a first turn, not counted, warms up. What
    `undo` holds for an action is done after it, untimed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            seconds = machine.clock(action)
            if undo:
                undo[name]()
            if turn:
                times[name].append(seconds)
        bar.update()
    return times


def straightness(points: list[dict], name: str) -> float:
    """How far, at most, a model's latencies lie from one straight line in the context, as a share of the latency."""
    contexts, seconds = [p["context"] for p in points], [p["seconds"][name] for p in points]
    slope, start = statistics.linear_regression(contexts, seconds)
    return max(abs(start + slope * c - s) / s for c, s in zip(contexts, seconds, strict=True))


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the turns of one's time as a share of the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def training_step(machine: Machine, decoder: Decoder, size: Size):
    """A function that runs forward, loss and backward once; every text token and every frame's end has a label."""
    config = decoder.config
    x, pos, frame = machine.stream(config, size.rows, size.frames, TEXT)
    x.requires_grad_()  # as when a connector is trained before the decoder
    ends = torch.arange(config.frame_tokens - 1, size.frames * config.frame_tokens, config.frame_tokens)
    labelled = torch.cat((ends, torch.arange(size.tokens - TEXT, size.tokens))).to(machine.device)
    labels = torch.randint(config.vocab_size, (size.rows * len(labelled),), device=machine.device)

    def step() -> None:
        x.grad = None
        logits = decoder.logits(decoder(x, pos, frame)[:, labelled]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()

    return step


def llama(config: ModelConfig):
    """transformers' Llama of the same size, or None where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError:
        return None
    torch.manual_seed(0)
    sizes = {"hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
             "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
             "intermediate_size": config.ffn_hidden, "vocab_size": config.vocab_size,
             "max_position_embeddings": 32768}  # fmt: skip
    return LlamaModel(LlamaConfig(**sizes, attn_implementation="sdpa"))


def llama_step(machine: Machine, decoder: Decoder, size: Size):
    """`training_step` for transformers' Llama, or None. The output layer is the decoder's."""
    peer = llama(size.model)
    if peer is None:
        return None
    peer.to(machine.device, machine.dtype).train()
    head = decoder.logits

    class Peer(torch.nn.Module):
        config = size.model

        def forward(self, x, pos, frame):
            return peer(inputs_embeds=x, use_cache=False).last_hidden_state  # its positions are 0, 1, ... as ours

        def logits(self, hidden):
            return head(hidden)

    return training_step(machine, Peer(), size)


def bench_training(machine: Machine, size: Size, bar: tqdm) -> dict:
    """Time of a training step, MoD beside full computation (and transformers' Llama), and saved activations."""
    full = dense(size.model)
    decoders = {"mod": machine.build(size.model), "full": machine.build(full)}
    actions = {name: training_step(machine, decoder, size) for name, decoder in decoders.items()}
    peer = llama_step(machine, decoders["full"], size) if size.name != "tiny" and not machine.compile else None
    if peer:
        actions["transformers"] = peer
    times = side_by_side(machine, actions, size.turns, bar)
    result = {
        "tokens": size.tokens,
        "rows": size.rows,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "time_ratio": ratio(times, "mod", "full"),
        "flop_ratio": decoder_flops(size.model, size.frames, TEXT) / decoder_flops(full, size.frames, TEXT),
        "flops": {"mod": 3 * size.rows * decoder_flops(size.model, size.frames, TEXT),
                  "full": 3 * size.rows * decoder_flops(full, size.frames, TEXT)},
    }  # fmt: skip
    if peer:
        result["ours_to_transformers"] = ratio(times, "full", "transformers")
    return result


def peak_bytes(machine: Machine, config: ModelConfig, size: Size) -> int:
    """Peak memory of a training step over rest (weights and gradients are there already), in this process."""
    decoder = machine.build(config)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = training_step(machine, decoder, size)
    training_step(machine, decoder, replace(size, frames=1, rows=1))()  # libraries allocate on first use
    if machine.device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - rest
    rest = memory("VmRSS", forget_peak=True)
    step()
    return memory("VmHWM") - rest


def memory(which: str, forget_peak: bool = False) -> int:
    """Bytes of this process that are in memory now ("VmRSS") or were at most ("VmHWM", since the peak was forgotten).

    Raises UserError where there is no /proc, that is, not on Linux.
    """
    try:
        if forget_peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UserError(f"peak memory is read from /proc, which is Linux only ({error}); pass --no-memory") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))


def bench_memory(machine: Machine, size: Size, bar: tqdm) -> dict:
    """Peak of a training step over rest, each model in a fresh process, beside the formula for saved activations."""
    peaks = {}
    for name in ("mod", "full"):
        command = [sys.executable, "-m", "mod.study.bench", "--peak", f"{size.name}:{name}", "--device", machine.device]
        command += ["--dtype", str(machine.dtype).removeprefix("torch."), *(["--compile"] if machine.compile else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1])
        peaks[name] = int(done.stdout.split()[-1])
        bar.update()
    # The formula is float32's: in bfloat16 norms and rotations still keep some of their numbers in float32.
    saved = {name: size.rows * activation_bytes(config, size.frames, TEXT)
             for name, config in (("mod", size.model), ("full", dense(size.model)))}  # fmt: skip
    return {
        "peak_bytes": peaks,
        "peak_ratio": peaks["mod"] / peaks["full"],
        "saved_bytes": saved,
        "saved_ratio": saved["mod"] / saved["full"],
    }


class Live:
    """A decoder with a cache that frames are appended to."""

    def __init__(self, machine: Machine, config: ModelConfig, frames: int):
        self.machine, self.config, self.decoder, self.seen = machine, config, machine.build(config).eval(), 0
        self.cache = KVCache(config, frames=frames, text=0, dtype=machine.dtype, device=machine.device)
        self.x, self.pos, self.frame = machine.stream(config, 1, 1, 0)

    @torch.inference_mode()
    def step(self) -> None:
        self.cache.require(1, [0])
        place = self.pos + self.seen * self.config.frame_tokens
        self.decoder(self.x, place, self.frame + self.seen, cache=self.cache)
        self.seen += 1

    def undo(self) -> None:
        """Forget the last frame, so that the context of every turn is the same."""
        self.seen -= 1
        self.cache.rewind([torch.full_like(layer.length, kept * self.seen)
                           for layer, kept in zip(self.cache.layers, self.config.kept, strict=True)])  # fmt: skip

    @torch.inference_mode()
    def skip_to(self, frames: int) -> None:
        """Fill the cache as if so many frames had passed; what is in it does not matter to the clock."""
        for layer, kept in zip(self.cache.layers, self.config.kept, strict=True):
            layer.k[:, :, : kept * frames].normal_()
            layer.v[:, :, : kept * frames].normal_()
            layer.pos[:, : kept * frames] = torch.arange(kept * frames, device=self.machine.device)
            layer.length[:] = kept * frames
        self.seen = frames


class PeerLive:
    """transformers' Llama with its dynamic cache; the same methods."""

    def __init__(self, machine: Machine, config: ModelConfig):
        self.machine, self.config, self.seen, self.cache = machine, config, 0, None
        self.model = llama(config).to(machine.device, machine.dtype).eval()
        self.x, self.pos, _ = machine.stream(config, 1, 1, 0)

    @torch.inference_mode()
    def step(self) -> None:
        place = self.pos + self.seen * self.config.frame_tokens
        self.model(inputs_embeds=self.x, position_ids=place, past_key_values=self.cache, use_cache=True)
        self.seen += 1

    def undo(self) -> None:
        self.seen -= 1
        self.cache.crop(-self.config.frame_tokens)

    @torch.inference_mode()
    def skip_to(self, frames: int) -> None:
        from transformers import DynamicCache

        self.cache, self.seen = DynamicCache(), frames
        shape = (1, self.config.kv_heads, frames * self.config.frame_tokens, self.config.head_dim)
        for layer in range(self.config.depth):
            keys, values = (torch.randn(shape, device=self.machine.device, dtype=self.machine.dtype) for _ in range(2))
            self.cache.update(keys, values, layer)


def bench_streaming(machine: Machine, size: Size, bar: tqdm) -> list[dict]:
    """Latency of one more frame at growing context, MoD beside full computation (and transformers' Llama)."""
    full, points = dense(size.model), []
    for context in size.contexts:
        frames = context // size.model.frame_tokens
        live = {"mod": Live(machine, size.model, frames + 1), "full": Live(machine, full, frames + 1)}
        if size.name != "tiny" and not machine.compile and find_spec("transformers"):
            live["transformers"] = PeerLive(machine, size.model)
        for one in live.values():
            one.skip_to(frames)
        held = {name: live[name].cache.bytes() for name in ("mod", "full")}
        steps, undo = ({name: getattr(one, what) for name, one in live.items()} for what in ("step", "undo"))
        times = side_by_side(machine, steps, size.turns, bar, undo)
        flops = {"mod": frame_flops(size.model, frames, 0), "full": frame_flops(full, frames, 0)}
        point = {
            "context": frames * size.model.frame_tokens,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "time_ratio": ratio(times, "mod", "full"),
            "flop_ratio": flops["mod"] / flops["full"],
            "flops": flops,
            "kv_bytes": held,
        }
        number = torch.finfo(machine.dtype).bits // 8
        for name, config in (("mod", size.model), ("full", full)):
            assert held[name] == kv_bytes(config, frames, 0, number), "not the formula's"
        if "transformers" in times:
            point["transformers_to_mod"] = ratio(times, "transformers", "mod")
            point["transformers_to_full"] = ratio(times, "transformers", "full")
        points.append(point)
    return points


def fill(machine: Machine, size: Size, budget: int, bar: tqdm) -> dict:
    """Stream frames until one more would exceed `budget` bytes of keys and values; frames that went in."""
    number, frames = torch.finfo(machine.dtype).bits // 8, {}
    for name, config in (("mod", size.model), ("full", dense(size.model))):
        live = Live(machine, config, 2 * frames_that_fit(config, budget, 0, number))
        while live.cache.bytes() <= budget:
            live.step()
        frames[name] = live.seen - 1
        assert frames[name] == frames_that_fit(config, budget, 0, number), "not the formula's"
        bar.update()
    return {"budget_bytes": budget, "frames": frames, "ratio": frames["mod"] / frames["full"]}


def report(results: dict) -> str:
    """The results as Markdown tables."""
    lines = [f"{results['device']}, {results['dtype']}{', compiled' if results['compile'] else ''}, "
             f"torch {results['torch']}, threads: {results['threads']}. Ratios are MoD / full computation.", "",
             "| decoder | tokens of a step | step time | its FLOPs | peak memory | saved activations (formula) | "
             "our full step / transformers' Llama |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        step, memory = size["training"], size["memory"]
        peer = f"{step['ours_to_transformers']:.2f}" if "ours_to_transformers" in step else "-"
        peak = f"{memory['peak_ratio']:.2f} | {memory['saved_ratio']:.2f}" if memory else "- | -"
        lines.append(
            f"| {name} | {step['rows']} × {step['tokens']} | {step['time_ratio']:.2f} | {step['flop_ratio']:.2f} | "
            f"{peak} | {peer} |"
        )
    lines += ["", "| decoder | context, tokens | time of one more frame | its FLOPs | KV bytes | "
              "transformers' dense Llama, dynamic cache: its time / full | its time / MoD |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        for point in size["streaming"]:
            peers = [
                f"{point[key]:.2f}" if key in point else "-" for key in ("transformers_to_full", "transformers_to_mod")
            ]
            kv = point["kv_bytes"]["mod"] / point["kv_bytes"]["full"]
            lines.append(
                f"| {name} | {point['context']:,} | {point['time_ratio']:.2f} | {point['flop_ratio']:.2f} | "
                f"{kv:.3f} | {' | '.join(peers)} |"
            )
    points = list(results["sizes"].values())[-1]["streaming"]
    if len(points) > 2:
        bend = {name: f"{straightness(points, name):.0%}" for name in ("mod", "full")}
        off = f"at most {bend['mod']} (MoD) and {bend['full']} (full)"
        lines += ["", f"Latency of the largest decoder is a straight line in the context, but for {off}."]
        lines += ["Each ratio is a median over turns of its own."]
    mib, frames = results["filled"]["budget_bytes"] / 2**20, results["filled"]["frames"]
    held = f"{frames['mod']} frames with MoD, {frames['full']} with full computation"
    lines += ["", f"A cache of {mib:.0f} MiB holds {held}: {results['filled']['ratio']:.2f} times as many."]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Measured points on the formula's lines, for the largest size."""
    name, size = list(results["sizes"].items())[-1]
    config = ModelConfig(**size["model"])
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    step, latency, cache = figure.subplots(1, 3)
    labels, ratios_, limits = [], [], []
    for each, values in results["sizes"].items():
        labels += [f"{each}\nstep time"] + ([f"{each}\npeak memory"] if values["memory"] else [])
        ratios_ += [values["training"]["time_ratio"]] + ([values["memory"]["peak_ratio"]] if values["memory"] else [])
        limits += [values["training"]["flop_ratio"]] + ([values["memory"]["saved_ratio"]] if values["memory"] else [])
    step.bar(range(len(labels)), ratios_, color=BLUE, label="measured")
    step.plot(range(len(labels)), limits, "_", color=VERMILION, markersize=28, markeredgewidth=2.5,
              label="formula: FLOPs, saved activations")  # fmt: skip
    step.set_xticks(range(len(labels)), labels, fontsize=7, rotation=30)
    step.set(title="A training step, MoD / full computation", ylabel="ratio", ylim=(0, 1.1))
    contexts = [point["context"] for point in size["streaming"]]
    line = [contexts[-1] * i / 40 for i in range(1, 41)]
    largest = size["streaming"][-1]
    pace = largest["seconds"]["full"] / largest["flops"]["full"]
    for key, variant, colour in (("full", dense(config), ORANGE), ("mod", config, BLUE)):
        frames = [round(tokens / config.frame_tokens) for tokens in line]
        latency.plot(line, [1e3 * pace * frame_flops(variant, n, 0) for n in frames], color=colour, alpha=0.7,
                     label=f"{key}: its FLOPs at full computation's pace")  # fmt: skip
        latency.plot(contexts, [1e3 * point["seconds"][key] for point in size["streaming"]], "o", color=colour,
                     label=f"{key}: measured")  # fmt: skip
        number = 4 if results["dtype"] == "float32" else 2
        held = [kv_bytes(variant, n, 0, number) / 2**20 for n in frames]
        cache.plot(line, held, color=colour, label=f"{key}: formula")
        cache.plot(contexts, [point["kv_bytes"][key] / 2**20 for point in size["streaming"]], "o", color=colour,
                   label=f"{key}: the real tensors")  # fmt: skip
    latency.set(title=f"One more frame ({name})", xlabel="context, tokens of full computation", ylabel="time (ms)")
    cache.set(title=f"KV cache ({name})", xlabel="context, tokens of full computation", ylabel="keys and values (MiB)")
    for axis in (step, latency, cache):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper right" if axis is step else "upper left", markerscale=0.5)
    save(figure, path)


def run(arguments) -> int:
    if arguments.threads < 1:
        raise UserError(f"threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    machine = Machine(arguments.device, arguments.dtype, arguments.compile)
    sizes = QUICK if arguments.quick else SIZES
    arguments.memory = arguments.memory and not arguments.quick
    if arguments.peak:
        name, kind = arguments.peak.split(":")
        size = next(size for size in SIZES if size.name == name)
        print(peak_bytes(machine, size.model if kind == "mod" else dense(size.model), size))
        return 0
    steps = sum((size.turns + 1) * (1 + len(size.contexts)) + (2 if arguments.memory else 0) for size in sizes) + 2
    print(f"{len(sizes)} sizes, about {'half a minute' if arguments.quick else 'eight minutes on a CPU core'}")
    results = {"device": machine.name, "dtype": arguments.dtype, "compile": arguments.compile,
               "torch": torch.__version__, "threads": torch.get_num_threads(), "sizes": {}}  # fmt: skip
    with tqdm(total=steps, unit="turn", disable=None) as bar:
        for size in sizes:
            torch.compiler.reset()  # compiled code of another size counts towards the limit of recompilations
            bar.set_description(size.name)
            results["sizes"][size.name] = {
                "model": asdict(size.model),
                "training": bench_training(machine, size, bar),
                "memory": bench_memory(machine, size, bar) if arguments.memory else None,
                "streaming": bench_streaming(machine, size, bar),
            }
        budget = kv_bytes(dense(sizes[-1].model), 30, 0, torch.finfo(machine.dtype).bits // 8)
        results["filled"] = fill(machine, sizes[-1], budget, bar)
    if not arguments.quick:
        name = f"bench-{arguments.device}"
        name += (f"-{arguments.dtype}" if arguments.device == "cuda" else "") + (
            "-compiled" if arguments.compile else ""
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / f"{name}.json", to_json(results, indent=1) + "\n")
        write_text(arguments.out / f"{name}.md", report(results))
        plot(results, arguments.out / f"{name}.png")
        print(f"wrote {arguments.out}/{name}.json, .md and .png")
    print(report(results))
    print(json.dumps(results))
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
    parser.add_argument("--peak", help="SIZE:mod or SIZE:full; prints the peak memory of its training step in bytes")
    return run_script(run, parser.parse_args(argv), "mod.study.bench")


if __name__ == "__main__":
    sys.exit(main())
