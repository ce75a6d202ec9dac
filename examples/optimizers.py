# %% [markdown]
# # Optimizers that look at single samples
#
# Each optimizer of `persample.optim` next to its plain counterpart, on scikit-learn's handwritten digits: what it is
# for, whether it does that, and what it costs. Differences that are not there are shown as well.

# %%
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import persample
from persample import optim

SEEDS = range(int(os.environ.get("PERSAMPLE_OPTIMIZERS_SEEDS", "2")))
torch.set_num_threads(1)  # tensors are small here: more threads would wait for each other
data = load_digits()
order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
images, labels = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
x, y, u, v = images[:1280], labels[:1280], images[1280:], labels[1280:]
loss_fn = nn.CrossEntropyLoss()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batches(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(len(x), generator=generator).split(size)


def gradients(model: nn.Module, batch: Tensor, labels: Tensor = y) -> persample.Gradients:
    return persample.gradients(model, loss_fn, x[batch], labels[batch])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float((model(u).argmax(1) == v).float().mean())


@torch.no_grad()
def train_loss(model: nn.Module) -> float:
    return float(loss_fn(model(x), y))


def average(run: Callable[[int], float]) -> float:
    return sum(run(seed) for seed in SEEDS) / len(SEEDS)


# %% [markdown]
# ## Clipping
#
# Clipping bounds what a single sample can do. That is needed for privacy, where noise is added next (accounting is
# yours), and it helps against samples that are wrong: here up to 40 % of the labels.


# %%
def clipped(seed: int, wrong: float, bound: float | None, noise: float = 0.0, adam: bool = False) -> float:
    generator = torch.Generator().manual_seed(seed)
    flip = torch.rand(len(y), generator=generator) < wrong
    given = torch.where(flip, torch.randint(0, 10, y.shape, generator=generator), y)
    model = network(seed)
    parameters = list(model.named_parameters())
    opt: torch.optim.Optimizer
    if bound is None:
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
    elif adam:
        opt = optim.ClippedAdam(parameters, lr=0.01, max_norm=bound, noise_multiplier=noise, generator=generator)
    else:  # clipped gradients are shorter: a larger learning rate
        opt = optim.ClippedSGD(parameters, lr=1.0, max_norm=bound, noise_multiplier=noise, generator=generator)
    for batch in batches(64, 12, seed):
        G = gradients(model, batch, given)
        if bound is None:
            opt.zero_grad()
            G.backward()
            opt.step()
        else:
            opt.step(G)
    return accuracy(model)


print("test accuracy after 12 epochs          clean labels   40 % random labels")
table = {
    "SGD": {"bound": None},
    "ClippedSGD, C = 1": {"bound": 1.0},
    "ClippedSGD, C = 1, noise sigma = 1": {"bound": 1.0, "noise": 1.0},
    "ClippedAdam, C = 1, noise sigma = 1": {"bound": 1.0, "noise": 1.0, "adam": True},
}
clipping = {}
for name, options in table.items():
    found = [average(lambda seed, w=w, o=options: clipped(seed, w, **o)) for w in (0.0, 0.4)]
    clipping[name] = found
    print(f"  {name:40s} {found[0]:6.1%}        {found[1]:6.1%}")
assert clipping["ClippedSGD, C = 1"][1] > clipping["SGD"][1]
assert min(clipping["ClippedAdam, C = 1, noise sigma = 1"]) > 0.8

# %% [markdown]
# On clean labels clipping costs a little (hard samples are held back), on wrong ones it helps; noise costs more.
#
# ## Adam that doesn't know the batch size
#
# The second moment of ordinary Adam is that of the mean gradient, which contains less noise in larger batches. Taken
# over groups of 16 samples it means the same for every batch size. With `lr` and `1 - beta` in proportion to the batch
# size, the same number of *samples* should then lead to the same loss.


# %%
def adam(seed: int, size: int, group: int | None) -> float:
    model, scale = network(seed), size / 16
    betas = (0.99**scale, 0.999**scale)
    opt = optim.PerSampleAdam(model.named_parameters(), lr=1e-3 * scale, betas=betas, group_size=group)
    for batch in batches(size, 10, seed):
        opt.step(gradients(model, batch))
    return train_loss(model)


sizes, groups = (16, 64, 256), {"Adam": None, "PerSampleAdam, groups of 16": 16}
adams = {name: [average(lambda seed, n=n, g=g: adam(seed, n, g)) for n in sizes] for name, g in groups.items()}
spread = {name: max(found) / min(found) for name, found in adams.items()}
print("\ntraining loss after 10 epochs         ", *[f"B = {size:3d}  " for size in sizes], " largest / smallest")
for name, found in adams.items():
    print(f"  {name:36s}", *[f"{loss:7.4f}  " for loss in found], f"   {spread[name]:.2f}")
assert spread["PerSampleAdam, groups of 16"] < spread["Adam"]
assert abs(adams["Adam"][0] / adams["PerSampleAdam, groups of 16"][0] - 1) < 1e-3  # at B = 16 they are the same


# %% [markdown]
# ## Natural gradient
#
# The damped inverse Fisher matrix of a batch of 256, from its 256 x 256 Gram matrix. It makes more of every *step* than
# SGD with any of several learning rates. But a step of so small a network takes several times as long (last column, as
# a multiple of a step of SGD in this run): fewer steps are not less time here.


# %%
def descend(seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], natural: bool) -> tuple[float, float]:
    model, start = network(seed), time.perf_counter()
    opt = make(model)
    steps = 0
    for batch in batches(256, 8, seed):
        steps += 1
        if natural:
            opt.step(gradients(model, batch))
        else:
            opt.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            opt.step()
    return train_loss(model), (time.perf_counter() - start) / steps


methods: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD, lr 0.3": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "SGD, lr 1": lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
    "SGD, lr 3": lambda m: torch.optim.SGD(m.parameters(), lr=3.0),
    "NaturalGradient, lr 0.3": lambda m: optim.NaturalGradient(m.named_parameters(), lr=0.3, damping=0.1),
}
print("\ntraining loss after 40 steps             loss     time of a step")
natural, took = {}, {}
for name, make in methods.items():
    runs = [descend(seed, make, name.startswith("Natural")) for seed in SEEDS]
    natural[name], took[name] = sum(loss for loss, _ in runs) / len(runs), min(t for _, t in runs)
    print(f"  {name:36s} {natural[name]:7.4f}  {took[name] / took['SGD, lr 0.3']:10.1f} x")
assert natural["NaturalGradient, lr 0.3"] < min(loss for name, loss in natural.items() if name.startswith("SGD"))
assert took["NaturalGradient, lr 0.3"] > 2 * took["SGD, lr 0.3"]


# %% [markdown]
# ## A batch size that grows
#
# Small batches at first, when most samples agree, larger ones when noise hides the mean gradient: the norm test keeps
# the relative error of the mean gradient at about 0.9. All runs see the same number of samples.


# %%
def growing(seed: int, size: int, adaptive: bool) -> tuple[float, int, int]:
    model, seen, steps = network(seed), 0, 0
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    controller = optim.AdaptiveBatchSize(size, optim.by_norm_test(0.9), maximum=256)
    stream = iter([int(i) for batch in batches(1280, 8, seed) for i in batch])
    for chosen in controller.batches(stream):
        G = gradients(model, torch.tensor(chosen))
        opt.zero_grad()
        G.backward()
        opt.step()
        if adaptive:
            controller.update(G)
        seen, steps = seen + len(chosen), steps + 1
    assert seen == 8 * 1280
    return train_loss(model), steps, controller.size


print("\nthe same 10,240 samples                  loss     steps   last batch size")
sizing = {}
sized = {"B = 16": (16, False), "B = 27": (27, False), "B = 128": (128, False), "B = 16 and growing": (16, True)}
for name, (size, adaptive) in sized.items():
    triples = [growing(seed, size, adaptive) for seed in SEEDS]
    sizing[name] = [sum(column) / len(triples) for column in zip(*triples, strict=True)]
    print(f"  {name:36s} {sizing[name][0]:7.4f}  {sizing[name][1]:7.0f}   {sizing[name][2]:7.0f}")
assert sizing["B = 16 and growing"][1] < 0.7 * sizing["B = 16"][1]
assert sizing["B = 16 and growing"][0] < sizing["B = 128"][0]

# %% [markdown]
# It saves 40 % of the steps of `B = 16` for a little loss. A constant size with as many steps (27) is about as good
# here: the gain is that nobody had to know that number.
#
# ## Gradient surgery
#
# What is best for the average class can be uphill for a single one. Surgery (PCGrad) takes from the gradient of every
# class what points against others. We look at the class that a step treats worst: the cosine between its gradient and
# the step, averaged over training. Conflicts get milder but stay, and the training loss falls faster at this
# learning rate. New digits are classified no better for it.


# %%
def surgery(seed: int, weighting: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    model, worst, steps = network(seed), 0.0, 0
    opt = optim.GradientSurgery(model.named_parameters(), weighting, lr=0.5)
    for batch in batches(64, 10, seed):
        G, classes = gradients(model, batch), y[batch]
        K = G.gram()
        w = optim.surgery_weights(K, weighting, classes)  # the step is w^T G
        A = nn.functional.one_hot(classes).float().T  # [classes, samples]
        lengths = (A @ K @ A.T).diagonal().sqrt() * (w @ K @ w).sqrt()
        worst, steps = worst + float((A @ K @ w / lengths)[lengths > 0].min()), steps + 1
        opt.step(G, classes)
    return accuracy(model), train_loss(model), worst / steps


def mean_weights(K: Tensor) -> Tensor:
    return torch.full_like(K[0], 1 / len(K))


print("\nafter 10 epochs                       test accuracy   training loss   cosine of the worst class")
operated = {}
for name, weighting in {"mean of the classes": mean_weights, "surgery (PCGrad)": optim.pcgrad_weights}.items():
    results = [surgery(seed, weighting) for seed in SEEDS]
    operated[name] = [sum(column) / len(results) for column in zip(*results, strict=True)]
    print(f"  {name:40s} {operated[name][0]:6.1%}        {operated[name][1]:7.4f}        {operated[name][2]:7.3f}")
assert operated["surgery (PCGrad)"][2] > operated["mean of the classes"][2] + 0.1
assert operated["surgery (PCGrad)"][1] < operated["mean of the classes"][1]

# %% [markdown]
# ## One picture

# %% mystnb={"image": {"alt": "Accuracy with clipping; loss by batch size, by steps, and by natural gradient"}}
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
figure, ((left, middle), (right, last)) = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
places = range(len(clipping))
for which, (name, colour, marker) in enumerate((("clean labels", BLUE, "o"), ("40 % random labels", ORANGE, "s"))):
    found = [100 * column[which] for column in clipping.values()]
    left.plot(found, places, marker, color=colour, label=name)
left.set_yticks(places, [name.replace(", ", ",\n") for name in clipping], fontsize=9)
left.set(xlabel="test accuracy, %", ylim=(3.4, -1.2), title="clipping, after 12 epochs")
left.grid(axis="x", color="#dddddd")
left.legend(fontsize=9, frameon=False, loc="upper center", ncols=2, columnspacing=1)
for (name, losses), colour, marker in zip(adams.items(), (GREY, BLUE), "os", strict=True):
    middle.plot(sizes, losses, marker=marker, color=colour, label=name)
middle.set(xscale="log", xlabel="batch size, samples", ylabel="training loss", title="the same samples, by Adam")
middle.set_ylim(0, 1.35 * max(max(losses) for losses in adams.values()))
middle.set_xticks(sizes, [str(size) for size in sizes])
middle.minorticks_off()
middle.legend(frameon=False, fontsize=9, loc="upper left")
for (name, (loss, steps, _)), colour, marker in zip(sizing.items(), (BLUE, GREEN, PURPLE, ORANGE), "os^D", strict=True):
    right.plot(steps, loss, marker, color=colour, label=name)
right.set(xlabel="steps", ylabel="training loss", title="the same samples, by SGD", xlim=(0, None), ylim=(0, None))
right.legend(frameon=False, fontsize=9)
last.barh(list(natural)[::-1], list(natural.values())[::-1], color=[ORANGE, GREY, GREY, GREY])
last.set_yticks(range(4), [name.replace(", ", ",\n") for name in list(natural)[::-1]], fontsize=9)
last.set(xlabel="training loss", title="after 40 steps with batches of 256")
plt.show()
