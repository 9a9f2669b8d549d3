"""Steepest descent for a whole manifold of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightops import _check
from weightops.manifolds.manifold import Manifold
from weightops.optim.gram import GramEstimate

WHERE = "ManifoldDescent"
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_FIELDS = ("optimizer", "num_coeffs", "_params", "_inverse", "_estimate")
_STATE_DICT_HOOKS = ("state_dict_pre_hooks", "state_dict_post_hooks")


class ManifoldDescent(Optimizer):
    """Any optimizer, given ``G^-1 grad`` for the parameters that span a manifold ``W(s)``.

    The gradient of the loss averaged over contexts by ``P [K, ...]`` is ``int phi(s) (x) g(s) ds``; the
    step ``dP = -eta G^-1 int phi(s) (x) g(s) ds`` lowers it fastest for a given movement of the whole
    manifold, ``int |dW(s)|^2 ds`` (Benjamin et al. 2025, arXiv 2505.22994). With SGD, momentum, Nesterov's and
    weight decay too, ``W(s)`` then moves the same way whichever basis phi is written in. Optimizers that
    scale single weights (Adam) take the same gradient, but scale it in the basis at hand.

    It is an optimizer: schedulers, ``GradScaler``, hooks, closures and further wrapping (another manifold
    for other parameters) work. After a step ``.grad`` is what it was, so during a step the manifold's
    gradients are held twice. ``param_groups``, ``state`` and ``defaults`` are those of ``optimizer``.

    Args:
        optimizer: has all parameters; those not in ``params`` it steps as ever.
        manifold: what ``params`` span, which has a Gram in closed form; or the inverse Gram ``[K, K]`` itself;
            or, with ``estimate``, K.
        params: parameters whose first axis is K, or pairs of name and parameter.
        estimate: take the Gram of the contexts drawn, a running mean of ``phi phi^T`` over what
            :meth:`observe` is given, instead of that of contexts drawn evenly.
        decay: of that mean, per :meth:`observe`.
        damping: added to the estimate's diagonal, times its mean diagonal entry; other than 0, the
            independence of the basis is lost.

    Attributes:
        optimizer: the wrapped one.

    Raises:
        ValueError: a parameter's first axis is not K, or the optimizer lacks it; the inverse Gram is not
            symmetric and positive definite; a number is out of range.
        TypeError: an argument has the wrong type.
    """

    #: the inverse Gram on the devices and in the dtypes of the gradients
    _cast: dict[tuple[torch.device, torch.dtype], Tensor]

    def __init__(
        self,
        optimizer: Optimizer,
        manifold: Manifold | Tensor | int,
        params: Params,
        *,
        estimate: bool = False,
        decay: float = 0.99,
        damping: float = 0.0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{WHERE}: optimizer must be a torch.optim.Optimizer, not "
                f"{_check.describe(optimizer)}"
            )
        _check.flag(WHERE, "estimate", estimate)
        _check.number(WHERE, "decay", decay, 0, 1)
        _check.number(WHERE, "damping", damping, 0, float("inf"))
        if damping and not estimate:
            raise ValueError(
                f"{WHERE}: damping needs estimate=True, the inverse Gram is known already"
            )
        k, inverse = _read(manifold, estimate)
        named = _named(params, k)
        if not named:
            raise ValueError(f"{WHERE}: params must hold a parameter, but is empty")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, param in named:
            if id(param) not in held:
                raise ValueError(f"{WHERE}: {name} is not among the optimizer's parameters")
        self.optimizer, self.num_coeffs = optimizer, k
        self._params, self._inverse = named, inverse
        self._estimate = GramEstimate(k, decay, damping) if estimate else None
        # Optimizer.__init__ would make groups and states of its own beside the wrapped one's.
        self.__setstate__(self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in _FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner = vars(state["optimizer"])
        # States are saved and loaded by the wrapped one, so that hooks on either are hooks on it.
        shared = {name: value for name, value in inner.items() if name.endswith(_STATE_DICT_HOOKS)}
        super().__setstate__({"_cast": {}} | shared | state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def observe(self, coeffs: Tensor) -> None:
        """Let the contexts of a batch, by their coefficients ``[..., K]``, enter the estimated Gram.

        No gradient flows into it. Contexts that are drawn once for many rows count once.

        Raises:
            ValueError: the shape does not fit, or ``estimate`` is off.
            TypeError: ``coeffs`` is no floating point tensor.
        """
        if self._estimate is None:
            raise ValueError(f"{WHERE}.observe: needs estimate=True, the Gram is known already")
        self._estimate.observe(f"{WHERE}.observe", coeffs)
        self._inverse = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer; with ``closure``, its loss.

        Raises:
            ValueError: the estimated Gram is singular, or nothing was observed.
            TypeError: a gradient is sparse.
        """
        own: list[tuple[Tensor, Tensor]] = []

        def give_back() -> None:
            for param, grad in own:
                param.grad = grad
            own.clear()

        def evaluate() -> Any:
            give_back()
            with torch.enable_grad():
                loss = closure()  # type: ignore[misc]
            self._precondition(own)
            return loss

        try:
            if closure is not None:
                return self.optimizer.step(evaluate)
            self._precondition(own)
            return self.optimizer.step()
        finally:
            give_back()

    @torch.no_grad()
    def _precondition(self, own: list[tuple[Tensor, Tensor]]) -> None:
        """Put ``G^-1 grad`` in the place of gradients, which go to ``own``."""
        for name, param in self._params:
            grad = param.grad
            if grad is None:
                continue
            _check.dense(WHERE, f"the gradient of {name}", grad)
            wide = grad if grad.dtype == torch.float64 else grad.float()
            with torch.autocast(grad.device.type, enabled=False):
                steepest = torch.tensordot(self._inverse_like(wide), wide, 1)
            own.append((param, grad))
            param.grad = steepest.to(grad.dtype)

    def _inverse_like(self, like: Tensor) -> Tensor:
        if self._inverse is None:
            assert self._estimate is not None
            self._inverse = self._estimate.inverse(WHERE)
            self._cast = {}
        key = (like.device, like.dtype)
        if key not in self._cast:
            self._cast[key] = self._inverse.to(*key)
        return self._cast[key]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any], *, manifold: bool = False) -> None:
        """Add a group to the wrapped optimizer; with ``manifold``, one of parameters whose first axis is K.

        Raises:
            ValueError: a parameter's first axis is not K; else as the wrapped optimizer.
            TypeError: a parameter is no tensor.
        """
        _check.flag(f"{WHERE}.add_param_group", "manifold", manifold)
        named: list[tuple[str, Tensor]] = []
        if manifold:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = param_group | {"params": params}
            named = _named(params, self.num_coeffs)
        self.optimizer.add_param_group(param_group)
        self._params = self._params + named

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the estimated Gram under ``"manifold_descent"``."""
        state = self.optimizer.state_dict()
        own = None if self._estimate is None else self._estimate.state_dict()
        return state | {"manifold_descent": [*state.get("manifold_descent", []), own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or, where the Gram is not estimated, a bare optimizer's.

        Raises:
            ValueError: the estimated Gram is missing, or not ``[K, K]``; else as the wrapped optimizer.
        """
        state = dict(state_dict)
        *others, own = state.pop("manifold_descent", None) or [None]
        if self._estimate is not None:
            k = self.num_coeffs
            if own is None:
                raise ValueError(f"{WHERE}: state_dict has no estimated Gram")
            if own["moment"].shape != (k, k):
                raise ValueError(
                    f"{WHERE}: state_dict has a Gram of shape {list(own['moment'].shape)}, "
                    f"not [{k}, {k}]"
                )
        self.optimizer.load_state_dict(state | ({"manifold_descent": others} if others else {}))
        if self._estimate is not None:
            self._estimate.load_state_dict(own)
            self._inverse = None

    def __repr__(self) -> str:
        gram = "estimated" if self._estimate is not None else "closed form"
        return (
            f"{WHERE}(K={self.num_coeffs}, {len(self._params)} parameters, Gram {gram}, "
            f"{self.optimizer!r})"
        )


def _read(manifold: Any, estimate: bool) -> tuple[int, Tensor | None]:
    """K, and the inverse Gram ``[K, K]`` in float64 on the CPU unless it is to be estimated."""
    if isinstance(manifold, Manifold):
        return manifold.num_coeffs, None if estimate else manifold.inverse_gram
    if estimate:
        if isinstance(manifold, bool) or not isinstance(manifold, int):
            raise TypeError(
                f"{WHERE}: manifold must be a Manifold or K, where the Gram is estimated, not "
                f"{_check.describe(manifold)}"
            )
        _check.count(WHERE, "manifold", manifold)
        return manifold, None
    if not isinstance(manifold, Tensor):
        raise TypeError(
            f"{WHERE}: manifold must be a Manifold or its inverse Gram [K, K], not "
            f"{_check.describe(manifold)}"
        )
    _check.floating(WHERE, "manifold", manifold)
    if manifold.dim() != 2 or manifold.shape[0] != manifold.shape[1] or not len(manifold):
        raise ValueError(
            f"{WHERE}: manifold must be an inverse Gram [K, K], not of shape {list(manifold.shape)}"
        )
    inverse = manifold.detach().to("cpu", torch.float64)
    _check.finite(WHERE, "manifold", inverse)
    if not torch.allclose(inverse, inverse.mT, rtol=1e-4) or torch.linalg.eigvalsh(inverse)[0] <= 0:
        raise ValueError(
            f"{WHERE}: manifold must be an inverse Gram, symmetric and positive definite, not "
            f"{inverse.tolist()}"
        )
    return len(inverse), inverse


def _named(params: Any, k: int) -> list[tuple[str, Tensor]]:
    """Every parameter once, with a name for messages; its first axis is K."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"{WHERE}: params must be parameters, or pairs of name and parameter, not "
            f"{_check.describe(params)}"
        )
    named: dict[int, tuple[str, Tensor]] = {}
    for n, each in enumerate(params):
        pair = isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str)
        name, param = each if pair else (f"params[{n}]", each)
        _check.tensor(WHERE, name, param, f"[{k}, ...]")
        if param.dim() == 0 or param.shape[0] != k:
            raise ValueError(
                f"{WHERE}: {name} must have K = {k} as its first axis, but has shape "
                f"{list(param.shape)}"
            )
        named.setdefault(id(param), (name, param))
    return list(named.values())
