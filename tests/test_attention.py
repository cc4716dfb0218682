"""Whom layers and heads look at: the attention that is measured is the one that is paid."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from mod.data import COLOURS, SHAPES, clip_batch
from mod.layers import rotate
from mod.layout import Vocabulary, lay_out
from mod.related.crowd import BADGE_LABEL, NAME_WORDS
from mod.related.data import words_of
from mod.related.world import WORLD
from mod.run import write_tensors
from mod.study import crowd, first_look, heads
from mod.study.attention import asked, followed, shares
from mod.study.sweep import configure, quick
from tests.test_scripts import refused

QUICK = replace(first_look.PRESET, train=replace(first_look.PRESET.train, batch_size=2, vit_steps=2, eval_clips=8))


def model_and_clips(layers: str):
    """Answers of one look and of two."""
    config = replace(QUICK, model=replace(QUICK.model, layers=layers), data=replace(QUICK.data, looks=0.5))
    model, source = WORLD.build(config, torch.device("cpu"))
    return model.eval(), source.words, source.validation(3)


@pytest.mark.parametrize(("looks", "opening"), [(asked, ""), (followed, "leader of ")])
def test_who_is_looked_for_is_found_in_the_row_and_in_the_frame(looks, opening):
    """Against the words of the conversation and what the patches show: the answer is the side of the last look."""
    _, words, clips = model_and_clips("none")
    for clip in clips:
        layout, found = lay_out(words, len(clip.frames), 26, clip.said), []

        def sprite(position, layout=layout, clip=clip):
            frame = layout.frame[position]
            return clip.patch_labels[frame][position - layout.frame.index(frame) - 1]

        for at, groups in looks(words, clip, 26):
            named, *others = groups
            assert layout.frame[at] == -1 and len(named) == 1
            assert {layout.frame[place] for group in groups for place in group} == {max(layout.frame[:at])}, "the latest frame"
            colour, shape, *_ = mine = sprite(named[0])
            name = words.words[layout.ids[at]]
            assert name == f"{list(COLOURS)[colour - 1]}-{SHAPES[shape - 1]}"
            side = mine[3]
            if others:
                [[leader], alike, rest] = others
                assert sprite(leader)[:2].tolist() == [mine[BADGE_LABEL], shape]
                assert all(sprite(place)[1] == shape for place in alike) and all(sprite(place)[1] != shape for place in rest)
                assert sum(map(len, groups)) == 10 == len(set(np.concatenate(groups)))
                side = sprite(leader)[3]
            found.append((f"{opening}{name} {words.words[layout.labels[at]]}", side))
        said = [say.text for say in clip.said if say.role == "assistant" and not say.text.startswith("moves")]
        assert [text for text, _ in found] == [text for text in said if text.startswith("leader") == bool(opening)]
        sides = {}
        assert all(sides.setdefault(side, text.split()[-1]) == text.split()[-1] for text, side in found)


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
        looks = [[weights[row, :, word, group].sum(-1) for group in groups] for row, clip in enumerate(clips)
                 for word, groups in followed(words, clip, 26)]
        right.append(torch.stack([torch.stack(one) for one in looks]).mean(0))
    assert torch.allclose(shares(model, words, clips, followed), torch.stack(right), rtol=1e-4)


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
    monkeypatch.setattr(first_look, "train_and_look", None)  # nothing is trained again
    assert first_look.main(short) == 0 and first_look.main([*short, "--report"]) == 0
    refused(first_look.main, ["--every", "0"], capsys, "every must be at least 1, got 0")


def test_names_are_words_that_the_stream_knows():
    words = Vocabulary(words_of(QUICK.data))
    assert all(name in words.ids for name in NAME_WORDS)


def test_heads_of_finished_runs_are_told_and_drawn(tmp_path, capsys):
    config = configure(quick(crowd.BASE), crowd.VARIANTS["skip"], 0)
    model, source = WORLD.build(config, torch.device("cpu"))
    (tmp_path / "skip-4").mkdir()
    write_tensors(tmp_path / "skip-4" / "model.safetensors", {name: p.detach() for name, p in model.weights().items()})
    result = {"config": {"world": config.world} | asdict(config), "routers": "", "kinds": {"leader": 0.5}}
    (tmp_path / "skip-4.json").write_text(json.dumps(result))
    flags = ["--runs", str(tmp_path), "--results", str(tmp_path), "--out", str(tmp_path / "heads"), "--clips", "2"]
    assert heads.main([*flags, "--only", "skip"]) == 0 and (tmp_path / "heads.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "heads.json").read_text())["heads"]["skip"]["4"]
    right = shares(model.eval(), source.words, source.validation(2), followed)
    assert torch.allclose(torch.tensor(found["attention"]), right) and right[[0, 2, 3]].count_nonzero() == 0
    layer, head = heads.most(found["attention"], 1)
    assert layer == 1 and right[1, 1, head] == right[:, 1].max()
    assert f"| `skip`, seed 4 | 0.500 | {right[:, 0].max():.2f} (layer 1) | {right[1, 1, head]:.2f} (layer 1) |" in (
        tmp_path / "heads.md").read_text()
    refused(heads.main, [*flags, "--only", "exit"], capsys, "no finished run of exit in")
    refused(heads.main, ["--only", "nobody"], capsys, "only got 'nobody', expected names among full")
    refused(heads.main, ["--clips", "0"], capsys, "clips must be at least 1, got 0")
