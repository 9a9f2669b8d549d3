"""What two specs of one architecture share, whatever their widths and the names of their tensors and labels."""

from __future__ import annotations

from typing import Any

from weightops.spec import WeightSpec

Outline = list[list[Any]]


def outline(spec: WeightSpec, sizes: bool) -> Outline:
    """Per tensor its factors of axes: a label's number by first appearance; ``None``, or with ``sizes`` its size
    as ``[size]``, where there is no label."""
    numbers: dict[str, int] = {}
    found: Outline = []
    for name, shape in spec.shapes.items():
        factors: list[Any] = []
        for axis in range(len(shape)):
            for label, size in spec.factors(name, axis):
                if label is None:
                    factors.append([size] if sizes else None)
                else:
                    factors.append(numbers.setdefault(label, len(numbers)))
        found.append(factors)
    return found


def check_outline(
    where: str, spec: WeightSpec, sizes: bool, wanted: Outline, names: list[str]
) -> None:
    """Raise ``ValueError`` where ``spec``'s outline is not ``wanted``; ``names`` are of the tensors of that."""
    found, found_names = outline(spec, sizes), list(spec.shapes)
    for n in range(max(len(wanted), len(found))):
        if found[n : n + 1] != wanted[n : n + 1]:
            sides = [
                f"{listed[n]} ({_text(each[n])})" if n < len(each) else "missing"
                for each, listed in ((found, found_names), (wanted, names))
            ]
            raise ValueError(
                f"{where}: spec is of another architecture than the functional: of {len(found)} tensors, "
                f"{len(wanted)} wanted, the first that differs is {sides[0]}, which should be {sides[1]}"
            )


def _text(factors: list[Any]) -> str:
    return ", ".join(
        "." if each is None else f"{each[0]} fixed" if isinstance(each, list) else f"label {each}"
        for each in factors
    )
