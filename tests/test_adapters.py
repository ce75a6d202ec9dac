"""The plugs into other libraries, against those libraries."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample import adapters

N, D, C = 6, 5, 3
CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore")  # what peers warn of is theirs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()


def batch(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64), torch.randint(C, (n,), generator=generator)


def rows(model: nn.Module, x: Tensor, y: Tensor) -> persample.Gradients:
    return persample.gradients(model, CE, x, y, engine="loop")


def test_opacus_optimizer_clips_what_it_is_given() -> None:
    from opacus.optimizers import DPOptimizer

    model, (x, y) = net(), batch()
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = DPOptimizer(plain, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=N)
    before = [p.detach().clone() for p in model.parameters()]
    adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y), model)
    expected = rows(model, x, y).clip(0.3)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        # Opacus divides by norm + 1e-6 where we divide by the norm
        assert torch.allclose(old - p, 0.5 * expected[name] / N, rtol=1e-4, atol=1e-9)
    with pytest.raises(persample.QuantityError, match=r"0\.weight"):
        adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y, params="2"), model)


def test_opacus_accumulates_and_refuses_coupled_rows() -> None:
    from opacus.optimizers import DPOptimizer

    model, (x, y) = net(), batch()
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = DPOptimizer(plain, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=N)
    expected = rows(model, x, y).clip(0.3)
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        for at in (slice(0, 2), slice(2, 3), slice(3, None)):
            adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x[at], y[at]), model)
        optimizer.step()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            assert torch.allclose(old - p, 0.5 * expected[name] / N, rtol=1e-4, atol=1e-9)
        expected = rows(model, x, y).clip(0.3)
        with pytest.raises(persample.QuantityError, match="zero_grad"):
            adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y), model)
    coupled = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).double()
    with pytest.raises(persample.BatchCoupledError):
        adapters.opacus.fill_grad_sample(persample.gradients(coupled, CE, x, y, coupled="loss"), coupled)
    coupled[0].requires_grad_(False)
    with pytest.raises(persample.BatchCoupledError):
        adapters.opacus.fill_grad_sample(persample.gradients(coupled, CE, x, y), coupled)
    assert all(getattr(p, "grad_sample", None) is None for p in coupled.parameters())


def test_opacus_steps_along_noise_for_an_empty_batch() -> None:
    from opacus.optimizers import DPOptimizer

    model, (x, y) = net(), batch()
    plain, twin = torch.optim.SGD(model.parameters(), lr=0.5), copy.deepcopy(model)
    optimizer = DPOptimizer(plain, noise_multiplier=2.0, max_grad_norm=0.3, expected_batch_size=N)
    with pytest.raises(persample.EmptyBatchError, match=r"fill_grad_sample\(\[\], model\) for Opacus"):
        persample.gradients(model, CE, x[:0], y[:0])
    torch.manual_seed(1)
    optimizer.zero_grad()
    adapters.opacus.fill_grad_sample([], model)
    optimizer.step()
    torch.manual_seed(1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        noise = torch.normal(0.0, 0.6, p.shape, dtype=p.dtype)
        assert torch.allclose(q - p, 0.5 * noise / N, rtol=0, atol=1e-12)
    expected = rows(model, x, y).dense()
    for pieces in ([[], slice(None)], [slice(0, 2), [], slice(2, None)]):
        optimizer.zero_grad()
        for at in pieces:
            G = [] if isinstance(at, list) else persample.gradients(model, CE, x[at], y[at])
            adapters.opacus.fill_grad_sample(G, model)
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad_sample, expected[name], atol=1e-12)  # type: ignore[attr-defined]
    optimizer.zero_grad()
    adapters.opacus.fill_grad_sample([persample.gradients(model, CE, x[i::2], y[i::2]) for i in range(2)], model)
    assert torch.allclose(model[0].bias.grad_sample[N // 2 :], expected["0.bias"][1::2], atol=1e-12)


def test_opacus_takes_the_rows_of_its_own_model_alone() -> None:
    model, (x, y) = net(), batch()
    compiled = torch.compile(model)
    adapters.opacus.fill_grad_sample(persample.gradients(compiled, CE, x, y), compiled)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad_sample, rows(model, x, y)[name], atol=1e-12)  # type: ignore[attr-defined]
    other = copy.deepcopy(net())
    with pytest.raises(persample.QuantityError, match=r"another model's '0\.weight'"):
        adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y), other)
    assert all(getattr(p, "grad_sample", None) is None for p in other.parameters())


def test_torchjd_weighting_and_aggregator_agree() -> None:
    from torchjd.aggregation import UPGrad
    from torchjd.aggregation._upgrad import UPGradWeighting

    model, (x, y) = net(), batch()
    G = persample.gradients(model, CE, x, y)
    aggregated = adapters.torchjd.aggregate(G, UPGrad())
    with pytest.raises(persample.ArgumentError, match=r"weights \[N\], a tensor, got NoneType"):
        adapters.torchjd.backward(G, lambda K: None)
    assert all(p.grad is None for p in model.parameters())
    weight = adapters.torchjd.backward(G, UPGradWeighting())
    assert weight.shape == (N,)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, aggregated[name], atol=1e-6)
    assert torch.allclose(aggregated["0.weight"].flatten(), UPGrad()(rows(model, x, y).flat())[: D * 4], atol=1e-6)


def test_torchjd_weightings_and_aggregators_are_told_apart() -> None:
    """An aggregator makes ``[N]`` numbers of a Gram matrix, too."""
    from torchjd.aggregation import Mean, UPGrad, UPGradWeighting

    model, (x, y) = net(), batch()
    G = persample.gradients(model, CE, x, y)
    for aggregator in (UPGrad(), Mean()):
        with pytest.raises(persample.ArgumentError, match="is an Aggregator"):
            adapters.torchjd.backward(G, aggregator)
    with pytest.raises(persample.ArgumentError, match="is a Weighting"):
        adapters.torchjd.aggregate(G, UPGradWeighting())
    assert all(p.grad is None for p in model.parameters())
    assert torch.allclose(adapters.torchjd.backward(G, torch.diagonal), G.squared_norm(), rtol=1e-9)


def test_captum_influence_is_the_inner_product_of_gradients() -> None:
    from captum.influence import TracInCP

    model, train, test = net(), batch(0), batch(1, n=2)
    influence = adapters.captum.influence_function(
        model, CE, [tuple(t[:3] for t in train), tuple(t[3:] for t in train)]
    )
    expected = rows(model, *test).gram(rows(model, *train))
    assert torch.allclose(influence.influence(test), expected, atol=1e-12)
    assert torch.allclose(influence.self_influence(), rows(model, *train).squared_norm(), atol=1e-12)
    assert torch.equal(influence.influence(test, k=2)[0], expected.topk(2).indices)
    assert torch.allclose(influence.influence(test, k=2).influence_scores, expected.topk(2).values, atol=1e-12)
    for form in (list(test), [test], (part for part in [test])):  # a batch of a DataLoader, and several
        assert torch.allclose(influence.influence(form), expected, atol=1e-12)
    loader = DataLoader(TensorDataset(*test), batch_size=2)
    assert torch.allclose(influence.influence(next(iter(loader))), expected, atol=1e-12)
    assert torch.allclose(influence.influence([*loader]), expected, atol=1e-12)
    assert influence.influence(test, k=N)[0].shape == (2, N)
    for k in (0, -1, N + 1):
        with pytest.raises(persample.errors.ArgumentError, match=f"k must be from 1 to {N}, .* got {k}"):
            influence.influence(test, k=k)
    tracin = TracInCP(
        model,
        TensorDataset(*train),
        ["now"],
        checkpoints_load_func=lambda *_: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=3,
    )
    assert torch.allclose(tracin.influence(test), expected, atol=1e-9)
    total = adapters.captum.intermediate_quantities(model, CE, [train], aggregate=True)
    assert torch.allclose(total[0], rows(model, *train).flat().sum(0), atol=1e-12)


def test_captum_numbers_are_those_of_samples() -> None:
    """A loader that shuffles gives other samples the same numbers at every call."""
    model, train, test = net(), batch(0), batch(1, n=2)
    shuffled = DataLoader(TensorDataset(*train), batch_size=2, shuffle=True)
    with pytest.raises(persample.errors.StoreError, match="the loader shuffles"):
        adapters.captum.influence_function(model, CE, shuffled)
    influence = adapters.captum.influence_function(model, CE, [train])
    for use in (influence.influence, influence.self_influence):
        with pytest.raises(persample.errors.StoreError, match="the loader shuffles"):
            use(shuffled)
    total = adapters.captum.intermediate_quantities(model, CE, shuffled, aggregate=True)
    assert torch.allclose(total[0], rows(model, *train).flat().sum(0), atol=1e-12)
    with pytest.raises(persample.ArgumentError, match="train is a generator, which can be read only once"):
        adapters.captum.influence_function(model, CE, (part for part in [train]))
    once = (part for part in [test])
    influence.influence(once)
    with pytest.raises(persample.ArgumentError, match=r"no batch .* read only once, and have been"):
        influence.influence(once)


def test_trak_features_are_those_of_its_own_computer(tmp_path: Path) -> None:
    from trak import TRAKer
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.projectors import NoOpProjector

    model, (x, y) = net().float(), batch()
    scores = []
    for computer in (FunctionalGradientComputer, adapters.trak.gradient_computer()):
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=N,
            save_dir=tmp_path / computer.__name__,
            device="cpu",
            projector=NoOpProjector(0, 0, 0, "none", "cpu"),
            gradient_computer=computer,
            proj_dim=-1,
            logging_level=50,
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(batch=(x.float(), y), num_samples=N)
        scores.append(torch.as_tensor(traker.saver.current_store["grads"]).clone())
    assert scores[0].norm() > 0 and torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-5)


def trak_features(tmp_path: Path, model: nn.Module, computer: Any, **options: Any) -> Tensor:
    """What ``TRAKer`` keeps of a batch, through its own projector."""
    from trak import TRAKer

    options |= {"proj_dim": 8, "logging_level": 50, "use_half_precision": False, "device": "cpu"}
    save_dir = tmp_path / str(len(list(tmp_path.iterdir())))
    traker = TRAKer(model, "image_classification", N, save_dir=save_dir, gradient_computer=computer, **options)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize(batch=single(batch()), num_samples=N)
    return torch.as_tensor(traker.saver.current_store["grads"]).clone()


@pytest.mark.parametrize(
    "grad_wrt", [None, ["2.weight", "0.bias"], ["2.bias", "2.weight"]], ids=["all", "some", "head"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_trak_counts_frozen_parameters_and_those_that_it_names(
    tmp_path: Path, grad_wrt: list[str] | None, frozen: bool
) -> None:
    from trak.gradient_computers import FunctionalGradientComputer

    model = net().float()
    model[0].requires_grad_(not frozen)
    expected = trak_features(tmp_path, model, FunctionalGradientComputer, grad_wrt=grad_wrt)
    computers = [adapters.trak.gradient_computer(), adapters.trak.gradient_computer(engine="loop")]
    computers += [adapters.trak.gradient_computer(params=grad_wrt)] if grad_wrt else []
    for computer in computers:
        features = trak_features(tmp_path, model, computer, grad_wrt=grad_wrt)
        assert features.norm() > 0 and torch.allclose(features, expected, rtol=1e-3, atol=1e-5)
        assert [p.requires_grad for p in model.parameters()] == [not frozen, not frozen, True, True]
        assert all(p.grad is None for p in model.parameters())


def test_trak_counts_what_we_compute(tmp_path: Path) -> None:
    model = net().float()
    for params, grad_wrt in (("2", None), ("2", ["0.bias"])):
        computer = adapters.trak.gradient_computer(params=params)
        with pytest.raises(persample.errors.ArgumentError, match=r"'0\.bias'.*TRAKer\(grad_wrt=\[names\]\)"):
            trak_features(tmp_path, model, computer, grad_wrt=grad_wrt)


def single(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].float(), pair[1]


def test_dattri_task_takes_its_gradients_from_us() -> None:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model, train, test = net().float(), single(batch(0)), single(batch(1, n=2))

    def loss(params: Any, data: Any) -> Tensor:
        x, y = data
        return F.cross_entropy(torch.func.functional_call(model, params, x.unsqueeze(0)), y.unsqueeze(0))

    def score(task: Any) -> Tensor:
        attributor = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=False, device="cpu")
        attributor.projector_kwargs = None  # whatever is passed, it projects
        return attributor.attribute(
            DataLoader(TensorDataset(*train), batch_size=4), DataLoader(TensorDataset(*test), batch_size=2)
        )

    plain = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    ours = adapters.dattri.attach(AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()), CE)
    expected = rows(model, *train).gram(rows(model, *test))  # train x test
    assert torch.allclose(score(plain), expected, rtol=1e-4) and torch.allclose(score(ours), expected, rtol=1e-4)
    before = copy.deepcopy(model.state_dict())
    elsewhere = adapters.dattri.grad_function(model, CE)(torch.zeros(sum(p.numel() for p in model.parameters())), train)
    assert elsewhere.shape == (N, 39) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_curvlinops_takes_our_operators() -> None:
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator

    model, (x, y) = net(), batch()
    ours = adapters.curvlinops.linear_operator(persample.curvature.ggn(model, CE, x, y))
    theirs = GGNLinearOperator(model, CE, list(model.parameters()), [(x, y)])
    v = torch.randn(ours.shape[1], 2, dtype=torch.float64)
    assert torch.allclose(ours @ v, theirs @ v, atol=1e-10)
    assert torch.allclose((ours + ours) @ v, 2 * (ours @ v), atol=1e-10)
    assert CGInverseLinearOperator(ours, maxiter=2).shape == ours.shape


def test_the_log_stays_what_it_was_where_noise_is_too_small() -> None:
    from persample.adapters._log import GradientLog

    model, (x, y) = net(), batch()
    log = GradientLog(decay=0.5)
    log.start(model)
    CE(model(x), y).backward()
    before = log.figures()["gradient_noise_scale"], copy.deepcopy(log.noise.state_dict())
    CE(model(torch.ones_like(x)), torch.zeros_like(y)).backward()
    log.stop()
    assert log.figures()["gradient_noise_scale"] == before[0] and log.noise.state_dict() == before[1]


def test_the_log_goes_on_after_an_overflow() -> None:
    from persample.adapters._log import GradientLog

    model, (x, y) = net(), batch()
    logs = [GradientLog(), GradientLog()]
    for log, scales in zip(logs, ((1.0, 1.0), (1.0, float("inf"), 1.0)), strict=True):
        log.start(model)
        for scale in scales:
            if scale == 1:
                CE(model(x), y).backward()
                continue
            with pytest.warns(UserWarning, match="not finite: it is skipped"):
                (CE(model(x), y) * scale).backward()
            assert not torch.tensor(log.figures()["gradient_norm_max"]).isfinite()  # which is that of this batch
        log.stop()
    assert logs[0].figures() == logs[1].figures()


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("which", ["empirical_fisher_backend", "ggn_backend"])
def test_laplace_backends_agree_with_its_own(which: str, weights: str) -> None:
    from laplace import Laplace
    from laplace.curvature import CurvlinopsEF
    from laplace.curvature.curvature import EFInterface, GGNInterface

    model, (x, y) = net(), batch()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    posteriors = []
    fisher = EFInterface if weights == "all" else CurvlinopsEF
    for backend in (getattr(adapters.laplace, which)(), fisher if "fisher" in which else GGNInterface):
        posterior = Laplace(
            model, "classification", subset_of_weights=weights, hessian_structure="full", backend=backend
        )
        posterior.fit(loader)
        posteriors.append(posterior.H.clone())
    assert posteriors[0].norm() > 0 and torch.allclose(*posteriors, rtol=1e-6, atol=1e-9)


class Batches(list[Any]):
    """What laplace takes for a loader."""

    dataset = range(N)


@pytest.mark.parametrize("which", ["empirical_fisher_backend", "ggn_backend"])
def test_laplace_backends_take_dicts_as_laplace_does(which: str) -> None:
    """As one argument: ``forward(self, data)``, of any class of mapping."""
    from collections import UserDict

    from laplace import Laplace

    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, data: Any) -> Tensor:
            return self.net(data["input_ids"])

    x, y = batch()
    backend, posteriors = getattr(adapters.laplace, which)(), []
    for model, kind in ((net(), None), (Keyed(), dict), (Keyed(), UserDict)):
        parts = [slice(0, 4), slice(4, N)]
        batches = [kind({"input_ids": x[at], "labels": y[at]}) if kind else (x[at], y[at]) for at in parts]
        posterior = Laplace(model, "classification", subset_of_weights="all", hessian_structure="full", backend=backend)
        posterior.fit(Batches(batches))
        posteriors.append(posterior.H.clone())
    assert posteriors[0].norm() > 0
    assert all(torch.allclose(H, posteriors[0], rtol=1e-9, atol=1e-12) for H in posteriors[1:])


def trained(tmp_path: Path, callback: Any, skipped: int = -1, epochs: int = 1, **options: Any) -> dict[str, Tensor]:
    """What is logged in epochs of one batch, given ``accumulate_grad_batches`` or others; one may be skipped."""
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net().float()

        def training_step(self, batch: Any, _: int) -> Any:
            return None if self.current_epoch == skipped else CE(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    x, y = batch()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=tmp_path, accelerator="cpu", **quiet, **options
    )
    trainer.fit(Module(), DataLoader(TensorDataset(x.float(), y), batch_size=N))
    return dict(trainer.callback_metrics)


def test_lightning_undoes_what_the_trainer_divides_by(tmp_path: Path) -> None:
    exact = float(rows(net(), *batch()).norm().max())
    own = {"reduction": 1 / N}  # all that there is to say, of a trainer that divides too
    for accumulate, options, factor in (
        *((1, {}, 1), (4, {}, 1), (4, {"reduction": "mean"}, 1), (4, {"reduction": "sum"}, N)),
        *((4, own, 4), (4, {"reduction": lambda: 1 / N}, 4)),
    ):
        callback = adapters.lightning.callback(lambda m: m.net, **options)
        logged = float(trained(tmp_path, callback, accumulate_grad_batches=accumulate)["gradient_norm_max"])
        assert abs(logged * factor / exact - 1) < 1e-4


def test_lightning_says_so_where_nothing_is_seen(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"callback\(lambda m: m.net\)"):
        assert not trained(tmp_path, adapters.lightning.callback())


@pytest.mark.parametrize("skipped", [0, 1])
def test_lightning_has_nothing_to_say_of_batches_that_are_skipped(tmp_path: Path, skipped: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="persample")
        assert trained(tmp_path, adapters.lightning.callback(lambda m: m.net), skipped, epochs=3)


def test_lightning_logs_without_touching_the_training(tmp_path: Path) -> None:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return CE(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(callbacks: list[Any]) -> tuple[Any, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=2,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(TensorDataset(*batch()), batch_size=3))
        return module, trainer.callback_metrics

    plain, _ = train([])
    watched, metrics = train([adapters.lightning.callback(lambda m: m.net)])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    assert metrics["gradient_norm_median"] > 0 and "gradient_noise_scale" in metrics
    assert not watched.net._forward_hooks


def test_trainer_callback_logs_what_the_model_alone_would_show(tmp_path: Path) -> None:
    import transformers

    def train(callbacks: list[Any]) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=20,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=8,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = transformers.GPT2LMHeadModel(config)
        ids = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": row} for row in ids]
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
        return model, trainer.state.log_history

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _ = train([])
        watched, history = train([adapters.transformers.callback()])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 3 and all(entry["gradient_norm_max"] > 0 for entry in logged)
    assert not watched._forward_hooks


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2), (2, 4)])
def test_trainer_callback_undoes_what_the_trainer_divides_by(size: int, steps: int, tmp_path: Path) -> None:
    """Of batches of one and the same sample, whose gradient each row is, however the trainer accumulates."""
    import transformers

    torch.manual_seed(0)
    dims = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    ends, drops = (
        {"bos_token_id": 0, "eos_token_id": 0},
        dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dims, **ends, **drops))
    row = torch.randint(20, (6,))
    model(input_ids=row[None], labels=row[None]).loss.backward()
    exact = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    labels = torch.tensor([-100, *row[1:]])  # the trainer counts the first one, too, which is nobody's target
    data = [{"input_ids": row, "labels": labels}] * (size * steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [adapters.transformers.callback()]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert abs(logged["gradient_norm_max"] / float(exact) - 1) < 1e-4


def test_an_interrupted_training_leaves_nothing_on_the_model_for_long(tmp_path: Path) -> None:
    """Nobody tells the callback: its next training ends it, or that nobody has it any more."""
    import transformers

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.left = net().float(), 2

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            out = self.net(x)
            return {"loss": CE(out, labels), "logits": out}

    x, y = batch(n=12)
    data = [{"x": row.float(), "labels": label} for row, label in zip(x, y, strict=True)]
    quiet: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, **quiet
    )

    def train(model: nn.Module, callback: Any) -> list[int]:
        """How many hooks are there afterwards, while the callback is."""
        with contextlib.suppress(KeyboardInterrupt):
            transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        return [len(model._forward_hooks), len(model._forward_pre_hooks)]

    model, callback = Interrupted(), adapters.transformers.callback()
    assert train(model, callback) == [1, 1]
    model.left = 3
    assert train(model, callback) == [0, 0]
    model.left = 2
    assert train(model, callback) == [1, 1]
    del callback
    model.left = 2
    for _ in range(2):  # that a forward was interrupted is known at the next one, and the callback is garbage then
        model(x.float(), y)["loss"].backward()
        gc.collect()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trak.gradient_computers", None)
    with pytest.raises(ImportError, match="pip install traker"):
        adapters.trak.gradient_computer()
    with pytest.raises(AttributeError, match="no adapter 'tensorflow'"):
        adapters.tensorflow  # noqa: B018


def filled_by(make: Any, model: nn.Module) -> tuple[nn.Module, Any]:
    """A model that takes its own rows in every backward, and the optimizer that clips them."""
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.optimizers import DPOptimizer

    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    if make == "module":
        return GradSampleModule(model), DPOptimizer(
            plain, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=N
        )
    wrapped, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=plain, data_loader=DataLoader(TensorDataset(*batch()), batch_size=N),
        noise_multiplier=0.0, max_grad_norm=0.3, poisson_sampling=False,
    )  # fmt: skip
    return wrapped, optimizer


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("make", ["module", "engine"])
def test_opacus_counts_no_sample_twice(make: str, verify: bool | None) -> None:
    """Hooks of Opacus leave rows of their own: said with the ways out, each of which steps along every row once."""
    (model, optimizer), (x, y) = filled_by(make, net()), batch()
    with pytest.raises(persample.QuantityError, match=r"count twice.*remove_hooks"):
        adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y, verify=verify), model)
    for way in ("zero_grad", "remove_hooks"):
        inner = model._module
        twin = copy.deepcopy(net())
        twin.load_state_dict(inner.state_dict())
        expected, before = rows(twin, x, y).clip(0.3), [p.detach().clone() for p in model.parameters()]
        if way == "remove_hooks":
            model.remove_hooks()
            optimizer.zero_grad()
        for at in (slice(0, 2), slice(2, None)) if way == "remove_hooks" else (slice(None),):
            G = persample.gradients(model, CE, x[at], y[at], verify=verify)
            if way == "zero_grad":
                optimizer.zero_grad()
            adapters.opacus.fill_grad_sample(G, model)
        assert all(len(p.grad_sample) == N for p in model.parameters())
        optimizer.step()
        for g, p, old in zip(expected.values(), model.parameters(), before, strict=True):
            assert torch.allclose(old - p, 0.5 * g / N, rtol=1e-4, atol=1e-9)


def test_opacus_leaves_no_marks_on_the_rows() -> None:
    """The same rows may be given again after a step."""
    from opacus.optimizers import DPOptimizer

    model, (x, y) = net(), batch()
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = DPOptimizer(plain, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=N)
    G = persample.Gradients(rows(model, x, y).factors, torch.zeros(N))
    for _ in range(2):
        optimizer.zero_grad()
        adapters.opacus.fill_grad_sample(G, model)
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, G.clip(0.3)[name] / N, rtol=1e-4, atol=1e-9)  # type: ignore[arg-type]


def test_opacus_clips_rows_of_convolutions_adaptively() -> None:
    """Its `AdaClipDPOptimizer` takes views of rows, which must be contiguous."""
    from opacus.optimizers import AdaClipDPOptimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, C)).double()
    x, y = torch.randn(N, 1, 5, dtype=torch.float64), batch()[1]
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=N,
        target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=10.0, min_clipbound=0.01,
        unclipped_num_std=1.0,
    )  # fmt: skip
    expected, before = rows(model, x, y).clip(0.3), [p.detach().clone() for p in model.parameters()]
    adapters.opacus.fill_grad_sample(persample.gradients(model, CE, x, y), model)
    optimizer.step()
    for g, p, old in zip(expected.values(), model.parameters(), before, strict=True):
        assert torch.allclose(old - p, 0.5 * g / N, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("take", "got"),
    [
        (lambda G, S: G.dense(), "got dict"),
        (lambda G, S: None, "got NoneType"),
        (lambda G, S: [None], "got a list with NoneType"),
        (lambda G, S: [G, G.dense()], "got a list with dict"),
        (lambda G, S: S, r"without quantities=.*got Statistics"),
    ],
)
def test_opacus_takes_gradients_alone(take: Any, got: str) -> None:
    model, (x, y) = net(), batch()
    given = take(persample.gradients(model, CE, x, y), persample.gradients(model, CE, x, y, quantities=["norm"]))
    with pytest.raises(persample.ArgumentError, match=rf"fill_grad_sample takes .*{got}"):
        adapters.opacus.fill_grad_sample(given, model)
    assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())
