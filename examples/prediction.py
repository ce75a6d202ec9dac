# %% [markdown]
# # One prediction, and the samples behind it
#
# A network says that a digit is an 8. Which training digits made it say so, and which spoke against it? We ask several
# methods of `persample.attribution` about a few uncertain predictions, look at the answers, and then check them in the
# only way that counts: train again without the samples that were named, and see what becomes of the prediction.

# %%
from __future__ import annotations

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import persample
from persample import attribution

torch.set_num_threads(1)  # tensors are small here: more threads would wait for each other
data = load_digits()
order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
images, labels = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
TRAIN, STEPS, LR, DECAY = 500, 100, 0.01, 1e-3
x, y, u, v = images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]
criterion = nn.CrossEntropyLoss()
Parameters = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


# %% [markdown]
# Models are trained by Adam on all of their samples in every step, many at once (`vmap`): each has a row of weights
# that says which samples it sees, and an initialisation.


# %%
def train(weights: Tensor, seeds: list[int], saved: tuple[int, ...] = ()) -> tuple[Parameters, list[Parameters]]:
    """One network per row of ``weights [models, TRAIN]``; and those after the ``saved`` steps."""
    skeleton = network(0)
    stacked, _ = stack_module_state([network(seed) for seed in seeds])
    parameters = {name: p.detach() for name, p in stacked.items()}

    def loss(parameters: Parameters, weight: Tensor) -> Tensor:
        losses = F.cross_entropy(functional_call(skeleton, parameters, (x,)), y, reduction="none")
        return weight @ losses / weight.sum()

    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    checkpoints = []
    for t in range(1, STEPS + 1):
        slopes = vmap(grad(loss))(parameters, weights)
        for name, p in parameters.items():
            g = slopes[name] + DECAY * p
            first[name].lerp_(g, 0.1)
            second[name].lerp_(g.square(), 0.001)
            p -= LR * first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
        if t in saved:
            checkpoints.append({name: p.clone() for name, p in parameters.items()})
    return parameters, checkpoints


def one(parameters: Parameters, which: int = 0) -> nn.Module:
    """One of the networks, in double precision."""
    model = network(0)
    model.load_state_dict({name: p[which] for name, p in parameters.items()})
    return model.double()


def margins(parameters: Parameters, inputs: Tensor, targets: Tensor) -> Tensor:
    """``[models, n]``: ``log p / (1 - p)`` of the right class."""
    skeleton = network(0)
    outputs = vmap(lambda p: functional_call(skeleton, p, (inputs,)))(parameters)
    return torch.stack([attribution.margin(logits, targets) for logits in outputs])


# %% [markdown]
# ## The predictions
#
# Of the new digits we take those that are classified correctly with the smallest margins: single samples can't do much
# about a prediction that is certain anyway.

# %%
ASKED, SEED = 8, 0
trained, checkpoints = train(torch.ones(1, TRAIN), [SEED], saved=(25, 50, 75, 100))
model = one(trained)
everything = margins(trained, u, v)[0]
print(f"{float((everything > 0).float().mean()):.1%} of {len(u)} new digits are right")
asked = torch.where(everything > 0, everything, torch.inf).argsort()[:ASKED]
tests, truth = u[asked], v[asked]

# %% [markdown]
# ## Eight answers
#
# From the per-sample gradients of one model: their inner products, cosines, inner products summed over four checkpoints
# (TracIn), through the inverse of the empirical Fisher matrix, and TRAK. None of them may be taken on trust, so there
# are three simple answers as well: similar images (of the same class as helpful ones, of other classes as harmful
# ones), any samples of the same class, and any samples. Scores are positive where a training sample helps.

# %%
inputs, queries = x.double(), tests.double()
G = persample.gradients(model, criterion, inputs, y)
H = persample.gradients(model, criterion, queries, truth)
pairs = []
for parameters in checkpoints:
    net = one(parameters)
    pairs.append(
        (LR, persample.gradients(net, criterion, inputs, y), persample.gradients(net, criterion, queries, truth))
    )
A = persample.gradients(model, attribution.margin, inputs, y)
B = persample.gradients(model, attribution.margin, queries, truth)
R = attribution.Projection(512, seed=0)
same = y[:, None] == truth
near = 1 / (1 + torch.cdist(inputs, queries))
chance = torch.rand(TRAIN, ASKED, generator=torch.Generator().manual_seed(0))
scores = {
    "grad-dot": attribution.grad_dot(G, H),
    "grad-cos": attribution.grad_cos(G, H),
    "TracIn": attribution.tracin(pairs),
    "empirical Fisher": attribution.empirical_fisher_influence(G, H, damping=1e-3),
    "TRAK": attribution.trak(A.project(R), B.project(R), torch.sigmoid(-A.losses), damping=1.0),
    "similar images": torch.where(same, near, -near),
    "any of the class": torch.where(same, chance, -chance),
    "any": chance,
}

# %% [markdown]
# ## The check
#
# For every question and every answer: train without the fifteen samples with the largest scores, and without the
# fifteen with the smallest, with two initialisations (that of the explained model, and another). What moves is the
# margin of the question: down, if helpful samples are gone; up, if harmful ones are.

# %%
LEFT_OUT, SEEDS = 15, (SEED, SEED + 1)


def without(score: Tensor) -> Tensor:
    """``[questions]``: the change of each margin when the samples with its largest scores are left out."""
    weights = torch.ones(ASKED + 1, TRAIN)  # the last one: nothing left out
    weights[:ASKED].scatter_(1, score.topk(LEFT_OUT, 0).indices.T, 0)
    changes = torch.zeros(ASKED)
    for seed in SEEDS:
        found = margins(train(weights, [seed] * len(weights))[0], tests, truth)
        changes += (found[:-1].diagonal() - found[-1]) / len(SEEDS)
    return changes


helped, harmed = {}, {}
print(f"change of the margin without {LEFT_OUT} of {TRAIN} samples, on average over {ASKED} predictions")
print("                         helpful ones   harmful ones")
for name, score in scores.items():
    helped[name], harmed[name] = without(score), without(-score)
    print(f"  {name:20s} {float(helped[name].mean()):12.2f} {float(harmed[name].mean()):15.2f}")

average = {name: (float(helped[name].mean()), float(harmed[name].mean())) for name in scores}
fisher, similar, of_class, random = (
    average[name] for name in ("empirical Fisher", "similar images", "any of the class", "any")
)
assert all(average[name][0] < of_class[0] - 0.2 for name in list(scores)[:5])
assert all(average[name][1] > max(of_class[1], random[1]) + 0.2 for name in list(scores)[:5])
assert fisher[0] < of_class[0] - 1.5 and fisher[1] > similar[1] + 0.2
assert similar[0] < average["grad-dot"][0]

# %% [markdown]
# Every method beats chance, also chance within the class. Curvature pays: the empirical Fisher matrix is ahead of plain
# inner products. But look at the similar images: to find the samples behind a prediction on data as simple as this, no
# gradient was needed. Gradients are ahead in finding what spoke *against* it.
#
# ## One prediction

# %%
QUESTION = 0
score = scores["empirical Fisher"][:, QUESTION]
helpful, harmful = score.topk(LEFT_OUT).indices, (-score).topk(LEFT_OUT).indices
print(f"a {int(truth[QUESTION])}, with a margin of {float(everything[asked[QUESTION]]):.2f}")
for name, found, change in (("most helpful", helpful, helped), ("most harmful", harmful, harmed)):
    print(f"  {name}: labels {y[found].tolist()}; without them {float(change['empirical Fisher'][QUESTION]):+.2f}")
probabilities = torch.softmax(model(queries[QUESTION]).detach(), 0)
print("  probabilities", {digit: round(float(p), 2) for digit, p in enumerate(probabilities) if p > 0.05})

# %% [markdown]
# ## One picture

# %% mystnb={"image": {"alt": "A digit, its most helpful and harmful training digits; changes of the margin"}}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
SHOWN = 6
figure = plt.figure(figsize=(9, 7.5), layout="constrained")
above, below = figure.subfigures(2, 1)
mosaic = [["asked", *(f"+{i}" for i in range(SHOWN))], ["asked", *(f"-{i}" for i in range(SHOWN))]]
axes = above.subplot_mosaic(mosaic, width_ratios=[1.8] + [1] * SHOWN)


def show(ax: plt.Axes, image: Tensor, title: str, colour: str) -> None:
    ax.imshow(image.view(8, 8).numpy(), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set(color=colour, linewidth=2)


show(axes["asked"], tests[QUESTION], f"predicted: {int(truth[QUESTION])} (right)", GREY)
for i in range(SHOWN):
    show(axes[f"+{i}"], x[helpful[i]], f"“{int(y[helpful[i]])}”", BLUE)
    show(axes[f"-{i}"], x[harmful[i]], f"“{int(y[harmful[i]])}”", ORANGE)
axes["+0"].set_ylabel("most helpful", color=BLUE)
axes["-0"].set_ylabel("most harmful", color=ORANGE)
above.suptitle("one prediction, and training samples behind it (empirical Fisher)", fontsize=11)
ax = below.subplots()
for found, colour, name in ((helped, BLUE, "without the most helpful"), (harmed, ORANGE, "without the most harmful")):
    for place, method in enumerate(reversed(scores)):
        ax.plot(found[method], [place] * ASKED, ".", color=colour, alpha=0.4, markersize=5)
        ax.plot(float(found[method].mean()), place, "D", color=colour, label=name if place == 0 else None)
ax.axvline(0, color=GREY, linewidth=1)
ax.set_yticks(range(len(scores)), list(reversed(scores)))
ax.set(xlabel="change of the margin, log p/(1 - p)")
ax.set_title(f"trained without {LEFT_OUT} samples: {ASKED} predictions, and their mean", fontsize=11)
ax.legend(frameon=False, loc="lower left")
plt.show()
