"""An embedding whose rows follow a context."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightops import _check
from weightops.manifolds.manifold import Manifold
from weightops.nn.manifold import Convert, ManifoldLayer


class ManifoldEmbedding(ManifoldLayer):
    """An embedding whose rows follow the context: those of its K tables, mixed for each entry of a batch.

    Args:
        num_embeddings, embedding_dim: size of a table.
        manifold: topology of the weights, or a number of bases K whose mixture each context is.
        padding_idx: row that is zero at first and stays as it is, in every table.
        spread: of the initial weights' standard deviation, which part comes from the context.
        device, dtype: of the parameters.

    Attributes:
        weight: the tables ``[K, num_embeddings, embedding_dim]``.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        manifold: Manifold | int,
        *,
        padding_idx: int | None = None,
        spread: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(manifold)
        where, rows = "ManifoldEmbedding", num_embeddings
        _check.count(where, "num_embeddings", num_embeddings)
        _check.count(where, "embedding_dim", embedding_dim)
        _check.number(where, "spread", spread, 0, 1)
        if padding_idx is not None:
            _check.count(where, "padding_idx", padding_idx, -rows)
            if padding_idx >= rows:
                raise ValueError(
                    f"{where}: padding_idx must be less than {rows}, not {padding_idx}"
                )
            padding_idx %= rows
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.spread = padding_idx, spread
        self._allocate((num_embeddings, embedding_dim), None, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the tables as :class:`ManifoldLinear` draws its bases, from ``torch.nn.Embedding``'s N(0, 1)."""
        self._draw(self.weight, self.spread, lambda table: table.normal_())
        if self.padding_idx is not None:
            self.weight[:, self.padding_idx] = 0

    def forward(
        self,
        ids: Tensor,
        context: Tensor | None = None,
        *,
        coeffs: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``[B, ...]``, int64 or int32, to ``[B, ..., embedding_dim]``; contexts and errors as for
        :class:`ManifoldLinear`."""
        _check.tensor("ManifoldEmbedding", "ids", ids, "[B, ...]")
        _check.index_dtype("ManifoldEmbedding", "ids", ids)
        mixing = self._at_each(ids, context, coeffs, index, self.weight)
        lead, between = mixing.shape[:-1], [1] * (ids.dim() - mixing.dim() + 1)
        mixing = mixing.view(*lead, *between, self.num_bases, 1)
        mixed: Any = 0
        for table, share in zip(self.weight, mixing.unbind(-2), strict=True):
            mixed = mixed + share * F.embedding(ids, table, self.padding_idx).to(share.dtype)
        return mixed.to(self.weight.dtype)

    @classmethod
    def lifted(cls, module: nn.Embedding, manifold: Manifold, convert: Convert) -> Any:
        """``module`` with tables that ``convert`` gives for its own."""
        sizes = (module.num_embeddings, module.embedding_dim)
        layer = cls(*sizes, manifold, padding_idx=module.padding_idx, device="meta")
        layer._adopt(module, convert)
        if layer.padding_idx is not None:
            with torch.no_grad():
                padding = module.weight[layer.padding_idx]
                layer.weight[:, layer.padding_idx] = manifold.around(padding)
        return layer

    def ordinary(self, convert: Convert, coeffs: Tensor) -> nn.Module:
        sizes = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        return self._release(nn.Embedding(*sizes, device="meta"), convert)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {super().extra_repr()}"
