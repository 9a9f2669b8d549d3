"""What users have today for layers with weights of their own for every context, and for whole networks.

Layers are functions of inputs, coefficients [B, K] and bases, without biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

import weightops
from weightops.testing import ManifoldConv

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of every stream in a chunk the second-level cache holds all, and both threads have work in it.
CHUNK = 2**17
TENSORS = 2**18  # weights in each tensor of a network


def matmuls(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    first, *rest = c[:, :, None].unbind(1)
    y = first * F.linear(x, weight[0])
    for each, basis in zip(rest, weight[1:], strict=True):
        y = torch.addcmul(y, each, F.linear(x, basis))
    return y


def scaled_matmuls(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    first, *rest = c[:, :, None].unbind(1)
    y = F.linear(first * x, weight[0])
    for each, basis in zip(rest, weight[1:], strict=True):
        y = torch.addmm(y, each * x, basis.T)
    return y


def joined(weight: Tensor) -> Tensor:
    """[K, out, in, ...] as [out, K in, ...], which scaled inputs side by side meet."""
    return weight.transpose(0, 1).flatten(1, 2)


def concatenated(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    return F.linear((c[:, :, None] * x[:, None]).flatten(1), weight)


def concatenating(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    return concatenated(x, c, joined(weight))


def wide(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    products = F.linear(x, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
    return torch.bmm(c[:, None], products)[:, 0]


def einsum(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bk,bi,koi->bo", c, x, weight)


def bmm(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    """The weights of every sample in memory."""
    own = (c @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return torch.bmm(own, x[:, :, None])[:, :, 0]


LINEAR: dict[str, Layer] = {
    "matmuls": matmuls,
    "scaled-matmuls": scaled_matmuls,
    "concatenated": concatenated,
    "concatenating": concatenating,
    "wide": wide,
    "einsum": einsum,
    "bmm": bmm,
}


def synthesised(c: Tensor, weight: Tensor) -> Tensor:
    """The weights at one context [K]: a pass over memory for each basis, where a product is slower."""
    w = c[0] * weight[0]
    for each, basis in zip(c[1:], weight[1:], strict=True):
        w = torch.addcmul(w, each, basis)
    return w


def loop(x: Tensor, c: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    for g, context in enumerate(c):
        rows = (index == g).nonzero()[:, 0]
        y.index_copy_(0, rows, F.linear(x[rows], synthesised(context, weight)))
    return y


def sorted_loop(x: Tensor, c: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    order = index.argsort()
    parts = x[order].split(index.bincount(minlength=len(c)).tolist())
    ys = [F.linear(x, synthesised(context, weight)) for x, context in zip(parts, c, strict=True)]
    return torch.cat(ys)[order.argsort()]


LOOPS = {"loop": loop, "loop-sorted": sorted_loop}


def condconv(problem: ManifoldConv) -> Layer:
    """timm's layer, its bases as rows [K, out * in * k * k]."""
    from condconv import condconv2d

    layer = condconv2d()(
        problem.inputs,
        problem.outputs,
        problem.kernel,
        padding=problem.padding,
        num_experts=problem.bases,
    )
    return lambda x, c, weight: functional_call(layer, {"weight": weight}, (x, c))


def vmapped(problem: ManifoldConv) -> Layer:
    sizes = problem.inputs, problem.outputs, problem.kernel
    layer = nn.Conv2d(*sizes, padding=problem.padding, bias=False)

    def batch(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        def one(x: Tensor, c: Tensor) -> Tensor:
            return functional_call(layer, {"weight": torch.tensordot(c, weight, 1)}, (x,))

        return vmap(one)(x, c)

    return batch


def scaled_channels(problem: ManifoldConv) -> Layer:
    def convolve(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        channels = (c[:, :, None, None, None] * x[:, None]).flatten(1, 2)
        return F.conv2d(channels, weight, padding=problem.padding)

    return convolve


def wide_convolution(problem: ManifoldConv) -> Layer:
    def convolve(x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight.flatten(0, 1), padding=problem.padding)
        by_basis = y.unflatten(1, weight.shape[:2]).flatten(2)
        return torch.bmm(c[:, None], by_basis).view(-1, weight.shape[1], *y.shape[2:])

    return convolve


def our_convolution(problem: ManifoldConv) -> Layer:
    return lambda x, c, weight: weightops.manifold_conv2d(x, c, weight, padding=problem.padding)


CONVOLUTIONS: dict[str, Callable[[ManifoldConv], Layer]] = {
    "weightops": our_convolution,
    "vmap": vmapped,
    "scaled-channels": scaled_channels,
    "wide": wide_convolution,
    "condconv": condconv,
}
# The bases as who multiplies by them often would keep them.
PREPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "concatenated": joined,
    "scaled-channels": joined,
    "condconv": lambda weight: weight.flatten(1),
}


def prepared(implementation: str, weight: Tensor) -> Tensor:
    prepare = PREPARED.get(implementation.removeprefix("medium-"))
    return prepare(weight) if prepare else weight


def with_gradients(
    f: Callable[..., Tensor], leaves: Sequence[Tensor], outputs: int
) -> Callable[[], tuple[Tensor, ...]]:
    """``f`` of its leaves and the gradients by all of them, for the same cotangent at every call."""
    for leaf in leaves:
        leaf.requires_grad_()
    x = leaves[0]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(x.shape[0], outputs, *x.shape[2:], generator=generator).to(x)

    def both() -> tuple[Tensor, ...]:
        y = f(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    return both


def in_place(c: Sequence[float], bases: Sequence[Tensor], out: Tensor) -> Tensor:
    """``out = sum_k c[k] bases[k]``, a pass over memory for each basis."""
    torch.mul(bases[0], c[0], out=out)
    for each, basis in zip(c[1:], bases[1:], strict=True):
        out.add_(basis, alpha=each)
    return out


def in_chunks(c: Sequence[float], bases: Tensor, out: Tensor) -> Tensor:
    """The same, chunk by chunk within the cache."""
    for to, part in zip(out.split(CHUNK), bases.split(CHUNK, 1), strict=True):
        in_place(c, part.unbind(), to)
    return out


def foreach(c: Sequence[float], bases: Tensor) -> Tensor | Sequence[Tensor]:
    """The same, as torch's optimizers go over the tensors of a network."""
    first, *rest = (basis.split(TENSORS) for basis in bases)
    total = torch._foreach_mul(first, c[0])
    for each, tensors in zip(c[1:], rest, strict=True):
        torch._foreach_add_(total, tensors, alpha=each)
    return total


def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def fused(c: Tensor, bases: Tensor, out: Tensor) -> Tensor:
        return out.copy_(sum(each * basis for each, basis in zip(c, bases, strict=True)))

    torch._dynamo.reset()
    return torch.compile(fused)


def descend(bases: Tensor, grad: Tensor, step: Sequence[float]) -> Tensor:
    """``grad @ bases.T`` [K], and then ``bases[k] -= step[k] grad``."""
    to_coeffs = torch.stack([torch.dot(basis, grad) for basis in bases])
    for each, basis in zip(step, bases, strict=True):
        basis.add_(grad, alpha=-each)
    return to_coeffs


def descend_in_chunks(bases: Tensor, grad: Tensor, step: Sequence[float]) -> Tensor:
    """The same, chunk by chunk within the cache."""
    to_coeffs = bases.new_zeros(len(bases))
    for part, slope in zip(bases.split(CHUNK, 1), grad.split(CHUNK), strict=True):
        to_coeffs += part @ slope
        for each, basis in zip(step, part, strict=True):
            basis.add_(slope, alpha=-each)
    return to_coeffs


Step = Callable[[], tuple[Tensor, Tensor]]


def by_hand(forward: Callable, backward: Callable) -> Callable[..., Step]:
    def make(
        bases: Tensor, coeffs: Tensor, grad: Tensor, lr: float, inverse_gram: Tensor, out: Tensor
    ) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            theta = forward(coeffs.tolist(), bases, out)
            return theta, backward(bases, grad, (lr * (coeffs @ inverse_gram)).tolist())

        return step

    return make


def autograd(
    bases: Tensor, coeffs: Tensor, grad: Tensor, lr: float, inverse_gram: Tensor, out: Tensor
) -> Step:
    phi = coeffs.clone().requires_grad_()
    optimizer = torch.optim.SGD([bases.requires_grad_()], lr)

    def step() -> tuple[Tensor, Tensor]:
        phi.grad = bases.grad = None
        theta = torch.einsum("k,kp->p", phi, bases)
        theta.backward(grad)
        bases.grad = torch.tensordot(inverse_gram, bases.grad, 1)
        optimizer.step()
        return theta, phi.grad

    return step


STEPS: dict[str, Callable[..., Step]] = {
    "by-hand": by_hand(in_place, descend),
    "by-hand-in-chunks": by_hand(in_chunks, descend_in_chunks),
    "autograd": autograd,
}
