"""Chapter 9: drop, merge or skip."""

import torch
import torch.nn.functional as F

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "9.1",
    ("def selection(keep):\n    return torch.diag(keep.float())", "zeros in the place"),
    ("def selection(keep):\n    return torch.eye(len(keep))[:, keep]", "transposed"),
    ("def selection(keep):\n    return torch.eye(len(keep))[keep] / keep.sum()", "add up to"),
)
def selection(answer) -> str:
    keep = torch.tensor([True, False, True, True, False, False, True])
    want, got = torch.eye(7)[keep], something(answer(keep.clone()), "selection(keep)")
    looks_like(got, torch.diag(keep.float()), "This leaves zeros in the place of dropped tokens: M has as many rows as tokens are kept.")
    looks_like(got, want.T, "This is the transposed matrix, (N, n): it puts tokens back (scatter) instead of taking them out.")
    if isinstance(got, torch.Tensor) and got.shape == want.shape and not torch.allclose(got.float().sum(1), torch.ones(4)):
        raise Wrong(f"The rows add up to {got.float().sum(1).tolist()}; a kept token is copied, so each row holds a single one.")
    same(got.float() if isinstance(got, torch.Tensor) else got, want, "selection(keep)")
    return "Right: a row of the identity for every token that is kept."


_AHEAD = "def looks_ahead(system, frames):\n    other = frames.clone()\n    other[{0}] = torch.randn_like(other[{0}])\n    return not torch.allclose(system(other){1}, system(frames){1})"


@exercise(
    "9.2",
    (_AHEAD.format("-1", ""), "may change"),
    (_AHEAD.format("0", "[1:]"), "past"),
    (_AHEAD.format("-1", "[:-1]"), "only when the last frame is not"),
    ("def looks_ahead(system, frames):\n    return True", "says True"),
)
def looks_ahead(answer) -> str:
    frames = torch.randn(6, 4)
    systems = {
        "each frame alone": (lambda x: x.square(), False),
        "the sum so far": (lambda x: x.cumsum(0), False),
        "the mean of all frames": (lambda x: x - x.mean(0), True),
        "a peep at the next frame": (lambda x: torch.cat((x[1:], x[-1:])), True),
    }
    got = {name: something(answer(system, frames.clone()), f"looks_ahead on {name!r}") for name, (system, _) in systems.items()}
    if all(got.values()):
        raise Wrong("It says True of everybody, even of a system that computes on each frame alone. The frame that you change may change its own output.")
    if got["the sum so far"] and not got["each frame alone"]:
        raise Wrong("It says that a sum of all frames so far looks ahead. Depending on the past is allowed: change later frames, compare earlier outputs.")
    for name, (_, want) in systems.items():
        if bool(got[name]) != want:
            raise Wrong(f"On a system that outputs {name} it says {bool(got[name])}, expected {want}.")
    # outputs that depend on a later frame only when the last frame is not the one that was changed
    sly = torch.zeros(6, 4)

    def second(x):
        y = sly.clone()
        y[0] = x[2]
        return y

    if not answer(second, frames.clone()):
        raise Wrong("A system whose output 0 is frame 2 goes free: you find a peep only when the last frame is not innocent. Change the others, too.")
    return "Right. This is how tests/test_methods.py looks at every system, and how chapter 4 caught a router."


_MERGE = (
    "import torch.nn.functional as F\ndef merge_closest(x, sizes):\n    unit = F.normalize(x, dim=-1)\n"
    "    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)\n    i, j = sorted(divmod(int(cosine.argmax()), len(x)))\n"
    "    x, sizes = x.clone(), sizes.clone()\n    x[i] = (sizes[i] * x[i] + sizes[j] * x[j]) / (sizes[i] + sizes[j])\n"
    "    sizes[i] += sizes[j]\n    stay = torch.arange(len(x)) != j\n    return x[stay], sizes[stay]"
)


@exercise(
    "9.3",
    (_MERGE.replace("(sizes[i] * x[i] + sizes[j] * x[j]) / (sizes[i] + sizes[j])", "(x[i] + x[j]) / 2"), "sizes"),
    (_MERGE.replace("F.normalize(x, dim=-1)", "x"), "dot product"),
    (_MERGE.replace(".fill_diagonal_(-torch.inf)", ""), "itself"),
    (_MERGE.replace("    sizes[i] += sizes[j]\n", ""), "four patches"),
)
def merge_closest(answer) -> str:
    x = torch.randn(6, 8)
    x[4] = 0.2 * x[1] + 0.01 * torch.randn(8)  # alike in direction, not in length
    x[0], x[5] = 9 * x[0], 9 * x[0] + 9 * torch.randn(8)  # long, so that a dot product is deceived
    sizes = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 1.0])

    def merged(i, j, weights=sizes):
        y, s = x.clone(), sizes.clone()
        y[i], s[i] = (weights[i] * x[i] + weights[j] * x[j]) / (weights[i] + weights[j]), sizes[i] + sizes[j]
        stay = torch.arange(6) != j
        return y[stay], s[stay]

    unit = F.normalize(x, dim=-1)
    assert sorted(divmod(int((unit @ unit.T).fill_diagonal_(-2).argmax()), 6)) == [1, 4]
    got = something(answer(x.clone(), sizes.clone()), "merge_closest(x, sizes)")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong("Return two things: the new tokens and their sizes.")
    new, counts = got
    for k in range(6):
        if isinstance(new, torch.Tensor) and new.shape == (5, 8) and torch.allclose(new, x[torch.arange(6) != k]):
            raise Wrong(f"Token {k} was merged with itself: nothing is more like a token than itself. Leave the diagonal out.")
    looks_like(new, merged(1, 4, torch.ones(6))[0], "The mean ignores sizes: a token that stands for three patches counts three times.")
    i, j = sorted(divmod(int((x @ x.T).fill_diagonal_(-torch.inf).argmax()), 6))
    looks_like(new, merged(i, j)[0], "You compare by the dot product, so long vectors win. The cosine compares directions: normalise first.")
    same(new, merged(1, 4)[0], "the new tokens")
    if isinstance(counts, torch.Tensor) and counts.shape == (5,) and counts[1] == 3:
        raise Wrong("The tokens are right, but the merged one stands for four patches now: add the sizes.")
    same(counts, merged(1, 4)[1], "the new sizes")
    return "Right: repeat it, and you have a token merger; its place in the cache is that of the earliest patch."
