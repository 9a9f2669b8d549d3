"""assign against scipy and the batch solvers of lapx, cold and warm, on 64 problems at once."""

from __future__ import annotations

import lap
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import weightops
from weightops.testing import Assign

PROBLEMS = [Assign(family, n) for family in ("gram", "uniform") for n in (64, 256, 512, 1024)]
# lapx's dense batch solvers; the remaining ones return the same answers as pairs, or want sparse input.
LAPX = ("lapjvh_batch", "lapjvr_batch", "lapjvs_batch", "lapjvx_batch")


def lapx(name: str, cost: np.ndarray) -> np.ndarray:
    """Columns ``[B, n]`` of least cost."""
    found = getattr(lap, name)(cost, return_cost=False, n_threads=torch.get_num_threads())
    rows, columns = found
    return np.stack([c[np.argsort(r)] for r, c in zip(rows, columns, strict=True)])


def scipy_one_by_one(cost: np.ndarray) -> np.ndarray:
    return np.stack([linear_sum_assignment(each)[1] for each in cost])


def total(score: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return score.double().gather(2, columns[..., None]).sum((1, 2))


@pytest.mark.parametrize(
    "implementation", ["weightops", "weightops-warm", "weightops-useless-duals", *LAPX, "scipy"]
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_assign(problem: Assign, implementation: str, measure, benchmark) -> None:
    benchmark.group = f"assign {problem}"
    before, score = problem.make()
    maximize = problem.maximize
    best = total(score, weightops.assign(score, maximize=maximize))
    if implementation.startswith("weightops"):
        duals = None
        if implementation == "weightops-warm":
            duals = weightops.assign(before, maximize=maximize, return_duals=True)[1]
        elif implementation == "weightops-useless-duals":
            duals = weightops.assign(before.flip(0, 2), maximize=maximize, return_duals=True)[1]
        given = weightops.assign(score, maximize=maximize, duals=duals)
        measure(lambda: weightops.assign(score, maximize=maximize, duals=duals), problem.bytes)
    else:
        # Peers minimise; they get their costs ready made.
        cost = (-score if maximize else score).numpy()
        if implementation == "scipy" and problem.size > 512:
            pytest.skip("scipy takes seconds here and is far behind at every smaller size")
        solve = scipy_one_by_one if implementation == "scipy" else lambda c: lapx(implementation, c)
        given = torch.from_numpy(solve(cost)).long()
        measure(lambda: solve(cost), problem.bytes)
    torch.testing.assert_close(total(score, given), best, rtol=1e-6, atol=1e-6)
