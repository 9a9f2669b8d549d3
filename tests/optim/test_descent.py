"""Descent moves the manifold, not its parameters: what it computes, and that it is an optimizer."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from weightops.manifolds import Bezier, BSpline, Ellipse, Line, Manifold, Torus
from weightops.optim import ManifoldDescent

D = torch.float64
Make = Callable[[list[Tensor]], Optimizer]
GRID = (torch.arange(8, dtype=D) + 0.5) / 8


class Problem:
    """A layer on a manifold and one off it, fitted to targets that turn with the context.

    ``basis`` is A in phi -> A phi; parameters start so that W(s) does not depend on it.
    """

    def __init__(self, manifold: Manifold, basis: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        k = manifold.num_coeffs
        self.manifold = manifold
        self.basis = torch.eye(k, dtype=D) if basis is None else basis
        back = torch.linalg.inv(self.basis).mT
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=D)  # noqa: E731
        self.weight = torch.tensordot(back, draw(k, 3, 4) / 2, 1).requires_grad_()
        self.bias = torch.tensordot(back, draw(k, 3) / 2, 1).requires_grad_()
        self.head = draw(2, 3).requires_grad_()
        self.x, self.y = draw(5, 4), draw(5, 2)
        grid = GRID if manifold.context_dims == 1 else torch.cartesian_prod(GRID, GRID)
        self.phi = manifold.coeffs(grid) @ self.basis.mT

    @property
    def spanning(self) -> list[Tensor]:
        return [self.weight, self.bias]

    @property
    def params(self) -> list[Tensor]:
        return [*self.spanning, self.head]

    @property
    def inverse_gram(self) -> Tensor:
        back = torch.linalg.inv(self.basis)
        return back.mT @ self.manifold.inverse_gram @ back

    def weights(self) -> Tensor:
        """W(s) over the grid, flat, and the head."""
        spread = [(self.phi @ p.detach().flatten(1)).flatten() for p in self.spanning]
        return torch.cat([*spread, self.head.detach().flatten()])

    def loss(self) -> Tensor:
        weight = torch.einsum("sk,koi->soi", self.phi, self.weight)
        hidden = (weight @ self.x.mT).mT + (self.phi @ self.bias)[:, None]
        turned = self.y * torch.linspace(-1, 1, len(self.phi), dtype=D)[:, None, None]
        return (hidden.tanh() @ self.head.mT - turned).square().mean()

    def backward(self) -> Tensor:
        for param in self.params:
            param.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def descend(self, optimizer: Optimizer, steps: int = 20) -> Tensor:
        """W(s) after every step."""
        path = []
        for _ in range(steps):
            self.backward()
            optimizer.step()
            path.append(self.weights())
        return torch.stack(path)


def rebasis(k: int, seed: int = 1) -> Tensor:
    """Invertible, and far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(k, k, generator=generator, dtype=D))
    return u @ torch.logspace(-0.5, 0.5, k, dtype=D).diag() @ v


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.05),
    "momentum": lambda params: SGD(params, lr=0.02, momentum=0.9),
    "nesterov": lambda params: SGD(params, lr=0.02, momentum=0.9, nesterov=True),
    "weight decay": lambda params: SGD(params, lr=0.05, momentum=0.5, weight_decay=0.1),
}
MANIFOLDS = [Line(), Ellipse(), Bezier(2), BSpline(5, 2, ring=True), Torus()]


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_basis_does_not_matter(name: str, manifold: Manifold) -> None:
    plain = Problem(manifold)
    turned = Problem(manifold, rebasis(manifold.num_coeffs))
    torch.testing.assert_close(turned.weights(), plain.weights())
    make = OPTIMIZERS[name]
    path = plain.descend(ManifoldDescent(make(plain.params), manifold, plain.spanning))
    other = turned.descend(
        ManifoldDescent(make(turned.params), turned.inverse_gram, turned.spanning)
    )
    torch.testing.assert_close(other, path, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_gram_the_basis_matters(name: str) -> None:
    plain, turned = Problem(Ellipse()), Problem(Ellipse(), rebasis(3))
    make = OPTIMIZERS[name]
    path, other = plain.descend(make(plain.params)), turned.descend(make(turned.params))
    assert (other - path).abs().max() > 0.05


def test_with_adam_the_basis_matters_still() -> None:
    plain, turned = Problem(Ellipse()), Problem(Ellipse(), rebasis(3))
    path, other = (
        p.descend(ManifoldDescent(Adam(p.params, lr=0.02), p.inverse_gram, p.spanning))
        for p in (plain, turned)
    )
    assert (other - path).abs().max() > 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_estimated_gram_makes_the_basis_as_indifferent(name: str) -> None:
    paths = []
    for basis in (None, rebasis(3)):
        problem = Problem(Ellipse(), basis)
        optimizer = ManifoldDescent(
            OPTIMIZERS[name](problem.params), 3, problem.spanning, estimate=True
        )
        path = []
        for step in range(20):
            optimizer.observe(problem.phi[step % 4 :])  # drawn unevenly
            path.append(problem.descend(optimizer, 1))
        paths.append(torch.cat(path))
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-7, atol=1e-9)


def test_a_step_is_the_papers() -> None:
    """dP = -eta G^-1 int phi(s) (x) g(s) ds, by Gauss-Legendre, for a loss of one weight tensor."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(2, 3, generator=generator, dtype=D).requires_grad_()
    target = torch.randn(3, generator=generator, dtype=D)
    nodes = torch.tensor([-(0.6**0.5), 0, 0.6**0.5], dtype=D) / 2 + 0.5
    shares = torch.tensor([5.0, 8, 5], dtype=D) / 18
    expected = torch.zeros_like(bases)
    loss = torch.zeros((), dtype=D)
    for s, share in zip(nodes, shares, strict=True):
        phi = torch.stack([1 - s, s])
        weight = phi @ bases
        gradient = 2 * (weight - s * target).detach()
        inverse = torch.tensor([[4.0, -2], [-2, 4]], dtype=D)
        expected -= 0.1 * inverse @ (share * torch.outer(phi, gradient))
        loss = loss + share * (weight - s * target).square().sum()
    loss.backward()
    before = bases.detach().clone()
    ManifoldDescent(SGD([bases], lr=0.1), Line(), [bases]).step()
    torch.testing.assert_close(bases.detach() - before, expected)


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
def test_no_direction_of_equal_movement_lowers_the_loss_faster(manifold: Manifold) -> None:
    problem = Problem(manifold)
    problem.backward()
    gradient = problem.weight.grad.flatten(1)  # type: ignore[union-attr]
    before = problem.weight.detach().clone()
    ManifoldDescent(SGD(problem.params, lr=1.0), manifold, problem.spanning).step()
    taken = (problem.weight.detach() - before).flatten(1)

    def slope(direction: Tensor) -> Tensor:
        movement = (direction * (manifold.gram @ direction)).sum()  # int |dW(s)|^2 ds
        return (gradient * direction).sum() / movement.sqrt()

    generator = torch.Generator().manual_seed(0)
    others = [torch.randn(taken.shape, generator=generator, dtype=D) for _ in range(20)]
    others += [taken + 0.1 * other * taken.norm() / other.norm() for other in others]
    assert all(slope(taken) < slope(other) for other in others)
    if not torch.equal(manifold.gram, manifold.gram[0, 0] * torch.eye(manifold.num_coeffs)):
        assert slope(taken) < slope(-gradient)


def test_other_parameters_step_as_ever() -> None:
    plain, wrapped = Problem(Ellipse()), Problem(Ellipse())
    for problem in (plain, wrapped):
        problem.backward()
    SGD(plain.params, lr=0.1, weight_decay=0.1).step()
    optimizer = SGD(wrapped.params, lr=0.1, weight_decay=0.1)
    ManifoldDescent(optimizer, Ellipse(), wrapped.spanning).step()
    assert torch.equal(wrapped.head, plain.head)
    assert not torch.equal(wrapped.bias, plain.bias)


def test_gradients_are_as_before_after_a_step() -> None:
    problem = Problem(Ellipse())
    optimizer = ManifoldDescent(SGD(problem.params, lr=0.1), Ellipse(), problem.spanning)
    problem.backward()
    before = [(p.grad, p.grad.clone()) for p in problem.params]  # type: ignore[union-attr]
    optimizer.step()
    for param, (grad, value) in zip(problem.params, before, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step()
    assert problem.weight.grad is before[0][0]


def test_parameters_without_gradient_are_left_alone() -> None:
    problem = Problem(Ellipse())
    optimizer = ManifoldDescent(SGD(problem.params, lr=0.1), Ellipse(), problem.spanning)
    problem.backward()
    problem.bias.grad = None
    before = problem.bias.detach().clone()
    optimizer.step()
    assert torch.equal(problem.bias, before)
    assert problem.bias.grad is None


def test_a_closure_gives_the_same_steps() -> None:
    plain, closing = Problem(Bezier(2)), Problem(Bezier(2))
    make = OPTIMIZERS["momentum"]
    expected = plain.descend(ManifoldDescent(make(plain.params), Bezier(2), plain.spanning), 3)
    optimizer = ManifoldDescent(make(closing.params), Bezier(2), closing.spanning)
    losses = [optimizer.step(closing.backward) for _ in range(3)]
    assert torch.equal(closing.weights(), expected[-1])
    assert losses[2] < losses[0]


def test_a_closure_called_again_sees_its_own_gradients() -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            closure()
            return super().step()

    problem = Problem(Ellipse())
    optimizer = ManifoldDescent(Twice(problem.params, lr=0.0), Ellipse(), problem.spanning)
    problem.backward()
    once = [p.grad.clone() for p in problem.params]  # type: ignore[union-attr]
    optimizer.step(lambda: problem.loss().backward())  # adds to the gradients that are there
    for param, grad in zip(problem.params, once, strict=True):
        torch.testing.assert_close(param.grad, 3 * grad)


def test_schedulers_set_the_wrapped_ones_rate() -> None:
    problem = Problem(Ellipse())
    inner = SGD(problem.params, lr=1.0)
    optimizer = ManifoldDescent(inner, Ellipse(), problem.spanning)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for rate in (1.0, 0.5, 0.25):
        assert inner.param_groups[0]["lr"] == rate
        problem.backward()
        optimizer.step()
        scheduler.step()
    # Loading makes new groups; the scheduler must find those.
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.5**4


def make_estimating(problem: Problem) -> ManifoldDescent:
    inner = SGD(problem.params, lr=0.05, momentum=0.9)
    return ManifoldDescent(inner, problem.manifold, problem.spanning, estimate=True, decay=0.5)


def run(problem: Problem, optimizer: ManifoldDescent, steps: range) -> None:
    for step in steps:
        optimizer.observe(problem.phi[step % 3 :])
        problem.descend(optimizer, 1)


def test_a_loaded_state_goes_on_where_it_was_saved() -> None:
    whole = Problem(Ellipse())
    optimizer = make_estimating(whole)
    run(whole, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = Problem(Ellipse())
    again = make_estimating(resumed)
    again.observe(torch.eye(3))
    resumed.descend(again, 1)  # what came before loading leaves no trace
    with torch.no_grad():
        for param, value in zip(resumed.params, whole.params, strict=True):
            param.copy_(value)
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        for problem, opt in ((whole, optimizer), (resumed, again)):
            problem.descend(opt, 1)  # the Gram comes from what was observed before saving
            opt.observe(problem.phi[:5])
    assert torch.equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_work(copied: Callable) -> None:
    problem = Problem(Ellipse())
    optimizer = make_estimating(problem)
    CosineAnnealingLR(optimizer, 10)  # which puts a step of its own on the instance
    run(problem, optimizer, range(3))
    twin, other = copied((problem, optimizer))
    run(problem, optimizer, range(3))
    run(twin, other, range(3))
    assert torch.equal(twin.weights(), problem.weights())
    assert other.param_groups is other.optimizer.param_groups


def test_a_bare_optimizers_state_loads() -> None:
    problem, other = Problem(Ellipse()), Problem(Ellipse())
    inner = SGD(problem.params, lr=0.125, momentum=0.9)
    problem.descend(inner, 2)
    optimizer = ManifoldDescent(SGD(other.params, lr=0.5, momentum=0.9), Ellipse(), other.spanning)
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125
    buffer = optimizer.state[other.weight]["momentum_buffer"]
    assert torch.equal(buffer, inner.state[problem.weight]["momentum_buffer"])
    inner.load_state_dict(optimizer.state_dict())


def test_hooks_run_once() -> None:
    problem = Problem(Ellipse())
    inner = SGD(problem.params, lr=0.1)
    optimizer = ManifoldDescent(inner, Ellipse(), problem.spanning)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt))
    problem.backward()
    optimizer.step()
    assert seen == [optimizer, optimizer]
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[2:] == ["saved", "loaded"]


def test_two_manifolds_in_one_optimizer() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(k, 2, generator=generator, dtype=D) for k in (2, 3, 4))
    grads = [torch.randn(p.shape, generator=generator, dtype=D) for p in (a, b, c)]

    def build(params: list[Tensor]) -> ManifoldDescent:
        inner = ManifoldDescent(SGD(params, lr=1.0), Line(), params[:1])
        return ManifoldDescent(inner, 3, params[1:2], estimate=True)

    params = [p.clone().requires_grad_() for p in (a, b, c)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = build(params)
    optimizer.observe(torch.eye(3))
    fresh = build(params)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()
    expected = (a - Line().inverse_gram @ grads[0], b - 3 * grads[1], c - grads[2])
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value)


def test_zero_grad() -> None:
    problem = Problem(Ellipse())
    optimizer = ManifoldDescent(SGD(problem.params, lr=0.1), Ellipse(), problem.spanning)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.abs().max() == 0 for p in problem.params)  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_groups_that_come_later() -> None:
    first, spanning, other = (torch.ones(3, 2, requires_grad=True) for _ in range(3))
    optimizer = ManifoldDescent(SGD([first], lr=1.0), Ellipse(), [first])
    optimizer.add_param_group({"params": iter([spanning]), "lr": 2.0}, manifold=True)
    optimizer.add_param_group({"params": other})
    for param in (first, spanning, other):
        param.grad = torch.ones(3, 2)
    optimizer.step()
    assert first.detach()[:, 0].tolist() == [0, -1, -1]
    assert spanning.detach()[:, 0].tolist() == [-1, -3, -3]
    assert other.detach()[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"params\[0\] must have K = 3 as its first axis"):
        optimizer.add_param_group({"params": torch.ones(2, 2)}, manifold=True)
    assert len(optimizer.param_groups) == 3


def test_a_grad_scaler_works() -> None:
    problem, scaled = Problem(Ellipse()), Problem(Ellipse())
    expected = problem.descend(
        ManifoldDescent(SGD(problem.params, lr=0.1), Ellipse(), problem.spanning), 1
    )
    optimizer = ManifoldDescent(SGD(scaled.params, lr=0.1), Ellipse(), scaled.spanning)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(scaled.loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(scaled.weights(), expected[0])
    before = scaled.weights()
    scaled.weight.grad[0, 0, 0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    assert torch.equal(scaled.weights(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves_are_combined_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.zeros(3, 50, dtype=dtype, requires_grad=True)
    bases.grad = torch.randn(3, 50, generator=generator).to(dtype)
    optimizer = ManifoldDescent(SGD([bases], lr=1.0), Bezier(2), [bases])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    expected = -(Bezier(2).inverse_gram @ bases.grad.double()).to(dtype)
    torch.testing.assert_close(bases.detach(), expected)


def test_an_estimate_comes_to_the_closed_form() -> None:
    problem = Problem(Bezier(2))
    optimizer = ManifoldDescent(SGD(problem.params, lr=1), 3, problem.spanning, estimate=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        s = Bezier(2).sample(64, stratified=True, generator=generator, dtype=D)
        optimizer.observe(Bezier(2).coeffs(s).reshape(8, 8, 3))
    problem.weight.grad = torch.eye(3, dtype=D).reshape(3, 3, 1).expand(3, 3, 4).contiguous()
    before = problem.weight.detach().clone()
    optimizer.step()
    found = (before - problem.weight.detach())[..., 0]
    torch.testing.assert_close(found, Bezier(2).inverse_gram, rtol=0.01, atol=0)


def test_the_mean_fades_and_starts_unbiased() -> None:
    bases = torch.zeros(2, 1, dtype=D, requires_grad=True)
    optimizer = ManifoldDescent(SGD([bases], lr=1.0), 2, [bases], estimate=True, decay=0.75)
    first, second = torch.eye(2) * 2, torch.eye(2) * 4
    bases.grad = torch.ones(2, 1, dtype=D)

    def gram() -> float:
        before = bases.detach().clone()
        optimizer.step()
        return (1 / (before - bases.detach()))[0].item()

    optimizer.observe(first)
    assert gram() == pytest.approx(2)  # the mean of diag(4, 0) and diag(0, 4), not a quarter of it
    optimizer.observe(torch.empty(0, 2))  # says nothing
    assert gram() == pytest.approx(2)
    optimizer.observe(second)
    assert gram() == pytest.approx((0.75 * 2 + 8) / 1.75)
    for _ in range(60):
        optimizer.observe(second)
    assert gram() == pytest.approx(8)


def test_no_gradient_flows_through_what_is_observed() -> None:
    bases = torch.zeros(2, 1, requires_grad=True)
    optimizer = ManifoldDescent(SGD([bases], lr=1.0), 2, [bases], estimate=True)
    optimizer.observe(torch.eye(2).requires_grad_())
    bases.grad = torch.ones(2, 1)
    optimizer.step()
    assert not bases.grad.requires_grad


def test_damping_inverts_what_is_singular() -> None:
    bases = torch.zeros(2, 1, dtype=D, requires_grad=True)
    bases.grad = torch.tensor([[1.0], [2.0]], dtype=D)
    optimizer = ManifoldDescent(SGD([bases], lr=1.0), 2, [bases], estimate=True, damping=0.5)
    optimizer.observe(torch.tensor([2.0, 0.0]))
    optimizer.step()  # Gram diag(4, 0), half its mean diagonal entry is 1
    torch.testing.assert_close(bases.detach(), torch.tensor([[-0.2], [-2.0]], dtype=D))


@pytest.mark.parametrize("contexts", [1, 2, 8, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_different_contexts_are_said(contexts: int, dtype: torch.dtype) -> None:
    problem = Problem(Ellipse())
    optimizer = ManifoldDescent(SGD(problem.params, lr=1), 3, problem.spanning, estimate=True)
    s = torch.tensor([0.3, 0.6], dtype=dtype)[torch.arange(contexts) % 2]
    optimizer.observe(Ellipse().coeffs(s))
    problem.backward()
    before, grad = problem.weights(), problem.weight.grad
    with pytest.raises(
        ValueError,
        match=rf"^ManifoldDescent: the Gram estimated from {contexts} contexts is singular, .* "
        "observe more different contexts than K = 3, or set damping",
    ):
        optimizer.step()
    assert torch.equal(problem.weights(), before)
    assert problem.weight.grad is grad
    optimizer.observe(Ellipse().coeffs(GRID))
    optimizer.step()


def bad(manifold: Any = None, params: Any = None, **options: Any) -> ManifoldDescent:
    problem = Problem(Ellipse())
    manifold = Ellipse() if manifold is None else manifold
    params = problem.spanning if params is None else params
    return ManifoldDescent(SGD(problem.params, lr=1), manifold, params, **options)


LINEAR = nn.Linear(2, 4)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: ManifoldDescent(SGD, Line(), [LINEAR.weight]),
        TypeError,
        "optimizer must be a torch.optim.Optimizer, not type",
    ),
    (lambda: bad("line"), TypeError, r"manifold must be a Manifold or its inverse Gram \[K, K\]"),
    (lambda: bad(3), TypeError, r"manifold must be a Manifold or its inverse Gram .* not int 3"),
    (
        lambda: bad(torch.eye(3), estimate=True),
        TypeError,
        "manifold must be a Manifold or K, where the Gram is estimated, not a torch.float32 tensor",
    ),
    (lambda: bad(0, estimate=True), ValueError, "manifold must be at least 1, not 0"),
    (lambda: bad(torch.ones(3, 2)), ValueError, r"inverse Gram \[K, K\], not of shape \[3, 2\]"),
    (lambda: bad(torch.eye(3).long()), TypeError, "manifold must be floating point"),
    (lambda: bad(torch.eye(3) / 0), ValueError, r"manifold must be finite, but manifold\[0, 0\]"),
    (lambda: bad(-torch.eye(3)), ValueError, "symmetric and positive definite, not .*-1.0"),
    (lambda: bad(torch.ones(3, 3).tril()), ValueError, "symmetric and positive definite, not"),
    (
        lambda: bad(params=[LINEAR.weight]),
        ValueError,
        r"params\[0\] must have K = 3 as its first axis, but has shape \[4, 2\]",
    ),
    (
        lambda: bad(params=LINEAR.named_parameters()),
        ValueError,
        r"weight must have K = 3 as its first axis, but has shape \[4, 2\]",
    ),
    (
        lambda: bad(params=[torch.ones(())]),
        ValueError,
        r"params\[0\] must have K = 3 as its first axis, but has shape \[\]",
    ),
    (
        lambda: bad(params=[torch.ones(3, 2)]),
        ValueError,
        r"params\[0\] is not among the optimizer's parameters",
    ),
    (lambda: bad(params=LINEAR.weight), TypeError, "params must be parameters, or pairs of name"),
    (lambda: bad(params=3), TypeError, "params must be parameters, .* not int 3"),
    (lambda: bad(params=[3]), TypeError, r"params\[0\] must be a tensor \[3, ...\], not int 3"),
    (lambda: bad(params=iter([])), ValueError, "params must hold a parameter, but is empty"),
    (lambda: bad(estimate=1), TypeError, "estimate must be True or False, not int 1"),
    (lambda: bad(decay=1.0), ValueError, r"decay must be in \[0, 1\), not 1.0"),
    (lambda: bad(decay="no"), TypeError, "decay must be a number, not str 'no'"),
    (lambda: bad(damping=-1, estimate=True), ValueError, r"damping must be in \[0, inf\), not -1"),
    (lambda: bad(damping=0.1), ValueError, "damping needs estimate=True"),
    (lambda: bad().observe(torch.ones(2, 3)), ValueError, "observe: needs estimate=True"),
    (
        lambda: bad(estimate=True).observe(torch.ones(3, 2)),
        ValueError,
        r"observe: coeffs must have shape \[..., 3\], not \[3, 2\]",
    ),
    (lambda: bad(estimate=True).observe([1.0]), TypeError, "observe: coeffs must be a tensor"),
    (
        lambda: bad(estimate=True).observe(torch.ones(2, 3).long()),
        TypeError,
        "observe: coeffs must be floating point, not torch.int64",
    ),
    (
        lambda: bad(estimate=True).load_state_dict(bad().state_dict()),
        ValueError,
        "state_dict has no estimated Gram",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ManifoldDescent(: |.*){message}"):
        call()


def stepping(problem: Problem, **options: Any) -> ManifoldDescent:
    problem.backward()
    return ManifoldDescent(SGD(problem.params, lr=1), Ellipse(), problem.spanning, **options)


def test_a_step_without_contexts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ManifoldDescent: no contexts were observed"):
        stepping(Problem(Ellipse()), estimate=True).step()


def test_coefficients_that_are_not_finite_are_said() -> None:
    optimizer = stepping(Problem(Ellipse()), estimate=True)
    optimizer.observe(torch.full((4, 3), float("nan")))
    with pytest.raises(ValueError, match="coefficients were observed that are not finite"):
        optimizer.step()


def test_a_sparse_gradient_is_refused() -> None:
    bases = torch.ones(3, 2, requires_grad=True)
    optimizer = ManifoldDescent(SGD([bases], lr=1.0), Ellipse(), [("table", bases)])
    bases.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match="the gradient of table must be a dense tensor"):
        optimizer.step()


def test_a_gram_of_another_k_is_not_loaded() -> None:
    state = bad(estimate=True).state_dict()
    bases = torch.ones(2, 2, requires_grad=True)
    optimizer = ManifoldDescent(SGD([bases] * 1, lr=1.0), 2, [bases], estimate=True)
    with pytest.raises(ValueError, match=r"has a Gram of shape \[3, 3\], not \[2, 2\]"):
        optimizer.load_state_dict(state)


def test_what_it_is_can_be_read() -> None:
    assert repr(bad()).startswith("ManifoldDescent(K=3, 2 parameters, Gram closed form, SGD (")
    assert "Gram estimated" in repr(bad(estimate=True))
