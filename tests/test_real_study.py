"""The study of a real language model: what it measures has the right value, and all of it runs on a small model."""

import json
import math

import pytest
import torch

from mod.layout import TEXT
from mod.real.lora import changes
from mod.real.parts import assemble
from mod.real.tokenizer import TextTokenizer
from mod.study import real
from mod.study.pretrained import PARAGRAPH, distances, perplexities, perplexity
from tests.helpers import plan_of
from tests.test_chat import CHATML, small, write_chat_model
from tests.test_scripts import refused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("study") / "chatml", CHATML, 1, 2)


def test_perplexity_is_token_by_token(llm):
    model, words = assemble(small(llm), CPU), TextTokenizer(llm)
    ids, nats = words.prompt("It is nowhere."), 0.0
    for length in range(1, len(ids)):
        text = torch.tensor([ids[:length]])
        with torch.no_grad():
            logits = model.decoder.logits(model.decoder(model.decoder.embed(text), plan_of(model.config, torch.full(text.shape, TEXT))))
        nats -= logits[0, -1].log_softmax(-1)[ids[length]].item()
    assert math.isclose(perplexity(model.decoder, words, "It is nowhere."), math.exp(nats / (len(ids) - 1)), rel_tol=1e-4)


def test_adapters_off_is_the_checkpoint_and_merged_is_the_trained_model(llm):
    model, words = assemble(small(llm), CPU), TextTokenizer(llm)
    text = PARAGRAPH.read_text().strip()
    before = perplexity(model.decoder, words, text)
    for _, change in changes(model.decoder):
        torch.nn.init.normal_(change.lora_b, std=0.02)
    trained = perplexity(model.decoder, words, text)
    found = perplexities(model.decoder, words)
    assert found["off"] == before and trained != before
    assert math.isclose(found["merged"], trained, rel_tol=1e-3)
    assert perplexity(model.decoder, words, text) == trained, "left as it was"


def test_distances_are_shares_of_the_norm_by_kind():
    whole, kind = [torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])], torch.tensor([0, 1, 2])
    own = [whole[0] + torch.tensor([[0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])]
    assert distances(own, whole, kind) == {"text": [0.2], "vision": [0.5]}


def test_the_study_runs_and_goes_on_from_what_is_finished(llm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--llm", str(llm), "--quick", "--device", "cpu"]
    assert real.main([*flags, "--only", "full"]) == 0
    result = tmp_path / "runs" / "real-quick" / "real" / "full-0.json"
    held = result.read_text()
    assert str(tmp_path) not in held, "nothing of this machine"
    assert real.main([*flags, "--only", "full,mod-update,mod-narrowed"]) == 0 and result.read_text() == held
    data = json.loads((tmp_path / "runs" / "real-quick" / "real.json").read_text())
    assert set(data["values"]) == {"full", "mod-update", "mod-narrowed"} and set(data["values"]["full"]["quality"]) == {"0"}
    run = json.loads(held)
    assert data["values"]["full"]["quality"]["0"] == (run["narration_exact"] + run["question_accuracy"]) / 2
    assert data["costs"]["full"]["flops"] == 1 > data["costs"]["mod-update"]["flops"]
    dense_start, at_once = (data["costs"][name] for name in ("mod-narrowed", "mod-update"))
    assert dense_start["training flops"] == 1 > at_once["training flops"], "two steps are both dense"
    assert dense_start["flops"] == at_once["flops"] and "mod-narrowed" not in data["inside"]["distances"]
    assert {point["step"] for point in data["curves"]["full"]["0"]} == {1, 2}
    gaps = data["inside"]["distances"]
    assert len(gaps["mod-value"]["text"]) == 3 and gaps["mod-value"]["vision"][0] == 0 < gaps["mod-value"]["vision"][1]
    assert gaps["mod-value"] == gaps["mod-sigmoid-read"] != gaps["mod-update"], "a sigmoid gate begins at weight one"
    assert data["values"]["full"]["perplexity of text, adapters off"]["0"] == data["inside"]["text"]["checkpoint"]
    assert real.main([*flags, "--only", "random,uniform", "--minutes", "0.0001"]) == 0, "time is up when the first is done"
    assert (result.parent / "random-0.json").exists() != (result.parent / "uniform-0.json").exists()
    diverged = {"config": run["config"], "diverged": "the loss became nan", "curve": []}
    (result.parent / "mod-score-value-0.json").write_text(json.dumps(diverged))
    assert real.main([*flags, "--report"]) == 0, "a run that has diverged has a row, and no curve"
    data = json.loads((tmp_path / "runs" / "real-quick" / "real.json").read_text())
    assert set(data["values"]["mod-score-value"]["quality"].values()) == {None}
    other = json.loads(held)
    other["config"]["train"]["steps"] = 3
    result.write_text(json.dumps(other))
    refused(real.main, [*flags, "--only", "full"], capsys, "other settings than today's", "move it")


def test_mistakes_are_told(capsys):
    refused(real.main, [], capsys, "pass --llm")
    refused(real.main, ["--llm", "x", "--only", "mod-narrowed", "--steps", "50"], capsys, "narrows down until step 90")
    refused(real.main, ["--llm", "x", "--minutes", "-1"], capsys, "minutes must be at least 0")
    refused(real.main, ["--llm", "x", "--only", "fuller"], capsys, "expected names among", "mod-value")
