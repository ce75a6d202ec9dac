# %% [markdown]
# # Per-sample gradients while a network trains
#
# A small convolutional network learns scikit-learn's handwritten digits. Five per cent of the training labels are
# wrong. Along the way we look at what the average gradient hides: how long the gradients of single samples are, how
# noisy their mean is, and which samples are unusual. Nothing here needs more than one backward pass per step.

# %%
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import persample

STEPS = int(os.environ.get("PERSAMPLE_DEMO_STEPS", "240"))
PICTURE = Path(os.environ.get("PERSAMPLE_DEMO_PICTURE", "build/demo.png"))
BATCH, FLIPPED = 128, 0.05
torch.set_num_threads(1)  # tensors this small gain nothing from more


# %% [markdown]
# ## Data, with some labels flipped


# %%
def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]``, labels ``[N]`` of which some are wrong, and which those are ``[N]``."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: int(FLIPPED * len(labels))]] = True
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return images, torch.where(wrong, (labels + shift) % 10, labels), wrong


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


# %% [markdown]
# ## Training, with the gradients of every sample
#
# `persample.gradients` takes the place of `loss.backward()`: its `backward()` writes the mean gradient into `.grad`.
# From the norms and the norm of the mean follows the gradient noise scale `tr(Sigma) / |g|^2` of McCandlish et al.
# (2018): roughly, the batch size beyond which larger batches stop helping. Numerator and denominator are averaged
# separately, since on a single batch the denominator may even be negative.


# %%
def train(images: Tensor, labels: Tensor) -> tuple[nn.Sequential, list[dict[str, float]]]:
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    history: list[dict[str, float]] = []
    trace = signal = 0.0
    for step in range(STEPS):
        pick = torch.randperm(len(labels), generator=generator)[:BATCH]
        G = persample.gradients(model, criterion, images[pick], labels[pick])
        optimizer.zero_grad()
        G.backward()
        optimizer.step()

        squared, n = G.squared_norm(), len(G)
        mean_squared = sum(g.square().sum() for g in G.mean().values())
        trace = 0.95 * trace + 0.05 * float(n / (n - 1) * (squared.mean() - mean_squared))
        signal = 0.95 * signal + 0.05 * float((n * mean_squared - squared.mean()) / (n - 1))
        assert G.losses is not None
        history.append(
            {
                "loss": float(G.losses.mean()),
                "median norm": float(squared.sqrt().median()),
                "noise scale": trace / signal,
            }
        )
        if step % max(1, STEPS // 6) == 0 or step == STEPS - 1:
            print(
                f"  step {step:4d}   loss {history[-1]['loss']:.3f}   median norm {history[-1]['median norm']:7.3f}"
                f"   noise scale {history[-1]['noise scale']:8.1f}",
                flush=True,
            )
    return model, history


# %%
images, labels, wrong = digits()
print(
    f"digits: {len(labels)} samples, {int(wrong.sum())} of them with a wrong label\n\ntraining a conv net with "
    f"batches of {BATCH}"
)
model, history = train(images, labels)

# %% [markdown]
# ## What the gradients say at the end

# %%
criterion = nn.CrossEntropyLoss()
G = persample.gradients(model, criterion, images, labels)
norm = G.norm()
print(f"\n{G}")
print("\ngradient norm of single samples: quantiles")
for q in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0):
    print(f"  {q:4.0%}  {float(norm.quantile(q)):9.4f}")

# %% [markdown]
# Signal-to-noise: `mean^2 / variance` of every weight over the samples, averaged over the weights of a layer.

# %%
mean, variance = G.mean(), G.variance(ddof=1)
print("\nsignal-to-noise ratio by layer (mean over weights of mean^2 / variance)")
snr = {name: float((mean[name].square() / variance[name].clamp(min=1e-20)).mean()) for name in G.names}
for name, value in snr.items():
    print(f"  {name:10s} {value:.2e}")

# %% [markdown]
# Samples with long gradients are those that the network has not made its peace with. Many of them have a wrong label.

# %%
order = norm.argsort(descending=True)
flipped = int(wrong.sum())
found = int(wrong[order[:flipped]].sum())
print("\nthe most unusual samples")
for i in order[:8].tolist():
    print(
        f"  sample {i:4d}   norm {float(norm[i]):8.3f}   label {int(labels[i])}   {'wrong label' if wrong[i] else ''}"
    )
print(
    f"\n{found} of the {flipped} flipped labels are among the top {flipped} by gradient norm "
    f"(chance: {flipped**2 / len(labels):.1f})"
)

# %% [markdown]
# The rows are exact: those of three samples agree with running each of them alone.

# %%
alone = persample.gradients(model, criterion, images[:3], labels[:3], engine="loop")
error = float((alone.flat() - G.select(None).flat()[:3]).norm() / alone.flat().norm())
print(f"relative difference to three samples run alone: {error:.1e}")
assert error < 1e-4

# %% [markdown]
# ## One picture


# %% mystnb={"image": {"alt": "Norms at the end; noise scale while training; signal by parameter; unusual digits"}}
def picture(path: Path) -> None:
    blue, orange, grey = "#0072B2", "#D55E00", "#666666"
    figure = plt.figure(figsize=(9.5, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.5, 1])
    axes = above.subplot_mosaic([["norms", "norms"], ["noise", "signal"]])
    ax, middle, right = axes["norms"], axes["noise"], axes["signal"]
    bins = np.geomspace(max(float(norm.min()), 1e-6), float(norm.max()), 40)
    ax.hist(
        [norm[~wrong].numpy(), norm[wrong].numpy()],
        bins=bins,
        histtype="step",
        linewidth=2,
        color=[blue, orange],
        label=["label as given", "label flipped"],
    )
    ax.set(xscale="log", xlabel="gradient norm of a sample", ylabel="samples", title="Gradient norms at the end")
    ax.legend(frameon=False, loc="upper left")
    middle.plot([h["noise scale"] for h in history], color=blue)
    middle.axhline(BATCH, color=grey, linestyle="--", linewidth=1)
    middle.annotate(
        "batch size used",
        (1, BATCH),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -12),
        textcoords="offset points",
        ha="right",
        color=grey,
    )
    middle.set(yscale="log", xlabel="step", ylabel="samples", title="Gradient noise scale")
    right.barh(list(snr)[::-1], [1e3 * value for value in snr.values()][::-1], color=blue)
    right.set(xlabel="mean² / variance, in thousandths", title="Signal-to-noise by parameter")
    for i, ax in zip(order[:10].tolist(), below.subplots(1, 10), strict=True):
        ax.imshow(images[i, 0].numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(
            f"“{int(labels[i])}”\n|g| = {float(norm[i]):.1f}", fontsize=9, color=orange if wrong[i] else "black"
        )
        for spine in ax.spines.values():
            spine.set(color=orange if wrong[i] else grey, linewidth=2 if wrong[i] else 0.5)
    below.suptitle("The most unusual samples: labels as given, in orange those flipped beforehand", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


picture(PICTURE)
print(f"\npicture: {PICTURE}")
assert found > 3 * flipped**2 / len(labels)
