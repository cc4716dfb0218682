"""The diagrams: 800 pixels wide, readable there, no label over another; what they say is what the package does."""

import re

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mod.study import diagrams
from mod.study.diagrams import DIAGRAMS, GATES, NARRATION, PIXELS, TALK, short_stream, toy
from tests.notebooks import ROOT

FOLDER = ROOT / "results/diagrams"
each_diagram = pytest.mark.parametrize("name", DIAGRAMS)


@each_diagram
def test_a_diagram_is_readable_at_its_width(name):
    figure = DIAGRAMS[name].figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    wide, high = canvas.get_width_height()
    assert wide == PIXELS and high <= PIXELS
    texts = [text for text in figure.axes[0].texts if text.get_text().strip()]
    assert len(texts) > 5 and min(text.get_fontsize() for text in texts) * figure.dpi / 72 >= 11, "pixels, of a letter"
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    for number, (text, place) in enumerate(boxes):
        assert place.x0 >= 0 and place.y0 >= 0 and place.x1 <= wide and place.y1 <= high, f"{text!r} leaves the page"
        for other, there in boxes[number + 1 :]:
            assert not place.overlaps(there), f"{text!r} lies over {other!r}"


@each_diagram
def test_the_file_is_this_picture(name, tmp_path):
    """Same size, same alternative text as the code draws now; drawn again, the same file."""
    diagram, text = DIAGRAMS[name], (FOLDER / f"{name}.svg").read_text()
    assert len(diagram.alt.split()) >= 15
    diagrams.save_diagram(diagram, tmp_path / "1.svg")
    with matplotlib.rc_context({"font.size": 20, "axes.prop_cycle": matplotlib.cycler(linestyle=[":", "-."])}):  # a notebook's
        diagrams.save_diagram(diagram, tmp_path / "2.svg")
    now = (tmp_path / "1.svg").read_text()
    assert now == (tmp_path / "2.svg").read_text() and [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    for part in (r'viewBox="([^"]*)"', r"<title>([^<]*)</title>"):
        assert re.search(part, now).group(1) == re.search(part, text).group(1), "python -m mod.study.diagrams"
    assert len(text) < 250_000


def test_every_diagram_is_shown_and_no_other_file_lies_there():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(DIAGRAMS)
    pages = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "mod").glob("*/README.md"), ROOT / "results/README.md"))
    assert all(f"diagrams/{name}.svg" in pages for name in DIAGRAMS)


def test_masks_are_those_of_the_layers():
    model = toy(seed=2)
    stream = short_stream(model, 2, NARRATION)
    count = len(stream.frame)
    kept = diagrams.kept_places(model, stream)
    for layer in range(4):
        reads, through = diagrams.who_reads_whom(model, stream, layer)
        here = torch.tensor([place in kept[layer] for place in range(count)])
        assert through == here.tolist() and len(kept[layer]) == count - 6 * (layer % 2)
        assert torch.equal(reads, torch.ones(count, count).tril().bool() & here & here[:, None])


@pytest.mark.parametrize("gate", GATES)
def test_only_an_update_gate_teaches_the_last_router_nothing(gate):
    inner, last = diagrams.router_gradients(gate)
    assert inner > 0.005 and (last == 0 if gate.endswith("update") else last > 0.005)


def test_the_cache_grows_as_the_formula_says():
    model = toy(seed=2)
    stream = short_stream(model)
    grown, offline = diagrams.cache_entries(model, stream), diagrams.kept_places(model, stream)
    assert grown[-1] == offline, "the entries are the tokens that the offline pass computes on"
    for number, layers in enumerate(grown):
        text = sum(at < 0 for at in stream.frame[: max(layers[0]) + 1])
        assert [len(layer) for layer in layers] == [count * (number + 1) + text for count in model.config.keep_counts]
    assert len(TALK) == len(grown) == 3


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    assert diagrams.main(["--out", str(tmp_path / "new")]) == 0
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(DIAGRAMS)
    assert "wrote model, routed" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert diagrams.main(["--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
