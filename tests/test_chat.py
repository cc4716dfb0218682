"""A language model in its own chat format: turns of several tokens are laid out, streamed and rated alike, in whole
sentences, from the preset's flags to a stream that answers. The models are random and small; their tokenizers are
trained here."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import stream_tiny
import train_tiny
from mod.config import UserError
from mod.data import COLOURS, HEIGHTS, SHAPES, SIDES, synthetic
from mod.evaluate import free_running, teacher_forced
from mod.layout import NO_LABEL, TEXT, Say, assistant_ids, collate, lay_out, user_ids
from mod.real.align import align, label_vectors, targets
from mod.real.llm import load_llm, read_llm_config
from mod.real.parts import assemble
from mod.real.sentences import in_sentences, sentence
from mod.real.tokenizer import TextTokenizer
from mod.real.world import WORLD, build
from mod.stream import Stream
from tests.helpers import plan_of, streaming_of
from tests.test_llm import SIZES, tensors
from tests.test_scripts import refused

CHATML, LLAMA3 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NAMES = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
CLOSED = [f"{name} {verb} {height}" for name, verb, height in product(NAMES, ("appears", "moves"), HEIGHTS)]
CLOSED += [f"{name} turns {colour}" for name, colour in product(NAMES, COLOURS)] + [f"{name} leaves" for name in NAMES]
CLOSED += [f"{when} {side}" for when, side in product(("now", "first"), SIDES)]
CLOSED += ["nowhere", "where is it ?", "where did it appear ?"]
CLOSED += [text for name in NAMES for text in (f"where is the {name} ?", f"where did the {name} appear ?")]
CPU = torch.device("cpu")


def write_chat_model(folder, symbols, bos: int, eos: int):
    """A random Llama with a byte-level tokenizer that knows a chat format's symbols; "assistant" is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=symbols, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(map(sentence, CLOSED), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": True, "head_dim": 8}
    size = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({**SIZES, "vocab_size": size, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos}))
    save_file(tensors(config, 8, range(size)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def llm(request, tmp_path_factory):
    symbols, bos, eos = (CHATML, 1, 2) if request.param == "chatml" else (LLAMA3, 0, 3)
    return write_chat_model(tmp_path_factory.mktemp("chat") / request.param, symbols, bos, eos)


def small(llm, **train):
    """The preset on a small model, without warm-ups."""
    base = WORLD.presets["llm"]
    train = replace(base.train, device="cpu", vit_steps=0, **train)
    config = replace(base, real=replace(base.real, llm=str(llm), align_steps=0), train=train)
    return WORLD.settle(config, {"device"})


def test_no_two_texts_become_the_same_sentence():
    assert len(set(map(sentence, CLOSED))) == len(CLOSED)
    assert sentence("red disc appears top") == "A red disc appears at the top."
    assert sentence("cyan cross moves upper") == "The cyan cross moves to the upper part."
    assert sentence("where did the pink square appear ?") == "Where did the pink square appear?"
    assert [sentence(text) for text in ("now far-left", "first centre")] == ["It is on the far left.", "It appeared in the centre."]
    with pytest.raises(ValueError, match="expected a text of the synthetic stream"):
        sentence("red disc sings")


def test_clips_in_sentences_are_the_same_clips(llm):
    _, source = build(small(llm), CPU)
    plain = synthetic(replace(small(llm), model=replace(WORLD.presets["llm"].model)))
    for clip, closed in zip(source.validation(6), plain.validation(6), strict=True):
        assert (clip.frames == closed.frames).all() and [s.frame for s in clip.said] == [s.frame for s in closed.said]
        assert [s.text for s in clip.said] == [sentence(s.text) for s in closed.said]
        assert clip.said == in_sentences(closed).said and len(clip.truth) == len(closed.truth)
        for say, reply in zip(clip.said, clip.said[1:], strict=False):
            if say.role == "user":
                assert clip.truth[say.frame][say.text] == reply.text
    live = next(iter(source.live(0)))
    assert "Where is it?" in live.truth[0]


def test_turns_are_the_chat_format(llm):
    words = TextTokenizer(llm)
    if llm.name == "chatml":
        text = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nIt is on the left.<|im_end|>\n"
        assert (words.bos, words.eos, words.user, words.assistant) == (1, 2, 1, 1)
    else:
        head = "<|start_header_id|>{}<|end_header_id|>\n\n"
        text = f"{head.format('user')}Where is it?<|eot_id|>{head.format('assistant')}It is on the left.<|eot_id|>"
        assert (words.bos, words.eos, words.user, words.assistant) == (0, 3, 1, 1)
    assert len(words.opening["assistant"]) > 3, "the tokenizer has no token of its own for the role"
    assert user_ids(words, "Where is it?") + assistant_ids(words, "It is on the left.") == words._ids(text)


def test_the_opening_is_no_choice_but_its_first_token(llm):
    """What is labelled: the decision after a frame, that an answer follows a question, words, and the end of a turn."""
    words = TextTokenizer(llm)
    said = [Say(0, "assistant", "It is nowhere."), Say(1, "user", "Where is it?"), Say(1, "assistant", "It is nowhere.")]
    layout = lay_out(words, 3, 2, said)
    reply = [*words.encode("It is nowhere."), words.eos]
    expected = [words.assistant, *reply, words.assistant, *reply, words.eos]
    assert [label for label in layout.labels if label != NO_LABEL] == expected
    assert [label for label, speaks in zip(layout.labels, streaming_of(layout), strict=True) if speaks] == [words.assistant, words.eos]
    for at, label in enumerate(layout.labels):
        follows = [token for token, frame in zip(layout.ids[at + 1 :], layout.frame[at + 1 :], strict=True) if frame == TEXT]
        if label not in (NO_LABEL, words.eos) or (label == words.eos and layout.frame[at] == TEXT):
            assert follows[0] == label, "every label is the text token that follows"


@pytest.fixture(scope="module")
def model(llm):
    config = small(llm)
    torch.manual_seed(3)
    made = assemble(config, CPU).double().eval()
    for name, parameter in made.named_parameters():  # as if trained: adapters and routers do something
        if "lora_b" in name or ".router." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made, TextTokenizer(llm), config


class Numbered(TextTokenizer):
    """Responses as the numbers of their tokens: random ones, decoded and encoded again, are not always the same."""

    def decode(self, ids):
        return "# " + " ".join(map(str, ids))

    def encode(self, text):
        return [int(number) for number in text.split()[1:]] if text.startswith("# ") else super().encode(text)


def offline_logits(model, words, clip_frames, said):
    layout = lay_out(words, len(clip_frames), model.config.frame_tokens, said)
    batch = collate([layout], clip_frames, model.config.frame_tokens, model.config.keep_counts)
    with torch.inference_mode():
        return layout, model.predict(batch)


def test_a_stream_is_what_its_transcript_computes_offline(model):
    """Two rows narrate and answer; then each row's transcript, laid out for training, makes every one of its choices."""
    model, words = model[0], Numbered(model[1].folder)
    rows, generator = 2, torch.Generator().manual_seed(0)
    side = model.config.image_size
    pixels = torch.rand(rows, 3, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    stream = Stream(model, words, rows, threshold=1.0, max_words=5)  # it always speaks
    said, limit = [[] for _ in range(rows)], 5
    for t in range(3):
        for row, reply in enumerate(stream.narrate(pixels[:, t])):
            said[row].append(("assistant", t, reply))
        asked = ["Where is it?" if t == row else None for row in range(rows)]
        rated = stream.score(["It is nowhere." if question else None for question in asked])
        assert [scores is not None for scores in rated] == [question is not None for question in asked]
        for row, reply in enumerate(stream.ask(asked)):
            if asked[row]:
                said[row] += [("user", t, asked[row]), ("assistant", t, reply)]
    for row in range(rows):
        layout, logits = offline_logits(model, words, pixels[row], [Say(t, role, text) for role, t, text in said[row]])
        assert stream.position[row] == len(layout.ids), "the stream fed what training would"
        labels = [label for label in layout.labels if label != NO_LABEL]
        text = [not speaks for label, speaks in zip(layout.labels, streaming_of(layout), strict=True) if label != NO_LABEL]
        chosen = logits.masked_fill(stream.never, -torch.inf).argmax(-1).tolist()
        run = 0
        for own, label, is_text in zip(chosen, labels, text, strict=True):
            if not is_text or label == words.assistant:
                run = 0  # a decision, or the end of a question
                continue
            assert own == label or (label == words.eos and run == limit), "cut where it was too long"
            run += 1


def test_scores_are_those_of_the_whole_stream(model):
    """What `score` says of a response after a question, against the offline pass in which it was said."""
    model, words, _ = model
    side, reply = model.config.image_size, "It is on the far left."
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    stream = Stream(model, words)
    stream.see(pixels[:1])
    stream.respond([False])
    stream.see(pixels[1:])
    stream.hear(["Where is it?"])
    [scores] = stream.score([reply])
    _, logits = offline_logits(model, words, pixels, [Say(1, "user", "Where is it?"), Say(1, "assistant", reply)])
    n = len(words.encode(reply)) + 1
    torch.testing.assert_close(scores, logits[-n:].float().log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_both_ways_of_measuring_work_in_sentences(model, llm):
    model, words, config = model
    _, source = build(config, CPU)
    clips = [replace(clip, frames=torch.from_numpy(clip.frames).double()) for clip in source.validation(3)]
    turns, _ = teacher_forced(model, words, clips)
    free, _ = free_running(model, words, clips, max_words=6)
    for some, clip in zip(turns, clips, strict=True):
        replies = [say.text for say in clip.said if say.role == "assistant"]
        assert [len(turn.right) for turn in some] == [len(words.encode(text)) + 1 for text in replies]
    assert sum(map(len, turns)) == sum(map(len, free)) > 3


def test_text_alone_is_the_checkpoints_at_step_0(llm):
    """With the preset's routers and low-rank changes in place, before training: the same logits, bit for bit."""
    config = small(llm)
    made, words = assemble(config, CPU), TextTokenizer(llm)
    dense = load_llm(llm, replace(read_llm_config(llm, config.model), layers="none"))
    ids = torch.tensor([user_ids(words, "Where is it?") + assistant_ids(words, "It is nowhere.")])
    plan = plan_of(config.model, torch.full(ids.shape, TEXT))
    with torch.no_grad():
        ours, theirs = (d.logits(d(d.embed(ids), plan)) for d in (made.decoder, dense))
    assert torch.equal(ours, theirs)


def test_the_connector_begins_as_the_words_for_what_is_seen(llm):
    """What its tokens should be is the sum of the words' embeddings; training it comes nearer, and moves nothing else."""
    config = small(llm)
    made, source = build(config, CPU)
    embedding, words = made.decoder.embed.weight.detach(), source.words
    labels = torch.zeros(1, 49, 5, dtype=torch.long)
    labels[0, 8] = torch.tensor([1, 2, 1, 1, 0])  # a red disc at the top, on the far left
    labels[0, 30, 4] = 1

    def mean(text):
        return embedding[words.encode(text)].mean(0)

    wanted = targets(labels, label_vectors(words, embedding), 7)
    sprite = mean(" red") + mean(" disc") + mean(" top") + mean(" far left")
    torch.testing.assert_close(wanted[0, 9], sprite)
    torch.testing.assert_close(wanted[0, 31], mean(" nothing") + mean(" moves"))
    torch.testing.assert_close(wanted[0, 0], sprite + mean(" moves"))
    assert wanted.shape == (1, 50, 24) and torch.equal(wanted[0, 1], mean(" nothing"))
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    assert align(made, source, 30) < 0.9 * align(build(config, CPU)[0], source, 1)
    moved = {name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("connector.")}


def test_the_preset_runs_end_to_end(llm, tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = ["--preset", "llm", "--llm", str(llm), "--out", out, "--steps", "2", "--vit-steps", "1", "--align-steps",
             "1", "--batch-size", "2", "--eval-every", "0", "--eval-clips", "2", "--device", "cpu"]
    assert train_tiny.main(flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= metrics["free_running"]["silence_accuracy"] <= 1 and metrics["flop_ratio"] < 0.8
    capsys.readouterr()
    stream = ["--checkpoint", out, "--frames", "3", "--ask", "1:Where is it?", "--device", "cpu"]
    assert stream_tiny.main([*stream, "--threshold", "1"]) == 0
    printed = capsys.readouterr().out
    assert "user: Where is it?" in printed and "narrations" in printed and "appears" in printed
    assert train_tiny.main(["--resume", "--out", out, "--steps", "3"]) == 0


def test_what_cannot_be_written_is_refused_in_one_sentence(tmp_path, capsys):
    folder = write_chat_model(tmp_path / "chatml", CHATML, 1, 2)
    text = (folder / "tokenizer.json").read_text()
    parts = json.loads(text)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    run = ["--preset", "llm", "--llm", str(folder), "--out", str(tmp_path / "none")]
    refused(train_tiny.main, run, capsys, "<|im_start|> and <|im_end|> as tokens of their own", "--symbols")
    (folder / "tokenizer.json").write_text(text)
    refused(train_tiny.main, [*run, "--symbols", "user=assistant"], capsys, "the user symbol 'assistant' is", "--symbols")
    refused(train_tiny.main, ["--preset", "llm", "--out", str(tmp_path / "none")], capsys, "sentences need a language model", "--llm")
    with pytest.raises(UserError, match="another opening than the user's"):
        words = Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1, "<unk>": 2}, unk_token="<unk>"))
        words.add_special_tokens(CHATML[1:])
        words.save(str(folder / "tokenizer.json"))
        TextTokenizer(folder)
    assert not (tmp_path / "none").exists()
