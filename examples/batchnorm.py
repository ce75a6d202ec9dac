# %% [markdown]
# # What BatchNorm does to per-sample gradients
#
# In training mode a BatchNorm layer normalises with the mean and variance of the batch. The loss of one sample then
# depends on all the others. We walk through that coupling on scikit-learn's handwritten digits, with a small network of
# two BatchNorm layers: who is coupled, by which layer, how strongly, and what becomes of "the gradient of sample `n`".

# %%
from __future__ import annotations

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

import persample
from persample import batchnorm

torch.manual_seed(0)
data = load_digits()
images, labels = torch.tensor(data.images).unsqueeze(1) / 16, torch.tensor(data.target)  # float64
model = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10),
).double()  # fmt: skip
criterion = nn.CrossEntropyLoss()

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for pick in torch.randperm(len(labels)).split(64):  # one epoch, so that it isn't about random weights
    optimizer.zero_grad()
    criterion(model(images[pick]), labels[pick]).backward()
    optimizer.step()

x, y = images[:32], labels[:32]

# %% [markdown]
# ## An error first
#
# Asked for per-sample gradients, persample refuses, and names the layer and the parameters in front of it. What follows
# the last BatchNorm is not coupled, and is served as ever.

# %%
try:
    persample.gradients(model, criterion, x, y)
except persample.BatchCoupledError as error:
    print(error)
free = persample.gradients(model, criterion, x, y, params=["5.weight", "5.bias", "8.weight", "8.bias"])
print(free)

# %% [markdown]
# ## The coupling
#
# `coupling` takes the statistics of both layers as variables. The table lists, for each call of a BatchNorm, which
# parameters its statistics are the first to couple, and how much the losses depend on them.

# %%
coupling = persample.coupling(model, criterion, x, y)
coupling

# %% [markdown]
# `norms()[n, m]` says how much loss `n` depends on the parameters *as sample `m` uses them*. Without BatchNorm it would
# be diagonal. Here everybody has a part in everybody's loss; the diagonal is left out of the picture, since it is
# much larger than the rest.

# %% mystnb={"image": {"alt": "Heat map of how much each loss depends on the other samples"}}
ax = coupling.plot()
print(f"on average {float(coupling.data_coupling().mean()):.0%} of a loss' gradient table lies with other samples")
print(f"{float(coupling.theta_coupling().mean()):.0%} of a loss' gradient flows through the statistics")

# %% [markdown]
# Which layers and channels do it, and along how many directions:

# %% mystnb={"image": {"alt": "Coupling by layer and channel; singular values of the influence through the statistics"}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
batchnorm.plot_layers(coupling, left)
batchnorm.plot_spectrum(coupling, right)
plt.show()

# %% [markdown]
# ## Five gradients of one sample
#
# Row sums of the table are the true gradients of the losses (`"loss"`); column sums are what hooks give (`"copy"`).
# Both sum to the gradient of the batch. With the statistics held fixed (`"frozen"`), or the running ones (`"eval"`),
# they don't. `"influence"` says how the batch gradient moves with the weight of a sample, in the loss and in the
# statistics.

# %%
found = {notion: coupling.gradients(notion) for notion in ("loss", "copy", "influence", "frozen", "eval")}
batch_gradient = torch.autograd.grad(len(x) * criterion(model(x), y), model[0].weight)[0]
for notion, G in found.items():
    off = float((G.sum()["0.weight"] - batch_gradient).norm() / batch_gradient.norm())
    print(f"{notion:10s} rows sum to the gradient of the first layer up to {off:.1e}")
    assert (off < 1e-9) == (notion in ("loss", "copy", "influence"))

# %% [markdown]
# The bias in front of a BatchNorm tells them apart: moving it changes nothing, so the gradient of every loss is zero.
# Copies of it only cancel in the sum.

# %%
for notion, G in found.items():
    print(f"{notion:10s} largest entry of the rows of the first bias {float(G['0.bias'].abs().max()):.1e}")
assert found["loss"]["0.bias"].abs().max() < 1e-12
assert found["copy"]["0.bias"].abs().max() > 1e-3 and found["copy"]["0.bias"].sum(0).abs().max() < 1e-12

# %% [markdown]
# ## Leaving a sample out
#
# `statistic_influence()` is `T[n, m]`, the derivative of loss `n` in the weight of sample `m` in all statistics. To
# first order, minus `T` is what happens to the losses when a sample is left out of the statistics. Compare with leaving
# every sample out in turn:

# %%
estimate, exact = coupling.leave_one_out(), coupling.leave_one_out(exact=True)
correlation = float(torch.corrcoef(torch.stack([estimate.flatten(), exact.flatten()]))[0, 1])
print(f"correlation of {exact.numel()} changes with their first-order estimates: {correlation:.3f}")
assert correlation > 0.9
assert coupling.statistic_influence().sum(1).abs().max() < 1e-10  # all weights scaled together change nothing

# %% [markdown]
# ## Large batches
#
# In a larger batch each single other sample matters less, as `1/N`. The share of the gradient that flows through the
# statistics stays: all the others together matter as before.

# %%
sizes = (8, 16, 32, 64, 128)
several = [persample.coupling(model, criterion, images[:n], labels[:n]) for n in sizes]
others = [float(c.input_norms().fill_diagonal_(0).sum() / (len(c) * (len(c) - 1))) for c in several]
shares = [float(c.theta_coupling().mean()) for c in several]
for n, other, share in zip(sizes, others, shares, strict=True):
    print(f"N = {n:4d}   another sample {other:.4f}   times N {n * other:.2f}   through the statistics {share:.2f}")
assert others[-1] < others[0] / 6
assert min(shares) > 0.6 * max(shares)

# %% [markdown]
# ## In evaluation mode
#
# Nothing is coupled, and everything that links two samples is exactly 0.

# %%
model.eval()
assert persample.coupling(model, criterion, x, y).data_coupling().max() == 0
print(persample.gradients(model, criterion, x, y))
model = model.train()

# %% [markdown]
# ## One picture

# %% mystnb={"image": {"alt": "Norms by five notions; leaving one out, estimated and exact; what vanishes with N"}}
mosaic = [["notions", "notions"], ["left out", "decay"]]
figure, axes = plt.subplot_mosaic(mosaic, figsize=(9.5, 7.5), layout="constrained")
batchnorm.plot_notions(coupling, ax=axes["notions"])
axes["left out"].scatter(estimate.flatten(), exact.flatten(), s=5, alpha=0.5, color="#0072B2")
low, high = float(exact.min()), float(exact.max())
axes["left out"].plot([low, high], [low, high], color="#D55E00", linewidth=1)
axes["left out"].set(
    xlabel="first-order estimate, -T[n, m]", ylabel="change of loss n without sample m", title="leaving one out"
)
batchnorm.plot_decay(several, axes["decay"])
plt.show()
