"""Chapter 0: the idea."""

import math

import torch

from . import Wrong, exercise, instead, looks_like, same, something


@exercise(
    "0.1",
    ("def tokens_kept(r, n):\n    return int(r * n)", "rounded up"),
    ("def tokens_kept(r, n):\n    return round(r * n)", "rounded up"),
    ("def tokens_kept(r, n):\n    return r * n", "whole number"),
    ("def tokens_kept(r, n):\n    return int(r * n + 0.8)", "rounded up"),
)
def tokens_kept(answer) -> str:
    for r, n in ((0.2, 26), (0.4, 5), (0.5, 7), (1.0, 26), (0.01, 26), (0.05, 22)):
        got = something(answer(r, n), f"tokens_kept({r}, {n})")
        want = math.ceil(r * n)
        try:
            got = float(got)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"tokens_kept({r}, {n}) is {got!r}, expected a number.") from None
        if not got.is_integer():
            raise Wrong(f"tokens_kept({r}, {n}) is {got:g}, which is not a whole number: a layer cannot keep part of a token.")
        if got != want and got == want - 1:
            raise Wrong(f"tokens_kept({r}, {n}) is {got:g}; the product {r * n:g} must be rounded up, to {want}.")
        same(got, want, f"tokens_kept({r}, {n})")
    return "Right: the smallest whole number that is not below r·n, so at least one token stays."


@exercise(
    "0.2",
    (
        "def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = x[kept] + mu[kept, None] * f(x)[kept]\n    return y",
        "saw the skipped tokens",
    ),
    (
        "def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = mu[kept, None] * (x[kept] + f(x[kept]))\n    return y",
        "outside",
    ),
    ("def routed(x, kept, mu, f):\n    return x[kept] + mu[kept, None] * f(x[kept])", "left out"),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = x[kept] + f(x[kept])\n    return y", "mu is missing"),
    (
        "def routed(x, kept, mu, f):\n    x[kept] = x[kept] + mu[kept, None] * f(x[kept])\n    return x",
        "changed its input",
    ),
    (
        "def routed(x, kept, mu, f):\n    m = torch.zeros(len(x), dtype=torch.bool)\n    m[kept] = True\n"
        "    return x + torch.where(m[:, None], mu[:, None] * f(x * m[:, None]), 0)",
        "zeros included",
    ),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    for n in kept:\n        y[n] = x[n] + mu[n] * f(x[n][None])[0]\n    return y", "once"),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = mu[kept, None] * f(x[kept])\n    return y", "itself is missing"),
    ("def routed(x, kept, mu, f):\n    y = torch.zeros_like(x)\n    y[kept] = x[kept] + mu[kept, None] * f(x[kept])\n    return y", "come out as zeros"),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = x[kept] + mu[: len(kept), None] * f(x[kept])\n    return y", "mu[kept]"),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    y[kept] = x[kept] + mu[kept] * f(x[kept])\n    return y", "Give it an axis"),
    ("def routed(x, kept, mu, f):\n    y = x.clone()\n    f(x[kept])\n    y[kept] = x[kept] + mu[kept, None] * f(x[kept])\n    return y", "once is enough"),
)
def routed(answer) -> str:
    x, mu = torch.randn(6, 4), torch.randn(6)
    kept = torch.tensor([1, 3, 4])

    def double(h):
        return h.cumsum(0) * 0.5 + 1

    seen = []

    def f(h):
        seen.append(len(h))
        return double(h)

    short = double(x[kept])
    want = x.clone()
    want[kept] = x[kept] + mu[kept, None] * short
    given = x.clone()
    shapes = "Shapes do not fit: mu[kept] is (K,), the update is (K, D). Give it an axis, mu[kept, None]."
    with instead(RuntimeError, ("must match the size",), shapes):
        got = something(answer(given, kept, mu, f), "routed(...)")
    if not torch.equal(given, x):
        raise Wrong("It changed its input x. Work on x.clone(): the caller may still need x.")
    if isinstance(got, torch.Tensor) and got.shape == short.shape:
        raise Wrong("Only the kept tokens come back. The skipped ones are left out, but they go on to the next layer.")
    mistakes = {
        "f was given all tokens, so the kept ones saw the skipped tokens. Give f only x[kept]: that is the saving.":
            mu[kept, None] * double(x)[kept] + x[kept],
        "mu multiplies the token itself, too. Put x[kept] outside the product: h + mu · f(h).":
            mu[kept, None] * (x[kept] + short),
        "mu is missing: the update of each kept token is multiplied by its own mu.": x[kept] + short,
        "f mixes tokens: call it once with all kept tokens, not once for each.":
            x[kept] + mu[kept, None] * torch.cat([double(x[n][None]) for n in kept]),
        "The kept token itself is missing: h + mu · f(h), not mu · f(h).": mu[kept, None] * short,
        "mu has one entry per token of the frame; take those of the kept tokens, mu[kept].": x[kept] + mu[:3, None] * short,
    }
    for hint, rows in mistakes.items():
        wrong = x.clone()
        wrong[kept] = rows
        looks_like(got, wrong, hint)
    wrong = torch.zeros_like(x)
    wrong[kept] = want[kept]
    looks_like(got, wrong, "Skipped tokens come out as zeros; they must come out as they went in.")
    same(got, want, "routed(...)")
    if len(seen) != 1:
        raise Wrong(f"The numbers are right, but f was called {len(seen)} times; once is enough: that is the saving.")
    if seen != [3]:
        raise Wrong(f"The numbers are right, but f was given {seen[0]} tokens, zeros included; give it x[kept]: that is the saving.")
    return "Right: kept tokens are updated, skipped ones are the same bits as before, and f saw three tokens, not six."


@exercise(
    "0.3",
    (
        "import math\ndef cache_entries(keep, frames, n, text):\n    return [math.ceil(r * n * frames) + text for r in keep]",
        "frame by frame",
    ),
    (
        "import math\ndef cache_entries(keep, frames, n, text):\n"
        "    return [math.ceil(r * n) * frames + math.ceil(r * text) for r in keep]",
        "text is never skipped",
    ),
    (
        "import math\ndef cache_entries(keep, frames, n, text):\n    return [math.ceil(r * n) * frames for r in keep]",
        "text is missing",
    ),
    (
        "import math\ndef cache_entries(keep, frames, n, text):\n    return [math.ceil(r * n) * frames + (text if r == 1 else 0) for r in keep]",
        "in the routed layers",
    ),
    (
        "import math\ndef cache_entries(keep, frames, n, text):\n    return [math.ceil(r * (n * frames + text)) for r in keep]",
        "through the router as well",
    ),
    ("def cache_entries(keep, frames, n, text):\n    return [int(r * n) * frames + text for r in keep]", "rounded down"),
    ("def cache_entries(keep, frames, n, text):\n    return [r * n * frames + text for r in keep]", "whole tokens"),
)
def cache_entries(answer) -> str:
    keep, frames, n, text = (1.0, 0.2, 1.0, 0.2), 8, 26, 27
    got = something(answer(keep, frames, n, text), "cache_entries(...)")
    hints = {
        "The routed layers round over all frames at once. The choice is made frame by frame: round up, then multiply.":
            [math.ceil(r * n * frames) + text for r in keep],
        "The text was thinned out as well; text is never skipped: every layer holds all of it.":
            [math.ceil(r * n) * frames + math.ceil(r * text) for r in keep],
        "Text is missing in the routed layers; it never skips a layer.":
            [math.ceil(r * n) * frames + (text if r == 1 else 0) for r in keep],
        "You put the text through the router as well: round the frame's tokens alone, then add the text.":
            [math.ceil(r * (n * frames + text)) for r in keep],
        "The text is missing: every text token leaves an entry in every layer, too.":
            [math.ceil(r * n) * frames for r in keep],
        "You rounded down: a layer keeps ⌈r·n⌉ tokens of a frame, rounded up.": [math.floor(r * n) * frames + text for r in keep],
        "A layer keeps whole tokens: round r·n up for each frame, then multiply.": [r * n * frames + text for r in keep],
    }
    for hint, mistake in hints.items():
        looks_like(got, mistake, hint)
    same(got, [math.ceil(r * n) * frames + text for r in keep], "cache_entries(...)")
    same(answer((0.5, 1.0), 3, 5, 2), [11, 17], "cache_entries((0.5, 1.0), 3, 5, 2)")
    return "Right. Chapter 5 finds just these numbers in the real cache."
