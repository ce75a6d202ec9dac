# %% [markdown]
# # A transformer as it comes
#
# A GPT-2 of the `transformers` library, with random weights from a configuration, learns four small tasks at once: to
# copy four digits, to reverse them, to add one to each (modulo ten), and to sort them. Its mean gradient hides that
# there are four tasks. The gradients of single sequences show it: which sequences learn together, which tasks are in
# each other's way, where in the sequence there is something left to learn, and in which layers.

# %%
from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
import transformers
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

import persample

torch.set_num_threads(1)  # tensors are small here: more threads would wait for each other
TASKS = ("copy", "reverse", "add one", "sort")
DIGITS, ANSWER = 4, 14  # tokens: 0 to 9 digits, 10 to 13 the tasks, 14 "answer now"


def sequences(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[n, 10]``: task, four digits, "answer now", four digits of the answer; and the tasks ``[n]``."""
    task, given = torch.randint(4, (n,), generator=generator), torch.randint(10, (n, DIGITS), generator=generator)
    answers = torch.stack([given, given.flip(1), (given + 1) % 10, given.sort(1).values], 1)[torch.arange(n), task]
    return torch.cat([10 + task[:, None], given, torch.full((n, 1), ANSWER), answers], 1), task


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    size = {"vocab_size": 15, "n_positions": 10, "n_embd": 48, "n_layer": 2, "n_head": 4}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = transformers.GPT2Config(**size, **plain, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config)


def token_losses(outputs: Any, ids: Tensor) -> Tensor:
    """``[N, 4]``: the loss of every token of the answer."""
    return F.cross_entropy(outputs.logits[:, -DIGITS - 1 : -1].mT, ids[:, -DIGITS:], reduction="none")


def loss_fn(outputs: Any, ids: Tensor) -> Tensor:
    """``[N]``: the mean over the answer; a sequence is a sample."""
    return token_losses(outputs, ids).mean(1)


SEED = 0
model, generator = network(SEED), torch.Generator().manual_seed(SEED)
probe, task = sequences(160, generator)
order = task.argsort(stable=True)
probe, task = probe[order], task[order]

# %% [markdown]
# ## Nothing special
#
# The model needs no preparation. Its output layer shares its weight with the token embedding, positions are a table
# that all sequences look up alike, and attention, layer norms and `Conv1D` layers are plain function calls.

# %%
G = persample.gradients(model, loss_fn, probe, probe)
G

# %% [markdown]
# Row 7 is what `autograd.grad` says of sequence 7 alone. In double precision nothing but rounding is left:

# %%
exact = copy.deepcopy(model).double()
rows = persample.gradients(exact, loss_fn, probe[:16], probe[:16])
alone = torch.autograd.grad(loss_fn(exact(probe[7:8]), probe[7:8]).sum(), list(exact.parameters()))
worst = max(
    float((rows[name][7] - g).norm() / g.norm()) for (name, _), g in zip(exact.named_parameters(), alone, strict=True)
)
print(f"largest relative difference of a parameter's gradient: {worst:.1e}")
assert worst < 1e-9 and persample.check(model, loss_fn, probe[:16], probe[:16]).ok


# %% [markdown]
# ## Training
#
# Now and then we stop and take the gradients of 160 other sequences. The cosine between two of them says whether a step
# on one helps the other. Do sequences of one task stand together? We ask the nearest neighbour (is the sequence with
# the largest cosine of the same task?), and average by pairs of tasks.


# %%
def by_task(values: Tensor) -> Tensor:
    """``[4, 4]``: the mean over pairs of sequences of two tasks, without a sequence and itself."""
    member = F.one_hot(task, 4).to(values)
    apart = 1 - torch.eye(len(values))
    return (member.T @ (values * apart) @ member) / (member.T @ apart @ member)


def neighbours(cosine: Tensor) -> float:
    """The share of sequences whose nearest neighbour is of the same task."""
    return float((task[(cosine - 2 * torch.eye(len(cosine))).argmax(1)] == task).float().mean())


STEPS, STOPS = 300, (0, 25, 50, 100, 150, 200, 250, 300)
pairs: dict[int, Tensor] = {}
cosines: dict[int, Tensor] = {}
agree: list[float] = []
learned: list[list[float]] = []
parts: list[dict[str, float]] = []
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
print("step   right, by task: " + "  ".join(f"{name:>7s}" for name in TASKS) + "   nearest neighbour of the same task")
for step in range(STEPS + 1):
    if step in STOPS:
        G = persample.gradients(model, loss_fn, probe, probe)
        right = (G.outputs.logits[:, -DIGITS - 1 : -1].argmax(2) == probe[:, -DIGITS:]).float().mean(1)
        learned.append([float(right[task == k].mean()) for k in range(4)])
        cosines[step] = G.cosine()
        pairs[step] = by_task(cosines[step])
        agree.append(neighbours(cosines[step]))
        squares, total = G.squared_norm(per_parameter=True), G.squared_norm()
        part = {name: sum(v for n, v in squares.items() if name in n) for name in ("wte", "wpe", "attn", "mlp", "ln_")}
        parts.append({name: float((v / total).mean()) for name, v in part.items()})
        print(f"{step:4d} {'':17s}" + "  ".join(f"{r:7.0%}" for r in learned[-1]) + f" {agree[-1]:20.0%}")
    if step == 100:
        middle = copy.deepcopy(model)
    ids, _ = sequences(128, generator)
    optimizer.zero_grad()
    loss_fn(model(ids), ids).mean().backward()
    optimizer.step()
half = pairs[50]
assert agree[0] < 0.6 and agree[3] > 0.75  # at the start, and after 100 steps; chance is about 1/4
assert half.diagonal().min() > 0.02
assert half[1, 0] < -0.02 and half[1, 2] < -0.02 and half[0, 2] > 0
assert min(learned[-1]) > 0.8

# %% [markdown]
# At the start, the task is a token like any other. Within a few dozen steps the gradient of a sequence tells its task.
# And the tasks are not indifferent to each other: copying and adding one both have to look at the digit in the same
# place, and help each other; reversing looks elsewhere, and its gradients point against both of them.
#
# Where the gradient lies moves, too. Each share is the mean over sequences of the squared norm of one kind of
# parameter, over that of all:

# %%
kinds = {"wte": "tokens", "wpe": "positions", "attn": "attention", "mlp": "MLP", "ln_": "layer norms"}
print("step  " + "  ".join(f"{name:>11s}" for name in kinds.values()))
for step, found in zip(STOPS, parts, strict=True):
    print(f"{step:4d}  " + "  ".join(f"{found[name]:11.0%}" for name in kinds))
    assert abs(sum(found.values()) - 1) < 1e-4
assert parts[3]["mlp"] < 0.5 * parts[0]["mlp"] and parts[3]["wpe"] > 1.5 * parts[0]["wpe"]


# %% [markdown]
# ## Single tokens of the answer
#
# Tokens are no samples: each of them depends on all before it. But a *sequence, asked about one of its tokens*, is a
# sample. So we repeat every sequence, once per token of the answer, and let the loss look at that token only. The four
# rows of a sequence are then what its row is the mean of.


# %%
def loss_of_one(outputs: Any, targets: tuple[Tensor, Tensor]) -> Tensor:
    """``[N]``: the loss of the token of the answer that the targets name."""
    ids, token = targets
    return token_losses(outputs, ids).gather(1, token[:, None]).squeeze(1)


some, of = probe[::2], task[::2]
repeated, token = some.repeat_interleave(DIGITS, 0), torch.arange(DIGITS).repeat(len(some))
T = persample.gradients(middle, loss_of_one, repeated, (repeated, token))
G = persample.gradients(middle, loss_fn, some, some)
torch.testing.assert_close(T.flat().view(len(some), DIGITS, -1).mean(1), G.flat(), rtol=1e-3, atol=1e-5)

norms, losses = T.norm().view(-1, DIGITS), T.losses.view(-1, DIGITS)  # [sequences, tokens]
table = torch.stack([norms[of == k].mean(0) for k in range(4)])
print("mean gradient norm after 100 steps, by token of the answer")
for name, row in zip(TASKS, table.tolist(), strict=True):
    print(f"  {name:8s}" + "".join(f"{value:7.1f}" for value in row))
ranks = torch.stack([norms.flatten(), losses.flatten()]).argsort(1).argsort(1).double()
print(f"rank correlation of norm and loss, over tokens: {float(torch.corrcoef(ranks)[0, 1]):.2f}")
assert torch.corrcoef(ranks)[0, 1] > 0.6

# %% [markdown]
# Tokens with long gradients mostly are those with large losses. That is usual: norms cost about one backward pass, and
# the loss comes for free, so see whether it would do.
#
# ## One picture

# %% mystnb={"image": {"alt": "Cosines of gradients by task; digits right while training; norms by token"}}
PALETTE, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "os^v"
SEEN = 100
figure, ((left, by_pair), (curves, right)) = plt.subplots(2, 2, figsize=(9.5, 8), layout="constrained")
image = left.imshow(cosines[SEEN].numpy(), cmap="PuOr", vmin=-0.5, vmax=0.5)
ends = [0, *torch.bincount(task).cumsum(0).tolist()]
centres = [(a + b) / 2 for a, b in pairwise(ends)]
left.set_xticks(centres, TASKS)
left.set_yticks(centres, TASKS, rotation=90, va="center")
left.tick_params(length=0)
for end in ends[1:-1]:
    left.axhline(end - 0.5, color="black", linewidth=0.7)
    left.axvline(end - 0.5, color="black", linewidth=0.7)
left.set_title(f"cosines of gradients after {SEEN} steps")
figure.colorbar(image, ax=left, shrink=0.85, extend="max", label="cosine of two sequences")
image = by_pair.imshow(pairs[50].numpy(), cmap="PuOr", vmin=-0.2, vmax=0.2)
for i, row in enumerate(pairs[50].tolist()):
    for j, value in enumerate(row):
        by_pair.text(j, i, f"{value:.2f}", ha="center", va="center")
by_pair.set_xticks(range(4), TASKS)
by_pair.set_yticks(range(4), TASKS, rotation=90, va="center")
by_pair.set_title("mean by pairs of tasks, after 50 steps")
figure.colorbar(image, ax=by_pair, shrink=0.85, label="mean cosine")
for name, values, colour, marker in zip(TASKS, zip(*learned, strict=True), PALETTE, MARKERS, strict=True):
    curves.plot(STOPS, values, marker=marker, markersize=4, color=colour, label=name)
curves.plot(STOPS, agree, "--", color="black", label="same-task neighbours")
curves.set(xlabel="step", ylabel="share of digits that are right", ylim=(0, 1.4), title="while training")
curves.set_yticks([0, 0.25, 0.5, 0.75, 1])
curves.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
image = right.imshow(table.numpy(), cmap="cividis", vmin=0, aspect="auto")
for k, row in enumerate(table.tolist()):
    for t, value in enumerate(row):
        shade = "black" if value > 0.6 * float(table.max()) else "white"
        right.text(t, k, f"{value:.0f}", ha="center", va="center", color=shade)
right.set_xticks(range(DIGITS), [f"{t + 1}." for t in range(DIGITS)])
right.set_yticks(range(4), TASKS)
right.set(xlabel="token of the answer", title="norm of the gradient of one token's loss")
figure.colorbar(image, ax=right, shrink=0.85, label="mean norm (unscaled loss)")
plt.show()
