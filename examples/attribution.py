# %% [markdown]
# # Which training samples made a prediction?
#
# Attribution methods promise a number for every pair of a training and a test sample: how much the first one helped
# with the second. Whether the numbers mean anything can be measured, by training again without some samples. We do that
# three times on scikit-learn's handwritten digits: with hundreds of models on random halves of the data, with labels
# that we made wrong ourselves, and with every single sample left out of a model that can be trained exactly.

# %%
from __future__ import annotations

import os
import tempfile

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample import attribution, curvature

TRAIN = int(os.environ.get("PERSAMPLE_ATTRIBUTION_TRAIN", "1100"))
MODELS = int(os.environ.get("PERSAMPLE_ATTRIBUTION_MODELS", "200"))
TEST, STEPS, LR, DECAY = 200, 100, 0.01, 1e-3
torch.set_num_threads(1)  # tensors are small here: more threads would wait for each other


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 64]`` between 0 and 1 and labels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


images, labels = digits()
x, y, u, v = images[:TRAIN], labels[:TRAIN], images[-TEST:], labels[-TEST:]


# %% [markdown]
# ## Hundreds of models at once
#
# Models of one architecture are one model with a leading axis on every parameter (`stack_module_state`), trained
# together under `vmap`. All start from the same initialisation and see all their samples in every step, so that they
# differ by their data and by nothing else.


# %%
def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


Parameters = dict[str, Tensor]


def train(x: Tensor, y: Tensor, members: Tensor, steps: int = STEPS) -> Parameters:
    """One network per row of ``members [models, n]``, by Adam on all of these samples in every step."""
    net, inputs, targets = network(), x[members], y[members]
    parameters, _ = stack_module_state([network() for _ in members])
    parameters = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (x,)), y)

    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for t in range(1, steps + 1):
        gradients = vmap(grad(loss))(parameters, inputs, targets)
        for name, p in parameters.items():
            g = gradients[name] + DECAY * p
            first[name].lerp_(g, 0.1)
            second[name].lerp_(g.square(), 0.001)
            scale = (second[name] / (1 - 0.999**t)).sqrt() + 1e-8
            p -= LR * first[name] / (1 - 0.9**t) / scale
    return parameters


def one(parameters: Parameters) -> nn.Module:
    """The first of the trained networks, in double precision."""
    net = network()
    net.load_state_dict({name: p[0] for name, p in parameters.items()})
    return net.double()


# %%
generator = torch.Generator().manual_seed(1)
members = torch.stack([torch.randperm(TRAIN, generator=generator)[: TRAIN // 2] for _ in range(MODELS)])
subsets = torch.zeros(MODELS, TRAIN, dtype=torch.bool).scatter_(1, members, True)
retrained = train(x, y, members)
net = network()
outputs = vmap(lambda parameters: functional_call(net, parameters, (u,)))(retrained)
margins = torch.stack([attribution.margin(logits, v) for logits in outputs])  # [models, test]: log p/(1 - p)

model = one(train(x, y, torch.arange(TRAIN)[None]))  # the model that is explained
accuracy = float((outputs.argmax(2) == v).float().mean())
print(f"{MODELS} models trained on halves of {TRAIN} samples: {accuracy:.1%} right on average on {TEST} others")


# %% [markdown]
# ## Scores of the model that saw everything
#
# All from the per-sample gradients of one model. Inner products need Gram matrices only; TRAK works with projected
# gradients of the margin. `empirical_fisher_influence` has a damping to choose: we show several.

# %%
inputs, tests, cross_entropy = x.double(), u.double(), nn.CrossEntropyLoss()
G = persample.gradients(model, cross_entropy, inputs, y)
H = persample.gradients(model, cross_entropy, tests, v)
projection = attribution.Projection(512, seed=0)

scores = {
    "random": torch.randn(TRAIN, TEST, generator=generator),
    "grad-cos": attribution.grad_cos(G, H),
    "grad-dot": attribution.grad_dot(G, H),
}
A = persample.gradients(model, attribution.margin, inputs, y)
B = persample.gradients(model, attribution.margin, tests, v)
missing = torch.sigmoid(-A.losses)  # 1 - p: these losses are the margins
scores["TRAK, 512 projected"] = attribution.trak(A.project(projection), B.project(projection), missing, damping=1.0)
for damping in (1e-2, 1e-3, 1e-4):
    scores[f"empirical Fisher, {damping:g}"] = attribution.empirical_fisher_influence(G, H, damping=damping)
P, Q = G.project(projection), H.project(projection)
scores["empirical Fisher, 0.001, 512 projected"] = attribution.empirical_fisher_influence(P, Q, damping=1e-3)

# %% [markdown]
# The linear datamodelling score: do the scores of a test sample, summed over the half that a model was trained on,
# rank the models as its true margins do? (Spearman correlation over models, averaged over test samples.)

# %%
lds = {
    name: float(attribution.linear_datamodelling_score(score, subsets, margins).mean())
    for name, score in scores.items()
}
print("\nlinear datamodelling score")
for name, value in lds.items():
    print(f"  {name:40s} {value:6.3f}")

fisher = lds["empirical Fisher, 0.001"]
assert fisher >= 0.45 and fisher >= lds["grad-dot"] + 0.15
assert abs(lds["random"]) <= 0.05
assert lds["empirical Fisher, 0.001, 512 projected"] < fisher

# %% [markdown]
# Curvature is what makes the difference: it discounts directions in which many samples pull. The price of projecting
# 2,410 numbers to 512 is visible, and so is that of a bad damping.
#
# For larger data the same numbers come in pieces. `GradientStore` keeps (projected) rows on disk and goes on after a
# kill; `cross_gram` streams one data set past the other.

# %%
with tempfile.TemporaryDirectory() as directory:
    loader = DataLoader(TensorDataset(inputs, y), batch_size=128)
    store = attribution.GradientStore(directory, model, projection=projection, dtype=torch.float64)
    store.extend(cross_entropy, loader)
    print(f"\n{store}")
    torch.testing.assert_close(store.rows(), P, rtol=1e-9, atol=1e-9)
others = DataLoader(TensorDataset(tests, v), batch_size=100)
streamed = attribution.cross_gram(model, cross_entropy, loader, others, block=1)
torch.testing.assert_close(streamed, scores["grad-dot"], rtol=1e-9, atol=1e-9)


# %% [markdown]
# ## Labels that are wrong
#
# We flip one label in ten and train on that. A wrong sample can only be explained by itself: its own gradient stays
# long. Self-influence is its squared norm, at the end or summed over checkpoints. The loss alone, which costs nothing,
# finds wrong labels just as well here: measure it before you reach for gradients.

# %%
wrong = torch.zeros(TRAIN, dtype=torch.bool)
wrong[torch.randperm(TRAIN, generator=generator)[: TRAIN // 10]] = True
flipped = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10, y)
checkpoints = []
for steps in (20, 40, 60):
    net = one(train(x, flipped, torch.arange(TRAIN)[None], steps))
    checkpoints.append((LR, persample.gradients(net, cross_entropy, inputs, flipped, quantities=["norm"])))
last = checkpoints[-1][1]
auc = {
    "self-influence": attribution.mislabel_auc(attribution.self_influence(last), wrong),
    "self-influence, 3 checkpoints": attribution.mislabel_auc(attribution.self_influence(checkpoints), wrong),
    "loss": attribution.mislabel_auc(last.losses, wrong),
}
print(f"\nfinding {int(wrong.sum())} flipped labels among {TRAIN}: area under the ROC curve")
for name, value in auc.items():
    print(f"  {name:40s} {value:6.3f}")
assert auc["self-influence"] >= 0.97 and auc["loss"] >= auc["self-influence"] - 0.01


# %% [markdown]
# ## Leaving out one sample, exactly
#
# Logistic regression with a penalty has one minimum, so "the model without sample `i`" is not a matter of luck. From
# the minimum on all samples, every leave-one-out minimum is a few Newton steps away, and steps with the Hessian of
# the full problem will do: then all of them are taken together. Influence functions promise the same changes from
# gradients and Hessian alone, `g_i^T H^-1 h_j / n` to first order.

# %%
FEW, PENALTY = min(300, TRAIN), 1e-2
few, few_labels = inputs[:FEW], y[:FEW]
linear = nn.Linear(64, 10).double()
theta = torch.zeros(650, dtype=torch.float64)


def losses(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``[n]``: cross-entropies of a linear classifier with parameters ``theta [650]``."""
    parameters = {"weight": theta[:640].view(10, 64), "bias": theta[640:]}
    return F.cross_entropy(functional_call(linear, parameters, (x,)), y, reduction="none")


def objective(theta: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean loss of the training samples, and the penalty."""
    return weight @ losses(theta, few, few_labels) / weight.sum() + PENALTY / 2 * theta.square().sum()


def hessian(theta: Tensor) -> Tensor:
    """``[650, 650]``, of the objective with all samples."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, linear.parameters())
    exact = curvature.hvp(linear, cross_entropy, few, few_labels) @ torch.eye(650, dtype=torch.float64)
    return exact + PENALTY * torch.eye(650, dtype=torch.float64)


everything = torch.ones(FEW, dtype=torch.float64)
while (slope := grad(objective)(theta, everything)).abs().max() > 1e-10:  # Newton
    theta = theta - torch.linalg.solve(hessian(theta), slope)
factor = torch.linalg.cholesky(hessian(theta))
without = torch.ones(FEW, FEW, dtype=torch.float64) - torch.eye(FEW, dtype=torch.float64)
thetas = theta.expand(FEW, -1)
while (slopes := vmap(grad(objective))(thetas, without)).abs().max() > 1e-8:  # all at once, with one Hessian
    thetas = thetas - torch.cholesky_solve(slopes.mT, factor).mT

# %%
changes = vmap(lambda theta: losses(theta, tests, v))(thetas) - losses(theta, tests, v)  # [left out, test]
G = persample.gradients(linear, cross_entropy, few, few_labels)
H = persample.gradients(linear, cross_entropy, tests, v)
predicted = attribution.influence(G, H, lambda columns: torch.cholesky_solve(columns, factor)) / FEW
agreement = attribution.leave_one_out_correlation(predicted, changes)
together = float(attribution.leave_one_out_correlation(predicted.view(-1, 1), changes.view(-1, 1)))
slope = float((predicted * changes).sum() / predicted.square().sum())
print(f"\nleave-one-out of {FEW} samples, true change against predicted: Pearson {together:.3f} over all pairs,")
print(f"{float(agreement.mean()):.3f} on average per test sample; changes are {slope:.2f} times as large as predicted")
assert together >= 0.98

# %% [markdown]
# ## One picture

# %% mystnb={"image": {"alt": "Linear datamodelling score by method; true against predicted changes of test losses"}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
left.barh(list(lds)[::-1], list(lds.values())[::-1], color="#0072B2")
left.set(xlabel="linear datamodelling score (rank correlation)", title=f"{MODELS} retrained models")
right.scatter(predicted.flatten().numpy(), changes.flatten().numpy(), s=4, color="#0072B2", alpha=0.4)
low, high = float(predicted.min()), float(predicted.max())
right.plot([low, high], [low, high], color="#D55E00", linewidth=1, label="as predicted")
right.set(xlabel="predicted change of a test loss", ylabel="true change", title="leaving one out, convex model")
right.legend(frameon=False)
plt.show()
