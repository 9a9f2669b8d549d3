"""Every op under every transform: eager, compiled, differentiated, batched, exported."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import weightops
from weightops import testing, tokens
from weightops.ops import assign as assign_op
from weightops.ops import equivariant as equivariant_op
from weightops.ops import manifold as manifold_op
from weightops.ops import permute as permute_op
from weightops.ops import population as population_op
from weightops.ops import token_pair
from weightops.ops.equivariant.plan import code_of
from weightops.ops.equivariant.reference import per_term
from weightops.ops.functional import functional
from weightops.ops.functional import reference as functional_reference
from weightops.ops.permute import reference
from weightops.ops.permute.plan import plan
from weightops.ops.population import training, training_reference
from weightops.ops.token_pair import reference as token_pair_reference
from weightops.ops.tokens import reference as tokens_reference

GENERATOR = torch.Generator().manual_seed(0)
SPEC = weightops.WeightSpec(
    {"a.weight": ("h", None), "a.bias": ("h",), "b.weight": (("k", None), "h")},
    {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (4, 3)},
    sizes={"k": 2},
)
PERMS = SPEC.random_permutations(2, GENERATOR)
INDEX = testing.pack(PERMS, SPEC)
FLAT = torch.randn(2, SPEC.numel, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(2, 3, 4, generator=GENERATOR, dtype=torch.float64)
AXES = [testing.random_rows(2, 3, GENERATOR), testing.random_rows(2, 4, GENERATOR)]
WEIGHTS = torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64)


# The smallest with a repeated label, a mean, a broadcast and a scalar type.
PLAN = weightops.EquivariantPlan(
    weightops.WeightSpec({"w": ("h", "h"), "b": ("h",)}, {"w": (2, 2), "b": (2,)}), terms="local"
)
FEATURES = torch.randn(2, PLAN.spec.numel, 2, generator=GENERATOR, dtype=torch.float64)
THETA = torch.randn(PLAN.num_terms, 2, 1, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(PLAN.num_biases, 1, generator=GENERATOR, dtype=torch.float64)


def layer_of_everything(layer: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``layer`` of features, per-sample theta and bias that all hang on ``values`` [2, P, 2]."""
    theta = values.sum(1)[:, None, :, None] * THETA
    return layer(values, theta, (2 * values[:, : PLAN.num_biases, :1]).cos(), PLAN)


THETAS = [
    torch.randn(PLAN.num_terms, *shape, generator=GENERATOR, dtype=torch.float64)
    for shape in ((2, 3), (3, 1))
]
BIASES = [
    torch.randn(PLAN.num_biases, width, generator=GENERATOR, dtype=torch.float64)
    for width in (3, 1)
]


def by_layers(
    x: Tensor, theta: Sequence[Tensor], bias: Sequence[Tensor], plan: Any, *, activate_last: bool
) -> Tensor:
    for n, each in enumerate(theta):
        x = per_term(x, each, bias[n], plan)
        x = torch.relu(x) if activate_last or n + 1 < len(theta) else x
    return x


def stack_of_everything(stack: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``stack`` of features, per-sample theta and one of the biases that all hang on ``values`` [2, P, 2]."""
    theta = [values.sum((1, 2))[:, None, None, None] * each for each in THETAS]
    bias = [(2 * values[:, : PLAN.num_biases, :1]).cos().expand(-1, -1, 3), BIASES[1]]
    return stack(values, theta, bias, PLAN, activate_last=True)


SAMPLES = torch.randn(2, 3, 4, generator=GENERATOR, dtype=torch.float64)
COEFFS = torch.randn(2, 3, generator=GENERATOR, dtype=torch.float64)
LINEAR = torch.randn(3, 2, 4, generator=GENERATOR, dtype=torch.float64)
LINEAR_BIAS = torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(2, 2, 4, 3, generator=GENERATOR, dtype=torch.float64)
KERNELS = torch.randn(3, 4, 1, 2, 3, generator=GENERATOR, dtype=torch.float64)
CONVOLUTION: dict[str, Any] = {"stride": (1, 2), "padding": 1, "dilation": (2, 1), "groups": 2}
ITEM_OF = torch.tensor([1, 0, 1, 1])


def manifold_by_einsum(
    x: Tensor, coeffs: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None = None
) -> Tensor:
    c = coeffs if index is None else coeffs[index]
    if c.dim() == 1:
        c = c.expand(x.shape[0], -1)
    y = torch.einsum("nk,nri,koi->nro", c, x.flatten(1, -2) if x.dim() > 2 else x[:, None], weight)
    return (y + (c @ bias)[:, None]).reshape(*x.shape[:-1], weight.shape[1])


def manifold_conv_by_samples(
    x: Tensor, coeffs: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None = None
) -> Tensor:
    c = coeffs if index is None else coeffs[index]
    weights, biases = torch.tensordot(c, weight, 1), c @ bias
    found = [
        torch.nn.functional.conv2d(x[n : n + 1], weights[n], biases[n], **CONVOLUTION)
        for n in range(x.shape[0])
    ]
    return torch.cat(found)


def manifold_conv1d_by_samples(x: Tensor, coeffs: Tensor, weight: Tensor) -> Tensor:
    weights = torch.tensordot(coeffs, weight, 1)
    x = torch.nn.functional.pad(x, (0, 1))
    return torch.stack([torch.nn.functional.conv1d(x[n], weights[n]) for n in range(x.shape[0])])


def manifold_of_everything(layer: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``layer`` of inputs, contexts, bases and biases that all hang on ``values`` [2, 3, 4]."""
    weight = values.sum() * LINEAR + values[:, :2].transpose(0, 1)[None, :, 0]
    return layer(values, values[:, :, 1].cos(), weight, LINEAR_BIAS * values[0, :, :2])


def convolution_of_everything(layer: Callable[..., Tensor], images: Tensor) -> Tensor:
    """``layer`` of images, contexts, bases and biases that all hang on ``images`` [2, 2, 4, 3]."""
    weight = images.sum() * KERNELS + images[0, 0, :, None, None] * images[1, 1, 0]
    bias = images[0, 1, :3, :1] * torch.ones(4, dtype=images.dtype)
    return layer(images, images[:, 0, 0].cos(), weight, bias)


TOKENS = tokens.TokenPlan(SPEC, "channel", size=2)
STATISTICS = tokens.statistics(FLAT, SPEC)
PACKED = torch.randn(2, TOKENS.num_tokens, 2, generator=GENERATOR, dtype=torch.float64)


SMALL = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
SMALL_SPEC = weightops.trace(SMALL, torch.randn(2, 1, 3, 3))
NETWORKS = torch.randn(2, SMALL_SPEC.numel, generator=GENERATOR, dtype=torch.float64)
INPUTS = torch.randn(4, 1, 3, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 2])
PROGRAM = SMALL_SPEC._cache["program"].encode(SMALL_SPEC.offsets)


EMBEDDING = torch.randn(2, 5, 2, generator=GENERATOR, dtype=torch.float64)
PAIR_WEIGHT = torch.randn(2, 3, 4, generator=GENERATOR, dtype=torch.float64)
PAIR_BIAS = torch.randn(2, 3, generator=GENERATOR, dtype=torch.float64)
PAIRS = torch.tensor([[[0, 1], [4, 4], [0, 3]], [[2, 2], [3, 1], [1, 0]]])


def by_concatenation(pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = [e[p].flatten(1) for e, p in zip(embedding, pairs.expand(len(embedding), -1, -1))]
    return torch.baddbmm(bias[:, None], torch.stack(rows), weight.mT)


def pairs_of_everything(layer: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``layer`` of an embedding, weights and biases that all hang on ``values`` [2, 5, 2]; shared pairs."""
    weight = values.sum((1, 2))[:, None, None] * PAIR_WEIGHT + values[:, :3].repeat(1, 1, 2)
    return layer(
        PAIRS[:1] if layer is by_concatenation else PAIRS[0],
        values,
        weight,
        values[:, 1:4, 0].cos(),
    )


FUNCTIONAL_THETA = torch.randn(
    2, 6 * 3 + 3 * PLAN.num_terms + 3 + PLAN.num_biases, generator=GENERATOR, dtype=torch.float64
)


def functional_of_everything(f: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``f`` of networks, gradients, momenta, what is shared and theta that all hang on ``values`` [2, P, 2]."""
    flat, grads = values.unbind(-1)
    momenta = torch.stack([(flat + grads).sin(), flat.cos()])
    theta = FUNCTIONAL_THETA * grads.sum(1, keepdim=True)
    return f(flat, grads, momenta, flat[:, :2].sin(), theta, [4, 2], [6, 3, 1], code_of(PLAN), 1e-5)


class Case(NamedTuple):
    """An op as a function of one differentiable tensor, and its definition."""

    op: testing.Function
    reference: testing.Function
    x: Tensor
    name: str


CASES = {
    "permute": Case(
        lambda x: weightops.permute(x, PERMS, SPEC),
        lambda x: reference.permute(x, INDEX, plan(SPEC)),
        FLAT,
        "permute",
    ),
    "permute-inverse": Case(
        lambda x: weightops.permute(x, PERMS, SPEC, inverse=True),
        lambda x: reference.permute(x, INDEX, plan(SPEC), True),
        FLAT,
        "permute",
    ),
    "permute_axes": Case(
        lambda x: weightops.permute_axes(x, AXES),
        lambda x: reference.permute_axes(x, torch.cat(AXES, 1), [1, 2]),
        X,
        "permute_axes",
    ),
    "merge": Case(
        lambda x: weightops.merge(x, WEIGHTS, SPEC, perms=PERMS),
        lambda x: reference.merge(x, WEIGHTS, INDEX, plan(SPEC)),
        FLAT,
        "merge",
    ),
    "merge-weights": Case(
        lambda w: weightops.merge(FLAT, w, SPEC, perms=PERMS),
        lambda w: reference.merge(FLAT, w, INDEX, plan(SPEC)),
        WEIGHTS,
        "merge",
    ),
    "merge-both": Case(
        lambda x: weightops.merge(x, x[:, :2].cos(), SPEC),
        lambda x: reference.merge(x, x[:, :2].cos(), None, plan(SPEC)),
        FLAT,
        "merge",
    ),
    "equivariant": Case(
        lambda x: weightops.equivariant_linear(x, THETA, BIAS, PLAN),
        lambda x: per_term(x, THETA, BIAS, PLAN),
        FEATURES,
        "equivariant_linear",
    ),
    "equivariant-theta": Case(
        lambda theta: weightops.equivariant_linear(FEATURES, theta, BIAS, PLAN),
        lambda theta: per_term(FEATURES, theta, BIAS, PLAN),
        THETA,
        "equivariant_linear",
    ),
    "equivariant-bias": Case(
        lambda bias: weightops.equivariant_linear(FEATURES, THETA, bias, PLAN),
        lambda bias: per_term(FEATURES, THETA, bias, PLAN),
        BIAS,
        "equivariant_linear",
    ),
    "equivariant-everything": Case(
        lambda x: layer_of_everything(weightops.equivariant_linear, x),
        lambda x: layer_of_everything(per_term, x),
        FEATURES,
        "equivariant_linear",
    ),
    "stack": Case(
        lambda x: equivariant_op.equivariant_stack(x, THETAS, BIASES, PLAN),
        lambda x: by_layers(x, THETAS, BIASES, PLAN, activate_last=False),
        FEATURES,
        "equivariant_stack",
    ),
    "stack-theta": Case(
        lambda theta: equivariant_op.equivariant_stack(
            FEATURES, [theta, *THETAS[1:]], BIASES, PLAN
        ),
        lambda theta: by_layers(FEATURES, [theta, *THETAS[1:]], BIASES, PLAN, activate_last=False),
        THETAS[0],
        "equivariant_stack",
    ),
    "stack-everything": Case(
        lambda x: stack_of_everything(equivariant_op.equivariant_stack, x),
        lambda x: stack_of_everything(by_layers, x),
        FEATURES,
        "equivariant_stack",
    ),
    "manifold": Case(
        lambda x: weightops.manifold_linear(x, COEFFS, LINEAR, LINEAR_BIAS),
        lambda x: manifold_by_einsum(x, COEFFS, LINEAR, LINEAR_BIAS),
        SAMPLES,
        "manifold_contract",
    ),
    "manifold-coeffs": Case(
        lambda c: weightops.manifold_linear(SAMPLES, c, LINEAR, LINEAR_BIAS),
        lambda c: manifold_by_einsum(SAMPLES, c, LINEAR, LINEAR_BIAS),
        COEFFS,
        "manifold_contract",
    ),
    "manifold-weight": Case(
        lambda w: weightops.manifold_linear(SAMPLES, COEFFS, w, LINEAR_BIAS),
        lambda w: manifold_by_einsum(SAMPLES, COEFFS, w, LINEAR_BIAS),
        LINEAR,
        "manifold_contract",
    ),
    "manifold-bias": Case(
        lambda b: weightops.manifold_linear(SAMPLES, COEFFS, LINEAR, b),
        lambda b: manifold_by_einsum(SAMPLES, COEFFS, LINEAR, b),
        LINEAR_BIAS,
        "manifold_contract",
    ),
    "manifold-shared": Case(
        lambda c: weightops.manifold_linear(SAMPLES, c, LINEAR * c.sum(), LINEAR_BIAS),
        lambda c: manifold_by_einsum(SAMPLES, c, LINEAR * c.sum(), LINEAR_BIAS),
        COEFFS[0].clone(),  # torch itself can't take a view of part of a tensor in a compiled jvp
        "manifold_contract",
    ),
    "manifold-grouped": Case(
        lambda c: weightops.manifold_linear(
            SAMPLES.reshape(4, 6)[:, :4] * c.sum(), c, LINEAR, LINEAR_BIAS, index=ITEM_OF
        ),
        lambda c: manifold_by_einsum(
            SAMPLES.reshape(4, 6)[:, :4] * c.sum(), c, LINEAR, LINEAR_BIAS, ITEM_OF
        ),
        COEFFS,
        "manifold_contract",
    ),
    "manifold-everything": Case(
        lambda x: manifold_of_everything(weightops.manifold_linear, x),
        lambda x: manifold_of_everything(manifold_by_einsum, x),
        SAMPLES,
        "manifold_contract",
    ),
    "manifold_conv": Case(
        lambda x: weightops.manifold_conv2d(
            x, COEFFS, KERNELS, LINEAR_BIAS.repeat(1, 2), index=ITEM_OF[:2], **CONVOLUTION
        ),
        lambda x: manifold_conv_by_samples(
            x, COEFFS, KERNELS, LINEAR_BIAS.repeat(1, 2), ITEM_OF[:2]
        ),
        IMAGES,
        "manifold_contract",
    ),
    "manifold_conv-everything": Case(
        lambda x: convolution_of_everything(partial(weightops.manifold_conv2d, **CONVOLUTION), x),
        lambda x: convolution_of_everything(manifold_conv_by_samples, x),
        IMAGES,
        "manifold_contract",
    ),
    "manifold_conv1d": Case(
        lambda x: weightops.manifold_conv1d(
            x, x[:, 0, :3], LINEAR[:, :, :3, None] * x[0, :, :2], padding="same"
        ),
        lambda x: manifold_conv1d_by_samples(x, x[:, 0, :3], LINEAR[:, :, :3, None] * x[0, :, :2]),
        SAMPLES,
        "manifold_contract",
    ),
    "synthesize": Case(
        lambda b: weightops.synthesize(COEFFS, b),
        lambda b: COEFFS @ b,
        LINEAR.flatten(1),
        "synthesize",
    ),
    "synthesize-both": Case(
        lambda b: weightops.synthesize(b[:, :3].cos(), b),
        lambda b: b[:, :3].cos() @ b,
        LINEAR.flatten(1),
        "synthesize",
    ),
    "tokens": Case(
        lambda x: tokens.pack(x, TOKENS),
        lambda x: tokens_reference.pack(x, None, None, TOKENS._code),
        FLAT,
        "token_pack",
    ),
    "tokens-standardised": Case(
        lambda x: tokens.pack(x, TOKENS, statistics=STATISTICS),
        lambda x: tokens_reference.pack(x, STATISTICS.mean, 1 / STATISTICS.std, TOKENS._code),
        FLAT,
        "token_pack",
    ),
    "tokens-back": Case(
        lambda x: tokens.unpack(x, TOKENS, statistics=STATISTICS),
        lambda x: tokens_reference.unpack(x, STATISTICS.mean, STATISTICS.std, TOKENS._code),
        PACKED,
        "token_unpack",
    ),
    "token_pair_linear": Case(
        lambda x: weightops.token_pair_linear(PAIRS, x, PAIR_WEIGHT, PAIR_BIAS),
        lambda x: by_concatenation(PAIRS, x, PAIR_WEIGHT, PAIR_BIAS),
        EMBEDDING,
        "token_pair_add",
    ),
    "token_pair_linear-everything": Case(
        lambda x: pairs_of_everything(weightops.token_pair_linear, x),
        lambda x: pairs_of_everything(by_concatenation, x),
        EMBEDDING,
        "token_pair_add",
    ),
    "token_pair_sum": Case(
        lambda x: token_pair.token_pair_sum(x, PAIRS, 5),
        lambda x: token_pair_reference.sum(x, PAIRS, 5),
        torch.randn(2, 3, 2, generator=GENERATOR, dtype=torch.float64),
        "token_pair_sum",
    ),
    "fourier_signal": Case(
        weightops.fourier_signal,
        lambda x: torch.stack(
            [torch.fft.fft(x, dim=1)[:, k].abs().square().sum(1).sqrt() for k in (1, 2)], 1
        ),
        EMBEDDING,
        "fourier_signal",
    ),
    "functional": Case(
        partial(functional_of_everything, functional),
        partial(functional_of_everything, functional_reference.functional),
        FEATURES,
        "functional",
    ),
    "population": Case(
        lambda x: population_op.population_logits(x, INPUTS, PROGRAM, True),
        lambda x: population_op.reference.population_logits(x, INPUTS, PROGRAM, True),
        NETWORKS,
        "population_logits",
    ),
    "population-samples": Case(
        lambda x: population_op.population_logits(NETWORKS, x, PROGRAM, True),
        lambda x: population_op.reference.population_logits(NETWORKS, x, PROGRAM, True),
        INPUTS,
        "population_logits",
    ),
    "population-loss": Case(
        lambda x: training.population_loss(x, INPUTS, CLASSES, PROGRAM, True),
        lambda x: training_reference.losses(x, INPUTS, CLASSES, PROGRAM, True),
        NETWORKS,
        "population_loss",
    ),
}
# Unlike every other size here: torch takes equal sizes for one symbol.
BATCHES = (11, 17, 23)
# Inductor takes seconds a program; the other backend covers the same tracing in a fraction.
INDUCTOR = {"none", "grad", "vmap", "jvp", "vmap(grad)"}


@pytest.mark.parametrize("name", testing.TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_eager_transform_equals_reference(case: str, name: str) -> None:
    testing.check_transform(name, "eager", *CASES[case][:3])


# By theta and by bias alone tracing goes the ways that the whole of it goes too.
BY_ONE = {
    *("equivariant-theta", "equivariant-bias", "stack-theta"),
    *("manifold", "manifold-coeffs", "manifold-weight", "manifold-bias", "manifold-shared"),
    *("manifold-grouped", "manifold_conv-everything", "manifold_conv1d", "synthesize"),
}


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c in CASES for n in testing.TRANSFORMS if c not in BY_ONE or n in INDUCTOR],
)
def test_traced_transform_equals_reference(case: str, name: str) -> None:
    testing.check_transform(name, "aot_eager", *CASES[case][:3])


@pytest.mark.parametrize("name", sorted(INDUCTOR))
@pytest.mark.parametrize(
    "case",
    [
        *("permute", "permute_axes", "merge-both", "equivariant", "stack"),
        *("manifold-everything", "manifold_conv", "synthesize-both"),
        *("tokens-standardised", "tokens-back"),
        *("token_pair_linear-everything", "token_pair_sum", "fourier_signal"),
    ],
)
def test_compiled_transform_equals_reference(case: str, name: str) -> None:
    testing.check_transform(name, "inductor", *CASES[case][:3])


@pytest.mark.parametrize("case", CASES)
def test_derivatives_equal_finite_differences(case: str) -> None:
    testing.check_gradients(CASES[case].op, CASES[case].x)


@pytest.mark.parametrize("case", CASES)
def test_export_keeps_the_op(case: str) -> None:
    testing.check_export(CASES[case].op, CASES[case].x, CASES[case].name)


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case: str) -> None:
    testing.check_autocast(CASES[case].op, CASES[case].x)


def test_dynamic_batch_compiles_once() -> None:
    one = {label: index[0] for label, index in PERMS.items()}
    inputs = [torch.randn(n, SPEC.numel, dtype=torch.float64) for n in BATCHES]
    testing.check_compiled_training(
        lambda x: weightops.permute(x, one, SPEC),
        lambda x: reference.permute(x, INDEX[:1], plan(SPEC)),
        inputs,
    )
    testing.check_compiled_training(
        lambda x: weightops.merge(x, x[:, 0], SPEC),
        lambda x: reference.merge(x, x[:, 0][None], None, plan(SPEC))[0],
        inputs,
    )
    axes = [AXES[0][0], AXES[1][0]]
    testing.check_compiled_training(
        lambda x: weightops.permute_axes(x, axes),
        lambda x: reference.permute_axes(x, torch.cat(axes)[None], [1, 2]),
        [torch.randn(n, 3, 4, dtype=torch.float64) for n in BATCHES],
    )


def test_dynamic_batch_of_tokens_compiles_once() -> None:
    testing.check_compiled_training(
        CASES["tokens-standardised"].op,
        CASES["tokens-standardised"].reference,
        [torch.randn(n, SPEC.numel, dtype=torch.float64) for n in BATCHES],
    )
    testing.check_compiled_training(
        CASES["tokens-back"].op,
        CASES["tokens-back"].reference,
        [torch.randn(n, *PACKED.shape[1:], dtype=torch.float64) for n in BATCHES],
    )


def test_dynamic_batch_of_features_compiles_once() -> None:
    inputs = [
        torch.randn(n, PLAN.spec.numel, 2, generator=GENERATOR, dtype=torch.float64)
        for n in BATCHES
    ]
    testing.check_compiled_training(
        lambda x: weightops.equivariant_linear(x, THETA, BIAS, PLAN),
        lambda x: per_term(x, THETA, BIAS, PLAN),
        inputs,
    )


def test_dynamic_batch_of_contexts_compiles_once() -> None:
    def grouped(layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        return layer(x, COEFFS, LINEAR, LINEAR_BIAS, index=(x[:, 0] > 0).long())

    def own(layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        return layer(x, x[:, :3].cos(), LINEAR, LINEAR_BIAS)

    def shared(layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        return layer(x, COEFFS[0], LINEAR, LINEAR_BIAS)

    inputs = [torch.randn(n, 4, generator=GENERATOR, dtype=torch.float64) for n in BATCHES]
    for each in (grouped, own, shared):
        testing.check_compiled_training(
            partial(each, weightops.manifold_linear), partial(each, manifold_by_einsum), inputs
        )
    testing.check_compiled_training(
        lambda b: weightops.synthesize(COEFFS, b.mT),
        lambda b: COEFFS @ b.mT,
        [v[:, :3] for v in inputs],
    )


def test_dynamic_batch_of_images_compiles_once() -> None:
    bias = LINEAR_BIAS.repeat(1, 2)
    inputs = [torch.randn(n, 2, 4, 3, generator=GENERATOR, dtype=torch.float64) for n in BATCHES]

    def layer(x: Tensor) -> Tensor:
        index = (x[:, 0, 0, 0] > 0).long()
        return weightops.manifold_conv2d(x, COEFFS, KERNELS, bias, index=index, **CONVOLUTION)

    def definition(x: Tensor) -> Tensor:
        both = [
            manifold_conv_by_samples(x, c.expand(x.shape[0], -1), KERNELS, bias) for c in COEFFS
        ]
        return torch.where((x[:, 0, 0, 0] > 0)[:, None, None, None], both[1], both[0])

    testing.check_compiled_training(layer, definition, inputs)


def test_compiled_code_asks_for_the_precision_that_torch_is_set_to() -> None:
    asked = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        asked.extend(
            node.args[-1] for node in graph.graph.nodes if "manifold_contract" in str(node.target)
        )
        return graph

    layer = torch.compile(weightops.manifold_linear, backend=backend, fullgraph=True)
    x, coeffs, weight = SAMPLES.float(), COEFFS.float(), LINEAR.float()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            layer(x, coeffs, weight)
            layer(SAMPLES, COEFFS, LINEAR)
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["highest", "highest", "medium", "highest"]


@pytest.mark.parametrize("contexts", ["own", "grouped", "shared"])
def test_vmap_over_any_arguments_of_a_manifold(contexts: str) -> None:
    coeffs = COEFFS[0] if contexts == "shared" else COEFFS
    index = torch.tensor([1, 0]) if contexts == "grouped" else None
    args = [SAMPLES[:, 0], coeffs, LINEAR, LINEAR_BIAS, index]
    others = [SAMPLES[:, 1], coeffs.cos(), LINEAR.cos(), LINEAR_BIAS.cos(), torch.tensor([1, 1])]

    def layer(x: Tensor, c: Tensor, w: Tensor, b: Tensor, i: Tensor | None) -> Tensor:
        return weightops.manifold_linear(x, c, w, b, index=i)

    def gradients(*args: Tensor) -> Any:
        return torch.func.grad(lambda *a: layer(*a).square().sum(), argnums=(0, 1, 2, 3))(*args)

    for batched in range(1, 32 if index is not None else 16):
        at = [n for n in range(5) if batched >> n & 1]
        lanes = [args, [others[n] if n in at else args[n] for n in range(5)]]
        given = [torch.stack([args[n], others[n]], -1) if n in at else args[n] for n in range(5)]
        dims = tuple(-1 if n in at else None for n in range(5))
        for f in (layer, gradients):
            expected = [torch.utils._pytree.tree_leaves(f(*lane)) for lane in lanes]
            found = torch.utils._pytree.tree_leaves(torch.func.vmap(f, in_dims=dims)(*given))
            for n, each in enumerate(found):
                torch.testing.assert_close(each, torch.stack([e[n] for e in expected]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("items", [0, 1, 2])
def test_opcheck_of_manifold_ops(items: int, requires_grad: bool) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=GENERATOR).requires_grad_(requires_grad)

    weight, kernels, index = make(3, 2, 4), make(3, 4, 1, 2, 3), torch.arange(items).flip(0)
    convolved = [1, 2, 1, 1, 2, 1, 2]
    for contexts, of in ((items, None), (1, None), (2, index)):
        coeffs, shift = make(contexts, 3), make(contexts, 2)
        x, y = make(items, 5, 4), make(items, 5, 2)
        testing.check_op(manifold_op._contract, x, coeffs, of, weight, shift, [], "high")
        wanted = (True, contexts == 1, True, "highest")
        testing.check_op(manifold_op._backward, y, x, coeffs, of, weight, [], *wanted)
        images, maps = make(items, 2, 4, 3), make(items, 4, 4, 2)
        args = (images, coeffs, of, kernels)
        testing.check_op(manifold_op._contract, *args, None, convolved, "highest")
        testing.check_op(manifold_op._backward, maps, *args, convolved, True, True, False, "high")
    testing.check_op(manifold_op._synthesize, make(items, 3), make(3, 7))
    if not requires_grad:
        coeffs, bases = make(items, 3), make(3, 7)
        testing.check_op(manifold_op._synthesize_into, coeffs, bases, make(items, 7))
        testing.check_op(manifold_op._update, bases, make(items, 7), coeffs, make(items, 3))


def test_another_plan_of_the_same_size_compiles_anew() -> None:
    square = {"w": (2, 2), "b": (2,)}
    apart = weightops.WeightSpec({"w": ("h", "k"), "b": ("k",)}, square)
    other = weightops.EquivariantPlan(apart, terms=lambda term: term.output == "w")
    fewer = weightops.EquivariantPlan(PLAN.spec, terms=lambda term: term.output == "b")
    layer = torch.compile(weightops.equivariant_linear, backend="aot_eager", fullgraph=True)
    for each in (PLAN, other, fewer):
        theta = torch.randn(each.num_terms, 2, 1, generator=GENERATOR, dtype=torch.float64)
        torch.testing.assert_close(
            layer(FEATURES, theta, None, each), per_term(FEATURES, theta, None, each)
        )


def test_another_token_plan_and_more_statistics_reach_what_was_compiled() -> None:
    pack = torch.compile(tokens.pack, backend="aot_eager", fullgraph=True)
    found = tokens.statistics(FLAT, SPEC)
    for kind in ("channel", "layer"):
        plan = tokens.TokenPlan(SPEC, kind, size=2)
        for _ in range(2):
            given = pack(FLAT, plan, statistics=found)
            expected = tokens_reference.pack(FLAT, found.mean, 1 / found.std, plan._code)
            torch.testing.assert_close(given, expected)
            found.update(3 * FLAT.cos())


def test_autocast_leaves_float32_alone() -> None:
    def layer(x: Tensor) -> Tensor:
        return weightops.equivariant_linear(x, THETA.float(), BIAS.float(), PLAN)

    testing.check_autocast(layer, FEATURES.float())
    testing.check_autocast(lambda x: weightops.merge(x, WEIGHTS.float(), SPEC), FLAT.float())
    manifold = [v.float() for v in (COEFFS, LINEAR, LINEAR_BIAS)]
    testing.check_autocast(lambda x: weightops.manifold_linear(x, *manifold), SAMPLES.float())
    testing.check_autocast(
        lambda x: weightops.manifold_conv2d(x, COEFFS.float(), KERNELS.float(), **CONVOLUTION),
        IMAGES.float(),
    )
    testing.check_autocast(
        lambda b: weightops.synthesize(COEFFS.float(), b), LINEAR[0].mT[:3].float()
    )
    batched = torch.func.vmap(layer)
    compiled = torch.compile(batched, backend="aot_eager", fullgraph=True)
    x = torch.stack([FEATURES, 2 * FEATURES]).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = compiled(x)
    torch.testing.assert_close(given, batched(x))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("batch", "groups"), [(0, 1), (1, 1), (4, 1), (4, 2)])
def test_opcheck_of_equivariant_ops(batch: int, groups: int, requires_grad: bool) -> None:
    code = equivariant_op.code_of(PLAN)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=GENERATOR).requires_grad_(requires_grad)

    x, y = make(batch, PLAN.spec.numel, 2), make(batch, PLAN.spec.numel, 1)
    theta, bias = make(groups, PLAN.num_terms, 2, 1), make(groups, PLAN.num_biases, 1)
    testing.check_op(equivariant_op._linear, x, theta, bias, code, False)
    testing.check_op(equivariant_op._linear, x, theta, None, code)
    testing.check_op(equivariant_op._linear, y, theta, None, code, True)
    testing.check_op(
        equivariant_op._stack, x, [theta, theta.mT], [bias, bias.expand(-1, -1, 2)], code, True
    )
    testing.check_op(equivariant_op._stack, x, [theta], [], code, False)
    testing.check_op(equivariant_op._backward, x, theta, y, code, True)
    testing.check_op(equivariant_op._backward, x, theta, y, code, False)


def test_a_backward_pass_under_autocast_keeps_float32() -> None:
    def gradients(autocast: bool) -> list[Tensor]:
        at = [v.float().requires_grad_() for v in (SAMPLES, COEFFS, LINEAR, LINEAR_BIAS)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            weightops.manifold_linear(*at).sum().backward()
        return [v.grad for v in at if v.grad is not None]

    for given, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_tracing_without_dynamo_looks_at_no_values() -> None:
    x, index = SAMPLES[:, 0], torch.tensor([1, 0])

    def layer(x: Tensor) -> Tensor:
        return weightops.manifold_linear(x, COEFFS, LINEAR, LINEAR_BIAS, index=index)

    torch.testing.assert_close(make_fx(layer)(x)(x), layer(x))
    with pytest.raises(ValueError, match=r"index\[1, 0\] is 2, outside 0..1"):
        torch.func.vmap(lambda i: weightops.manifold_linear(x[:1], COEFFS, LINEAR, index=i[None]))(
            torch.tensor([1, 2])
        )


def test_vmap_over_permutations() -> None:
    stacked = torch.stack([AXES[0], AXES[0].flip(1)])

    def each(p: Tensor) -> Tensor:
        return weightops.permute_axes(X, [p, None])

    expected = torch.stack([each(p) for p in stacked])
    torch.testing.assert_close(torch.func.vmap(each)(stacked), expected)
    compiled = torch.compile(torch.func.vmap(each), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(stacked), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("networks", [0, 1, 2])
def test_opcheck(networks: int, requires_grad: bool) -> None:
    flat = FLAT[:networks].clone().requires_grad_(requires_grad)
    index = INDEX[:networks] if networks else INDEX[:1]
    testing.check_op(permute_op._permute, flat, index, plan(SPEC), True)
    x = X[:networks].clone().requires_grad_(requires_grad)
    axes = torch.cat(AXES, 1)[:networks] if networks else torch.cat(AXES, 1)[:1]
    testing.check_op(permute_op._permute_axes, x, axes, [1, 2], False)
    if networks:
        weights = WEIGHTS[:, :networks].clone().requires_grad_(requires_grad)
        testing.check_op(permute_op._merge, flat, weights, index, plan(SPEC))
        testing.check_op(permute_op._merge, flat, weights, None, plan(SPEC))
    if not requires_grad:
        out = torch.empty_like(flat)
        testing.check_op(permute_op._permute_into, flat, index, plan(SPEC), False, out)
        testing.check_op(permute_op._permute_axes_into, x, axes, [1, 2], False, torch.empty_like(x))
        testing.check_op(assign_op._assign, X[:networks].detach(), True, None)


def test_assign_under_vmap_and_compile() -> None:
    score = torch.randn(2, 3, 4, 6, generator=GENERATOR)
    expected = weightops.assign(score.flatten(0, 1)).unflatten(0, (2, 3))

    def solve(s: Tensor) -> Tensor:
        return weightops.assign(s)

    for f in (solve, torch.compile(solve, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(torch.stack([f(s) for s in score]), expected)
    batched = torch.func.vmap(solve)
    for f in (batched, torch.compile(batched, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(f(score), expected)
    gradient = torch.func.grad(lambda s: (s * 2).gather(2, solve(s)[..., None]).sum())(score[0])
    torch.testing.assert_close(gradient.sum(), torch.tensor(24.0))
    program = torch.export.export(_Assign(), (score[0],))
    torch.testing.assert_close(program.module()(score[0]), expected[0])


class _Assign(torch.nn.Module):
    def forward(self, score: Tensor) -> Tensor:
        return weightops.assign(score)
