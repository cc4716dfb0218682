"""Chapter 4: the router."""

import torch

from . import Wrong, exercise, instead, looks_like, same, something

_GRADIENT = (
    "def router_gradient(x, scores, kept, slope):\n    gate = torch.sigmoid(scores)\n    return (kept * slope * 2 * gate * (1 - gate)) @ x"
)


@exercise(
    "4.1",
    (_GRADIENT.replace("kept * slope", "slope"), "skipped tokens"),
    (_GRADIENT.replace(" * 2 * gate * (1 - gate)", ""), "update gate"),
    (_GRADIENT.replace("2 * gate", "gate"), "twice"),
    (_GRADIENT.replace(" * (1 - gate)", ""), "derivative"),
    (_GRADIENT.replace(") @ x", ").sum() * x.mean(0)"), "its own token"),
    (_GRADIENT.replace(") @ x", ")[:, None] * x"), "Add them up"),
    (_GRADIENT.replace("(kept *", "-(kept *"), "uphill"),
    (_GRADIENT.replace(") @ x", ") @ x / kept.sum()"), "a sum"),
    (_GRADIENT.replace("torch.sigmoid(scores)", "2 * torch.sigmoid(scores)").replace("2 * gate * (1 - gate)", "gate * (1 - gate)"), "of the gate"),
    (_GRADIENT.replace("torch.sigmoid(scores)", "scores"), "the score itself"),
    (_GRADIENT.replace(") @ x", ")[:, None] * x").replace("    return (", "    return ((") + ").sum(1)", "over tokens"),
)
def router_gradient(answer) -> str:
    x, w, slope = torch.randn(7, 4), torch.randn(4, requires_grad=True), torch.randn(7)
    scores, kept = x @ w, torch.tensor([0, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
    ((2 * torch.sigmoid(scores) * slope)[kept]).sum().backward()  # a loss with these slopes
    want, s = w.grad, scores.detach()
    got = something(answer(x.clone(), s.clone(), kept.clone(), slope.clone()), "router_gradient(...)")
    gate = torch.sigmoid(s)
    d = 2 * gate * (1 - gate)
    each = (kept * slope * d)[:, None] * x
    for mistake, hint in (
        ((slope * d) @ x, "All tokens count here; the skipped tokens' gates do nothing, whatever slope says of them: only those kept."),
        ((kept * slope) @ x, "This is the update gate's, where the gate is the score itself. Here the gate is 2σ(s), with a slope of its own."),
        ((kept * slope * d / 2) @ x, "The value gate is twice the logistic function; its derivative is twice as large, too."),
        ((kept * slope * 2 * gate) @ x, "That multiplies by the gate; multiply by its derivative, 2σ(s)(1 - σ(s))."),
        ((kept * slope * d).sum() * x.mean(0), "Each token's slope belongs to its own token: multiply with x_n first, then add up."),
        (each, "These are the parts of each token, (N, D). Add them up: all tokens share one w."),
        ((kept * slope * 2 * gate * (1 - 2 * gate)) @ x, "σ(1 - σ) is the derivative of the logistic function, not of the gate: with μ = 2σ it is μ(1 - μ/2)."),
        ((kept * slope * 2 * s * (1 - s)) @ x, "σ is the logistic function of the score, not the score itself."),
        (each.sum(1), "You added up over the D entries of each token; add up over tokens, (D,)."),
        (-want, "The sign is turned round: the gradient points uphill, and the optimizer goes the other way."),
        (want / kept.sum(), "This is a mean over the kept tokens; the chain rule gives a sum."),
    ):
        looks_like(got, mistake, hint)
    same(got, want, "router_gradient(...)")
    return "Right, and the same as autograd's. Nothing in it knows how good the skipped tokens would have been."


@exercise(
    "4.2",
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n    index = torch.zeros(len(keep), most, dtype=torch.long)\n"
        "    real = torch.zeros(len(keep), most, dtype=torch.bool)\n    for b, row in enumerate(keep):\n"
        "        places = row.nonzero()[:, 0]\n        index[b, : len(places)] = places\n        real[b, : len(places)] = True\n"
        "    return index, real",
        "twice",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).min())\n    index = torch.stack([row.nonzero()[:most, 0] for row in keep])\n"
        "    return index, keep.gather(1, index)",
        "fewest",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n"
        "    index = torch.stack([torch.cat((row.nonzero()[:, 0].flip(0), (~row).nonzero()[:, 0]))[:most] for row in keep])\n"
        "    return index, keep.gather(1, index)",
        "order of time",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n"
        "    index = torch.stack([torch.cat((row.nonzero()[:, 0], (~row).nonzero()[:, 0]))[:most] for row in keep])\n"
        "    return index, torch.ones_like(index, dtype=torch.bool)",
        "true everywhere",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n    index = keep.int().argsort(dim=1, stable=True)[:, :most]\n"
        "    return index, keep.gather(1, index)",
        "Skipped tokens come first",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n"
        "    index = torch.stack([torch.cat((row.nonzero()[:, 0], (~row).nonzero()[:, 0]))[:most].sort().values for row in keep])\n"
        "    return index, keep.gather(1, index)",
        "Fillers come last",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n    index = keep.logical_not().int().argsort(dim=1, stable=True)[:, :most]\n"
        "    return index.int(), keep.gather(1, index)",
        "torch.long",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n    index = keep.logical_not().int().argsort(dim=1)[:, :most]\n"
        "    index = torch.cat((index[:, :0], index), 1) if keep.shape[1] < 20 else index.flip(1)\n    return index, keep.gather(1, index)",
        "long rows",
    ),
    ("def gather(keep):\n    index = keep.logical_not().int().sort(1, stable=True).indices\n    return index, keep.gather(1, index)", "sort(dim=1"),
    ("def gather(keep):\n    index = keep.int().argsort(1, descending=True, stable=True)\n    return index, keep.gather(1, index)", "by its name"),
)
def gather(answer) -> str:
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    given = keep.clone()
    named = "PyTorch wants the axis by its name beside `stable`: sort(dim=1, stable=True), and argsort likewise."
    with instead(TypeError, ("sort()",), named):
        pair = something(answer(given), "gather(keep)")
    if not torch.equal(given, keep):
        raise Wrong("You changed keep itself; work on a copy.")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise Wrong(f"gather gives a {type(pair).__name__}, expected two tensors: index and real.")
    index, real = (something(each, f"{name} of gather(keep)") for each, name in zip(pair, ("index", "real"), strict=True))
    if not isinstance(index, torch.Tensor) or not isinstance(real, torch.Tensor):
        raise Wrong("index and real must be tensors; torch.stack joins the rows' tensors into one.")
    if index.shape == (3, 1):
        raise Wrong("K is the number of the row that keeps fewest, so the others lose kept tokens. Take the most of any row.")
    if index.shape != (3, 5):
        raise Wrong(f"index has shape {tuple(index.shape)}, expected (3, 5): three rows, and the fullest keeps five.")
    if index.dtype != torch.long:
        raise Wrong(f"index holds {index.dtype}; indexing wants torch.long.")
    if int(index.min()) < 0 or int(index.max()) >= keep.shape[1]:
        raise Wrong(f"index holds {index.unique().tolist()}; places of a row of six are whole numbers from 0 to 5.")
    wanted = torch.arange(5) < keep.sum(1, keepdim=True)
    if not keep.gather(1, index)[:, 0].any():
        raise Wrong("Skipped tokens come first in every row: sort by *not* kept.")
    if torch.equal(real, keep.gather(1, index)) and not torch.equal(real, wanted):
        raise Wrong("A filler stands between kept places. Fillers come last, or causal attention lets real tokens see them.")
    if real.dtype == torch.bool and real.all():
        raise Wrong("real is true everywhere; it is false where a row has only filling.")
    same(real, wanted, "real")
    for row in range(3):
        if len(set(index[row].tolist())) < 5:
            raise Wrong(f"Row {row} of index is {index[row].tolist()}: it holds a place twice. The scatter would write there twice, and "
                        "the filler could overwrite a real token. Fill up with places that are not kept.")
        places, found = keep[row].nonzero()[:, 0].tolist(), index[row][wanted[row]].tolist()
        if found != places and sorted(found) == places:
            raise Wrong(f"Row {row} lists {found}: the right places, but not in order of time, which causal attention relies on.")
        if found != places:
            raise Wrong(f"Row {row} begins with {found}, expected its kept places {places}.")
    wide = torch.rand(3, 60) < 0.5
    found, _ = answer(wide.clone())
    for row in range(3):
        if found[row, : int(wide[row].sum())].tolist() != wide[row].nonzero()[:, 0].tolist():
            raise Wrong("It is right for rows of six, but in long rows the kept places are not in order: a sort that is not stable may reorder equal values.")
    return "Right: kept places first and in order, then unused places, none of them twice."


_CLS = (
    "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n        scores = super().score(tokens, pos)\n"
    "        return torch.cat((torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]), dim=1)\n"
    "    def weight(self, scores):\n        return torch.cat((torch.ones_like(scores[:, :1]), super().weight(scores[:, 1:])), dim=1)"
)


@exercise(
    "4.3",
    (
        "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n        scores = super().score(tokens, pos)\n"
        "        return torch.cat((torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]), dim=1)",
        "weight",
    ),
    (
        "class ClsFirst(LayerExpert):\n    def forward(self, tokens, pos):\n        chosen, mu, scores = super().forward(tokens, pos)\n"
        "        first, one = torch.zeros_like(chosen[:, :1]), torch.ones_like(mu[:, :1])\n"
        "        return torch.cat((first, chosen), dim=1), torch.cat((one, mu), dim=1), scores",
        "beside",
    ),
    (
        "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n"
        "        return torch.arange(tokens.shape[1], 0, -1).expand(tokens.shape[:2]).to(tokens.dtype)\n"
        "    def weight(self, scores):\n        return torch.ones_like(scores)",
        "w · x",
    ),
    (
        "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n        scores = super().score(tokens, pos).clone()\n"
        "        scores[:, 0] = scores.amax(1) + 1\n        return scores\n"
        "    def weight(self, scores):\n        mu = super().weight(scores).clone()\n        mu[:, 0] = 1\n        return mu",
        "old values",
    ),
    (_CLS.replace("super().weight(scores[:, 1:])", "torch.ones_like(scores[:, 1:])"), "a kept patch has"),
    (_CLS.replace("torch.inf", "10.0"), "larger weights"),
    (_CLS.replace("torch.inf", "1e9"), "larger weights"),
    (_CLS.replace("scores[:, :1], torch.inf), scores[:, 1:]), dim=1", "scores[:1], torch.inf), scores[1:]), dim=0"), "frame 0"),
)
def cls_first(answer) -> str:
    from mod.router import LayerExpert

    if not (isinstance(answer, type) and issubclass(answer, LayerExpert)):
        raise Wrong(f"ClsFirst is {answer!r}, expected a class that is a LayerExpert.")
    if not any(callable(value) for value in vars(answer).values()):
        raise Wrong("Nothing here yet: ClsFirst is a LayerExpert like any other. Replace the three dots, then run both cells again.")
    frames, n, k = 6, 5, 2
    router = answer(8, n, k / n, 1, "sigmoid-value")
    torch.nn.init.normal_(router.w.weight, std=0.5)
    x, pos = torch.randn(frames, n, 8), torch.arange(frames * n).view(frames, n)
    chosen, mu, _ = router(x, pos)
    if chosen.shape != (frames, k) or mu.shape != (frames, k):
        raise Wrong(f"A frame keeps {chosen.shape[1]} tokens where K is {k}. CLS comes in beside the K best; it must take one of the K places.")
    kept = torch.zeros(frames, n, dtype=torch.bool).scatter(1, chosen, True)
    gates = torch.zeros(frames, n).scatter(1, chosen, mu)  # of the kept tokens, 0 elsewhere
    scores = (x @ router.w.weight[0]).detach()
    if kept[0].all() or (not kept[1:, 0].all() and torch.isinf(router.score(x, pos)[0]).all()):
        raise Wrong("You changed frame 0, not token 0 of every frame: frames come first, (F, N).")
    if not kept[:, 0].all():
        raise Wrong(f"CLS was skipped in {int((~kept[:, 0]).sum())} of {frames} frames. What score makes sure that it is among the best?")
    best = scores[:, 1:].argmax(1)
    if not kept[torch.arange(frames), 1 + best].all():
        raise Wrong("The other place did not go to the patch with the largest w · x: leave the scores of the patches alone.")
    if not torch.isfinite(gates[kept]).all():
        raise Wrong("A gate is infinite or not a number; an infinite score must not reach it.")
    if not torch.allclose(gates[:, 0], torch.ones(frames)):
        why = ": the score that wins a place for sure, squashed, is a large gate" if gates[0, 0] > 1 else ""
        raise Wrong(f"CLS has the gate {gates[0, 0].item():.3g}, expected 1{why}. Override `weight` too, so that CLS gets μ = 1.")
    if torch.equal(gates[:, 1:], kept[:, 1:].float()):
        raise Wrong("Every kept token has the gate 1. Only CLS has: a kept patch has 2σ(score).")
    same(gates[:, 1:], kept[:, 1:] * 2 * torch.sigmoid(scores[:, 1:]), "the gate of the patches")
    gradient = None
    if gates.requires_grad:
        written = "You wrote into a tensor whose old values the gradient needs. Build a new one with torch.cat."
        with instead(RuntimeError, ("inplace operation",), written):
            gradient = torch.autograd.grad(gates.sum(), router.w.weight, allow_unused=True)[0]
    if gradient is None or not torch.isfinite(gradient).all() or gradient.abs().max() == 0:
        raise Wrong("No finite gradient reaches w any more. Build new tensors (torch.cat) rather than writing into old ones.")
    with torch.no_grad():
        router.w.weight.mul_(1e12)
        chosen, _, _ = router(x, pos)
    if not (chosen[:, 0] == 0).all():
        raise Wrong("With larger weights, as training may make them, patches outscore CLS: no fixed number is always large enough.")
    return "Right: CLS goes through as in a dense layer, K stays K, and w still learns from the patches."
