"""Features of whole networks that no permutation of neurons changes."""

from __future__ import annotations

from torch import Tensor, nn

from weightops.nn import _arguments
from weightops.ops.equivariant import _backward
from weightops.ops.equivariant.plan import code_of
from weightops.spec import WeightSpec

_SCALAR = WeightSpec({"invariant": ()}, {"invariant": ()})


class InvariantPool(nn.Module):
    """All linear invariants: every tensor's mean, and the means of its diagonals where a label repeats.

    Input ``[B, P, C]``, output ``[B, R * C]`` with the channels of a mean side by side; no parameters.

    Args:
        spec: the weight space.
        fixed: as for :class:`EquivariantLinear`; other than ``"permute"``, every position of the fixed
            axes has means of its own.
        normalize: ``"mean"`` or ``"sum"``.

    Attributes:
        plan: the maps to one number; ``plan.terms[r]`` says what the r-th mean is over.
        num_readers: number of means R.

    Raises:
        ValueError: an option is unknown.
        TypeError: ``spec`` is no WeightSpec.
    """

    def __init__(
        self, spec: WeightSpec, *, fixed: str = "permute", normalize: str = "mean"
    ) -> None:
        super().__init__()
        _arguments.is_spec("InvariantPool", "spec", spec)
        self.plan = _arguments.plan_of(
            spec, _SCALAR, fixed=fixed, terms="full", normalize=normalize
        )
        self.num_readers = self.plan.num_terms

    def out_features(self, channels: int) -> int:
        """Length of the output for ``channels`` features per weight."""
        return self.num_readers * channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, C]`` to ``[B, R * C]``.

        Raises:
            ValueError: P is not the spec's.
            TypeError: ``x`` is no floating point tensor.
        """
        _arguments.features("InvariantPool", x, self.plan.spec)
        batch, _, channels = x.shape
        if batch == 0:
            return x.new_zeros(0, self.num_readers * channels)
        # A layer onto one number is sum_r mean_r(x) . theta[r], so its gradient by a theta of each sample's
        # own is the means: one pass that pools, where the layer would multiply by an R C x R C identity.
        theta = x.new_zeros(()).expand(batch, self.num_readers, channels, 1)
        grad = x.new_ones(batch, 1, 1)
        return _backward(x, theta, grad, code_of(self.plan), False)[1].flatten(1)

    def extra_repr(self) -> str:
        return f"num_readers={self.num_readers}"
