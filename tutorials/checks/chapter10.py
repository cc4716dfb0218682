"""Chapter 10: your own weights and videos."""

import math
import tempfile
from pathlib import Path

import torch

from mod.config import UserError
from mod.real.streams import read_streams
from mod.router import Router

from . import Wrong, exercise, instead, looks_like, same, something

_LINE = """def line(video, events, fps):
    import json, math
    turns = [{"time": math.ceil(s * fps - 1e-9) / fps, "role": "assistant", "content": t} for s, t in events]
    return json.dumps({"video": video, "conversation": turns})"""


@exercise(
    "10.1",
    (_LINE.replace("math.ceil(s * fps - 1e-9) / fps", "s"), "before anything is to be seen"),
    (_LINE.replace("math.ceil(s * fps - 1e-9) / fps", "math.floor(s * fps) / fps"), "before anything is to be seen"),
    (_LINE.replace("math.ceil(s * fps - 1e-9) / fps", "round(s * fps) / fps"), "before anything is to be seen"),
    (_LINE.replace("math.ceil(s * fps - 1e-9) / fps", "math.ceil(s * fps - 1e-9)"), "a number of frames"),
    (_LINE.replace("math.ceil(s * fps - 1e-9)", "(math.floor(s * fps) + 1)"), "later than needed"),
    (_LINE.replace(" - 1e-9", ""), "55.00000000000001"),
    (_LINE.replace('"content": t', '"text": t'), "content"),
    (_LINE.replace('"assistant"', '"user"'), "assistant"),
    (_LINE.replace("turns})", "turns}, indent=1)"), "several lines"),
    (_LINE.replace("json.dumps(", "("), "json.dumps"),
    (_LINE.replace("json.dumps(", "str("), "no JSON"),
)
def line(answer) -> str:
    for fps, events in ((2.0, [(0.7, "red disc appears top"), (1.0, 'a "sign" lights up'), (1.2, "red disc leaves")]), (5.0, [(0.6, "it moves"), (0.61, "it stops")]), (25.0, [(2.2, "it stops")])):
        got = something(answer("a.mp4", list(events), fps), "line(...)")
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
        turns = conversation.turns
        if len(turns) != len(events):
            raise Wrong(f"Your line holds {len(turns)} turns, expected {len(events)}, one for each event.")
        for turn, (second, text) in zip(turns, events, strict=True):
            frame = math.ceil(second * fps - 1e-9)
            if turn.role != "assistant":
                raise Wrong(f"{text!r} is said by {turn.role!r}; narrations are the assistant's.")
            if fps != 1 and abs(turn.time - frame) < 1e-6 < abs(turn.time - frame / fps):
                raise Wrong(f"The time of {text!r} is {turn.time:g}, a number of frames; expected seconds: picture {frame}, at {fps:g} a second, is shown at {frame / fps:g} s.")
            if math.floor(turn.time * fps + 1e-9) < frame:
                raise Wrong(f"{text!r} happens at {second:g} s and is said at {turn.time:g} s: the picture last looked at then is older, so that would be before anything is to be seen.")
            if turn.time > frame / fps + 1e-6 and fps == 25:
                raise Wrong("2.2 s at 25 pictures a second is picture 55, but 2.2 * 25 is 55.00000000000001 in floating point: subtract a tiny amount before you round up.")
            if turn.time > frame / fps + 1e-6:
                raise Wrong(f"{text!r} happens at {second:g} s and is said at {turn.time:g} s, later than needed: the picture of {frame / fps:g} s shows it.")
            same((turn.time, turn.content), (frame / fps, text), "what the package reads from your line")
    return "Right: the package reads back what is said, and nothing before it can be seen."


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
    ("def merged(weight, a, b, alpha):\n    return weight + alpha / len(a) * a @ b", "The order is turned"),
    ("def merged(weight, a, b, alpha):\n    return weight + len(a) / alpha * b @ a", "upside down"),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha / a.shape[1] * b @ a", "rows of a"),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha // len(a) * b @ a", "whole numbers"),
    ("def merged(weight, a, b, alpha):\n    return weight + alpha / 8 * b @ a", "this chapter's rank"),
    ("def merged(weight, a, b, alpha):\n    b *= alpha / len(a)\n    return weight + b @ a", "changed"),
)
def merged(answer) -> str:
    weight, a, b, alpha = torch.randn(5, 9), torch.randn(3, 9), torch.randn(5, 3), 7.0
    given = weight.clone(), a.clone(), b.clone()
    order = "The order is turned: a maps to the rank and b back from it, so the change is b @ a."
    with instead(RuntimeError, ("cannot be multiplied",), order):
        got = something(answer(*given, alpha), "merged(...)")
    for name, one, other in zip(("the weight", "a", "b"), given, (weight, a, b), strict=True):
        if not torch.equal(one, other):
            raise Wrong(f"It changed {name} that it was given, which may be shared; return something new.")
    hints = {
        "The scale is missing: the change is alpha / rank times b @ a.": weight + b @ a,
        "alpha is not yet divided by the rank.": weight + alpha * b @ a,
        "The scale is upside down: it is alpha / rank, not rank / alpha.": weight + 3 / alpha * b @ a,
        "The weight itself is missing: return it together with its change.": alpha / 3 * b @ a,
        "Divided by another size than the rank: that is the number of rows of a (and of columns of b).":
            weight + alpha / 5 * b @ a,
        "The scale was rounded down: // divides whole numbers.": weight + alpha // 3 * b @ a,
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    looks_like(got, weight + alpha / 8 * b @ a, "8 was this chapter's rank; here it is the number of rows of a, len(a).")
    looks_like(got, weight + alpha / 9 * b @ a, "Divided by another size than the rank: that is the number of rows of a (and of columns of b).")
    same(got, weight + alpha / 3 * b @ a, "merged(...)")
    x = torch.randn(4, 9)
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
    ("class Mine(Router):\n    def score(self, tokens, pos):\n        return tokens.sum(-1).tolist()", "is a list"),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n        unit = torch.nn.functional.normalize(tokens, dim=-1)\n"
        "        return -(unit @ unit.transpose(1, 2)).masked_fill(torch.eye(tokens.shape[1], dtype=torch.bool), -2).amax(-1)",
        "hide each other",
    ),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n        unit = torch.nn.functional.normalize(tokens, dim=1)\n"
        "        return -(unit @ unit.transpose(1, 2)).mean(-1)",
        "along the tokens",
    ),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n        tokens /= tokens.norm(dim=-1, keepdim=True)\n"
        "        return -(tokens @ tokens.transpose(1, 2)).mean(-1)",
        "changed the tokens",
    ),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n"
        "        return -torch.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=-1)",
        "before you average",
    ),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n        unit = torch.nn.functional.normalize(tokens, dim=-1)\n"
        "        return -(unit * unit.roll(1, 1)).sum(-1)",
        "odd tokens",
    ),
    (
        "class Mine(Router):\n    def score(self, tokens, pos):\n        unit = torch.nn.functional.normalize(tokens, dim=-1)\n"
        "        return -(unit * unit[:, :1]).sum(-1)",
        "odd tokens",
    ),
)
def own_router(answer) -> str:
    if not (isinstance(answer, type) and issubclass(answer, Router)):
        raise Wrong(f"Mine is {answer!r}, expected a subclass of Router: class Mine(Router).")
    frames, number, width, odd = 6, 26, 16, 3
    background = torch.randn(frames, 1, width)  # each frame has a background of its own
    tokens = background + 0.15 * torch.randn(frames, number, width)
    places = torch.stack([torch.randperm(number - 2)[:odd] + 1 for _ in range(frames)])
    places[0, 0] = 0  # in one frame the first token is odd
    places[1:, 1] = places[1:, 0] + 1  # in the others two neighbours are, and alike
    rows = torch.arange(frames)[:, None]
    strange = torch.randn(frames, odd, width)
    strange -= (strange * background).sum(-1, keepdim=True) / (background**2).sum(-1, keepdim=True) * background
    strange[1:, 1] = strange[1:, 0]
    tokens[rows, places] = strange / strange.norm(dim=-1, keepdim=True) * background.norm(dim=-1, keepdim=True)
    pos = torch.arange(frames * number).reshape(frames, number)
    router = answer(width, number, 0.2, 1)
    with torch.no_grad():
        given = tokens.clone()
        scores = something(router.score(given, pos), "score(...)")
        if not isinstance(scores, torch.Tensor):
            raise Wrong(f"score(...) is a {type(scores).__name__}, expected a tensor.")
        if scores.shape != (frames, number):
            raise Wrong(f"score(...) has shape {tuple(scores.shape)}, expected (F, N) = {(frames, number)}.")
        if not torch.equal(given, tokens):
            raise Wrong("It changed the tokens that it was given, which the layer computes on next; make new ones.")
        if not torch.equal(scores, router.score(tokens, pos)):
            raise Wrong("Asked a second time it gives other scores; a stream would choose other tokens than training did.")
        changed = tokens.clone()
        changed[3:] = torch.randn(3, number, width)
        if not torch.allclose(router.score(changed, pos)[:3], scores[:3], atol=1e-5):
            raise Wrong("The scores of frames 0 to 2 change when frames 3 to 5 do: it looks at other frames.")
        kept = torch.zeros(frames, number, dtype=torch.bool).scatter(1, scores.topk(router.kept, dim=1).indices, True)
        found = int(kept[rows, places].sum())
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        nearest = (unit @ unit.transpose(1, 2)).masked_fill(torch.eye(number, dtype=torch.bool), -2).amax(-1)
        looks_like(scores, -nearest, "You ask for the *nearest* other token, so two odd ones that are alike hide each other. Compare with all of the frame.")
        along = torch.nn.functional.normalize(tokens, dim=1)
        looks_like(scores, -(along @ along.transpose(1, 2)).mean(-1), "You normalise along the tokens, dim=1; each *token* gets length one, dim=-1.")
        least = torch.zeros_like(kept).scatter(1, (-scores).topk(router.kept, dim=1).indices, True)
        if found < frames * odd / 2 and int(least[rows, places].sum()) > frames * odd / 2:
            raise Wrong("It keeps the tokens most like all others and drops what stands out: turn the sign of the score.")
        if found < 0.9 * frames * odd:
            raise Wrong(f"It keeps {found} of {frames * odd} odd tokens, at least {math.ceil(0.9 * frames * odd)} are needed; each frame has {odd}, sometimes two of them alike and side by side, or the first token.")
        longer = tokens.clone()
        at = int((~kept[0]).nonzero()[0])  # a background token
        longer[0, at] *= 2
        if not torch.allclose(router.score(longer, pos)[0, at], scores[0, at], atol=1e-4):
            raise Wrong("A background token that is twice as long gets another score; compare directions, not lengths, and normalise tokens before you average them: a long one pulls the mean.")
    return f"Right: all frames alone, the same each time, and {found} of {frames * odd} odd tokens kept."
