"""Real parts end to end, on small files that the tests write: a Llama-type model, a SigLIP tower and a folder of videos
are trained with LoRA through the scripts, reloaded, streamed; what should not fit is refused in one sentence."""

import json
import shlex
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import stream_tiny
import train_tiny
from mod.config import UserError
from mod.data import WORDS
from mod.layout import TEXT
from mod.real import make_streams
from mod.real.config import RealConfig, RealRun
from mod.real.llm import load_llm, read_llm_config
from mod.real.lora import changes
from mod.real.parts import Recomputed, assemble, read_words
from mod.real.source import features_file
from mod.real.world import WORLD, build, settle
from mod.run import load_run, read_config, read_tensors
from mod.stream import Stream
from mod.train import train
from tests.helpers import as_batch, assert_cache_holds_what_was_kept, in_chunks, offline, plan_of, routed
from tests.test_llm import write_checkpoint
from tests.test_scripts import refused
from tests.test_video import numbered, write
from tests.test_vision import write_tower

SYMBOLS = ["<s>", "</s>", "<unk>", "User", "Assistant"]
LLM = {"model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of a language model and a vision encoder, and twelve short videos with their conversations."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "vision").mkdir()
    write_checkpoint(folder / "llm", LLM, 6, words=[*SYMBOLS, *WORDS])
    write_tower(folder / "vision")
    assert make_streams.main([str(folder / "videos"), "--streams", "12", "--frames", "5"]) == 0
    return folder


def flags(files, out, *more, data=True) -> list[str]:
    parts = ["--llm", str(files / "llm"), "--vision", str(files / "vision")]
    parts += ["--data", str(files / "videos" / "streams.jsonl"), "--features", str(files / "features")] if data else []
    parts += [] if "--train" in more else ["--lora-rank", "4", "--lora-alpha", "8"]
    return [*parts, "--out", str(out), "--frame-tokens", "1+2x2", "--steps", "40", "--frames", "5", "--batch-size", "6",
            "--optimizer", "adamw", "--adam-lr", "1e-2", "--warmup", "2", "--eval-every", "0", "--eval-clips", "4",
            "--save-every", "20", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "real"
    assert train_tiny.main(flags(files, out)) == 0
    return out


CPU = torch.device("cpu")


def small(files, **real) -> RealRun:
    own = {"llm": str(files / "llm"), "vision": str(files / "vision"), "lora_rank": 4, "lora_alpha": 8.0, **real}
    base = WORLD.presets["real"]
    base = replace(base, real=RealConfig(**own), model=replace(base.model, grid=2), train=replace(base.train, device="cpu"))
    return settle(base, {"grid", "device", *own})


class TestTraining:
    def test_the_loss_falls(self, trained):
        log = [json.loads(line) for line in (trained / "log.jsonl").open()]
        losses = [entry["loss"] for entry in log if entry["kind"] == "train"]
        assert losses[-1] < 0.85 * losses[0] < 3.3  # nats; knowing nothing costs 4
        metrics = json.loads((trained / "metrics.json").read_text())
        assert metrics["recall"] == {} and metrics["steps"] == 40 and 0 < metrics["flop_ratio"] < 1

    def test_only_what_was_trained_is_saved(self, trained, files):
        names = set(read_tensors(trained / "model.safetensors")[0])
        assert names and all(".router." in name or "lora_" in name or name.startswith("connector.") for name in names)
        parts = ("q", "k", "v", "out", "gate", "up", "down")
        assert {f"decoder.layers.0.{at}.{part}.lora_a" for at, some in (("attention", parts[:4]), ("mlp", parts[4:])) for part in some} < names
        assert {"decoder.head.lora_b", "connector.fc2.bias", "decoder.layers.1.router.w.weight"} < names

    def test_features_are_computed_once(self, trained, files, tmp_path):
        made = {path: path.stat().st_mtime_ns for path in (files / "features").iterdir()}
        assert len(made) == 12
        assert train_tiny.main(flags(files, tmp_path / "again", "--steps", "1")) == 0
        assert {path: path.stat().st_mtime_ns for path in (files / "features").iterdir()} == made
        config = small(files, data=str(files / "videos" / "streams.jsonl"), features=str(files / "features"))
        video = files / "videos" / "clip-0000.mp4"
        assert features_file(video, config) in made
        assert features_file(video, replace(config, data=replace(config.data, fps=1.0))) not in made

    def test_features_are_what_the_encoder_sees(self, files, tmp_path):
        """Clips of features and clips of pictures lead to the same tokens."""
        data = {"data": str(files / "videos" / "streams.jsonl"), "features": str(tmp_path)}
        frozen = small(files, **data)
        seeing = replace(frozen, train=replace(frozen.train, vit_lr=1e-3))
        model, source = build(frozen, CPU)
        for kept, shown in zip(source.validation(3), build(seeing, CPU)[1].validation(3), strict=True):
            assert kept.said == shown.said and kept.frames.ndim == 3 and shown.frames.ndim == 4
            torch.testing.assert_close(model.see(kept.frames), model.see(torch.as_tensor(shown.frames)), rtol=1e-4, atol=1e-4)

    def test_training_and_validation_never_share_a_stream(self, files):
        config = small(files, data=str(files / "videos" / "streams.jsonl"), features=str(files / "features"), holdout=0.25)
        config = replace(config, train=replace(config.train, batch_size=9), data=replace(config.data, frames=2))
        _, source = build(config, CPU)
        # 12 streams of 5 frames in pieces of 2, 2 and 1; 9 streams to train on make 27 pieces, three steps an epoch
        epoch = [clip.frames.numpy().tobytes() for step in range(3) for clip in source.training(step)]
        assert len(epoch) == len(set(epoch)) == 27
        assert set(epoch) == {clip.frames.numpy().tobytes() for step in (3, 4, 5) for clip in source.training(step)}
        held = {clip.frames.numpy().tobytes() for clip in source.validation(99)}
        assert len(held) == 9 and not held & set(epoch)
        again = [clip.frames.numpy().tobytes() for step in range(3) for clip in source.training(step)]
        assert again == epoch, "the step alone decides"

    def test_resumed_equals_uninterrupted(self, trained, tmp_path, monkeypatch):
        config = read_config(trained)
        model, source = build(config, CPU)
        import mod.train as module

        before = module.train_step

        def cut_off(*parts):
            if parts[-2] == 25:
                raise KeyboardInterrupt
            return before(*parts)

        monkeypatch.setattr(module, "train_step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed", model, source)
        monkeypatch.undo()
        assert train_tiny.main(["--resume", "--out", str(tmp_path / "killed")]) == 0
        one, two = (read_tensors(folder / "model.safetensors")[0] for folder in (trained, tmp_path / "killed"))
        assert all(torch.equal(one[name], two[name]) for name in one)

    @pytest.mark.parametrize("kind", ["connector", "full"])
    def test_what_else_can_be_trained(self, kind, files, tmp_path):
        assert train_tiny.main(flags(files, tmp_path / "run", "--train", kind, "--steps", "1", "--layers", "keep:1,0.5,1")) == 0
        names = set(read_tensors(tmp_path / "run" / "model.safetensors")[0])
        assert ("decoder.embed.weight" in names) == (kind == "full") and "decoder.layers.1.router.w.weight" in names
        assert not any("lora_" in name or name.startswith("vit.") for name in names)
        model, _, _ = load_run(tmp_path / "run", CPU)
        assert model.config.depth == 3

    def test_real_parts_with_the_synthetic_stream(self, files, tmp_path, capsys):
        """No --data: the tokenizer writes the synthetic conversations, the real encoder sees the synthetic frames."""
        assert train_tiny.main(flags(files, tmp_path / "run", "--steps", "2", data=False)) == 0
        assert "lora_rank 4" in capsys.readouterr().out
        assert stream_tiny.main(["--checkpoint", str(tmp_path / "run"), "--ask", "2:where is it ?", "--device", "cpu"]) == 0
        assert "right:" in capsys.readouterr().out

    def test_recomputing_changes_nothing_but_memory(self, trained, files, tmp_path):
        config = small(files)
        model = assemble(replace(config, train=replace(config.train, recompute=True)), CPU)
        blocks = [getattr(layer, "block", layer) for layer in model.decoder.layers]
        assert len(routed(model)) == 1 and all(isinstance(block, Recomputed) for block in blocks)
        assert train_tiny.main(flags(files, tmp_path / "run", "--recompute")) == 0
        one, two = (read_tensors(folder / "model.safetensors")[0] for folder in (trained, tmp_path / "run"))
        assert all(torch.equal(one[name], two[name]) for name in one)


class TestReloading:
    def test_the_run_reloads_to_the_same_outputs_and_streams_as_it_computes_offline(self, trained, files):
        config = read_config(trained)
        model = assemble(config, CPU)
        again, _, _ = load_run(trained, CPU)
        batch = as_batch(model.config, [(3, [])], torch.float32)
        assert not torch.allclose(offline(model, batch), offline(again, batch)), "training has changed something"
        for name, tensor in read_tensors(trained / "model.safetensors")[0].items():
            model.get_parameter(name).data.copy_(tensor)
        model.eval()
        expected = offline(again, batch)
        assert torch.equal(offline(model, batch), expected)
        import random

        trace: list = []
        with torch.no_grad():
            offline(again, batch, trace)
            logits, cache = in_chunks(again, batch, again.see(batch.pixels), random.Random(0))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert_cache_holds_what_was_kept(cache, batch, trace)

    def test_a_video_file_is_streamed(self, trained, files, capsys):
        video = str(files / "videos" / "clip-0003.mp4")
        arguments = ["--checkpoint", str(trained), "--video", video, "--device", "cpu", "--ask", "1s:where is it ?"]
        assert stream_tiny.main([*arguments, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        frames = [line for line in lines if line["role"] in ("silence", "assistant") and line is not lines[lines.index(line) - 1]]
        kept = read_config(trained).model.keep_counts
        assert lines[-1]["frame"] == 4 and len(frames) >= 5
        held = lines[-1]["cache_entries"]
        assert all(held[0] - layer == (kept[0] - k) * 5 for layer, k in zip(held, kept, strict=True))
        assert [line["text"] for line in lines if line["role"] == "user"] == ["where is it ?"]
        assert stream_tiny.main([*arguments, "--fps", "4", "--frames", "7"]) == 0
        printed = capsys.readouterr().out
        assert "    6   1.50 s" in printed and "    7 " not in printed and "truth" not in printed and "cache:" in printed

    def test_questions_are_refused_only_when_the_end_has_come(self, trained, files, tmp_path, capsys):
        """The header knows of 2.5 s; three recordings last 7.5. What comes after the end was not asked, and that is said."""
        video = tmp_path / "three.mkv"
        write(video, numbered(5, 32), rate=Fraction(2))
        video.write_bytes(video.read_bytes() * 3)
        arguments = ["--checkpoint", str(trained), "--video", str(video), "--device", "cpu", "--json", "--ask", "6s:where is it ?"]
        assert stream_tiny.main([*arguments, "--ask", "14:where did it appear ?", "--ask", "9s:where is the red disc ?"]) == 0
        told = capsys.readouterr()
        lines = [json.loads(line) for line in told.out.splitlines()]
        assert [(line["frame"], line["text"]) for line in lines if line["role"] == "user"] == [(12, "where is it ?"), (14, "where did it appear ?")]
        assert lines[-1]["frame"] == 14 and "never asked, because the video ended first: where is the red disc ?" in told.err
        assert told.err.count("its clock was set anew 2 times") == 1

    def test_streaming_reads_nothing_of_the_training_data(self, trained, files, tmp_path, capsys):
        run = shutil.copytree(trained, tmp_path / "run")
        text = (run / "config.json").read_text().replace(str(files / "videos"), str(tmp_path / "gone"))
        (run / "config.json").write_text(text)
        _, source, config = load_run(run, CPU)
        assert config.real.data == str(tmp_path / "gone" / "streams.jsonl")
        with pytest.raises(UserError, match="gone"):
            source.validation(1)
        video = str(files / "videos" / "clip-0003.mp4")
        assert stream_tiny.main(["--checkpoint", str(run), "--video", video, "--device", "cpu"]) == 0

    def test_one_token_may_begin_and_end(self, files, tmp_path):
        """Some tokenizers have one symbol for both; a response must be able to end with it."""
        shutil.copytree(files / "llm", tmp_path / "llm")
        (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [1, 0]}))
        config = small(files, llm=str(tmp_path / "llm"))
        words = read_words(config)
        assert words.bos == words.eos == 1
        stream = Stream(assemble(config, CPU), words)
        assert not stream.never[words.eos] and stream.never[words.user] and stream.never[words.assistant]

    def test_a_video_may_have_a_very_long_name(self, files, tmp_path, capsys):
        """Its features and its saved stream have longer ones; two that begin alike have features of their own."""
        names = ["x" * 240 + f"{number}.mp4" for number in range(2)] + ["\N{hiragana letter a}" * 82 + ".mp4"]
        lines = [{"video": name, "conversation": [{"time": 0, "role": "assistant", "content": "red"}]} for name in names]
        for number, name in enumerate(names):
            shutil.copy(files / "videos" / f"clip-000{number}.mp4", tmp_path / name)
        (tmp_path / "streams.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments = flags(files, tmp_path / "run", "--data", str(tmp_path / "streams.jsonl"), "--features", str(tmp_path / "features"), "--steps", "1", data=False)
        assert train_tiny.main(arguments) == 0
        assert len(list((tmp_path / "features").iterdir())) == 3
        state = tmp_path / ("s" * 238 + ".safetensors")
        assert stream_tiny.main(["--checkpoint", str(tmp_path / "run"), "--video", str(tmp_path / names[2]), "--state", str(state), "--device", "cpu"]) == 0
        assert read_tensors(state)[0] and not list(tmp_path.glob("*.tmp"))

    def test_damaged_features_are_made_again(self, trained, files, tmp_path):
        features = shutil.copytree(files / "features", tmp_path / "features")
        path = sorted(features.iterdir())[3]
        whole = read_tensors(path)[0]["features"].clone()  # not the file itself
        path.write_bytes(path.read_bytes()[:40])
        assert train_tiny.main(flags(files, tmp_path / "run", "--features", str(features), "--steps", "1")) == 0
        torch.testing.assert_close(read_tensors(path)[0]["features"], whole)

    def test_a_video_of_several_lines_is_on_one_side(self, files, tmp_path):
        lines = (files / "videos" / "streams.jsonl").read_text().splitlines()
        for path in (files / "videos").glob("*.mp4"):
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "streams.jsonl").write_text("\n".join([*lines, *lines[-2:], lines[0]]) + "\n")
        config = small(files, data=str(tmp_path / "streams.jsonl"), features=str(tmp_path / "features"), holdout=0.2)
        config = replace(config, train=replace(config.train, batch_size=11))
        _, source = build(config, CPU)
        trained = {clip.frames.numpy().tobytes() for clip in source.training(0)}
        held = [clip.frames.numpy().tobytes() for clip in source.validation(99)]
        assert len(trained) == 10 and len(held) == 4 and len(set(held)) == 2 and not trained & set(held)

    def test_an_interpolated_run_goes_on(self, files, tmp_path):
        out = tmp_path / "run"
        assert train_tiny.main(flags(files, out, "--image-size", "48", "--steps", "1", data=False)) == 0
        assert train_tiny.main(["--resume", "--out", str(out), "--steps", "2"]) == 0
        assert read_config(out).model.image_size == 48


class TestInsertion:
    def test_text_and_keep_ratio_1_are_exactly_the_pretrained_decoder(self, files):
        """At step 0, before any training: with MoD inserted, LoRA added, and the dense decoder, bit for bit."""
        config = small(files)
        model = assemble(config, CPU)
        dense = load_llm(files / "llm", replace(read_llm_config(files / "llm", config.model), layers="none"))
        text = torch.randint(0, dense.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
        plan = plan_of(config.model, torch.full((2, 9), TEXT))
        with torch.no_grad():
            assert torch.equal(model.decoder(model.decoder.embed(text), plan), dense(dense.embed(text), plan))
            whole = assemble(replace(config, model=replace(config.model, keep_ratio=1.0, layers="all")), CPU)
            plan = plan_of(config.model, torch.tensor([[TEXT, *[0] * 5, *[TEXT] * 3]]).expand(2, -1))
            x = torch.randn(2, 9, dense.config.dim, generator=torch.Generator().manual_seed(0))
            assert torch.equal(whole.decoder(x, plan), dense(x, plan))
            # and where every token is chosen although the layer routes: weight one, so nothing but rounding differs
            for layer in routed(model):
                layer.router.kept = 5
            torch.testing.assert_close(model.decoder(x, plan), dense(x, plan), rtol=1e-5, atol=1e-5)

    def test_routers_get_gradient_from_the_first_step(self, files):
        model = assemble(small(files), CPU)
        offline(model, as_batch(model.config, [(3, [])], torch.float32)).logsumexp(-1).sum().backward()
        routers = [p for name, p in model.named_parameters() if ".router." in name]
        assert routers and all(p.grad.abs().sum() > 0 for p in routers)
        assert all(change.lora_b.grad is not None and change.base.weight.grad is None for _, change in changes(model))

    def test_frozen_weights_in_bfloat16_trained_ones_in_float32(self, files):
        config = small(files)
        model = assemble(replace(config, train=replace(config.train, dtype="bfloat16")), CPU)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
            assert (name in model.lent) != parameter.requires_grad == (name in model.weights())


class TestRefusals:
    def test_the_scripts_say_one_sentence(self, files, trained, tmp_path, capsys):
        def no(*more, parts, data=True):
            refused(train_tiny.main, flags(files, tmp_path / "none", *more, data=data), capsys, *parts)
            assert not (tmp_path / "none").exists()

        no("--dim", "32", parts=["dim got 32", "the checkpoint has 24", "--dim"])
        no("--frame-tokens", "7x7", parts=["'7x7'", "1+7x7"])
        no("--frame-tokens", "1+9x9", parts=["grid 9", "4 patches"])
        no("--lora-rank", "25", parts=["--lora-rank got 25", "1 to"])
        no("--symbols", "user=moves_now", parts=["user symbol", "--symbols user=TEXT"])
        no("--symbols", "who=User", parts=["symbols got", "KIND=TEXT"])
        no("--symbols", "user=User user=where", parts=["symbols got", "once each"])
        no("--symbols", "user=where assistant=where", parts=["same token twice", "--symbols"])
        no("--max-words", "1", parts=["tokens after one frame, but --max-words is 1", "raise it"])
        no("--symbols", "user=moves", parts=["holds 'moves', a symbol of the stream", "--symbols"])
        no("--grid", "3", parts=["--frame-tokens 1+2x2", "--grid 3"])
        no("--noise", "0.5", parts=["--noise does nothing"])
        no("--vit-steps", "5", parts=["--vit-steps does nothing"])
        no("--train", "full", "--lora-rank", "4", parts=["--lora-rank does nothing"])
        no("--holdout", "0.5", parts=["--holdout does nothing"], data=False)
        no("--vit-lr", "0.1", "--features", "here", parts=["--features does nothing"])
        refused(train_tiny.main, ["--symbols", "eos=</s>", "--out", str(tmp_path / "none")], capsys, "--symbols does nothing")
        no("--batch-size", "2", "--accumulate", "3", parts=["2 clips", "3 parts", "--batch-size"])
        refused(train_tiny.main, ["--train", "lora", "--out", str(tmp_path / "none")], capsys, "--llm")
        refused(train_tiny.main, ["--llm", str(tmp_path), "--out", str(tmp_path / "none")], capsys, "config.json")
        refused(train_tiny.main, ["--fsdp", "--out", str(tmp_path / "none")], capsys, "--optimizer adamw")
        refused(train_tiny.main, ["--resume", "--out", str(trained), "--lora-rank", "5"], capsys, "lora_rank got 5", "has 4")
        refused(train_tiny.main, ["--resume", "--out", str(trained), "--preset", "paper"], capsys, "resume without it")
        refused(train_tiny.main, ["--preset", "paper", "--llm", str(files / "llm"), "--out", str(tmp_path / "none")], capsys, "expected both")
        refused(train_tiny.main, ["--resume", "--out", str(trained), "--batch-size", "2"], capsys, "has finished its 40 steps")
        (tmp_path / "file").write_text("")
        refused(train_tiny.main, ["--out", str(tmp_path / "file")], capsys, "which is a file")
        refused(stream_tiny.main, ["--checkpoint", str(trained), "--fps", "3"], capsys, "--video")
        refused(stream_tiny.main, ["--checkpoint", str(trained), "--video", str(tmp_path / "no.mp4"), "--device", "cpu"], capsys, "no.mp4")

    def test_conversations_that_do_not_fit(self, files, tmp_path, capsys):
        data = tmp_path / "streams.jsonl"
        shutil.copy(files / "videos" / "clip-0000.mp4", tmp_path / "a.mp4")
        (tmp_path / "b.mp4").write_text("no video")

        def no(video, time, text, *parts, tiny=False):
            turn = {"time": time, "role": "assistant", "content": text}
            data.write_text(json.dumps({"video": video, "conversation": [turn]}) + "\n")
            arguments = flags(files, tmp_path / "none", "--data", str(data), *(["--train", "full"] if tiny else []), data=False)
            refused(train_tiny.main, arguments[4:] if tiny else arguments, capsys, *parts)

        no("a.mp4", 99.0, "moves", "a.mp4", "99", "last frame")
        no("b.mp4", 0.0, "moves", "b.mp4")
        no("c.mp4", 0.0, "moves", "line 1", "c.mp4")
        no("a.mp4", 0.0, "", "line 1", "empty content")
        no("a.mp4", 0.0, "hippopotamus", "unknown word 'hippopotamus'", tiny=True)

    @pytest.mark.parametrize("times", [(0.0, 0.1, 0.2), (2.0, 2.6)])
    def test_what_is_said_after_one_frame_is_as_long_as_all_of_it(self, files, tmp_path, capsys, times):
        """Turns of one frame are joined, those beyond the last frame too: together they must not be too long."""
        shutil.copy(files / "videos" / "clip-0000.mp4", tmp_path / "a.mp4")
        turns = [{"time": time, "role": "assistant", "content": " ".join(["red"] * 10)} for time in times]
        (tmp_path / "streams.jsonl").write_text(json.dumps({"video": "a.mp4", "conversation": turns}) + "\n")
        arguments = flags(files, tmp_path / "run", "--data", str(tmp_path / "streams.jsonl"), "--max-words", "12", "--steps", "1", data=False)
        refused(train_tiny.main, arguments, capsys, f"{10 * len(times)} tokens after one frame, but --max-words is 12")
        arguments[arguments.index("--max-words") + 1] = "30"
        assert train_tiny.main(arguments) == 0

    @pytest.mark.parametrize("question", ["where is it ? Assistant nowhere </s> User", "</s>", "red <s>"])
    def test_a_question_cannot_speak_as_the_assistant(self, trained, files, capsys, question):
        video = str(files / "videos" / "clip-0003.mp4")
        refused(stream_tiny.main, ["--checkpoint", str(trained), "--video", video, "--ask", f"1s:{question}", "--device", "cpu"], capsys,
                "a symbol of the stream or a control token, expected plain words")

    def test_a_run_whose_checkpoint_has_gone(self, files, trained, tmp_path, capsys):
        run = shutil.copytree(trained, tmp_path / "run")
        text = (run / "config.json").read_text().replace(str(files / "llm"), str(tmp_path / "gone"))
        (run / "config.json").write_text(text)
        refused(stream_tiny.main, ["--checkpoint", str(run), "--device", "cpu"], capsys, "gone")

    def test_a_checkpoint_is_no_run_to_be_overwritten(self, files, tmp_path, capsys):
        llm = shutil.copytree(files / "llm", tmp_path / "llm")
        before = {path.name: path.read_bytes() for path in llm.iterdir()}
        for fate in ([], ["--overwrite"]):
            refused(train_tiny.main, ["--llm", str(llm), "--out", str(llm), *fate], capsys, "is not the configuration of a run")
        assert {path.name: path.read_bytes() for path in llm.iterdir()} == before

    @pytest.mark.parametrize("part, entry, words", [
        ("llm", {"rope_parameters": "x"}, "unexpected kind"), ("llm", {"layer_types": 5}, "unexpected kind"),
        ("llm", {"num_attention_heads": 3}, "heads 3 must be a multiple"), ("llm", {"eos_token_id": 99}, "eos_token_id is 99"),
        ("llm", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"), ("vision", {"hidden_size": "x"}, "vit_dim must be"),
        ("vision", {"image_size": 64}, "16 positions, but its config.json says 64 pixels"),
    ])
    def test_entries_of_a_wrong_kind(self, part, entry, words, files, tmp_path, capsys):
        (tmp_path / "features").mkdir()
        for name in ("llm", "vision", "videos"):
            shutil.copytree(files / name, tmp_path / name)
        path = tmp_path / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
        refused(train_tiny.main, flags(tmp_path, tmp_path / "run"), capsys, words)

    def test_a_shard_without_what_the_index_promises(self, files, tmp_path, capsys):
        made = write_checkpoint(tmp_path, LLM, 6, shards=2, words=[*SYMBOLS, *WORDS])
        first, second = sorted(tmp_path.glob("model-*.safetensors"))
        shutil.copy(first, second)
        assert len(made) > 4
        refused(stream_tiny.main, ["--llm", str(tmp_path), "--text", "red", "--device", "cpu"], capsys, "lacks the tensor", "index")

    def test_a_tokenizer_larger_than_the_embedding(self, files, tmp_path):
        shutil.copytree(files / "llm", tmp_path / "llm")
        config = small(files)
        wide = replace(config, model=replace(config.model, vocab_size=7), real=replace(config.real, llm=str(tmp_path / "llm")))
        with pytest.raises(UserError, match="vocab_size is 7"):
            read_words(wide)
        path = tmp_path / "llm" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=0).replace('"moves": ', '"moves": 10000'))  # few tokens, with large numbers
        with pytest.raises(UserError, match=r"has 10000\d+ tokens, but vocab_size is"):
            read_words(small(files, llm=str(tmp_path / "llm")))


def test_preset_paper_needs_no_weights(capsys, tmp_path):
    """Parameters are those of Llama-3-8B and SigLIP-L; the cache's bytes are a sum that can be done by hand."""
    assert train_tiny.main(["--preset", "paper", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for part in ("--llm", "--vision", "--data", "torchrun", "GiB per hour", "memory of training"):
        assert part in printed
    # 32 layers; 16 hold 50 tokens of a frame, 16 hold 10; 2 * 8 heads * 128 numbers of 2 bytes a token
    assert f"{16 * (50 + 10) * 2 * 8 * 128 * 2 / 2**20:.2f} MiB per frame" in printed
    assert f"{32 * 50 * 2 * 8 * 128 * 2 / 2**20:.2f} MiB per frame" in printed
    decoder = next(line for line in printed.splitlines() if line.startswith("  decoder  "))
    every, trained = (int(number.replace(",", "")) for number in decoder.split()[1:])
    routers, rank = 16 * 4096, 128
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # q, out; k, v; the three of SwiGLU
    adapters = rank * (32 * sides + 4096 + 128256)
    assert every == 8_030_261_248 + routers + adapters and trained == routers + adapters


def test_the_first_bytes_of_features_are_readable_alone(trained, files):
    """A piece is read without the rest of its video."""
    path = next((files / "features").iterdir())
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("features").get_shape() == [5, 5, 32]


def test_the_readme_commands_run_as_they_are_written(files, tmp_path, monkeypatch, capsys):
    """The section's commands, in order, in a folder where its names are those of the small files."""
    readme = (Path(__file__).parents[1] / "mod" / "real" / "README.md").read_text()
    section = readme.split("\n## Bring your own weights and videos")[1].split("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in section.split("```bash\n")[1].split("```")[0].splitlines()]
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(files / "llm")
    (tmp_path / "siglip").symlink_to(files / "vision")
    scripts = {"stream_tiny.py": stream_tiny.main, "train_tiny.py": train_tiny.main, "mod.real.make_streams": make_streams.main}
    for _, *words in commands:
        script, *arguments = words[words[0] == "-m" :]
        assert scripts[script](arguments) == 0, script
    printed = capsys.readouterr().out
    assert "user: where is it ?" in printed and "50/50" in printed and "memory of training" in printed
