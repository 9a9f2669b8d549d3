"""The learned optimizer is an optimizer of torch: what it computes, and the habits of its kind."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import weightops
from weightops.learned import Functional, LearnedOptimizer, start, step

D = torch.float64
X = torch.randn(12, 6, dtype=D, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (12,), generator=torch.Generator().manual_seed(2))


class Recurrent(nn.Module):
    """A recurrent network with a tied square kernel and a buffer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed, self.kernel = nn.Linear(2, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 4)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, :2]).tanh() * self.scale
        for n in (2, 4):
            h = (self.embed(x[:, n : n + 2]) + self.kernel(h)).tanh() * self.scale
        return self.out(h)


class Attention(nn.Module):
    """One block of attention, whose projections are one tensor that the spec has by parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(-1, 3, 2))
        return self.out((h + self.attend(h, h, h, need_weights=False)[0]).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 4)),
    )


def mlp(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{"mlp": mlp, "cnn": convolutional, "rnn": Recurrent, "attention": Attention},
    "tied": lambda: Tied(),
}


class Tied(nn.Module):
    """One kernel under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


def make(name: str = "mlp", kind: str = "unf", seed: int = 0, **options: Any) -> tuple:
    """A model in float64, its spec and a functional."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(D)
    spec = weightops.trace(model, X)
    options = {"hidden": 4, "layers": 3} | options
    return model, spec, Functional(spec, kind, **options, dtype=D)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("momentum", [0.9, 0.7, 0.0])
def test_without_a_functional_it_is_sgd_with_momentum(name: str, momentum: float) -> None:
    model, spec, functional = make(name)
    other = copy.deepcopy(model)
    ours = LearnedOptimizer(spec, functional, 0.5, 0.0, model, momentum=momentum)
    sgd = torch.optim.SGD(other.parameters(), lr=0.5 * (1 - momentum), momentum=momentum)
    assert train(model, ours, 20) == pytest.approx(train(other, sgd, 20), rel=1e-10)
    torch.testing.assert_close(state_of(model), state_of(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["unf", "nfn", "deep_sets"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_formula_tensor_by_tensor(name: str, kind: str) -> None:
    model, spec, functional = make(name, kind)
    alpha, beta, decays = 0.1, 0.3, (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    optimizer = LearnedOptimizer(spec, functional, alpha, beta, model)
    momenta = {
        key: [torch.zeros_like(v)] * 6
        for key, v in spec.unflatten(torch.zeros(spec.numel).to(D)).items()
    }
    for number in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        named = dict(model.named_parameters(remove_duplicate=False))
        whole = {
            key: named[key].grad if key in named else torch.zeros_like(value)
            for key, value in model.state_dict().items()
            if key in spec.state_dict(torch.empty(spec.numel))
        }
        before = spec.flatten(model).clone()
        weights = spec.unflatten(before[0])
        grads = spec.unflatten(spec.flatten(whole)[0])
        columns = []
        for key, weight in weights.items():
            momenta[key] = [
                d * m + (1 - d) * grads[key] for d, m in zip(decays, momenta[key], strict=True)
            ]
            seen = [weight, grads[key], *momenta[key]]
            scaled = [v / (v.square().mean() + 1e-5).sqrt() for v in seen]
            columns.append(torch.stack([v.flatten() for v in scaled], -1))
        scales = torch.tensor([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000], dtype=D)
        f = functional(torch.cat(columns)[None], (number / scales - 1).tanh())[0]
        m = torch.cat([momenta[key][2].flatten() for key in weights])
        trained = spec.flatten({k: torch.full_like(v, float(k in named)) for k, v in whole.items()})
        optimizer.step()
        after = before - alpha * (m + beta * f).detach() * trained
        torch.testing.assert_close(spec.flatten(model), after, rtol=1e-9, atol=1e-12)


def test_a_population_moves_as_its_networks_do_one_by_one() -> None:
    _, spec, functional = make()
    torch.manual_seed(3)
    models = [mlp().to(D) for _ in range(3)]
    theta = torch.stack([functional.flatten() * scale for scale in (0.5, 1.0, -2.0)])
    alphas, betas = torch.tensor([0.1, 0.2, 0.3], dtype=D), torch.tensor([0.3, 0.2, 0.1], dtype=D)
    decays = torch.tensor([0.9, 0.8, 0.3], dtype=D)
    flat = spec.flatten(models)
    state = start(flat, decays)
    singly = [
        LearnedOptimizer(
            spec,
            copy.deepcopy(functional).load_flat_(theta[n]),
            *(alphas[n].item(), betas[n].item(), models[n]),
            momentum=decays[n].item(),
        )
        for n in range(3)
    ]
    for _ in range(3):
        for model, optimizer in zip(models, singly, strict=True):
            optimizer.zero_grad()
            loss_of(model).backward()
        grads = spec.flatten([{k: p.grad for k, p in m.named_parameters()} for m in models])
        flat, state = step(
            *(flat, grads, state, functional),
            **{"alpha": alphas, "beta": betas, "momentum": decays, "theta": theta},
        )
        for optimizer in singly:
            optimizer.step()
        torch.testing.assert_close(flat, spec.flatten(models), rtol=1e-9, atol=1e-12)


def test_gradients_flow_through_unrolled_steps() -> None:
    _, spec, functional = make(layers=2, hidden=2)
    flat = spec.flatten(mlp().to(D)).repeat(2, 1)
    theta = functional.flatten().repeat(2, 1).requires_grad_()
    alpha = torch.full((2,), 0.1, dtype=D, requires_grad=True)

    def unrolled(theta: Tensor, alpha: Tensor) -> Tensor:
        networks, state = flat, start(flat)
        for _ in range(2):
            grads = networks.sin()  # of the loss -cos
            networks, state = step(
                *(networks, grads, state, functional), alpha=alpha, beta=0.5, theta=theta
            )
        return networks.square().sum(-1)

    assert torch.autograd.gradcheck(unrolled, (theta, alpha), fast_mode=True)


def test_networks_at_different_steps_have_times_of_their_own() -> None:
    _, spec, functional = make()
    flat = spec.flatten(mlp().to(D)).repeat(2, 1)
    grads = torch.randn(2, spec.numel, dtype=D, generator=torch.Generator().manual_seed(0))
    state = start(flat)
    options: dict[str, Any] = {"alpha": 0.1, "beta": 1.0}
    apart, _ = step(
        flat, grads, type(state)(state.momenta, torch.tensor([0, 7])), functional, **options
    )
    for n, at in enumerate((0, 7)):
        one, after = step(
            *(flat[n : n + 1], grads[n : n + 1], type(state)(state.momenta[:, :1], at), functional),
            **options,
        )
        torch.testing.assert_close(apart[n : n + 1], one)
        assert after.step == at + 1


@pytest.mark.parametrize("name", ["mlp", "attention"])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_it_goes_on_where_it_stopped(how: str, name: str) -> None:
    model, spec, functional = make(name)
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model, momentum=0.8)
    train(model, optimizer, 3)
    if how == "state_dict":
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = LearnedOptimizer(spec, functional, 0.7, 0.7, twin, momentum=0.8)
        other.load_state_dict(torch.load(file, weights_only=True))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin, other = copy.deepcopy((model, optimizer))
    assert train(twin, other, 3) == train(model, optimizer, 3)
    torch.testing.assert_close(state_of(twin), state_of(model), rtol=0, atol=0)


def test_its_state_is_laid_out_as_of_optimizers_of_torch() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    train(model, optimizer, 3)
    state = optimizer.state_dict()["state"]
    assert [list(each["momenta"].shape) for each in state.values()] == [
        [6, *p.shape] for p in model.parameters()
    ]
    assert {each["step"].item() for each in state.values()} == {3.0}


def test_state_of_another_momentum_is_refused() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    train(model, optimizer, 1)
    other = LearnedOptimizer(spec, functional, 0.1, 0.1, model, momentum=0.8)
    with pytest.raises(
        ValueError, match=r"momenta of shape \[6, 5, 6\] for 0.weight, not \[7, 5, 6\]"
    ):
        other.load_state_dict(optimizer.state_dict())


def test_two_runs_are_the_same() -> None:
    paths = []
    for _ in range(2):
        model, spec, functional = make("rnn")
        paths.append(train(model, LearnedOptimizer(spec, functional, 0.1, 0.1, model), 5))
    assert paths[0] == paths[1]


def test_frozen_parameters_and_buffers_stay() -> None:
    model, spec, functional = make("cnn")
    model.eval()  # or batch norm moves its statistics itself
    model[1].weight.requires_grad_(False)
    before = state_of(model)
    train(model, LearnedOptimizer(spec, functional, 0.1, 0.1, model))
    same = {name for name, tensor in state_of(model).items() if torch.equal(tensor, before[name])}
    assert same == {"1.weight", "2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_what_is_frozen_for_a_while_keeps_its_momenta() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.0, model)
    train(model, optimizer, 2)
    weight = model[0].weight
    held, value = optimizer.state[weight]["momenta"].clone(), weight.detach().clone()
    loss_of(model).backward()
    weight.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momenta"], held)
    assert torch.equal(weight, value)
    assert not torch.equal(optimizer.state[model[2].weight]["momenta"], held)


def test_groups_have_alphas_and_betas_of_their_own() -> None:
    model, spec, functional = make()
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.0},
        {"params": [("head", model[2].weight)], "beta": 0.0},
    ]
    with pytest.raises(ValueError, match="with/without names"):  # as in torch
        LearnedOptimizer(spec, functional, 0.1, 0.1, model, groups)
    groups[1]["params"] = [model[2].weight]
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model, groups)
    train(model, optimizer, 1)
    before = state_of(plain)
    after = state_of(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["2.bias"], before["2.bias"])
    train(other, LearnedOptimizer(spec, functional, 0.1, 0.0, other), 1)
    torch.testing.assert_close(after["2.weight"], state_of(other)["2.weight"])
    optimizer.add_param_group({"params": model[2].bias})
    train(model, optimizer, 1)
    assert not torch.equal(model[2].bias, before["2.bias"])


def test_schedulers_closures_and_hooks_work() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *args: seen.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert first.item() == pytest.approx(loss_of(make()[0]).item())
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert seen == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(value: float) -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    train(model, optimizer, 2)
    before, held = state_of(model), copy.deepcopy(optimizer.state_dict())
    model[0].weight.grad[3, 2] = value
    with pytest.raises(ValueError, match=rf"the gradient of 0.weight\[3, 2\] is {value}, and the"):
        optimizer.step()
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert str(optimizer.state_dict()) == str(held)


def test_steps_with_gradients_that_are_not_finite_are_skipped_and_counted() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model, nonfinite="skip")
    train(model, optimizer, 2)
    before, held = state_of(model), str(optimizer.state_dict())
    model[2].bias.grad[:] = torch.nan
    optimizer.step()
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert (str(optimizer.state_dict()), optimizer.skipped) == (held, 1)
    assert all(torch.isfinite(torch.tensor(train(model, optimizer, 2))))


def test_networks_whose_gradients_are_not_finite_stay() -> None:
    _, spec, functional = make()
    flat = torch.randn(3, spec.numel, dtype=D)
    grads = torch.randn(3, spec.numel, dtype=D)
    _, state = step(flat, grads, start(flat), functional, alpha=0.1, beta=0.1)
    bad = grads.clone()
    bad[1, 4] = torch.inf
    options = {"alpha": 0.1, "beta": 0.1}
    good, after = step(flat, grads, state, functional, **options)
    held, kept = step(flat, bad, state, functional, **options)
    assert torch.equal(held[1], flat[1])
    assert torch.equal(kept.momenta[:, 1], state.momenta[:, 1])
    torch.testing.assert_close(held[::2], good[::2])
    torch.testing.assert_close(kept.momenta[:, ::2], after.momenta[:, ::2])


def test_a_model_without_any_gradient_stays() -> None:
    model, spec, functional = make()
    before = state_of(model)
    LearnedOptimizer(spec, functional, 0.1, 0.1, model).step()
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


def test_a_step_commutes_with_permuting_neurons() -> None:
    model, spec, functional = make("rnn")
    perms = spec.random_permutations(1, torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    spec.load_(other, weightops.permute(spec.flatten(model), perms, spec)[0])
    for each in (model, other):
        train(each, LearnedOptimizer(spec, functional, 0.1, 0.5, each), 3)
    moved = weightops.permute(spec.flatten(model), perms, spec)
    torch.testing.assert_close(spec.flatten(other), moved, rtol=1e-7, atol=1e-9)


def test_a_step_is_measured_and_nothing_changes() -> None:
    model, spec, functional = make()
    optimizer = LearnedOptimizer(spec, functional, 0.1, 0.1, model)
    train(model, optimizer, 2)
    before, held = state_of(model), str(optimizer.state_dict())
    cost = optimizer.measure(3)
    assert 0 < cost.functional_seconds < cost.seconds
    assert 0 < cost.share < 1
    # 19 x 4 and 4 x 4 for each of 59 weights, then the maps of the last layer.
    assert cost.flops >= 2 * spec.numel * (19 * 4 + 4 * 4)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert str(optimizer.state_dict()) == held


def test_what_was_learned_is_saved_with_its_numbers(tmp_path: Any) -> None:
    model, spec, functional = make()
    path = tmp_path / "optimizer.safetensors"
    LearnedOptimizer(spec, functional, 0.1, 0.3, model, momentum=0.7).save(path)
    torch.manual_seed(5)
    wide = mlp(9).to(D)
    loaded = LearnedOptimizer.load(path, weightops.trace(wide, X), wide)
    assert (loaded.defaults, loaded.momentum) == ({"lr": 0.1, "beta": 0.3}, 0.7)
    same = LearnedOptimizer(
        weightops.trace(wide, X), functional, 0.1, 0.3, copy.deepcopy(wide), momentum=0.7
    )
    assert train(wide, loaded) == train(same._model, same)
