"""Chapter 6: train it."""

import math

import torch

from . import Wrong, exercise, instead, looks_like, same, something


@exercise(
    "6.1",
    ("def recall(kept, shows):\n    return (kept[:, :-1] & shows).sum().item() / shows.sum().item()", "CLS"),
    ("def recall(kept, shows):\n    return (kept[:, 1:] & shows).sum().item() / kept[:, 1:].sum().item()", "precision"),
    ("def recall(kept, shows):\n    return (kept[:, 1:] & shows).sum().item() / kept.sum().item()", "precision"),
    ("def recall(kept, shows):\n    return ((kept[:, 1:] & shows).sum(1) / shows.sum(1)).nanmean().item()", "frame by frame"),
    ("def recall(kept, shows):\n    return (kept[:, 1:] == shows).float().mean().item()", "agree"),
    ("def recall(kept, shows):\n    return ((kept[:, 1:] & shows).sum(1) / shows.sum(1).clamp(min=1)).mean().item()", "frame by frame"),
    ("def recall(kept, shows):\n    return (kept[:, 1:] & shows).float().mean().item()", "all patches"),
    ("def recall(kept, shows):\n    kept[:, 0] = False\n    return (kept[:, 1:] & shows).sum().item() / shows.sum().item()", "changed"),
    ("def recall(kept, shows):\n    return (kept & shows).sum().item() / shows.sum().item()", "one column more"),
)
def recall(answer) -> str:
    kept, shows = torch.rand(12, 10) < 0.4, torch.rand(12, 9) < 0.3
    shows[3] = False
    hit = (kept[:, 1:] & shows).sum().item()
    given = kept.clone(), shows.clone()
    columns = "kept has one column more than shows: its first is the CLS token, which is no patch."
    with instead(RuntimeError, ("must match the size",), columns):
        got = something(answer(*given), "recall(kept, shows)")
    if not (torch.equal(given[0], kept) and torch.equal(given[1], shows)):
        raise Wrong("You changed what you were given; the trace of a model is not yours to write in. Work on a copy.")
    by_frame = (kept[:, 1:] & shows).sum(1) / shows.sum(1).clamp(min=1)
    for mean in (by_frame.mean(), by_frame[shows.any(1)].mean()):
        looks_like(got, mean.item(), "This averages frame by frame; a frame with three sprite patches then counts as much as one with one. Count patches over all frames.")
    hints = {
        "Token 0 is the CLS; patch 0 is token 1. The columns of kept and shows are off by one.":
            (kept[:, :-1] & shows).sum().item() / shows.sum().item(),
        "This is the share of kept patches that show a sprite, which is called precision. Divide by the sprite patches.":
            hit / kept[:, 1:].sum().item(),
        "This is the share of kept tokens that show a sprite, close to what is called precision. Divide by the sprite patches.":
            hit / kept.sum().item(),
        "This is how often kept and shows agree, background included. Only patches that show a sprite count.":
            (kept[:, 1:] == shows).float().mean().item(),
        "Divided by the number of all patches; divide by the number of those that show a sprite.": hit / shows.numel(),
    }
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, float) and math.isnan(got):
        raise Wrong("It is not a number: a frame without sprite has nothing to divide by. Count over all frames first, then divide.")
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, hit / shows.sum().item(), "recall(kept, shows)")
    return "Right. `recall` in `mod/data.py` does the same, and finds out which token shows which patch when the grids differ."


_STEPS = (
    "import math\ndef steps_to(curve, quality):\n    logged = [p for p in curve if 'lm' in p]\n"
    "    for before, point in zip(logged, logged[1:]):\n        if (before['lm'] + point['lm']) / 2 <= quality:\n"
    "            return point['step']\n    return math.nan"
)


@exercise(
    "6.2",
    (
        "def steps_to(curve, quality):\n    logged = [p for p in curve if 'lm' in p]\n"
        "    return next((p['step'] for p in logged if p['lm'] <= quality), float('nan'))",
        "a single",
    ),
    (
        "def steps_to(curve, quality):\n    logged = [p for p in curve if 'lm' in p]\n    for i in range(1, len(logged)):\n"
        "        if (logged[i - 1]['lm'] + logged[i]['lm']) / 2 <= quality:\n            return i\n    return float('nan')",
        "place in the list",
    ),
    (
        "def steps_to(curve, quality):\n    logged = [p for p in curve if 'lm' in p]\n    for i in range(1, len(logged)):\n"
        "        if (logged[i - 1]['lm'] + logged[i]['lm']) / 2 <= quality:\n            return logged[i]['step']\n    return logged[-1]['step']",
        "never",
    ),
    (
        "def steps_to(curve, quality):\n    for i in range(1, len(curve)):\n"
        "        if (curve[i - 1]['lm'] + curve[i]['lm']) / 2 <= quality:\n            return curve[i]['step']\n    return float('nan')",
        "validation",
    ),
    (_STEPS.replace("<= quality", "< quality"), "at most"),
    (_STEPS.replace("    return math.nan", "    return None"), "return math.nan"),
    (_STEPS.replace("zip(logged, logged[1:])", "zip([logged[0], *logged], logged)"), "none before it"),
    (_STEPS.replace("logged = [p for p in curve if 'lm' in p]", "logged = curve").replace("        if (", "        if 'lm' in before and 'lm' in point and ("), "A pair"),
)
def steps_to(answer) -> str:
    from mod.study import tables

    losses = {20: 1.3, 40: 0.19, 60: 0.5, 80: 0.25, 100: 0.15, 120: 0.05}
    curve = [{"step": step, "lm": lm, "recall": {}} for step, lm in losses.items()]
    curve.insert(4, {"step": 90, "narration": 0.8})
    curve.append({"step": 120, "narration": 0.9})

    def ask(quality: float):
        try:
            return answer([dict(point) for point in curve], quality)
        except KeyError as error:
            if error.args == ("lm",):
                raise Wrong("There is an entry without \"lm\": a validation in between. Skip those first.") from None
            raise

    got = something(ask(0.2), "steps_to(curve, 0.2)")
    hints = {
        "It looks at a single logged loss, which is noisy: take the mean of it and the one before.": 40,
        "This is a place in the list, not a step: look up \"step\" there.": 4,
        "This is the step of the first of the two; the mean is known at the second.": 80,
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    if ask((0.19 + 0.5) / 2) == 100:
        raise Wrong("Where the mean of step 40 and step 60 is exactly the quality, that counts: *at most* is <=, not <.")
    looks_like(got, 120, "A pair of logged losses was lost: between them lies a validation. Take the losses out of the curve first, then look at neighbours.")
    same(got, tables.steps_to({"curve": curve}, 0.2), "steps_to(curve, 0.2)")
    if ask(1.5) == 20:
        raise Wrong("steps_to(curve, 1.5) is 20, the first logged step; it has none before it to take a mean with, so 40 is the first that can be.")
    same(ask(1.5), 40, "steps_to(curve, 1.5)")
    last = ask(0.01)
    if last is None:
        raise Wrong("It returns nothing when the quality is never reached: return math.nan.")
    if not (isinstance(last, float) and math.isnan(last)):
        raise Wrong(f"steps_to(curve, 0.01) is {last}, but that quality is never reached: return math.nan, or a run that failed would "
                    "count as one that was slow.")
    return "Right. `steps_to` in `mod/study/tables.py` is where the column \"steps to quality\" comes from."


@exercise(
    "6.3",
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens.mean((0, 1))).norm(dim=-1)", "other frames"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return tokens - tokens.mean(1, keepdim=True)", "shape"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return -(tokens - tokens.mean(1, keepdim=True)).norm(dim=-1)", "ordinary"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens[:, :1]).norm(dim=-1)", "CLS"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens.mean(1, keepdim=True)).sum(-1)", "cancel"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens.mean(-1, keepdim=True)).norm(dim=-1)", "over D"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens[:, 1:].mean(1, keepdim=True)).norm(dim=-1)", "CLS too"),
    ("class Contrast(Router):\n    def score(self, tokens, pos):\n        return (tokens - tokens.mean(1)).norm(dim=-1)", "Keep the axis"),
)
def contrast(answer) -> str:
    from mod.router import Router

    if not (isinstance(answer, type) and issubclass(answer, Router)):
        raise Wrong(f"Contrast is {answer!r}, expected a class that is a Router.")
    if answer.score is Router.score:
        raise Wrong("It does not say yet how tokens are scored: define score(self, tokens, pos).")
    tokens, pos = torch.randn(4, 7, 6), torch.arange(28).view(4, 7)
    router = answer(6, 7, 0.4, 1)
    if any(parameter.numel() for parameter in router.parameters()):
        raise Wrong("It has weights; this one is to do without.")
    shapes = "Shapes do not fit: the mean of a frame is (F, D), tokens are (F, N, D). Keep the axis: mean(dim=1, keepdim=True)."
    with instead(RuntimeError, ("must match the size",), shapes):
        got = something(router.score(tokens.clone(), pos), "score(tokens, pos)")
    away = tokens - tokens.mean(1, keepdim=True)
    want = away.norm(dim=-1)
    if isinstance(got, torch.Tensor) and got.shape == want.shape:
        alone = router.score(tokens[:1].clone(), pos[:1])
        if not torch.allclose(alone, got[:1], atol=1e-5):
            raise Wrong("A frame's scores change when other frames are in the batch: take the mean over the frame's own tokens, dim 1. (Other "
                        "frames are other streams, or the future.)")
    hints = {
        "The mean is over all N tokens of the frame, CLS too; yours leaves the first out.":
            (tokens - tokens[:, 1:].mean(1, keepdim=True)).norm(dim=-1),
        "The sign is turned: now the most ordinary tokens are kept.": -want,
        "This is the distance from the CLS token, the first of the frame; asked for is that from the mean.":
            (tokens - tokens[:, :1]).norm(dim=-1),
        "This subtracts each token's own mean over D; subtract the mean of the frame's tokens, dim 1.":
            (tokens - tokens.mean(-1, keepdim=True)).norm(dim=-1),
        "Differences are added up with their signs, so that they cancel. Take the norm over D.": away.sum(-1),
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    if not torch.equal(got.argsort(1), want.argsort(1)) if isinstance(got, torch.Tensor) and got.shape == want.shape else True:
        same(got, want, "score(tokens, pos)")
    return "Right: no weights, and nothing but its own frame. Now train it: runs[\"contrast\"] = short_run(Contrast)."
