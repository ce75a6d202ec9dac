# %% [markdown]
# # Per-sample gradients in ten minutes
#
# The gradient of a training step is a mean over samples. This is what the mean is made of: one call, and what can be
# asked of its result.

# %%
from __future__ import annotations

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import persample

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(data.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(8 * 16, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
)
criterion = nn.CrossEntropyLoss()
x, y = images[:64], labels[:64]

# %% [markdown]
# ## One call
#
# `G` stands for a matrix with one row per sample. Row `n` is the gradient of the loss of sample `n`, not scaled by
# anything. What is kept are *factors* of the rows; the table says in which form, how much memory they take, and how
# long the gradients are.

# %%
G = persample.gradients(model, criterion, x, y)
G

# %% [markdown]
# The rows themselves are there if you want them: `[N, *P]` for a parameter of shape `P`.

# %%
rows = G["4.weight"]
print(rows.shape)
ordinary = torch.autograd.grad(criterion(model(x), y), model[4].weight)[0]
torch.testing.assert_close(rows.mean(0), ordinary)  # their mean is the ordinary gradient

alone = torch.autograd.grad(criterion(model(x[7:8]), y[7:8]), model[4].weight)[0]
torch.testing.assert_close(rows[7], alone)  # and row 7 is what sample 7 gives on its own

# %% [markdown]
# ## Questions that need no rows
#
# Norms, inner products, variances, clipped sums and projections are computed from the factors. Most of them cost about
# as much as one backward pass.

# %%
print("norms of the first five      ", [round(v, 2) for v in G.norm()[:5].tolist()])
print("inner products of all pairs  ", tuple(G.gram().shape))
print("variance of every weight     ", {name: tuple(v.shape) for name, v in G.variance(ddof=1).items()}["4.weight"])
print("sum of rows clipped to norm 1", {name: tuple(v.shape) for name, v in G.clip(1.0).items()}["4.weight"])

flat = G.flat()  # [N, D], for comparison
torch.testing.assert_close(G.norm(), flat.norm(dim=1))
torch.testing.assert_close(G.gram(), flat @ flat.T, rtol=1e-3, atol=1e-3)

# %% [markdown]
# ## Which samples agree
#
# The cosine of two gradients says whether a step on one sample helps the other. Samples of one class mostly help each
# other: their block of the matrix is bright.

# %%
order = y.argsort(stable=True)
cosine = G.cosine()[order][:, order]
same = y[order][:, None] == y[order]
different = ~torch.eye(len(y), dtype=torch.bool)
print(f"mean cosine within a class {cosine[same & different].mean():.2f}, between classes {cosine[~same].mean():.2f}")
assert cosine[same & different].mean() > cosine[~same].mean() + 0.3

# %% [markdown]
# ## Training with them
#
# `G.backward()` writes the mean gradient into `.grad`, as `loss.backward()` would; `G.backward(weight)` any weighted
# sum. Here every sample is clipped to norm 1, so that no single one can pull the others along.

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
generator = torch.Generator().manual_seed(0)
history = []
for _ in range(60):
    pick = torch.randperm(len(labels), generator=generator)[:64]
    G = persample.gradients(model, criterion, images[pick], labels[pick])
    optimizer.zero_grad()
    G.backward(torch.where(G.norm() > 1, 1 / G.norm(), 1.0) / len(G))
    optimizer.step()
    history.append(G.norm())
accuracy = float((model(images).argmax(1) == labels).float().mean())
print(f"{accuracy:.1%} of the digits are right")
assert accuracy > 0.85

# %% [markdown]
# In a loop of your own, record what the model does. Your losses, your graph and your `.grad` stay as they are:

# %%
with persample.extend(model) as recorder:
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")  # [N]
    norms = recorder.gradients(losses).norm()
    losses.mean().backward()
torch.testing.assert_close(norms, persample.gradients(model, criterion, x, y).norm())

# %% [markdown]
# ## Is it right?
#
# The first call for a model runs one sample alone and compares. `check` does it for several, parameter by parameter;
# `explain` says beforehand what serves each of them, and what it would take.

# %%
report = persample.check(model, criterion, x, y)
assert report.ok
report

# %%
persample.explain(model, criterion, x, y)

# %% [markdown]
# ## One picture
#
# At the start all gradients are about equally long. While the network learns, most become short, and a few samples are
# left to be learned.

# %% mystnb={"image": {"alt": "Cosines by class; gradient norms while training; a histogram of norms at the end"}}
mosaic = [["cosines", "training"], ["cosines", "end"]]
figure, axes = plt.subplot_mosaic(mosaic, figsize=(9.5, 5), width_ratios=[1.3, 1], layout="constrained")
left, middle, right = axes["cosines"], axes["training"], axes["end"]
image = left.imshow(cosine.numpy(), cmap="PuOr", vmin=-1, vmax=1)
left.set(title="cosines at the start, samples by class", xlabel="sample", ylabel="sample")
figure.colorbar(image, ax=left, shrink=0.8, label="cosine")
for q, colour in ((0.5, "#0072B2"), (0.95, "#D55E00")):
    middle.plot([float(norm.quantile(q)) for norm in history], color=colour, label=f"{q:.0%} quantile")
middle.set(yscale="log", title="gradient norms while training", xlabel="step", ylabel="norm (unscaled loss)")
middle.legend(frameon=False)
G.plot(right)
plt.show()
