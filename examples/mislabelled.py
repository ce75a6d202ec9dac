# %% [markdown]
# # Finding wrong labels
#
# A sample with a wrong label contradicts the others: what the network learns from it, it can use for nothing else. So
# its own gradient stays long while those of its neighbours shrink. We replace one label in ten of scikit-learn's
# handwritten digits by that of a look-alike (a 3 becomes an 8, a 7 a 1), and try to find them again by
# *self-influence*, the squared norm of a sample's gradient, at one moment or summed over checkpoints (TracIn, Pruthi et
# al. 2020). The plain loss, which costs no gradient, is the baseline.

# %%
from __future__ import annotations

from collections.abc import Iterator

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import persample
from persample import attribution

torch.set_num_threads(1)  # tensors are small here: more threads would wait for each other
data = load_digits()
order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)[order]
labels = torch.tensor(data.target)[order]
x, y, u, v = images[:1300], labels[:1300], images[1300:], labels[1300:]

LOOKALIKE = torch.tensor([6, 7, 3, 8, 9, 3, 0, 1, 3, 4])
generator = torch.Generator().manual_seed(1)
wrong = torch.zeros(len(x), dtype=torch.bool)
wrong[torch.randperm(len(x), generator=generator)[: len(x) // 10]] = True
given = torch.where(wrong, LOOKALIKE[y], y)
criterion = nn.CrossEntropyLoss()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def train(x: Tensor, y: Tensor, seed: int, epochs: int) -> Iterator[nn.Module]:
    """The model after every epoch of Adam."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for pick in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            criterion(model(x[pick]), y[pick]).backward()
            optimizer.step()
        yield model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


# %% [markdown]
# ## Scores along a training
#
# Norms alone are asked for, so no rows are kept: a checkpoint costs about one ordinary backward pass over the data.
# Scores are judged by the area under the ROC curve: the probability that a wrong label scores higher than a right one.

# %%
EPOCHS, CHECKPOINTS = 75, (1, 2, 5, 10, 20, 30, 45, 60, 75)
EARLY = 10
auc: dict[str, list[float]] = {}
fits, squares, losses = [], [], []
print("epoch   given labels fitted   squared norm   summed   loss   summed   (area under the ROC curve)")
for epoch, model in enumerate(train(x, given, seed=0, epochs=EPOCHS), 1):
    if epoch not in CHECKPOINTS:
        continue
    S = persample.gradients(model, criterion, x, given, quantities=["norm"])
    squares.append((1.0, S))
    losses.append(S.losses)
    scores = {
        "self-influence, now": attribution.self_influence(S),
        "self-influence, summed": attribution.self_influence(squares),
        "loss, now": S.losses,
        "loss, summed": torch.stack(losses).sum(0),
    }
    for name, score in scores.items():
        auc.setdefault(name, []).append(attribution.mislabel_auc(score, wrong))
    fits.append(accuracy(model, x, given))
    now, summed, loss, loss_summed = (found[-1] for found in auc.values())
    print(f"{epoch:5d} {fits[-1]:21.1%} {now:14.3f} {summed:8.3f} {loss:6.3f} {loss_summed:8.3f}")
    if epoch == EARLY:
        early = persample.gradients(model, criterion, x, given)  # rows, for later
assert min(auc["self-influence, summed"][-1], auc["loss, summed"][-1]) > 0.98
assert max(auc["self-influence, now"]) > 0.98
assert auc["self-influence, now"][-1] < auc["self-influence, summed"][-1] - 0.02
assert abs(auc["self-influence, now"][-1] - auc["loss, now"][-1]) < 0.02

# %% [markdown]
# For a while every score finds nearly all of them. Then the network begins to learn the wrong labels by heart, and at
# the end their gradients are no longer than those of honest hard samples. The sum over checkpoints remembers that they
# took long to be learned. So the moment matters, and checkpoints take the choice away. What doesn't matter here is the
# gradient: the loss, summed in the same way, is as good.
#
# ## What a wrong sample contradicts
#
# The loss can't say *why*. Inner products can: where the gradients of two samples point against each other, learning
# one unlearns the other. For the samples with the largest scores we look up the sample that each contradicts most, by
# the cosine early in training, and take over *its* label. The cosines come from a Gram matrix of factors.

# %%
found = scores["self-influence, summed"].argsort(descending=True)[: int(wrong.sum())]
opponent = early.cosine()[found].argmin(1)  # the lowest cosine
hits = wrong[found]
print(f"{int(hits.sum())} of the {int(wrong.sum())} wrong labels are among as many samples with the largest sums")
suggested = float((given[opponent] == y[found])[hits].float().mean())
predicted = float((early.outputs[found].argmax(1) == y[found])[hits].float().mean())
print(f"the label of the sample that they contradict most is their true one for {suggested:.0%} of those")
print(f"(and what the network itself says at that time, for {predicted:.0%})")
assert float(hits.float().mean()) > 0.8 and suggested > 0.9

# %% [markdown]
# ## Is it worth it?
#
# Train again without the samples that were found, and look at new digits with the right labels. For comparison: with
# all samples, without as many random ones, and with labels that were never wrong.

# %%
keep = torch.ones(len(x), dtype=torch.bool)
keep[found] = False
chance = torch.randperm(len(x), generator=generator)[: int(keep.sum())]
choices = {
    "all samples": (x, given),
    "without random ones": (x[chance], given[chance]),
    "without those found": (x[keep], given[keep]),
    "no wrong labels": (x, y),
}
accuracies = {}
for name, (inputs, targets) in choices.items():
    runs = [[*train(inputs, targets, seed, epochs=20)][-1] for seed in (1, 2)]
    accuracies[name] = sum(accuracy(model, u, v) for model in runs) / len(runs)
    print(f"  {name:20s} {accuracies[name]:6.1%} of {len(u)} new digits are right")
assert accuracies["without those found"] > accuracies["all samples"] + 0.005
assert accuracies["without those found"] > accuracies["without random ones"] + 0.005

# %% [markdown]
# ## One picture
#
# Below: the samples with the largest sums, and under each the one that it contradicts most.

# %% mystnb={"image": {"alt": "How well wrong labels are found by epoch; the worst digits, and what they contradict"}}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
figure = plt.figure(figsize=(9.5, 7), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=[1.3, 1])
left, right = above.subplots(1, 2)
for (name, values), colour, style in zip(
    auc.items(), (BLUE, BLUE, ORANGE, ORANGE), ("o:", "o-", "s:", "s-"), strict=True
):
    left.plot(CHECKPOINTS, values, style, color=colour, label=name, markersize=4)
left.set(ylim=(0.8, 1.005), xlabel="epoch", ylabel="area under the ROC curve", title="finding the wrong labels")
left.legend(frameon=False, loc="lower left")
sums = scores["self-influence, summed"]
bins = torch.logspace(float(sums.min().log10()), float(sums.max().log10()), 40).tolist()
for which, colour, name in ((~wrong, BLUE, "label is right"), (wrong, ORANGE, "label is wrong")):
    right.hist(sums[which].numpy(), bins, color=colour, histtype="step", linewidth=2, label=name)
right.set(
    xscale="log",
    xlabel="squared gradient norm, summed over checkpoints",
    ylabel="samples",
    title=f"after epoch {EPOCHS}",
)
right.legend(frameon=False)
SHOWN = 9
for column, pair in enumerate(
    zip(below.subplots(2, SHOWN).T, found[:SHOWN].tolist(), opponent[:SHOWN].tolist(), strict=True)
):
    (top, bottom), sample, other = pair
    for ax, i in ((top, sample), (bottom, other)):
        ax.imshow(x[i, 0].numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(
            f"“{int(given[i])}”" + (f", is {int(y[i])}" if wrong[i] else ""),
            fontsize=10,
            color=ORANGE if wrong[i] else "black",
        )
        for spine in ax.spines.values():
            spine.set(color=ORANGE if wrong[i] else GREY, linewidth=2 if wrong[i] else 0.5)
    if column == 0:
        top.set_ylabel("suspected")
        bottom.set_ylabel("contradicts")
below.suptitle("labels as given; in orange those that are wrong", fontsize=11)
plt.show()
