"""Which axes permute together: atoms in a union-find, refined into products and sums as ops ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

#: an axis is a product of atoms, slowest first; ``()`` is an axis of length 1
Axis: TypeAlias = tuple[int, ...]


class Reason(NamedTuple):
    """Why an axis does not permute, and the op that said so."""

    why: str
    where: str

    def __str__(self) -> str:
        return f"{self.why}, at {self.where}" if self.where else self.why


class Labels:
    """Atoms, each an indivisible label until an op refines it.

    An atom is one of

    - a **leaf**: it permutes, together with every leaf that it was united with;
    - a **fixed** leaf: it has a reason for which it does not permute;
    - **free**: the tensor is constant along it, so it goes with anything and ties nothing together;
    - a **product** of atoms: a view took the axis apart;
    - a **sum** of consecutive axes: parts were concatenated, split or sliced.

    Free atoms have no identity. Everything else is found through :meth:`atoms`, because atoms that a
    caller holds may have been refined since.

    Attributes:
        where: the op at work, added to the reasons of what it fixes.
    """

    def __init__(self) -> None:
        self.where = ""
        self._sizes: list[int] = []
        self._parents: list[int] = []
        self._reasons: list[Reason | None] = []
        self._free: list[bool] = []
        self._products: dict[int, Axis] = {}
        self._sums: dict[int, tuple[Axis, ...]] = {}

    def _atom(self, size: int, reason: Reason | None = None, free: bool = False) -> Axis:
        if size == 1:
            return ()
        self._sizes.append(size)
        self._parents.append(len(self._parents))
        self._reasons.append(reason)
        self._free.append(free)
        return (len(self._sizes) - 1,)

    def new(self, size: int) -> Axis:
        """An axis that permutes by itself."""
        return self._atom(size)

    def free(self, size: int) -> Axis:
        """An axis along which the tensor is constant."""
        return self._atom(size, free=True)

    def fixed(self, size: int, reason: str | Reason) -> Axis:
        """An axis that does not permute."""
        if isinstance(reason, str):
            reason = Reason(reason, self.where)
        return self._atom(size, reason)

    def _like(self, atom: int, size: int) -> Axis:
        return self._atom(size, self._reasons[atom], self._free[atom])

    def _find(self, atom: int) -> int:
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom

    def atoms(self, axis: Iterable[int]) -> Axis:
        """The factors as they are now: roots, no products, nothing of size 1."""
        found: list[int] = []
        for atom in axis:
            root = self._find(atom)
            if root in self._products:
                found += self.atoms(self._products[root])
            else:
                found.append(root)
        return tuple(found)

    def size(self, atom: int) -> int:
        return self._sizes[atom]

    def length(self, axis: Iterable[int]) -> int:
        return prod(self._sizes[atom] for atom in axis)

    def is_sum(self, atom: int) -> bool:
        return atom in self._sums

    def reason(self, axis: Iterable[int]) -> Reason | None:
        """Why the first fixed factor of an axis is fixed."""
        for atom in self.atoms(axis):
            for part in self._sums.get(atom, ()):
                if reason := self.reason(part):
                    return reason
            if self._reasons[atom]:
                return self._reasons[atom]
        return None

    def is_fixed(self, axis: Iterable[int]) -> bool:
        """Whether no factor permutes (an axis of length 1 can't)."""
        return all(
            all(map(self.is_fixed, self._sums[atom]))
            if atom in self._sums
            else self._reasons[atom] is not None
            for atom in self.atoms(axis)
        )

    def is_free(self, axis: Iterable[int]) -> bool:
        return all(self._free[atom] for atom in self.atoms(axis))

    def _has_free(self, axis: Iterable[int]) -> bool:
        return any(
            any(map(self._has_free, self._sums[atom])) if atom in self._sums else self._free[atom]
            for atom in self.atoms(axis)
        )

    def segments(self, axis: Iterable[int]) -> list[Axis]:
        """The consecutive parts of an axis, none of which leads with a sum."""
        atoms = self.atoms(axis)
        if not atoms or atoms[0] not in self._sums:
            return [atoms]
        lead, rest = atoms[0], atoms[1:]
        return [segment + rest for part in self._sums[lead] for segment in self.segments(part)]

    def fix(self, axis: Iterable[int], reason: str | Reason) -> None:
        """Let an axis and all that is united with it permute no more."""
        why, where = (reason, "") if isinstance(reason, str) else reason
        for atom in self.atoms(axis):
            for part in self._sums.get(atom, ()):
                self.fix(part, reason)
            if atom not in self._sums and not self._free[atom] and not self._reasons[atom]:
                self._reasons[atom] = Reason(why, where or self.where)

    def unite(self, one: Iterable[int], other: Iterable[int]) -> None:
        """Let two axes of equal length permute together, refining both where they differ."""
        x, y = self.atoms(one), self.atoms(other)
        while x and y:
            if self.is_free(x) or self.is_free(y):
                return
            if self.is_fixed(x) or self.is_fixed(y):
                reason = (self.is_fixed(x) and self.reason(x)) or self.reason(y)
                assert reason is not None
                self.fix(x + y, reason)
                return
            a, b = x[0], y[0]
            if self._sizes[a] == self._sizes[b]:
                if a != b:
                    self._merge(a, b)
                x, y = x[1:], y[1:]
            else:
                larger, smaller = (a, b) if self._sizes[a] > self._sizes[b] else (b, a)
                factors = self.factor(larger, self._sizes[smaller])
                if factors is None:
                    unlike = (
                        f"factors {self._text(x)} and {self._text(y)} have no common refinement"
                    )
                    self.fix(x + y, unlike)
                    return
                if larger == a:
                    x = factors + x[1:]
                else:
                    y = factors + y[1:]
            x, y = self.atoms(x), self.atoms(y)

    def _text(self, axis: Axis) -> str:
        return "*".join(str(self._sizes[atom]) for atom in axis)

    def _merge(self, a: int, b: int) -> None:
        """Unite two different atoms of one size, neither a product."""
        if self._free[a] or self._free[b]:
            return
        if a in self._sums or b in self._sums:
            whole, cut = (a, b) if a in self._sums else (b, a)
            parts = self.segments((whole,))
            pieces = self.cut((cut,), [self.length(part) for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                self.unite(part, piece)
        elif self._reasons[a] or self._reasons[b]:
            reason = self._reasons[a] or self._reasons[b]
            assert reason is not None
            self.fix((a, b), reason)
        else:
            self._parents[max(a, b)] = min(a, b)

    def meet(self, one: Axis, other: Axis) -> Axis:
        """United axes as one: of the two the one that is not constant along a factor."""
        self.unite(one, other)
        if self.is_free(one):
            return other
        if self.is_free(other) or not self._has_free(one):
            return one
        if not self._has_free(other):
            return other
        # Each is constant somewhere else: an axis without free factors takes the ties of both.
        both = self.new(self.length(self.atoms(one)))
        self.unite(both, one)
        self.unite(both, other)
        return both

    def factor(self, atom: int, size: int) -> Axis | None:
        """Refine an atom into ``size`` times the rest; ``None`` where that can't be."""
        inner, left = divmod(self._sizes[atom], size)
        if left:
            return None
        if atom in self._sums:
            return self._factor_sum(atom, inner)
        factors = self._like(atom, size) + self._like(atom, inner)
        if not self._free[atom]:
            self._products[atom] = factors
        return factors

    def _factor_sum(self, atom: int, inner: int) -> Axis | None:
        """Take a common last factor out of all parts of a sum."""
        heads: list[Axis] = []
        last: Axis | None = None
        for segment in self.segments((atom,)):
            halves = self._last_factor(self.atoms(segment), inner)
            if halves is None:
                return None
            heads.append(halves[0])
            last = halves[1] if last is None else self.meet(last, halves[1])
        assert last is not None
        del self._sums[atom]
        self._products[atom] = self.join(heads) + last
        return self._products[atom]

    def _last_factor(self, atoms: Axis, inner: int) -> tuple[Axis, Axis] | None:
        taken: Axis = ()
        while inner > 1:
            if not atoms:
                return None
            atom, size = atoms[-1], self._sizes[atoms[-1]]
            if inner % size == 0:
                atoms, taken, inner = atoms[:-1], (atom, *taken), inner // size
                continue
            factors = self.factor(atom, size // inner) if size % inner == 0 else None
            if factors is None:
                return None
            atoms = atoms[:-1] + self.atoms(factors)
        return atoms, taken

    def cut(self, axis: Axis, lengths: Sequence[int]) -> list[Axis]:
        """Take an axis apart into consecutive pieces, refining it into a sum."""
        atoms = self.atoms(axis)
        if atoms and (self.is_free(atoms) or self.is_fixed(atoms)):
            lead = atoms[0]
            if lead not in self._sums:
                return [self._like(lead, length) for length in lengths]
        pieces: list[Axis] = []
        waiting = [atoms]
        for length in lengths:
            taken: list[Axis] = []
            while length:
                # Cutting one segment may refine a later one that carries the same label.
                head, *more = self.segments(waiting.pop(0))
                waiting[:0] = more
                if self.length(head) > length:
                    head, tail = self._cut_segment(head, length)
                    waiting.insert(0, tail)
                taken.append(head)
                length -= self.length(head)
            pieces.append(self.join(taken))
        return pieces

    def _cut_segment(self, segment: Axis, at: int) -> tuple[Axis, Axis]:
        lead, rest = segment[0], segment[1:]
        size, inner = self._sizes[lead], self.length(rest)
        if at % inner:
            reason = f"cut at {at} of factors {self._text(segment)}"
            self.fix(segment, reason)
            return self.fixed(at, reason), self.fixed(size * inner - at, reason)
        first, second = self._like(lead, at // inner), self._like(lead, size - at // inner)
        if not self._free[lead]:
            self._sums[lead] = (first, second)
        return first + rest, second + rest

    def join(self, parts: Sequence[Axis]) -> Axis:
        """One axis that consists of the parts one after the other."""
        if len(parts) == 1:
            return parts[0]
        total = sum(self.length(self.atoms(part)) for part in parts)
        if all(map(self.is_fixed, parts)):
            reasons = [self.reason(part) for part in parts]
            return self.fixed(total, next(filter(None, reasons), "single indices side by side"))
        axis = self._atom(total)
        self._sums[axis[0]] = tuple(parts)
        return axis
