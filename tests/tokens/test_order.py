"""Permuted copies of a network have one canonical order."""

import torch

from weightops import permute, testing, tokens

# One label: a single assignment, whose optimum is the permutation itself.
SPEC = testing.mlp_spec(6, 8, 3)


def test_permuted_copies_of_the_reference_become_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(SPEC.numel, generator=generator)
    perms = SPEC.random_permutations(4, generator)
    copies = permute(reference.expand(4, -1), perms, SPEC)
    assert not torch.equal(copies[0], reference)
    assert torch.equal(tokens.canonical(copies, SPEC, reference), reference.expand(4, -1))


def test_the_order_changes_and_the_weights_do_not() -> None:
    flat = torch.randn(3, SPEC.numel)
    found = tokens.canonical(flat, SPEC, flat[0], seed=1)
    assert torch.equal(found[0], flat[0])
    assert torch.equal(found.sort(1).values, flat.sort(1).values)
