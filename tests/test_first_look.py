"""What layers look at while they learn: the attention that is measured is the one that is paid."""

import json
from dataclasses import replace

import pytest
import torch

from mod.data import COLOURS, SHAPES, clip_batch
from mod.layers import rotate
from mod.layout import Vocabulary, lay_out
from mod.related.crowd import NAME_WORDS
from mod.related.data import words_of
from mod.related.world import WORLD
from mod.study import first_look
from tests.test_scripts import refused

QUICK = replace(first_look.PRESET, train=replace(first_look.PRESET.train, batch_size=2, vit_steps=2, eval_clips=8))


def model_and_clips(layers: str):
    config = replace(QUICK, model=replace(QUICK.model, layers=layers))
    model, source = WORLD.build(config, torch.device("cpu"))
    return model.eval(), source.words, source.validation(3)


def test_who_is_asked_for_is_found_in_the_row_and_in_the_frame():
    _, words, clips = model_and_clips("none")
    for clip in clips:
        layout, found = lay_out(words, len(clip.frames), 26, clip.said), []
        for at, sprite in first_look.asked(words, clip, 26):
            frame = layout.frame[sprite]
            assert layout.frame[at] == -1 and frame == max(layout.frame[:at]), "the latest frame"
            patch = sprite - layout.frame.index(frame) - 1
            colour, shape, _, side, *_ = clip.patch_labels[frame][patch]
            name = words.words[layout.ids[at]]
            assert name == f"{list(COLOURS)[colour - 1]}-{SHAPES[shape - 1]}"
            found.append(f"{name} {words.words[layout.labels[at]]}")
        assert found == [say.text for say in clip.said if say.role == "assistant" and not say.text.startswith("moves")]


@pytest.mark.parametrize("layers", ["none", "1,3", "0,2", "all"])
def test_attention_is_that_of_whole_rows_under_a_mask(layers):
    """Computed a second time, without short rows: a skipped token is there, and nobody sees it."""
    model, words, clips = model_and_clips(layers)
    inputs, trace, batch = [], [], clip_batch(words, clips, model.config)
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in model.decoder.layers]
    with torch.no_grad():
        model.predict(batch, trace)
    for hook in hooks:
        hook.remove()
    kept, length, right = {one.layer: one.kept for one in trace}, batch.ids.shape[1], []
    turn = model.decoder.rope.turn(batch.plan.pos, model.config.head_dim)
    for number, (layer, x) in enumerate(zip(model.decoder.layers, inputs, strict=True)):
        block = getattr(layer, "block", layer)
        q, k = (rotate(norm(linear(block.norm1(x)).unflatten(-1, (-1, model.config.head_dim))).transpose(1, 2), turn)
                for linear, norm in ((block.attention.q, block.attention.q_norm), (block.attention.k, block.attention.k_norm)))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        there = torch.ones(len(clips) * length, dtype=torch.bool)
        if number in kept:
            there[batch.plan.vision.flatten()] = kept[number].flatten()
        sees = torch.ones(length, length, dtype=torch.bool).tril() & there.view(len(clips), 1, 1, length)
        weights = (q @ k.mT * model.config.head_dim**-0.5).where(sees, -torch.inf).softmax(-1)
        looks = [weights[row, :, word, sprite] for row, clip in enumerate(clips)
                 for word, sprite in first_look.asked(words, clip, 26)]
        right.append(torch.stack(looks).mean(0).max().item())
    assert first_look.attention_to_the_asked(model, words, clips) == pytest.approx(right, rel=1e-4)


def test_runs_are_trained_once_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_look, "PRESET", QUICK)
    refused(first_look.main, ["--report", "--seeds", "1"], capsys, "no finished run in results/first_look; train first")
    short = ["--seeds", "1", "--steps", "2", "--every", "1"]
    assert first_look.main(short) == 0 and "steps to 0.9" in capsys.readouterr().out
    results = tmp_path / "runs/first_look-2/results"
    data = json.loads(results.with_suffix(".json").read_text())
    assert set(data["curves"]) == set(first_look.VARIANTS) and results.with_suffix(".png").stat().st_size > 10_000
    for found in data["curves"].values():
        assert [point["step"] for point in found["0"]] == [1, 2] and len(found["0"][0]["attention"]) == 4
    monkeypatch.setattr(first_look, "train", None)  # nothing is trained again
    assert first_look.main(short) == 0 and first_look.main([*short, "--report"]) == 0
    refused(first_look.main, ["--every", "0"], capsys, "every must be at least 1, got 0")


def test_names_are_words_that_the_stream_knows():
    words = Vocabulary(words_of(QUICK.data))
    assert all(name in words.ids for name in NAME_WORDS)
