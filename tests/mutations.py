"""Would the tests notice? Plant known bugs, one at a time, in a copy of the code, and see that a test fails.

    python -m tests.mutations          # all of them, a few minutes
    python -m tests.mutations 3 7      # some, by number

Most are bugs of public Mixture-of-Depths or streaming code. Ends with exit code 1 if one survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PATIENCE = 400  # seconds; the tests of any one file end much sooner, on an idle machine

# what is planted, file, the right code, the wrong code, the tests that should notice
MUTATIONS = [
    (
        "one token fewer than asked", "mod/router.py", "indices[:, :k]", "indices[:, : k - 1]", "tests/test_router.py",
    ),
    (
        "ties broken by chance: the later of equals wins", "mod/router.py",
        "scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]",
        "(scores + 1e-3 * torch.arange(scores.shape[1])).sort(dim=-1, descending=True).indices[:, :k]", "tests/test_router.py",
    ),
    (
        "top-k over the whole sequence instead of each frame", "mod/router.py",
        'rearrange(top_k_mask(scores.detach(), self.kept), "f n -> (f n)")',
        "top_k_mask(scores.detach().reshape(1, -1), self.kept * scores.shape[0])[0]", "tests/test_router.py",
    ),
    (
        "ceiling lost to float noise", "mod/config.py", "math.ceil(keep_ratio * tokens - 1e-9)", "math.ceil(keep_ratio * tokens)",
        "tests/test_router.py",
    ),
    (
        "text scaled by the gate", "mod/router.py", "torch.ones_like(vision), torch.ones_like(x[..., 0])",
        "torch.ones_like(vision), 0.5 * torch.ones_like(x[..., 0])", "tests/test_mod_block.py",
    ),
    (
        "kept tokens in the order of their scores' sort, not of time", "mod/decoder.py", "argsort(dim=1, stable=True)[:, :length]",
        "argsort(dim=1, stable=True)[:, :length].flip(1)", "tests/test_mod_block.py",
    ),
    (
        "positions of the kept tokens renumbered", "mod/decoder.py", "place = pos[row, index].where(real, PAD)",
        "place = torch.arange(length).expand(len(x), -1).where(real, PAD)", "tests/test_mod_block.py",
    ),
    (
        "residual inside the gate: a kept token is scaled away", "mod/decoder.py", "h + mu[..., None] * update, h)",
        "mu[..., None] * (h + update), h)", "tests/test_mod_block.py",
    ),
    (
        "residual added twice", "mod/decoder.py", "h + mu[..., None] * update, h)", "2 * h + mu[..., None] * update, h)",
        "tests/test_mod_block.py",
    ),
    (
        "gate forgotten", "mod/decoder.py", "h + mu[..., None] * update, h)", "h + update, h)", "tests/test_mod_block.py",
    ),
    (
        "value gate forgotten: being read carries no gradient", "mod/decoder.py", "value_gate=loudness",
        "value_gate=None", "tests/test_mod_block.py",
    ),
    (
        "padding competes for a place in the short sequence", "mod/decoder.py", "keep = keep & (pos < PAD)", "keep = keep & (pos < 2 * PAD)",
        "tests/test_mod_block.py",
    ),
    (
        "compute only masked, not skipped", "mod/decoder.py", "length = int(keep.sum(1).max())  # K",
        "length = x.shape[1]", "tests/test_mod_block.py",
    ),
    (
        "non-square is_causal for a chunk after a cache", "mod/block.py", "causal, mask = pos is not None and past is None, None",
        "causal, mask = pos is not None, None",
        "tests/test_block.py", ("            k, v, mask = past.append", "            k, v, _ = past.append"),
    ),
    (
        "a chunk sees its own future", "mod/cache.py", '<= rearrange(pos, "b t -> b t 1")', '<= rearrange(pos, "b t -> b t 1").amax(1, keepdim=True)',
        "tests/test_block.py",
    ),
    (
        "empty cache slots are keys", "mod/cache.py", "k_pos, k_frame = self.pos[:, :longest], self.frame[:, :longest]",
        "longest = self.pos.shape[1]\n        k_pos, k_frame = self.pos.where(self.pos < PAD, 0), self.frame", "tests/test_stream.py",
    ),
    (
        "one layer's cache length is stale", "mod/cache.py", "self.length = length\n", "self.length = length - (longest % 7 == 6)\n",
        "tests/test_stream.py",
    ),
    (
        "key/value heads repeated in the wrong order", "mod/block.py",
        "mixed = F.scaled_dot_product_attention(\n            q, k, v,", "mixed = F.scaled_dot_product_attention(\n            q, k.flip(1), v.flip(1),",
        "tests/test_block.py",
    ),
    (
        "RoPE turns the wrong way in one half", "mod/block.py", "torch.cat((-sin, sin), dim=-1)",
        "torch.cat((sin, -sin), dim=-1)", "tests/test_block.py",
    ),
    (
        "streaming label one token early", "mod/layout.py", "self.labels += [NO_LABEL] * (tokens - 1) + [label]",
        "self.labels += [label] + [NO_LABEL] * (tokens - 1)", "tests/test_layout.py",
    ),
    (
        "text labels off by one", "mod/layout.py", "layout.text(ids, [*ids[1:], NO_LABEL])", "layout.text(ids, [NO_LABEL, *ids[1:]])",
        "tests/test_layout.py",
    ),
    (
        "the frame before a user's turn is labelled", "mod/layout.py", "layout.image(t, frame_tokens, NO_LABEL)",
        "layout.image(t, frame_tokens, vocabulary.assistant)", "tests/test_layout.py",
    ),
    (
        "a cut answer is not closed with <eos>", "mod/stream.py", "if len(spoken[row]) < self.max_words else self.words.eos",
        "if len(spoken[row]) < self.max_words else self.words.user", "tests/test_stream.py",
    ),
    (
        "rewinding forgets the tokens but not their positions", "mod/cache.py", "self.pos[forgotten], self.frame[forgotten] = PAD, -1",
        "self.frame[forgotten] = -1", "tests/test_stream.py", ("longest = int(length.max())", "longest = self.capacity if int(length.max()) < self.capacity else int(length.max())"),
    ),
    (
        "fluency credits a frame too many when early", "mod/metrics.py", "good = m - d if paper_compatible else m - 1 - d", "good = m - d",
        "tests/test_metrics.py",
    ),
    (
        "never speaking in the last turn costs nothing", "mod/metrics.py", "else -(len(after) + 1)", "else -len(after)", "tests/test_metrics.py",
    ),
    (
        "the optimizer's memory is not restored", "mod/checkpoint.py", "optimizer.state[parameter][key] = tensor if", "_ = tensor if", "tests/test_train.py",
    ),
    (
        "accumulated parts weighted alike, whatever their labels", "mod/train.py", "self.weight, labels)", "self.weight, None)",
        "tests/test_train.py",
    ),
    (
        "validation clips are training clips", "mod/data.py", '"validation": 1', '"validation": 0', "tests/test_data.py",
    ),
    (
        "the side is narrated", "mod/data.py", 'return f"{before} moves {sprite.height}"', 'return f"{before} moves {sprite.height} {sprite.side}"',
        "tests/test_data.py",
    ),
    (
        "one router shared by all layers", "mod/decoder.py", "block = MoDBlock(block, router)",
        "block = MoDBlock(block, next((b.router for b in self.layers if isinstance(b, MoDBlock)), router))", "tests/test_properties.py",
    ),
    (
        "tokens chosen after squashing: saturated scores tie", "mod/router.py", "top_k_mask(scores.detach(), self.kept)",
        "top_k_mask((20 * scores.detach()).sigmoid(), self.kept)", "tests/test_mod_block.py",
    ),
    (
        "weights by a softmax over the frame", "mod/router.py", "return 2 * torch.sigmoid(scores)", "return scores.softmax(-1)",
        "tests/test_router.py",
    ),
    (
        "a row of the batch writes into another row's cache", "mod/cache.py", "self.k[rows, :, slots] = k[rows, :, columns]",
        "self.k[0 * rows, :, slots] = k[rows, :, columns]", "tests/test_stream.py",
    ),
    (
        "gradients clipped after the step, that is, never", "mod/train.py", "norm = whole(nn.utils.clip_grad_norm_(trainable(optimizers), settings.clip))",
        "norm = torch.ones(())", "tests/test_train.py",
    ),
    (
        "the router sees where a token stands in the batch, not in its frame", "mod/router.py", 'tokens = rearrange(tokens, "(f n) d -> f n d", n=self.frame_tokens)',
        'tokens = rearrange(tokens, "(n f) d -> f n d", n=self.frame_tokens)', "tests/test_properties.py",
    ),
    (
        "FLOPs of attention halved, as if its square were a triangle", "mod/study/costs.py", "sum(4 * n * n * queries for n in tokens)",
        "sum(2 * n * n * queries for n in tokens)", "tests/test_costs.py",
    ),
    (
        "activations of the scored tokens forgotten", "mod/study/costs.py", '"router": scored * (config.dim + (1 if value else 0))', '"router": 0', "tests/test_costs.py",
    ),
    (
        "an auxiliary lesson turned round", "mod/study/routers.py", "gradient + LESSON", "gradient - LESSON", "tests/test_study.py::TestRouters",
    ),
    (
        "finished runs are trained again", "mod/study/sweep.py", "if not same(job(name, seed)[1], wanted(base, variants[name], seed))", "if True", "tests/test_study.py::TestSweep",
    ),
    (
        "an ordering judged without pairing its seeds", "mod/study/ablate_report.py", "ttest_rel([one[s] for s in seeds], [other[s] for s in seeds])",
        "ttest_rel([one[s] for s in seeds], [other[s] for s in seeds[::-1]])", "tests/test_study.py::TestTables",
    ),
    (
        "it is any sprite, not the one last spoken of", "mod/data.py", "it = self.topic", "it = self.sprites[0] if self.sprites else self.topic",
        "tests/test_data.py",
    ),
    (
        "merging into an output layer changes the embedding tied to it", "mod/real/lora.py",
        "self.base.weight = nn.Parameter(changed, requires_grad=False)", "self.base.weight.data = changed", "tests/test_lora.py",
    ),
    (
        "a frozen encoder's features are taken for those of another frame rate", "mod/real/source.py",
        "stamps, config.data.fps, ", "stamps, ", "tests/test_real.py",
    ),
    (
        "validation streams are trained on", "mod/real/source.py", "cut([talk for talk in talks if talk.video not in kept_back]", "cut(talks", "tests/test_real.py",
    ),
    (
        "the borrowed weights are saved again", "mod/real/parts.py", "model.borrowed.add(name)", "pass", "tests/test_real.py",
    ),
    (
        "new routers disturb a trained decoder", "mod/real/llm.py", "std=0.0 if", "std=1.0 if", "tests/test_real.py",
    ),
    (
        "all weights of a new router are zero: a hidden layer would never learn", "mod/real/llm.py",
        "            layer.router = router.to(device, dtype)",
        "            [nn.init.zeros_(parameter) for parameter in router.parameters()]\n            layer.router = router.to(device, dtype)",
        "tests/test_llm.py",
    ),
    (
        "a new router thinks it belongs to layer 0", "mod/real/llm.py", "new_router(config, number)", "new_router(config, 0)",
        "tests/test_llm.py",
    ),
    (
        "several processes train with the mean of a mean", "mod/train.py", "(losses[0] * world()).backward()", "losses[0].backward()", "tests/test_parallel.py",
    ),
    (
        "every process counts its own labels alone", "mod/train.py", "map(int, total(counts, device))", "map(int, counts)", "tests/test_parallel.py",
    ),
    (
        "nothing is computed again, and everything kept", "mod/train.py", "block.recompute = config.train.recompute", "pass", "tests/test_train.py",
    ),
    (
        "a second question is taken for the answer to the first", "mod/evaluate.py",
        'says.pop(0).text if says and says[0].role == "assistant" else None for says in after]', "says.pop(0).text if says else None for says in after]",
        "tests/test_evaluate.py",
    ),
    (
        "a response can never end where one token begins and ends a text", "mod/stream.py", "self.never[words.eos] = False", "pass", "tests/test_real.py",
    ),
    (
        "weights that should be split are copied", "mod/parallel.py", "if not split:", "if True:", "tests/test_parallel.py",
    ),
    (
        "a window that is one frame too long", "mod/window.py", "leaving = max(0, seen - size)", "leaving = max(0, seen - size - 1)", "tests/test_window.py",
    ),
    (
        "the text goes with its frame when it should stay", "mod/window.py", "if self.config.forgets_text else start + self.frame_tokens", "if True else 0",
        "tests/test_window.py",
    ),
    (
        "keys are turned the wrong way when a frame goes", "mod/cache.py", "behind * (start - stop)", "behind * (stop - start)", "tests/test_window.py",
    ),
    (
        "the sinks are turned as well", "mod/cache.py", "(self.pos[:, :used] >= stop[:, None]) & ", "", "tests/test_window.py",
    ),
    (
        "within a chunk of several frames nothing is forgotten", "mod/window.py", "if not self.hides_within:", "if True:", "tests/test_window.py",
    ),
    (
        "a full cache forgets all the same", "mod/cache.py", "                self.window.restore(before)\n", "                pass\n", "tests/test_window.py",
    ),
    (
        "angles lose their precision after hours", "mod/block.py", 'if x.device.type == "mps" else torch.float64', "if True else 0", "tests/test_window.py",
    ),
    (
        "a question at a frame's time comes before the frame", "mod/live.py",
        "return (question, QUESTION) if question is not None and question < frame else (frame, FRAME)",
        "return (question, QUESTION) if question is not None and question <= frame else (frame, FRAME)", "tests/test_live.py",
    ),
    (
        "the second of two questions is lost", "mod/live.py", "            heapq.heappop(self.questions[row])\n", "            self.questions[row].clear()\n",
        "tests/test_live.py",
    ),
    (
        "timestamps drift: the interval of frames is rounded", "mod/live.py", "float((number - self.first) / self.fps)",
        "(number - self.first) * round(float(1 / self.fps), 2)", "tests/test_live.py",
    ),
    (
        "a late frame is left out though none has come after it", "mod/live.py", "            self._count(delay)\n            yield overdue", "            pass",
        "tests/test_live.py",
    ),
    (
        "a restored stream forgets how far its keys were turned", "mod/window.py", '"gone": list(self.gone)', '"gone": [0] * len(self.gone)', "tests/test_live.py",
    ),
    (
        "the refractory period is not kept", "mod/stream.py", "wants[row] and not self.quiet[row]", "wants[row]", "tests/test_live.py",
    ),
    (
        "a stream is saved before what it says is shown", "stream_tiny.py", "        seconds = time.perf_counter() - started\n",
        "        seconds = time.perf_counter() - started\n        live.save(arguments.state, about, arguments.ask) if arguments.state else None\n        time.sleep(0.2 * bool(arguments.state))\n",
        "tests/test_watch.py",
    ),
    (
        "frames of the cache are not moved with its positions", "mod/cache.py", "self.frame[:, :used] = self.frame[row, order]", "pass",
        "tests/test_window.py",
    ),
    (
        "memory is not divided among the streams", "stream_tiny.py", "int(settings.memory_mb * 1e6) // rows", "int(settings.memory_mb * 1e6)", "tests/test_watch.py",
    ),
    (
        "memory forgets that the sinks need some", "stream_tiny.py", "1 + room, settings.sinks, number_bytes", "1 + room, 0, number_bytes", "tests/test_watch.py",
    ),
    (
        "a question that has been answered is asked again after a restart", "stream_tiny.py",
        "if [str(question.time), question.text] not in known]", "if True]", "tests/test_watch.py",
    ),
    (
        "a camera's pictures are thrown away after a restart", "stream_tiny.py", "passed = 0 if arguments.video and is_camera(name) else last + 1",
        "passed = last + 1", "tests/test_watch.py",
    ),
    (
        "a camera waits for what it has missed", "stream_tiny.py", 'default["on_late"] = "skip"', 'default["on_late"] = "wait"', "tests/test_watch.py",
    ),
    (
        "a stream with several rows is never saved again", "stream_tiny.py", "frames + len(happened), unsaved + 1", "frames + len(happened), unsaved + 1 if len(happened) == 1 else unsaved",
        "tests/test_watch.py",
    ),
    (
        "keys are turned in half precision", "mod/cache.py", "torch.promote_types(dtype, torch.float32) if turned else dtype", "dtype", "tests/test_window.py",
    ),
    (
        "calibrated thresholds outlive their weights", "mod/study/calibrate.py", "return threshold if run == fingerprint(folder) else None", "return threshold",
        "tests/test_watch.py",
    ),
    (
        "false narrations counted as right silences", "mod/study/calibrate.py", "false = quiet - sum(silent)", "false = sum(silent)", "tests/test_watch.py",
    ),
    (
        "FLOPs of a question counted word by word", "mod/study/record.py", "[asked] + [1] * (fed - asked)", "[1] * fed", "tests/test_watch.py",
    ),
    (
        "the page shows the truth in place of what was said", "mod/study/page.py", '"text": line.text', '"text": line.truth or line.text', "tests/test_page.py",
    ),
    (
        "sparks never fade", "mod/data.py", "        self.spark = None\n        for sprite", "        for sprite", "tests/test_data.py",
    ),
    (
        "a method's tokens stand at the first places of a frame, not at its last", "mod/related/models.py",
        "place = last - tokens.counts[:, None] + ", "place = last - self.config.frame_tokens + ", "tests/test_methods.py",
    ),
    (
        "empty places of a frame are tokens", "mod/related/models.py", "filled[row, place] = True", "filled[frame >= 0] = True",
        "tests/test_methods.py",
    ),
    (
        "a stream forgets its key frame from one frame to the next", "mod/related/models.py",
        "coming[row] = tokens[keys[last]]", "coming[row] = tokens[last]", "tests/test_methods.py",
    ),
    (
        "VoCo's frames stay in the cache", "mod/related/models.py", "if (code <= -2).any():", "if False:", "tests/test_methods.py",
    ),
    (
        "an auxiliary loss reaches nobody", "mod/related/models.py", "context.one = torch.ones_like(loss)",
        "context.one = torch.zeros_like(loss)", "tests/test_methods.py",
    ),
    (
        "a stream that was longer leaves another RoPE behind", "mod/related/models.py", "attention.rope = rope\n        yield",
        "attention.rope = before[0] = rope\n        yield", "tests/test_methods.py",
    ),
    (
        "what must know all frames is streamed all the same", "mod/videollm.py", "if not self.online:", "if False:",
        "tests/test_methods.py",
    ),
    (
        "a needle in every frame", "mod/study/needle.py", "if self.now == self.at:", "if True:", "tests/test_methods.py",
    ),
    (
        "costs of VoCo counted before eviction", "mod/related/costs.py", "if model.online:  # then", "if False:  # then",
        "tests/test_methods.py",
    ),
    (
        "of the front, what is as good and dearer", "mod/study/field.py", "c <= cost and g >= good and (c, g) != (cost, good)",
        "c < cost and g > good", "tests/test_field.py",
    ),
    (
        "narrower frames are squeezed with the nan of wider ones", "mod/vit.py", "[picture[..., :width] for", "[picture for",
        "tests/test_data.py",
    ),
    (
        "a question in advance is answered as of the first frame", "mod/data.py", "truth[-1][asked])", "truth[0].get(asked, asked))",
        "tests/test_data.py",
    ),
    (
        "sprites stand on the landmark", "mod/data.py", "return cells | {self.landmark} if self.landmark else cells", "return cells",
        "tests/test_data.py",
    ),
    (
        "FastV is asked by the last token, which has read the answer", "mod/related/models.py", "(token * begins_answer).amax(1), last)",
        "last, last)", "tests/test_methods.py",
    ),
    (
        "Mixture-of-Depths is evaluated by the choice of training", "mod/related/models.py",
        "if cache is None and self.causal and not self.training:", "if False:", "tests/test_methods.py",
    ),
    (
        "one front for all, those that look ahead too", "mod/study/field.py", " if data[\"online\"][name]})", "})", "tests/test_field.py",
    ),
]  # fmt: skip


def survives(number: int) -> bool:
    """Plant one bug in a copy and run its tests there; True if nobody notices."""
    title, name, right, wrong, tests, *more = MUTATIONS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("mod", "tests", "results"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ("train_tiny.py", "stream_tiny.py"):
            shutil.copy(ROOT / script, copy)
        code = (copy / name).read_text()
        for old, new in [(right, wrong), *more]:
            if old not in code:
                raise SystemExit(f"mutation {number} ({title}): {name} no longer holds {old!r}; adapt tests/mutations.py")
            code = code.replace(old, new)
        (copy / name).write_text(code)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "MUTATION": "1"}
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            tqdm.write(f"{number:>2} caught    {title}  (the tests did not end within {PATIENCE} s)")
            return False
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        verdict = "SURVIVED" if done.returncode == 0 else "caught  "
        tqdm.write(f"{number:>2} {verdict}  {title}  {failed[0][:110] if failed else ''}")
        return done.returncode == 0


def main(arguments: list[str]) -> int:
    numbers = [int(argument) for argument in arguments] or range(len(MUTATIONS))
    alive = [number for number in tqdm(numbers, unit="bug", disable=None) if survives(number)]
    print(f"{len(numbers) - len(alive)} of {len(numbers)} planted bugs caught" + (f"; alive: {alive}" if alive else ""))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
