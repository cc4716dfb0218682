"""Chapter 2: the stream."""

import torch
import torch.nn.functional as F

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "2.1",
    ("def speaks(logits, eos, threshold):\n    return logits.argmax(-1) != eos", "threshold"),
    ("def speaks(logits, eos, threshold):\n    return logits.softmax(-1)[..., eos] > threshold", "other way round"),
    ("def speaks(logits, eos, threshold):\n    return logits[..., eos] < threshold", "probabilities"),
    ("def speaks(logits, eos, threshold):\n    return logits.sigmoid()[..., eos] < threshold", "softmax"),
    ("def speaks(logits, eos, threshold):\n    return logits.softmax(0)[..., eos] < threshold", "the last axis"),
    ("def speaks(logits, eos, threshold):\n    return 1 - logits.softmax(-1)[..., eos] > threshold", "*not* staying silent"),
    ("def speaks(logits, eos, threshold):\n    return logits.softmax(-1)[..., eos] <= threshold", "at least θ"),
)
def speaks(answer) -> str:
    logits = 2 * torch.randn(4, 50, 6)
    for eos, threshold in ((1, 0.15), (2, 0.7)):
        p = logits.softmax(-1)[..., eos]
        got = something(answer(logits, eos, threshold), "speaks(...)")
        for mistake, hint in (
            (logits.softmax(0)[..., eos] < threshold, "Take the softmax over the vocabulary, the last axis, not the first."),
            (logits.argmax(-1) != eos, "It speaks when <eos> is not the likeliest token, whatever the threshold is."),
            (1 - p > threshold, "You compare the chance of *not* staying silent with the threshold; the rule is p(eos) < θ."),
            (p > threshold, "The other way round: speak when silence is *less* likely than the threshold."),
            (logits[..., eos] < threshold, "Logits are not probabilities: take the softmax over the vocabulary first."),
            (logits.sigmoid()[..., eos] < threshold, "A sigmoid ignores all other tokens; the softmax weighs <eos> against them."),
        ):
            looks_like(got, mistake, hint)
        same(got, p < threshold, f"speaks(logits, {eos}, {threshold})")
    if something(answer(torch.zeros(1, 4), 0, 0.25), "speaks(...)").any():  # p is 1/4 exactly
        raise Wrong("At p(eos) = θ it speaks. The model is silent when p(eos) is at least θ: < instead of <=.")
    return "Right: one line decides whether a model talks."


@exercise(
    "2.2",
    (
        "def decisions(frames, said):\n    roles = {s.frame: s.role for s in reversed(said)}\n"
        "    return ['speak' if roles.get(t) == 'assistant' else 'silent' for t in range(frames)]",
        "user speaks first",
    ),
    (
        "def decisions(frames, said):\n    spoken = {s.frame for s in said if s.role == 'assistant'}\n"
        "    return ['speak' if t in spoken else 'silent' for t in range(frames)]",
        "user speaks first",
    ),
    (
        "def decisions(frames, said):\n    users = {s.frame for s in said if s.role == 'user'}\n    spoken = {s.frame for s in said}\n"
        "    return [None if t in users else 'speak' if t in spoken else 'silent' for t in range(frames)]",
        "narrates first",
    ),
    (
        "def decisions(frames, said):\n    roles = {s.frame: s.role for s in reversed(said)}\n"
        "    return [{'assistant': 'speak'}.get(roles.get(t)) for t in range(frames)]",
        "nobody speaks",
    ),
    (
        "def decisions(frames, said):\n    out, seen = ['silent'] * frames, set()\n    for s in said:\n        if s.frame not in seen:\n"
        "            seen.add(s.frame)\n            out[s.frame] = 'speak' if s.role == 'assistant' else None\n    return out",
        "before the first",
    ),
)
def decisions(answer) -> str:
    from mod.layout import Say

    said = [
        Say(-1, "user", "now"), Say(0, "assistant", "red disc leaves"), Say(2, "user", "where is it ?"),
        Say(2, "assistant", "nowhere"), Say(3, "assistant", "red disc appears top"), Say(3, "user", "where is it ?"),
        Say(3, "assistant", "now left"), Say(5, "user", "where is it ?"),
    ]
    want = ["speak", "silent", None, "speak", "silent", None, "silent"]
    got = something(answer(7, list(said)), "decisions(7, said)")
    if not isinstance(got, (list, tuple)) or len(got) != 7:
        raise Wrong(f"decisions(7, said) is {got!r}, expected a list with one entry for each of the 7 frames.")
    if got[6] is None and got[1] == "silent":
        raise Wrong("Frame 6 is silent, but what was said before the first frame (its frame is -1) has landed there: out[-1] is the last entry.")
    for t in (1, 4, 6):
        if got[t] != "silent":
            raise Wrong(f"Frame {t}: nobody speaks, so the label is <eos>: expected 'silent', got {got[t]!r}.")
    for t in (2, 5):
        if got[t] is not None:
            raise Wrong(f"Frame {t}: the user speaks first there, so there is nothing to decide; expected None, got {got[t]!r}.")
    if got[3] != "speak":
        raise Wrong(f"Frame 3: the assistant narrates first, then the user asks; the decision was to speak, got {got[3]!r}.")
    same(list(got), want, "decisions(7, said)")
    return "Right: only who speaks *first* after a frame matters."


_LOSS = (
    "import torch.nn.functional as F\ndef loss(logits, labels, streaming, omega):\n    there = labels != NO_LABEL\n"
    "    e = F.cross_entropy(logits[there], labels[there], reduction='none')\n    s = streaming[there]\n"
    "    return ({0} * torch.where({1}, omega, 1.0)).sum() / there.sum()"
)


@exercise(
    "2.3",
    (
        "import torch.nn.functional as F\ndef loss(logits, labels, streaming, omega):\n"
        "    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LABEL)",
        "by one place",
    ),
    (
        "import torch.nn.functional as F\ndef loss(logits, labels, streaming, omega):\n    there = labels != NO_LABEL\n"
        "    e = F.cross_entropy(logits[there], labels[there], reduction='none')\n    s = streaming[there]\n"
        "    return e[~s].mean() + omega * e[s].mean()",
        "two means",
    ),
    (
        "import torch.nn.functional as F\ndef loss(logits, labels, streaming, omega):\n"
        "    e = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='none', ignore_index=NO_LABEL).view_as(labels)\n"
        "    return (e * torch.where(streaming, omega, 1.0)).mean()",
        "all tokens",
    ),
    (
        "import torch.nn.functional as F\ndef loss(logits, labels, streaming, omega):\n"
        "    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)",
        "omega",
    ),
    (_LOSS.format("-e", "s"), "The sign"),
    (_LOSS.format("e", "~s"), "the words"),
    (_LOSS.format("e", "s").replace("/ there.sum()", ""), "not yet divided"),
    (_LOSS.format("e", "s").replace("return (", "value = (") + "\n    return value.item()", "a plain number"),
    (_LOSS.format("e", "s").replace("there = labels != NO_LABEL", "there = labels != NO_LABEL\n    labels[~there] = 0"), "changed the labels"),
)
def loss(answer) -> str:
    from mod.layout import NO_LABEL

    logits, labels = torch.randn(2, 9, 5), torch.randint(5, (2, 9))
    labels[torch.rand(2, 9) < 0.5] = NO_LABEL
    labels[:, 0], labels[:, 4] = 2, 3
    streaming, omega = torch.zeros(2, 9, dtype=torch.bool), 3.0
    streaming[:, 4] = True
    there = labels != NO_LABEL
    each, s = F.cross_entropy(logits[there], labels[there], reduction="none"), streaming[there]
    sums = each[~s].sum(), each[s].sum()
    right, given = (sums[0] + omega * sums[1]) / len(each), labels.clone()
    got = something(answer(logits.clone().requires_grad_(), given, streaming.clone(), omega), "loss(...)")
    if not torch.equal(given, labels):
        raise Wrong("You changed the labels that you were given; the next to use them trains on others. Work on a copy.")
    shifted = labels[:, 1:] != NO_LABEL
    moved, ms = F.cross_entropy(logits[:, :-1][shifted], labels[:, 1:][shifted], reduction="none"), streaming[:, 1:][shifted]
    for mistake, hint in (
        (moved.mean(), "You move the labels by one place. They already say what comes next: position i is judged by label i."),
        ((torch.where(ms, omega, 1.0) * moved).mean(), "You move the labels by one place. They already say what comes next."),
        (each[~s].mean() + omega * each[s].mean(), "You add two means. One sum over all labels, divided by their number: a clip with few decisions must not count each of them more."),
        ((sums[0] + omega * sums[1]) / labels.numel(), "You divide by the number of all tokens, with and without a label; the equation's n counts labels."),
        (each.mean(), "omega is missing: decisions weigh omega times as much as words."),
        (-right, "The sign is wrong: a loss is -log p."),
        ((omega * sums[0] + sums[1]) / len(each), "omega weighs the words here; it belongs to the decisions, where streaming is true."),
        (right * len(each), "The sum is not yet divided by n, the number of labels."),
        (torch.stack([(F.cross_entropy(logits[b][there[b]], labels[b][there[b]], reduction="none") * torch.where(streaming[b][there[b]], omega, 1.0)).mean() for b in (0, 1)]).mean(),
         "This is the mean of the rows' means; n counts the labels of the whole batch."),
        ((sums[0] + omega * sums[1]) / (len(s) + (omega - 1) * s.sum()), "You divide by the sum of the weights; the equation's n counts labels."),
    ):
        looks_like(torch.as_tensor(got).float(), mistake, hint)
    same(torch.as_tensor(got).float(), right, "loss(...)")
    if not (isinstance(got, torch.Tensor) and got.requires_grad):
        raise Wrong("The value is right, but it is a plain number, without a gradient to train on: return the tensor.")
    return "Right. The package computes logits only where there is a label; with a vocabulary of 128 thousand words that matters."
