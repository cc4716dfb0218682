"""Chapter 10: your own weights and videos."""

import tempfile
from pathlib import Path

import torch

from mod.config import UserError
from mod.real.streams import read_streams
from mod.router import Router

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "10.1",
    (
        """def line(video, said):
    import json
    return json.dumps({"video": video, "conversation": [{"time": f, "role": r, "content": t} for f, r, t in said]})""",
        "a number of frames",
    ),
    (
        """def line(video, said):
    import json
    return json.dumps({"video": video, "conversation": [{"time": f / 2, "role": r, "text": t} for f, r, t in said]})""",
        "content",
    ),
    (
        """def line(video, said):
    import json
    turns = [{"time": f / 2, "role": r, "content": t} for f, r, t in said]
    return json.dumps({"video": video, "conversation": turns}, indent=1)""",
        "several lines",
    ),
    (
        """def line(video, said):
    turns = [{"time": f / 2, "role": r, "content": t} for f, r, t in said]
    return {"video": video, "conversation": turns}""",
        "json.dumps",
    ),
    (
        """def line(video, said):
    turns = [{"time": f / 2, "role": r, "content": t} for f, r, t in said]
    return str({"video": video, "conversation": turns})""",
        "no JSON",
    ),
)
def line(answer) -> str:
    said = [(0, "assistant", "red disc appears top"), (3, "user", 'where is "it" ?'), (3, "assistant", "now left")]
    got = something(answer("a.mp4", list(said)), "line(...)")
    if not isinstance(got, str):
        raise Wrong(f"It gives a {type(got).__name__}, expected a string: json.dumps writes one.")
    if "\n" in got.strip():
        raise Wrong("The JSON is spread over several lines; in streams.jsonl a line is a whole video.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.mp4").touch()
        file = Path(folder) / "streams.jsonl"
        file.write_text(got + "\n", encoding="utf-8")
        try:
            [conversation] = read_streams(file)
        except UserError as error:
            raise Wrong("The package refuses it: " + str(error).replace(folder + "/", "")) from None
    turns = [(turn.time, turn.role, turn.content) for turn in conversation.turns]
    if [turn[0] for turn in turns] == [frame for frame, _, _ in said]:
        raise Wrong("The time is a number of frames, expected seconds: frame 3, at two frames a second, is shown at 1.5 s.")
    same(turns, [(frame / 2, role, text) for frame, role, text in said], "what the package reads from your line")
    return "Right: the package reads back who says what, and when."


@exercise(
    "10.2",
    ("def merged(weight, a, b, alpha):\n    return weight + b @ a", "alpha / rank"),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha * b @ a", "divided by the rank"),
    ("def merged(weight, a, b, alpha):\n    return alpha / len(a) * b @ a", "The weight itself"),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha / b.shape[0] * b @ a", "rows of a"),
    (
        "def merged(weight, a, b, alpha):\n    weight += alpha / len(a) * b @ a\n    return weight",
        "changed the weight",
    ),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha / len(a) * a @ b", "It stops with"),
)
def merged(answer) -> str:
    weight, a, b, alpha = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3), 6.0
    given = weight.clone()
    got = something(answer(given, a, b, alpha), "merged(...)")
    if not torch.equal(given, weight):
        raise Wrong("It changed the weight that it was given, which may be shared; return a new one.")
    hints = {
        "The scale is missing: the change is alpha / rank times b @ a.": weight + b @ a,
        "alpha is not yet divided by the rank.": weight + alpha * b @ a,
        "The weight itself is missing: return it together with its change.": alpha / 3 * b @ a,
        "Divided by another size than the rank: that is the number of rows of a (and of columns of b).":
            weight + alpha / 5 * b @ a,
    }  # fmt: skip
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, weight + alpha / 3 * b @ a, "merged(...)")
    x = torch.randn(4, 7)
    same(x @ got.T, x @ weight.T + alpha / 3 * (x @ a.T) @ b.T, "what the merged matrix does to a vector")
    return "Right: one matrix does what three did."


@exercise(
    "10.3",
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n"
        "        return (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1)",
        "twice as long",
    ),
    (
        """class Mine(Router):
    def score(self, tokens, pos):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        return (unit @ unit.transpose(1, 2)).mean(-1)""",
        "turn the sign",
    ),
    (
        """class Mine(Router):
    def score(self, tokens, pos):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        return -(unit * unit.mean((0, 1))).sum(-1)""",
        "other frames",
    ),
    (
        """class Mine(Router):
    def score(self, tokens, pos):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        return -(unit @ unit.transpose(1, 2)).mean(-1, keepdim=True)""",
        "shape",
    ),
    ("class Mine:\n    def score(self, tokens, pos):\n        return tokens.sum(-1)", "subclass of Router"),
    ("class Mine(Router):\n    def score(self, tokens, pos):\n        return torch.rand(tokens.shape[:2])", "second time"),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n"
        "        return torch.nn.functional.normalize(tokens, dim=-1)[..., 0]",
        "odd tokens",
    ),
)
def own_router(answer) -> str:
    if not (isinstance(answer, type) and issubclass(answer, Router)):
        raise Wrong(f"Mine is {answer!r}, expected a subclass of Router: class Mine(Router).")
    frames, number, width, odd = 6, 26, 16, 3
    background = torch.randn(frames, 1, width)  # each frame has a background of its own
    tokens = background + 0.15 * torch.randn(frames, number, width)
    places = torch.stack([torch.randperm(number)[:odd] for _ in range(frames)])
    rows = torch.arange(frames)[:, None]
    strange = torch.randn(frames, odd, width)
    strange -= (strange * background).sum(-1, keepdim=True) / (background**2).sum(-1, keepdim=True) * background
    tokens[rows, places] = strange / strange.norm(dim=-1, keepdim=True) * background.norm(dim=-1, keepdim=True)
    pos = torch.arange(frames * number).reshape(frames, number)
    router = answer(width, number, 0.2, 1)
    with torch.no_grad():
        scores = something(router.score(tokens, pos), "score(...)")
        if not isinstance(scores, torch.Tensor) or scores.shape != (frames, number):
            raise Wrong(f"score(...) has shape {tuple(getattr(scores, 'shape', ()))}, expected (F, N) = {(frames, number)}.")
        if not torch.equal(scores, router.score(tokens, pos)):
            raise Wrong("Asked a second time it gives other scores; a stream would choose other tokens than training did.")
        changed = tokens.clone()
        changed[3:] = torch.randn(3, number, width)
        if not torch.allclose(router.score(changed, pos)[:3], scores[:3], atol=1e-5):
            raise Wrong("The scores of frames 0 to 2 change when frames 3 to 5 do: it looks at other frames.")
        kept = torch.zeros(frames, number, dtype=torch.bool).scatter(1, scores.topk(router.kept, dim=1).indices, True)
        found = int(kept[rows, places].sum())
        least = torch.zeros_like(kept).scatter(1, (-scores).topk(router.kept, dim=1).indices, True)
        if found < frames * odd / 2 and int(least[rows, places].sum()) > frames * odd / 2:
            raise Wrong("It keeps the tokens most like all others and drops what stands out: turn the sign of the score.")
        if found < 0.9 * frames * odd:
            raise Wrong(f"It keeps {found} of {frames * odd} odd tokens, of which each frame has {odd}; by lot it would be a quarter.")
        longer = tokens.clone()
        at = int((~kept[0]).nonzero()[0])  # a background token
        longer[0, at] *= 2
        if not torch.allclose(router.score(longer, pos)[0, at], scores[0, at], atol=1e-4):
            raise Wrong("A background token that is twice as long gets another score; compare directions, not lengths.")
    return f"Right: all frames alone, the same each time, and {found} of {frames * odd} odd tokens kept."
