"""Every argument of every public function x every way to get it wrong: an error that says so."""

import re
from collections.abc import Callable
from typing import Any

import bad_circles
import bad_generate
import bad_generators
import bad_learned
import bad_training
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightops import (
    WeightSpec,
    align,
    assign,
    explain,
    manifold_conv1d,
    manifold_conv2d,
    manifold_linear,
    merge,
    permute,
    permute_axes,
    population_forward,
    population_loss,
    synthesize,
    synthesize_update_,
    testing,
    tokens,
    trace,
    verify,
)
from weightops.population import overlap

SPEC = WeightSpec(
    {"w1": ("h", None), "b": ("h",), "w2": (("k", None), "h")},
    {"w1": (3, 2), "b": (3,), "w2": (4, 3)},
    sizes={"k": 2},
)
P = SPEC.numel
FLAT = torch.randn(2, P)
PERMS = SPEC.random_permutations(2)
X = torch.randn(2, 3, 4)
AXES = [torch.tensor([2, 0, 1]), None]
SCORE = torch.randn(2, 3, 4)
STATE = {name: tensor[0] for name, tensor in SPEC.unflatten(FLAT).items()}


ITEMS, COEFFS, INDEX = torch.randn(4, 3), torch.randn(2, 5), torch.tensor([1, 0, 1, 1])
LINEAR, BIAS = torch.randn(5, 6, 3), torch.randn(5, 6)
SEQUENCES, IMAGES = torch.randn(4, 4, 7), torch.randn(4, 4, 7, 6)
TAPS = {1: torch.randn(5, 6, 2, 3), 2: torch.randn(5, 6, 2, 3, 2)}
BASES, GRADS = torch.randn(5, 8), torch.randn(2, 8)


def module(**changes: Tensor) -> nn.Module:
    holder = nn.Module()
    for name, tensor in (STATE | changes).items():
        holder.register_buffer(name, tensor.clone())
    return holder


def _with(mapping: dict, **changes: Any) -> dict:
    return {k: v for k, v in (mapping | changes).items() if v is not ...}


def make(axes: Any = None, shapes: Any = None, sizes: Any = None) -> WeightSpec:
    axes = {"w": ("a", None)} if axes is None else axes
    return WeightSpec(axes, {"w": (3, 2)} if shapes is None else shapes, sizes=sizes)


class Layers(nn.Module):
    """What SPEC describes, as a model of inputs [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in STATE.items():
            setattr(self, name, nn.Parameter(tensor.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w1.mT + self.b).tanh() @ self.w2.mT


# As SPEC, but for k: it reads outputs, which do not permute.
MODEL, READ = (
    Layers(),
    WeightSpec(SPEC.axes | {"w2": (None, "h")}, SPEC.shapes),
)
EXAMPLES, TARGETS = torch.randn(5, 2), torch.tensor([0, 3, 1, 2, 0])
LAYER, LAYERS, CLASSES = nn.Linear(2, 3), torch.randn(2, 9), torch.tensor([0, 2, 1, 0, 2])
EVALUATED = {
    **{"inputs": EXAMPLES, "targets": TARGETS, "points": 2, "loss": None, "batch_size": 5},
    **{"norm_inputs": None, "norm": "reset", "progress": False},
}
SEARCHED = {"seed": 0, "tensors": None, "max_sweeps": 5}
TOKENS = tokens.TokenPlan(SPEC, "channel", size=4)
STATISTICS = tokens.statistics(FLAT, SPEC)
PACKED = tokens.pack(FLAT, TOKENS)

#: function -> how to call it, and arguments that it takes
VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "WeightSpec": (WeightSpec, {"axes": SPEC.axes, "shapes": SPEC.shapes, "sizes": {"k": 2}}),
    "flatten": (SPEC.flatten, {"models": STATE}),
    "unflatten": (SPEC.unflatten, {"flat": FLAT}),
    "state_dict": (SPEC.state_dict, {"flat": FLAT}),
    "load_": (SPEC.load_, {"model": module(), "row": FLAT[0]}),
    "random_permutations": (SPEC.random_permutations, {"n": 2, "generator": None}),
    "identity": (SPEC.identity, {"n": 2}),
    "compose": (SPEC.compose, {"p": PERMS, "q": PERMS}),
    "invert": (SPEC.invert, {"p": PERMS}),
    "from_json": (WeightSpec.from_json, {"text": SPEC.to_json()}),
    "permute": (
        permute,
        {"flat": FLAT, "perms": PERMS, "spec": SPEC, "inverse": False, "out": None},
    ),
    "permute_axes": (permute_axes, {"x": X, "perms": AXES, "inverse": False, "out": None}),
    "merge": (
        merge,
        {"flat": FLAT, "weights": [0.5, 0.5], "spec": SPEC, "perms": None, "out": None},
    ),
    "assign": (
        assign,
        {"score": SCORE, "maximize": True, "duals": torch.zeros(2, 4), "return_duals": True},
    ),
    "manifold_linear": (
        manifold_linear,
        {"x": ITEMS, "coeffs": COEFFS, "weight": LINEAR, "bias": BIAS, "index": INDEX},
    ),
    **{
        f"manifold_conv{axes}d": (
            convolution,
            {
                **{"x": x, "coeffs": COEFFS, "weight": TAPS[axes], "bias": BIAS, "index": INDEX},
                **{"stride": 1, "padding": 1, "dilation": 1, "groups": 2},
            },
        )
        for axes, convolution, x in ((1, manifold_conv1d, SEQUENCES), (2, manifold_conv2d, IMAGES))
    },
    "synthesize": (synthesize, {"coeffs": COEFFS, "bases": BASES, "out": None}),
    "synthesize_update_": (
        synthesize_update_,
        {
            **{"bases": BASES.clone(), "grad": GRADS, "coeffs": COEFFS},
            **{"lr": 0.1, "inverse_gram": torch.eye(5)},
        },
    ),
    "trace": (lambda model: trace(model, EXAMPLES), {"model": MODEL}),
    "explain": (lambda model: explain(model, EXAMPLES), {"model": MODEL}),
    "verify": (
        lambda spec, model, **options: verify(spec, model, EXAMPLES, **options),
        {"spec": READ, "model": MODEL, "kwargs": None, "seed": 0, "trials": 1, "rtol": 1e-9},
    ),
    "match": (
        align.match,
        {"spec": SPEC, "reference": FLAT[0], "flat": FLAT, "method": "weight", **SEARCHED},
    ),
    "match_all": (
        align.match_all,
        {
            **{"spec": SPEC, "flat": FLAT, "method": "universe", **SEARCHED},
            **{"tolerance": 1e-5, "progress": False},
        },
    ),
    "match_partial": (
        align.match_partial,
        {"spec": SPEC, "reference": FLAT[0], "other_spec": SPEC, "flat": FLAT, **SEARCHED},
    ),
    "widen": (align.widen, {"spec": SPEC, "flat": FLAT, "sizes": {"h": 4}}),
    "compose_path": (align.compose_path, {"spec": SPEC, "path": [PERMS, PERMS]}),
    "cycle_error": (align.cycle_error, {"spec": SPEC, "cycle": [PERMS, PERMS]}),
    "barrier": (
        align.barrier,
        {"model": MODEL, "spec": SPEC, "start": FLAT[0], "end": FLAT[1], **EVALUATED},
    ),
    "barrier_simplex": (
        align.barrier_simplex,
        {"model": MODEL, "spec": SPEC, "corners": FLAT, "weights": None, **EVALUATED},
    ),
    "population_forward": (
        population_forward,
        {
            **{"flat": LAYERS, "spec_or_model": LAYER, "x": EXAMPLES},
            **{"reduce": "accuracy", "targets": CLASSES},
        },
    ),
    "population_loss": (
        population_loss,
        {"flat": LAYERS, "spec_or_model": LAYER, "x": EXAMPLES, "targets": CLASSES},
    ),
    "overlap": (overlap, {"errors": torch.rand(2, 5) > 0.5}),
    "TokenPlan": (tokens.TokenPlan, {"spec": SPEC, "kind": "channel", "size": 4}),
    "TokenPlan.from_json": (
        tokens.TokenPlan.from_json,
        {"text": TOKENS.to_json(), "spec": SPEC},
    ),
    "pack": (tokens.pack, {"flat": FLAT, "plan": TOKENS, "statistics": STATISTICS}),
    "unpack": (tokens.unpack, {"tokens": PACKED, "plan": TOKENS, "statistics": STATISTICS}),
    "Statistics": (tokens.Statistics, {"spec": SPEC, "per": "layer"}),
    "Statistics.from_json": (
        tokens.Statistics.from_json,
        {"text": STATISTICS.to_json(), "spec": SPEC},
    ),
    "statistics": (tokens.statistics, {"flat": FLAT, "spec": SPEC, "per": "all"}),
    "update": (tokens.Statistics(SPEC).update, {"flat": FLAT}),
    "canonical": (tokens.canonical, {"flat": FLAT, "spec": SPEC, "reference": FLAT[0]}),
    "from_git_rebasin": (
        WeightSpec.from_git_rebasin,
        {"permutations": {"h": [("w1", 0), ("b", 0), ("w2", 1)]}, "shapes": SPEC.shapes},
    ),
    **bad_circles.VALID,
    **bad_generate.VALID,
    **bad_training.VALID,
    **bad_generators.VALID,
    **bad_learned.VALID,
}

H, ONE = PERMS["h"], PERMS["h"][0]
TYPE, VALUE = TypeError, ValueError
BAD_PERMS: list[tuple[Any, type, str]] = [
    ([ONE], TYPE, "{p} must map labels to index tensors, not list"),
    (ONE, TYPE, r"{p} must map labels .* not a torch.int64 tensor of shape \[3\] on cpu"),
    ({"z": ONE}, VALUE, r"{p} has label 'z', the spec has \['h', 'k'\]"),
    (
        {"h": [0, 1, 2]},
        TYPE,
        r"{p}\['h'\] must be a tensor \[3\] or \[n, 3\], not list \[0, 1, 2\]",
    ),
    ({"h": None}, TYPE, r"{p}\['h'\] must be a tensor \[3\] or \[n, 3\], not NoneType None"),
    ({"h": ONE.float()}, TYPE, r"{p}\['h'\] must be int64 or int32, not torch.float32"),
    ({"h": ONE.bool()}, TYPE, r"{p}\['h'\] must be int64 or int32, not torch.bool"),
    ({"h": H.to_sparse()}, TYPE, r"{p}\['h'\] must be a dense tensor, not torch.sparse_coo"),
    ({"h": H[None]}, VALUE, r"{p}\['h'\] must have shape \[3\] or \[n, 3\], not \[1, 2, 3\]"),
    ({"h": torch.tensor(0)}, VALUE, r"{p}\['h'\] must have shape \[3\] or \[n, 3\], not \[\]"),
    (
        {"h": torch.arange(4)},
        VALUE,
        r"{p}\['h'\] has length 4, but label \"h\" has size 3 \(w1 axis 0\)".replace('\\"', "'"),
    ),
    ({"h": torch.tensor([0, -1, 2])}, VALUE, r"{p}\['h'\] is no permutation .*is -1, outside 0..2"),
    ({"h": torch.tensor([0, 3, 2])}, VALUE, r"{p}\['h'\] is no permutation .*is 3, outside 0..2"),
    (
        {"h": torch.tensor([0, 2, 2])},
        VALUE,
        r"{p}\['h'\] is no permutation of 0..2 .*2 stands 2 times",
    ),
    (
        {"h": torch.tensor([[0, 1, 2], [1, 1, 0]])},
        VALUE,
        r"{p}\['h'\] .* 1 stands 2 times in row 1",
    ),
    ({"h": torch.tensor([0, 1, 2**31], dtype=torch.int64)}, VALUE, r"{p}\['h'\] is no permutation"),
]
BAD_ROWS: list[tuple[Any, type, str]] = [
    ({"h": H[:1].expand(5, -1)}, VALUE, r"perms\['h'\] has 5 rows, but flat has 2 networks"),
    ({"h": H.to("meta")}, VALUE, r"perms\['h'\] is on meta, but flat is on cpu"),
]
NOT_A_SPEC: list[tuple[Any, type, str]] = [
    ({"w1": (3, 2)}, TYPE, "spec must be a WeightSpec, not dict"),
    (None, TYPE, "spec must be a WeightSpec, not NoneType"),
]
BAD_FLAT: list[tuple[Any, type, str]] = [
    ([1.0], TYPE, r"flat must be a tensor \[N, P\], not list \[1.0\]"),
    (np.zeros((2, P)), TYPE, r"flat must be a tensor \[N, P\], not ndarray"),
    (FLAT[0], VALUE, rf"flat must have shape \[N, P\], not \[{P}\]"),
    (FLAT[None], VALUE, rf"flat must have shape \[N, P\], not \[1, 2, {P}\]"),
    (
        FLAT[:, 1:],
        VALUE,
        rf"flat has shape \[2, {P - 1}\], but the spec's networks have {P} weights",
    ),
    (FLAT.to_sparse(), TYPE, "flat must be a dense tensor, not torch.sparse_coo"),
]
BAD_FLAG: list[tuple[Any, type, str]] = [
    (1, TYPE, "{p} must be True or False, not int 1"),
    (None, TYPE, "{p} must be True or False, not NoneType None"),
    (torch.tensor(True), TYPE, "{p} must be True or False, not a torch.bool tensor"),
]


def bad_out(shape: list[int]) -> list[tuple[Any, type, str]]:
    text = re.escape(str(shape))
    short = [*shape[:-1], shape[-1] - 1]
    return [
        ([0.0], TYPE, r"out must be a tensor, not list"),
        (torch.zeros(short), VALUE, rf"out must have shape {text}, not {re.escape(str(short))}"),
        (torch.zeros(1, *shape), VALUE, rf"out must have shape {text}, not"),
        (
            torch.zeros(shape, dtype=torch.float64),
            TYPE,
            "out must be torch.float32, not torch.float64",
        ),
        (torch.zeros(shape, device="meta"), VALUE, "out is on meta, but the input is on cpu"),
        (torch.zeros(shape, requires_grad=True), VALUE, "out= does not record gradients"),
        (torch.zeros(shape[:-1]).unsqueeze(-1).expand(shape), VALUE, "out must not be an expanded"),
        (torch.zeros(shape).to_sparse(), TYPE, "out must be a dense tensor, not torch.sparse_coo"),
    ]


def bad_count(value: Any) -> tuple[Any, type, str]:
    return (value, TYPE, "n must be an integer, not " + type(value).__name__)


def not_this(name: str, shape: str, valid: Tensor, other: str, tail: str = "") -> list:
    """What is no dense tensor of the dtype and device of ``other``, which is float32."""
    text = re.escape(shape) + tail
    return [
        ([1.0], TYPE, rf"{name} must be a tensor {text}, not list"),
        (valid.numpy(), TYPE, rf"{name} must be a tensor {text}, not ndarray"),
        (valid.to_sparse(), TYPE, f"{name} must be a dense tensor, not torch.sparse_coo"),
        (valid.to("meta"), VALUE, f"{name} is on meta, but {other} is on cpu"),
    ]


BAD_POPULATION: dict[str, list[tuple[Any, type, str]]] = {
    "flat": [
        ([1.0], TYPE, r"flat must be a tensor \[N, P\], not list"),
        (LAYERS[0], VALUE, r"flat must have shape \[N, P\], not \[9\]"),
        (LAYERS[:, 1:], VALUE, "flat has shape .2, 8., but the architecture has 9 weights"),
        (LAYERS.half(), TYPE, "flat must be float32 or float64, not torch.float16"),
        (LAYERS.double(), TYPE, "x must be torch.float64 as flat, not torch.float32"),
    ],
    "spec_or_model": [
        (3, TYPE, "spec_or_model must be a module or a traced spec, not int 3"),
        (SPEC, VALUE, "spec_or_model is a spec without layers, as .* pass the model"),
        (nn.Linear(3, 3), VALUE, "torch.export can't export Linear"),
    ],
    "x": [
        ([1.0], TYPE, r"x must be a tensor \[B, ...\] or \[N, B, ...\], not list"),
        (EXAMPLES[0], VALUE, r"x must have shape \[B, ...\] or \[N, B, ...\], not \[2\]"),
        (EXAMPLES[:4], VALUE, r"targets must have shape \[4\] or \[2, 4\]"),
        (EXAMPLES.to("meta"), VALUE, "x is on meta, but flat is on cpu"),
    ],
    "targets": [
        (None, TYPE, "targets must be a tensor"),
        (CLASSES + 1, VALUE, r"targets must lie in 0..2, given 1 to 3"),
        (CLASSES.int(), TYPE, "targets must be classes of dtype int64"),
        (CLASSES[:4], VALUE, r"targets must have shape \[5\] or \[2, 5\]"),
        (CLASSES.to("meta"), VALUE, "targets is on meta, but flat is on cpu"),
    ],
}
FLOATS = "must be float16, bfloat16, float32 or float64, not"
LIKE_X = "must be torch.float32 as x, not"


def bad_contexts(x: Tensor, weight: Tensor, x_shape: str, weight_shape: str) -> dict:
    """What the layers on manifolds refuse alike."""
    shape, given = re.escape(str(list(x.shape))), re.escape(str(list(weight.shape)))
    return {
        "x": [
            *not_this("x", x_shape, x, "x")[:3],
            (x.to("meta"), VALUE, "coeffs is on cpu, but x is on meta"),
            (x.long(), TYPE, f"x {FLOATS} torch.int64"),
            (x.cfloat(), TYPE, f"x {FLOATS} torch.complex64"),
            (x.double(), TYPE, "weight is torch.float32, but x is torch.float64"),
            (x.half(), TYPE, "weight is torch.float32, but x is torch.float16"),
            (torch.tensor(1.0), VALUE, r"x must have shape \[.*\], not \[\]"),
            (x[:3], VALUE, r"index has length 4, but x has shape \[3, "),
        ],
        "coeffs": [
            *not_this("coeffs", "[B, K], [G, K] or [K]", COEFFS, "x"),
            (COEFFS.double(), TYPE, f"coeffs {LIKE_X} torch.float64"),
            (COEFFS.half(), TYPE, f"coeffs {LIKE_X} torch.float16"),
            (COEFFS.long(), TYPE, f"coeffs {LIKE_X} torch.int64"),
            (COEFFS[0], VALUE, r"index needs coeffs \[G, K\], not \[5\]"),
            (COEFFS[None], VALUE, r"coeffs must have shape .* not \[1, 2, 5\]"),
            (torch.tensor(1.0), VALUE, r"coeffs must have shape .* not \[\]"),
            (
                COEFFS[:, :4],
                VALUE,
                rf"coeffs has 4 coefficients \(shape \[2, 4\]\), but weight has 5 bases \(shape {given}",
            ),
            (COEFFS[:1], VALUE, r"index\[0\] is 1, outside 0..0"),
            (COEFFS[:0], VALUE, r"coeffs has no context \(shape \[0, 5\]\)"),
        ],
        "weight": [
            *not_this("weight", weight_shape, weight, "x"),
            (weight.double(), TYPE, "weight is torch.float64, but x is torch.float32"),
            (weight[0], VALUE, rf"weight must have shape {re.escape(weight_shape)}, not"),
            (weight[None], VALUE, rf"weight must have shape {re.escape(weight_shape)}, not"),
            (weight[:4], VALUE, "coeffs has 5 coefficients .* but weight has 4 bases"),
            (weight[:0], VALUE, r"weight has no basis \(shape \[0, "),
            (weight[:, :4], VALUE, r"bias must have shape \[5, 4\], not \[5, 6\]"),
        ],
        "bias": [
            *not_this("bias", "[K, out] or None", BIAS, "x"),
            (BIAS.double(), TYPE, "bias is torch.float64, but x is torch.float32"),
            (BIAS[0], VALUE, r"bias must have shape \[5, 6\], not \[6\]"),
            (BIAS.mT, VALUE, r"bias must have shape \[5, 6\], not \[6, 5\]"),
            (BIAS[:, :1], VALUE, r"bias must have shape \[5, 6\], not \[5, 1\]"),
        ],
        "index": [
            *not_this("index", "[B]", INDEX, "x"),
            (INDEX.float(), TYPE, "index must be int64 or int32, not torch.float32"),
            (INDEX > 0, TYPE, "index must be int64 or int32, not torch.bool"),
            (INDEX[None], VALUE, r"index must have shape \[B\], not \[1, 4\]"),
            (INDEX[:3], VALUE, rf"index has length 3, but x has shape {shape}"),
            (INDEX + 1, VALUE, r"index\[0\] is 2, outside 0..1"),
            (INDEX.int() - 1, VALUE, r"index\[1\] is -1, outside 0..1"),
            (INDEX * 2**40, VALUE, rf"index\[0\] is {2**40}, outside 0..1"),
            (None, VALUE, rf"coeffs \[2, 5\] must have a context for each .* of x {shape}"),
        ],
    }


def bad_geometry(name: str, axes: int, least: int, more: str = "") -> list:
    return [
        (1.5, TYPE, f"{name} must be an integer{more}, not float 1.5"),
        (None, TYPE, f"{name} must be an integer{more}, not NoneType"),
        (True, TYPE, f"{name} must be an integer{more}, not bool True"),
        ((1,) * (axes + 1), TYPE, f"{name} must be an integer{more}, not tuple"),
        ((1,) * (axes - 1) + ("1",), TYPE, f"{name} must be an integer{more}, not str '1'"),
        (least - 1, VALUE, f"{name} must be at least {least}, not {least - 1}"),
        ([least - 1] * axes, VALUE, f"{name} must be at least {least}, not {least - 1}"),
        (2**63, VALUE, rf"{name} must be below 2\^63, not {2**63}"),
    ]


def bad_convolution(axes: int) -> dict:
    x, weight = (SEQUENCES if axes == 1 else IMAGES), TAPS[axes]
    x_shape = "[B, C, L]" if axes == 1 else "[B, C, H, W]"
    weight_shape = "[K, out, C / groups, k]" if axes == 1 else "[K, out, C / groups, kh, kw]"
    bad = bad_contexts(x, weight, x_shape, weight_shape)
    bad["x"] += [
        (x[0], VALUE, rf"x must have shape {re.escape(x_shape)}, not \[4, "),
        (x[:, :3], VALUE, "x has 3 channels .* but weight has 2 in each of 2 groups"),
        (x[:, :0], VALUE, "x has 0 channels .* but weight has 2 in each of 2 groups"),
        (x[..., :0], VALUE, r"x must have pixels, not shape \["),
    ]
    bad["weight"] += [
        (weight[:, :, :1], VALUE, "x has 4 channels .* but weight has 1 in each of 2 groups"),
        (weight[..., :0], VALUE, r"weight must have outputs, channels and taps, not shape \["),
        (weight.repeat_interleave(5, -1), VALUE, "weight's kernel .* is larger than x's"),
    ]
    bad["stride"] = bad_geometry("stride", axes, 1, "( or . of them)?")
    bad["dilation"] = [
        *bad_geometry("dilation", axes, 1, "( or . of them)?"),
        (9, VALUE, "weight's kernel .* with dilation .*9.* is larger than x's"),
    ]
    bad["padding"] = [
        *bad_geometry("padding", axes, 0, "( or . of them)?"),
        ("full", VALUE, "padding must be one of 'same', 'valid' or an integer for each axis"),
    ]
    bad["groups"] = [
        *bad_geometry("groups", axes, 1)[:3],
        (0, VALUE, "groups must be at least 1, not 0"),
        ((2,), TYPE, "groups must be an integer, not tuple"),
        (4, VALUE, "groups 4 must divide the 6 outputs of weight"),
        (3, VALUE, "x has 4 channels .* but weight has 2 in each of 3 groups"),
    ]
    return bad


BAD_LINEAR = bad_contexts(ITEMS, LINEAR, "[..., in]", "[K, out, in]")
BAD_LINEAR["x"] += [
    (
        ITEMS[:, :2],
        VALUE,
        r"x has 2 inputs \(shape \[4, 2\]\), but weight has 3 \(shape \[5, 6, 3\]",
    ),
    (ITEMS[0], VALUE, r"index has length 4, but x has shape \[3\]"),
]
BAD_LINEAR["weight"] += [
    (LINEAR.mT[:, :, :3].mT, VALUE, r"bias must have shape \[5, 3\], not \[5, 6\]"),
    (
        LINEAR[:, :, :2],
        VALUE,
        r"x has 3 inputs \(shape \[4, 3\]\), but weight has 2 \(shape \[5, 6, 2\]",
    ),
]
BAD_COEFFS = [
    *not_this("coeffs", "[G, K] or [K]", COEFFS, "bases"),
    (COEFFS.double(), TYPE, "coeffs must be torch.float32 as bases, not torch.float64"),
    (COEFFS[:, :4], VALUE, "coeffs has 4 coefficients .* but bases has 5 bases"),
    (COEFFS[None], VALUE, r"coeffs must have shape .* not \[1, 2, 5\]"),
    (torch.tensor(1.0), VALUE, r"coeffs must have shape .* not \[\]"),
]
BAD_BASES = [
    *not_this("bases", "[K, P]", BASES, "")[:3],
    (BASES.to("meta"), VALUE, "coeffs is on cpu, but bases is on meta"),
    (BASES.long(), TYPE, f"bases {FLOATS} torch.int64"),
    (BASES.double(), TYPE, "coeffs must be torch.float64 as bases, not torch.float32"),
    (BASES[0], VALUE, r"bases must have shape \[K, P\], not \[8\]"),
    (BASES[None], VALUE, r"bases must have shape \[K, P\], not \[1, 5, 8\]"),
    (BASES[:0], VALUE, r"bases has no basis \(shape \[0, 8\]\)"),
    (BASES[:4], VALUE, "coeffs has 5 coefficients .* but bases has 4 bases"),
]
NO_NUMBERS = [None, "0.1", True, 1j, [0.1], torch.ones(1), torch.tensor(1), torch.tensor(True)]


nan = SCORE.clone()
nan[1, 2, 3] = torch.nan
infinite = SCORE.clone()
infinite[0, 1, 0] = -torch.inf

#: function, argument -> (what is given instead, error, what the message says behind "function: ")
SWEEP: dict[tuple[str, str], list[tuple[Any, type, str]]] = {
    ("flatten", "models"): [
        (3, TYPE, "models must be a module, a state dict or a non-empty list of them, not int 3"),
        ([], TYPE, "models must be .* not list"),
        ("ab", TYPE, "models must be .* not str 'ab'"),
        ([STATE, 3], TYPE, r"models\[1\] must be a module or a state dict, not int 3"),
        (_with(STATE, b=...), VALUE, "models has no tensor 'b', which the spec names"),
        ([STATE, _with(STATE, b=...)], VALUE, r"models\[1\] has no tensor 'b'"),
        (
            _with(STATE, extra=torch.ones(3)),
            VALUE,
            "models has a tensor 'extra', which the spec lacks",
        ),
        (_with(STATE, b=[0.0] * 3), TYPE, r"models\['b'\] must be a tensor \[3\], not list"),
        (_with(STATE, b=torch.ones(4)), VALUE, r"b has shape \[4\], the spec's is \[3\]"),
        (module(b=torch.ones(3, 1)), VALUE, r"b has shape \[3, 1\], the spec's is \[3\]"),
        (_with(STATE, b=STATE["b"].double()), TYPE, "b is torch.float64, others are torch.float32"),
        (_with(STATE, b=STATE["b"].to("meta")), VALUE, "b is on meta, but others is on cpu"),
    ],
    ("unflatten", "flat"): [
        BAD_FLAT[0],
        BAD_FLAT[4],
        (torch.tensor(0.0), VALUE, r"flat has shape \[\]"),
    ],
    ("state_dict", "flat"): [
        BAD_FLAT[0],
        BAD_FLAT[4],
        (torch.tensor(0.0), VALUE, r"flat has shape \[\]"),
    ],
    ("load_", "model"): [
        (STATE, TYPE, "model must be a module, not dict"),
        (nn.Linear(2, 3), VALUE, "model has no tensor 'w1', which the spec names"),
        (module(b=torch.ones(4)), VALUE, r"b has shape \[4\], the spec's is \[3\]"),
        (module().double(), TYPE, "w1 is torch.float64, but row is torch.float32"),
    ],
    ("load_", "row"): [
        (STATE, TYPE, r"row must be a tensor \[P\], not dict"),
        (FLAT, VALUE, rf"row must have shape \[P\], not \[2, {P}\]"),
        (
            FLAT[0, 1:],
            VALUE,
            rf"row has shape \[{P - 1}\], but the spec's networks have {P} weights",
        ),
        (FLAT[0].half(), TYPE, "w1 is torch.float32, but row is torch.float16"),
        (FLAT[0].to("meta"), VALUE, "row is on meta"),
    ],
    ("random_permutations", "n"): [
        *map(bad_count, (1.5, "2", None, True)),
        (-1, VALUE, "n must be at least 0, not -1"),
    ],
    ("random_permutations", "generator"): [
        (0, TYPE, "generator must be a torch.Generator, not int 0")
    ],
    ("identity", "n"): [
        *map(bad_count, (1.5, "2", None, False)),
        (-2, VALUE, "n must be at least 0, not -2"),
    ],
    ("compose", "p"): [
        *BAD_PERMS,
        ({"h": H.repeat(3, 1)}, VALUE, r"p\['h'\] has 6 rows, but q\['h'\] has 2"),
    ],
    ("compose", "q"): [
        *BAD_PERMS,
        ({"h": H.to("meta")}, VALUE, r"q\['h'\] is on meta, but p\['h'\] is on cpu"),
    ],
    ("invert", "p"): BAD_PERMS,
    ("from_json", "text"): [
        (None, TYPE, "text must be a string, not NoneType"),
        ("", VALUE, "text is not a WeightSpec: JSONDecodeError"),
        ("[]", VALUE, "text is not a WeightSpec: TypeError"),
        ("{}", VALUE, "text is not a WeightSpec: KeyError"),
        ('{"axes": {"w": 3}, "shapes": {}, "sizes": {}}', VALUE, "text is not a WeightSpec"),
    ],
    ("permute", "flat"): BAD_FLAT,
    ("permute", "perms"): [*BAD_PERMS, *BAD_ROWS, (None, TYPE, "perms must map labels")],
    ("permute", "spec"): NOT_A_SPEC,
    ("permute", "inverse"): BAD_FLAG,
    ("permute", "out"): bad_out([2, P]),
    ("permute_axes", "x"): [
        ([1.0], TYPE, r"x must be a tensor \[B, ...\], not list"),
        (np.zeros((2, 3, 4)), TYPE, r"x must be a tensor \[B, ...\], not ndarray"),
        (torch.tensor(1.0), VALUE, r"perms has 2 entries, but x \[\] has 0 axes behind the first"),
        (X[0], VALUE, r"perms has 2 entries, but x \[3, 4\] has 1 axes behind the first"),
        (X.mT, VALUE, r"perms\[0\] has length 3, but axis 1 of x has size 4"),
        (X.to("meta"), VALUE, r"perms\[0\] is on cpu, but x is on meta"),
        (X.to_sparse(), TYPE, "x must be a dense tensor, not torch.sparse_coo"),
    ],
    ("permute_axes", "perms"): [
        (
            ONE,
            TYPE,
            "perms must be a list with an entry per axis of x behind the first, not a torch.int64",
        ),
        ({"h": ONE}, TYPE, "perms must be a list .* not dict"),
        ([ONE], VALUE, r"perms has 1 entries, but x \[2, 3, 4\] has 2 axes behind the first"),
        ([ONE, [0, 1, 2, 3]], TYPE, r"perms\[1\] must be a tensor \[B, n\] or \[n\], not list"),
        ([ONE.float(), None], TYPE, r"perms\[0\] must be int64 or int32, not torch.float32"),
        ([None, ONE], VALUE, r"perms\[1\] has length 3, but axis 2 of x has size 4"),
        (
            [H.repeat(2, 1), None],
            VALUE,
            r"perms\[0\] must have shape \[2, 3\] or \[3\], not \[4, 3\]",
        ),
        ([H[None], None], VALUE, r"perms\[0\] must have shape \[2, 3\] or \[3\], not \[1, 2, 3\]"),
        ([ONE.to("meta"), None], VALUE, r"perms\[0\] is on meta, but x is on cpu"),
        (
            [None, torch.tensor([0, 1, -1, 3])],
            VALUE,
            r"perms\[1\] is no permutation of 0..3: .*-1, outside 0..3",
        ),
        (
            [None, torch.tensor([0, 1, 4, 3])],
            VALUE,
            r"perms\[1\] is no permutation of 0..3: .*4, outside 0..3",
        ),
        (
            [None, torch.tensor([0, 1, 1, 3])],
            VALUE,
            r"perms\[1\] is no permutation of 0..3: 1 stands 2 times",
        ),
    ],
    ("permute_axes", "inverse"): BAD_FLAG,
    ("permute_axes", "out"): bad_out([2, 3, 4]),
    ("merge", "flat"): [
        *BAD_FLAT,
        (FLAT.int(), TYPE, "flat must be float16, bfloat16, float32 or float64, not torch.int32"),
        (
            FLAT.cfloat(),
            TYPE,
            "flat must be float16, bfloat16, float32 or float64, not torch.complex64",
        ),
        (FLAT.to(torch.float8_e4m3fn), TYPE, "flat must be float16, .* not torch.float8_e4m3fn"),
        (FLAT[:1], VALUE, r"weights must have shape \[1\] or \[L, 1\] for 1 networks, not \[2\]"),
    ],
    ("merge", "weights"): [
        (
            "ab",
            TYPE,
            r"weights must be numbers \[M\] or \[L, M\], or one tensor of them, not str 'ab'",
        ),
        (None, TYPE, "weights must be .* not NoneType"),
        ({"a": 1}, TYPE, "weights must be .* not dict"),
        ([0.5, "x"], TYPE, "weights must be .* not list"),
        ([[0.5, 0.5], [1.0]], TYPE, "weights must be .* not list"),
        ([0.5, 1j], TYPE, "weights must be .* not list"),
        (np.array([1j, 0]), TYPE, "weights must be .* not ndarray"),
        ([10**400, 1], TYPE, "weights must be .* not list"),
        ([torch.tensor(0.5, requires_grad=True), 0.5], TYPE, "weights must be .* not list"),
        (0.5, VALUE, r"weights must have shape \[2\] or \[L, 2\] for 2 networks, not \[\]"),
        ([1.0], VALUE, r"weights must have shape \[2\] .* not \[1\]"),
        (torch.ones(1, 1, 2), VALUE, r"weights must have shape \[2\] .* not \[1, 1, 2\]"),
        (torch.ones(2, dtype=torch.bool), TYPE, "weights must be real numbers, not torch.bool"),
        (
            torch.ones(2, dtype=torch.cfloat),
            TYPE,
            "weights must be real numbers, not torch.complex64",
        ),
        (torch.ones(2, device="meta"), VALUE, "weights is on meta, but flat is on cpu"),
    ],
    ("merge", "spec"): NOT_A_SPEC,
    ("merge", "perms"): [*BAD_PERMS, *BAD_ROWS],
    ("merge", "out"): bad_out([P]),
    ("assign", "score"): [
        ([[1.0]], TYPE, r"score must be a tensor \[B, n, m\], not list"),
        (np.array(["a"]), TYPE, r"score must be a tensor \[B, n, m\], not ndarray"),
        (SCORE[0, 0], VALUE, r"score must have shape \[B, n, m\] or \[n, m\], not \[4\]"),
        (SCORE[None], VALUE, r"score must have shape \[B, n, m\] or \[n, m\], not \[1, 2, 3, 4\]"),
        (SCORE.cfloat(), TYPE, "score must be real numbers, not torch.complex64"),
        (SCORE > 0, TYPE, "score must be real numbers, not torch.bool"),
        (SCORE.mT, VALUE, "score has 4 rows and 3 columns; each row needs a column of its own"),
        (nan, VALUE, r"score must be finite, but score\[1, 2, 3\] is nan"),
        (infinite.numpy(), VALUE, r"score must be finite, but score\[0, 1, 0\] is -inf"),
        (nan.half(), VALUE, r"score must be finite, but score\[1, 2, 3\] is nan"),
        (SCORE.to_sparse(), TYPE, "score must be a dense tensor, not torch.sparse_coo"),
    ],
    ("assign", "maximize"): BAD_FLAG,
    ("assign", "return_duals"): BAD_FLAG,
    ("assign", "duals"): [
        ([0.0], TYPE, r"duals must be a tensor \[2, 4\], not list"),
        (torch.zeros(2, 3), VALUE, r"duals must have shape \[2, 4\], not \[2, 3\]"),
        (torch.zeros(4), VALUE, r"duals must have shape \[2, 4\], not \[4\]"),
        (
            torch.zeros(2, 4, dtype=torch.int64),
            TYPE,
            "duals must be floating point, not torch.int64",
        ),
        (torch.zeros(2, 4, device="meta"), VALUE, "duals is on meta, but score is on cpu"),
        (np.array([["a"] * 4] * 2), TYPE, r"duals must be a tensor \[2, 4\], not ndarray"),
    ],
    **{("manifold_linear", name): rows for name, rows in BAD_LINEAR.items()},
    **{
        (f"manifold_conv{axes}d", name): rows
        for axes in (1, 2)
        for name, rows in bad_convolution(axes).items()
    },
    ("synthesize", "coeffs"): BAD_COEFFS,
    ("synthesize", "bases"): BAD_BASES,
    ("synthesize", "out"): bad_out([2, 8]),
    ("synthesize_update_", "bases"): [
        *BAD_BASES,
        (GRADS, VALUE, r"coeffs has 5 coefficients .* but bases has 2 bases"),
        (BASES[:, :7], VALUE, r"grad must have shape \[2, 7\], not \[2, 8\]"),
        (BASES.clone().requires_grad_(), VALUE, "records no gradients; call it under"),
        (BASES[:, :1].expand(5, 8), VALUE, "bases must not be an expanded tensor"),
    ],
    ("synthesize_update_", "coeffs"): [
        *BAD_COEFFS,
        (COEFFS[0], VALUE, r"grad must have shape \[8\], not \[2, 8\]"),
        (COEFFS[:1], VALUE, r"grad must have shape \[1, 8\], not \[2, 8\]"),
    ],
    ("synthesize_update_", "grad"): [
        *not_this("grad", "[2, 8]", GRADS, "bases"),
        (GRADS.double(), TYPE, "grad is torch.float64, but bases is torch.float32"),
        (GRADS[0], VALUE, r"grad must have shape \[2, 8\], not \[8\]"),
        (GRADS[:, 1:], VALUE, r"grad must have shape \[2, 8\], not \[2, 7\]"),
        (GRADS.clone().requires_grad_(), VALUE, "records no gradients; call it under"),
    ],
    ("synthesize_update_", "lr"): [
        *((lr, TYPE, "lr must be a number or a tensor of one, not") for lr in NO_NUMBERS),
        (torch.tensor(0.1, device="meta"), VALUE, "lr is on meta, but bases is on cpu"),
        (torch.tensor(0.1).to_sparse(), TYPE, "lr must be a dense tensor"),
    ],
    ("synthesize_update_", "inverse_gram"): [
        *not_this("inverse_gram", "[5, 5] or None", torch.eye(5), "bases"),
        (torch.eye(5).double(), TYPE, "inverse_gram must be torch.float32 .* not torch.float64"),
        (torch.eye(4), VALUE, r"inverse_gram must have shape \[5, 5\], not \[4, 4\]"),
        (torch.ones(5), VALUE, r"inverse_gram must have shape \[5, 5\], not \[5\]"),
    ],
}


def bad_number(least: int, *more: tuple[Any, type, str]) -> list:
    return [
        (1.5, TYPE, "{p} must be an integer, not float 1.5"),
        (True, TYPE, "{p} must be an integer, not bool True"),
        (least - 1, VALUE, f"{{p}} must be at least {least}, not {least - 1}"),
        *more,
    ]


NOT_A_MODEL: list[tuple[Any, type, str]] = [
    (None, TYPE, "model must be a module, not NoneType"),
    ({"w1": FLAT}, TYPE, "model must be a module, not dict"),
]
BAD_SEARCH = {
    "seed": bad_number(0, (2**64, VALUE, r"seed must be below 2\^64")),
    "tensors": [
        ("w1", TYPE, "tensors must be a list of names, not str 'w1'"),
        (5, TYPE, "tensors must be a list of names, not int 5"),
        ([5], TYPE, "tensors must hold names, not int 5"),
        ([], VALUE, "tensors is empty"),
        (["z"], VALUE, r"tensors has 'z', the spec has \['w1', 'b', 'w2'\]"),
    ],
    "max_sweeps": bad_number(1),
}
BAD_NETWORK: list[tuple[Any, type, str]] = [
    ([1.0], TYPE, r"{p} must be a tensor \[.*P\], not list"),
    (FLAT[0, 1:], VALUE, rf"{{p}} has shape \[{P - 1}\], but the spec's networks have {P}"),
    (FLAT[0].int(), TYPE, "{p} must be floating point, not torch.int32"),
    (FLAT[0] * torch.nan, VALUE, "{p} must be finite, but"),
]
BAD_EVALUATION = {
    "inputs": [
        ([1.0], TYPE, r"inputs must be a tensor \[B, ...\], not list"),
        (EXAMPLES[:0], VALUE, r"inputs must hold examples, not shape \[0, 2\]"),
    ],
    "targets": [
        (None, TYPE, r"targets must be a tensor \[B\], not NoneType"),
        (TARGETS[1:], VALUE, "targets has length 4, but the batch of inputs has size 5"),
        (TARGETS.float(), TYPE, "targets must be int64 classes, not torch.float32"),
    ],
    "points": bad_number(2),
    "loss": [("mse", TYPE, "loss must be a function of outputs and targets, not str 'mse'")],
    "batch_size": bad_number(1),
    "norm_inputs": [([1.0], TYPE, r"norm_inputs must be a tensor \[B, ...\], not list")],
    "norm": [
        ("batch", VALUE, "norm must be one of 'reset', 'repair', not 'batch'"),
        ("repair", VALUE, "norm='repair' needs norm_inputs"),
    ],
    "progress": BAD_FLAG,
    "model": NOT_A_MODEL,
    "spec": NOT_A_SPEC,
}
NETWORKS = r"\[N, P\] or \[P\]"
BAD_NETWORKS: list[tuple[Any, type, str]] = [
    ([1.0], TYPE, rf"flat must be a tensor {NETWORKS}, not list"),
    (FLAT.to_sparse(), TYPE, "flat must be a dense tensor, not torch.sparse_coo"),
    (FLAT[None], VALUE, rf"flat must have shape {NETWORKS}, not \[1, 2, {P}\]"),
    (torch.tensor(0.0), VALUE, rf"flat must have shape {NETWORKS}, not \[\]"),
    (FLAT[:, 1:], VALUE, rf"flat has shape \[2, {P - 1}\], but the spec's networks have {P}"),
    (FLAT.int(), TYPE, f"flat {FLOATS} torch.int32"),
]
BAD_ZOO: list[tuple[Any, type, str]] = [
    *BAD_NETWORKS,
    (FLAT * torch.nan, VALUE, r"flat must be finite, but flat\[0, 0\] is nan"),
    (FLAT.to("meta"), VALUE, "flat is on meta, where tensors hold no values"),
]
NOT_A_PLAN: list[tuple[Any, type, str]] = [
    (None, TYPE, "plan must be a TokenPlan, not NoneType"),
    (SPEC, TYPE, "plan must be a TokenPlan, not WeightSpec"),
]
OF_MLP = testing.mlp_spec(2, 3, 2)
NO_STATISTICS: list[tuple[Any, type, str]] = [
    (FLAT, TYPE, "statistics must be Statistics or None, not a torch.float32 tensor"),
    (tokens.Statistics(SPEC), VALUE, "statistics are of no network"),
    (
        tokens.statistics(torch.ones(1, OF_MLP.numel), OF_MLP),
        VALUE,
        "statistics are of another spec: they differ in w1",
    ),
]


def bad_json(what: str, *more: tuple[Any, type, str]) -> list[tuple[Any, type, str]]:
    return [
        (3, TYPE, "text must be a string, not int 3"),
        ("{", VALUE, f"text is not {what}: JSONDecodeError"),
        ("[]", VALUE, f"text is not {what}"),
        ("{}", VALUE, f"text is not {what}: KeyError"),
        (SPEC.to_json(), VALUE, f"text is not {what}: KeyError"),
        *more,
    ]


BAD_PATH = [
    (PERMS, TYPE, "{p} must be a list of permutations, not dict"),
    ([], VALUE, "{p} has no steps"),
    ([PERMS, {"z": ONE}], VALUE, r"{p}\[1\] has label 'z'"),
    ([PERMS, {"h": H.repeat(2, 1)}], VALUE, r"{p}\[0\]\['h'\] has 2 rows, but .* has 4"),
]
SWEEP |= {
    ("trace", "model"): NOT_A_MODEL,
    ("explain", "model"): NOT_A_MODEL,
    ("verify", "spec"): NOT_A_SPEC,
    ("verify", "model"): NOT_A_MODEL,
    ("verify", "kwargs"): [([3], TYPE, "kwargs must map names to inputs, not list")],
    ("verify", "seed"): BAD_SEARCH["seed"],
    ("verify", "trials"): bad_number(1),
    ("verify", "rtol"): [
        ("0", TYPE, "rtol must be a number, not str"),
        (torch.nan, VALUE, r"rtol must be in \[0, 1\), not nan"),
    ],
    **{
        (where, name): rows
        for where in ("match", "match_all", "match_partial")
        for name, rows in ({"spec": NOT_A_SPEC} | BAD_SEARCH).items()
    },
    **{
        (where, "reference"): BAD_NETWORK
        if where == "match_partial"
        else [*BAD_NETWORK, (FLAT[:0], VALUE, r"flat must have shape \[N, T, P\]")]
        for where in ("match", "match_partial")
    },
    **{
        (where, "flat"): [*BAD_FLAT, (FLAT * torch.nan, VALUE, r"flat must be finite, but flat\[0")]
        for where in ("match", "match_all", "match_partial")
    },
    ("match", "method"): [("git", VALUE, "method must be one of 'weight', .*, not 'git'")],
    ("match_all", "method"): [("weight", VALUE, "method must be one of .*, not 'weight'")],
    ("match_all", "tolerance"): [(1, VALUE, r"tolerance must be in \[0, 1\), not 1")],
    ("match_all", "progress"): BAD_FLAG,
    ("match_partial", "other_spec"): [(None, TYPE, "other_spec must be a WeightSpec, not")],
    ("widen", "spec"): NOT_A_SPEC,
    ("widen", "flat"): BAD_FLAT,
    ("widen", "sizes"): [
        ([4], TYPE, "sizes must map labels, not list"),
        ({"z": 4}, VALUE, r"sizes has label 'z', the spec has \['h', 'k'\]"),
        ({"h": 2}, VALUE, r"sizes\['h'\] must be at least 3, not 2"),
        ({"h": 3.5}, TYPE, r"sizes\['h'\] must be an integer, not float 3.5"),
    ],
    ("compose_path", "spec"): NOT_A_SPEC,
    ("compose_path", "path"): BAD_PATH,
    ("cycle_error", "spec"): NOT_A_SPEC,
    ("cycle_error", "cycle"): BAD_PATH,
    **{
        (where, name): rows
        for where in ("barrier", "barrier_simplex")
        for name, rows in BAD_EVALUATION.items()
    },
    ("barrier", "start"): BAD_NETWORK[:3],
    ("barrier", "end"): BAD_NETWORK[:3],
    ("barrier_simplex", "corners"): [
        (FLAT[:1], VALUE, "corners must hold at least 2 networks, not 1"),
        (FLAT[0], VALUE, rf"corners must have shape \[N, P\], not \[{P}\]"),
    ],
    ("barrier_simplex", "weights"): [
        ([[0.5, 0.5]], TYPE, r"weights must be a tensor \[L, M\], not list"),
        (torch.ones(1, 3), VALUE, "weights has length 3, but the corners has size 2"),
        (torch.ones(1, 2), VALUE, r"rows of weights must sum to 1, but weights\[0\] sums to 2"),
    ],
    ("TokenPlan", "spec"): NOT_A_SPEC,
    ("TokenPlan", "kind"): [
        ("row", VALUE, "kind must be one of 'network', 'chunk', 'layer', 'channel', not 'row'"),
        (None, TYPE, "kind must be a string, not NoneType"),
        ("network", VALUE, f"size must be at least {P}, as the spec's networks have so many"),
    ],
    ("TokenPlan", "size"): bad_number(1, (2**31, VALUE, r"size must be below 2\^31")),
    ("TokenPlan.from_json", "text"): bad_json(
        "a TokenPlan",
        (TOKENS.to_json().replace("channel", "row"), VALUE, "text is not a TokenPlan: ValueError"),
    ),
    ("pack", "flat"): BAD_NETWORKS,
    ("pack", "plan"): NOT_A_PLAN,
    ("pack", "statistics"): NO_STATISTICS,
    ("unpack", "tokens"): [
        ([1.0], TYPE, r"tokens must be a tensor \[N, T, D\] or \[T, D\], not list"),
        (PACKED[None], VALUE, r"tokens must have shape \[N, T, D\] or \[T, D\], not \[1, 2"),
        (PACKED[:, 1:], VALUE, r"tokens has shape .*, but the plan's networks have 7 tokens of 4"),
        (PACKED[..., 1:], VALUE, r"tokens has shape .*, but the plan's networks have 7 tokens"),
        (PACKED.int(), TYPE, f"tokens {FLOATS} torch.int32"),
    ],
    ("unpack", "plan"): NOT_A_PLAN,
    ("unpack", "statistics"): NO_STATISTICS,
    ("Statistics.from_json", "text"): bad_json(
        "Statistics",
        (
            STATISTICS.to_json().replace('"count": 2', '"count": 2.5'),
            *(VALUE, "text is not Statistics: TypeError"),
        ),
        (
            re.sub(r'"squares": \[', '"squares": [-', STATISTICS.to_json()),
            *(VALUE, "text is not Statistics: .*squares must not be negative"),
        ),
        (
            re.sub(r'"mean": \[.*?\]', '"mean": {}', STATISTICS.to_json()),
            *(VALUE, "text is not Statistics: TypeError"),
        ),
        (
            re.sub(r'"mean": \[', '"mean": [NaN, ', STATISTICS.to_json()),
            *(VALUE, "text is not Statistics: .*mean must be 3 finite numbers"),
        ),
    ),
    **{
        (f"{where}.from_json", "spec"): [
            (3, TYPE, "spec must be a WeightSpec or None, not int 3"),
            (OF_MLP, VALUE, "text is of another spec: they differ in fc1.weight"),
        ]
        for where in ("TokenPlan", "Statistics")
    },
    **{
        (where, "spec"): [(None, TYPE, "spec must be a WeightSpec or a TokenPlan, not NoneType")]
        for where in ("Statistics", "statistics")
    },
    **{
        (where, "per"): [("tensor", VALUE, "per must be one of 'layer', 'all', not 'tensor'")]
        for where in ("Statistics", "statistics")
    },
    ("statistics", "flat"): BAD_ZOO,
    ("update", "flat"): BAD_ZOO,
    ("canonical", "flat"): [
        *BAD_FLAT,
        (FLAT * torch.nan, VALUE, r"flat must be finite, but flat\[0"),
        (FLAT.double(), TYPE, "flat is torch.float64, but reference is torch.float32"),
    ],
    ("canonical", "spec"): NOT_A_SPEC,
    ("canonical", "reference"): [
        *BAD_NETWORK,
        (FLAT, VALUE, rf"reference must have shape \[P\], not \[2, {P}\]"),
    ],
    ("from_git_rebasin", "permutations"): [
        ([3], TYPE, "permutations must map tensors to permutations, or .* not list"),
        ({"h": 3}, TYPE, r"permutations\['h'\] must be a list, not int 3"),
        ({"h": [("z", 0)]}, VALUE, r"permutations has \['z'\], which shapes lacks"),
    ],
    **{
        (where, argument): cases
        for where in ("population_forward", "population_loss")
        for argument, cases in BAD_POPULATION.items()
    },
    ("population_forward", "reduce"): [
        ("mean", VALUE, "reduce must be one of 'logits', 'loss', 'accuracy', 'errors', not 'mean'"),
        ("logits", VALUE, "targets are for reduce="),
    ],
    ("overlap", "errors"): [
        ([True], TYPE, r"errors must be a tensor \[N, B\], not list"),
        (torch.zeros(2, 5), TYPE, "errors must be bool, not torch.float32"),
        (torch.zeros(5).bool(), VALUE, r"errors must have shape \[N, B\], not \[5\]"),
    ],
    ("from_git_rebasin", "shapes"): [
        (None, TYPE, "shapes must be a module, a state dict or map names to shapes, not NoneType")
    ],
    **bad_circles.SWEEP,
    **bad_generate.SWEEP,
    **bad_training.SWEEP,
}
SWEEP |= bad_generators.SWEEP | bad_learned.SWEEP

CASES = [
    pytest.param(where, argument, value, error, text, id=f"{where}-{argument}-{i}")
    for (where, argument), cases in SWEEP.items()
    for i, (value, error, text) in enumerate(cases)
]


@pytest.mark.parametrize(("where", "argument", "value", "error", "text"), CASES)
def test_bad_argument_is_named(
    where: str, argument: str, value: Any, error: type, text: str
) -> None:
    function, arguments = VALID[where]
    # The other arguments are right, so the message is about this one.
    pattern = f"^{where}: " + text.replace("{p}", argument)
    with pytest.raises(error, match=pattern):
        function(**(arguments | {argument: value}))


def test_the_sweep_leaves_no_argument_out() -> None:
    swept = {(where, argument) for where, argument in SWEEP if where != "WeightSpec"}
    for where, (function, arguments) in VALID.items():
        function(**arguments)
        if where != "WeightSpec":
            assert {(where, argument) for argument in arguments} <= swept


def test_merge_of_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^merge: flat holds no network"):
        merge(FLAT[:0], torch.ones(1, 0), SPEC)


def test_meta_tensors_pass_where_all_are_meta() -> None:
    meta = {label: index.to("meta") for label, index in PERMS.items()}
    flat = FLAT.to("meta")
    assert permute(flat, meta, SPEC).shape == flat.shape
    assert permute(flat, meta, SPEC, out=torch.empty_like(flat)).is_meta
    assert merge(flat, [1.0, 2.0], SPEC, perms=meta).shape == (P,)
    assert permute_axes(X.to("meta"), [ONE.to("meta"), None]).is_meta
    assert assign(SCORE.to("meta")).shape == (2, 3)
    contexts = {"coeffs": COEFFS.to("meta"), "bias": BIAS.to("meta"), "index": INDEX.to("meta")}
    y = manifold_linear(ITEMS.to("meta"), weight=LINEAR.to("meta"), **contexts)
    assert y.is_meta
    assert y.shape == (4, 6)
    weight = TAPS[2].to("meta")
    y = manifold_conv2d(IMAGES.to("meta"), weight=weight, groups=2, padding="same", **contexts)
    assert y.shape == (4, 6, 7, 6)
    assert synthesize(COEFFS.to("meta"), BASES.to("meta")).shape == (2, 8)


def _tensor(shape: list[int], dtype: torch.dtype, device: str, sparse: bool) -> Tensor:
    x = torch.zeros(shape, dtype=dtype)
    return x.to_sparse() if sparse else x.to(device)


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, P]), max_size=4)
DTYPES = [
    *(
        torch.bool,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
    ),
    *(torch.float32, torch.float64, torch.complex64, torch.float8_e5m2),
]
TENSORS = st.builds(
    _tensor,
    SIZES,
    st.sampled_from(DTYPES),
    st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
    st.just(False),
) | st.builds(_tensor, SIZES, st.just(torch.float32), st.just("cpu"), st.just(True))
ARRAYS = st.builds(
    lambda shape, dtype, order: np.zeros(shape).astype(dtype)[::order] if shape else np.zeros(()),
    SIZES,
    st.sampled_from(["f4", ">f8", "f2", "i8", "U3", "O", "g", "c16", "?", "M8[s]"]),
    st.sampled_from([1, -1]),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-100, 100)
    | st.sampled_from([2**31, 2**63, -(2**64), 10**400])
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.builds(object)
    | st.sampled_from(["h", "k", "w1", SPEC, nn.Linear(2, 3), torch.float32, int])
    | TENSORS
    | ARRAYS
)
KEYS = st.sampled_from(["h", "k", "w1", "b", "w2", "z"]) | st.none() | st.integers(0, 2)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=6,
)
# Reasonable memory, not a reasonable number, is what bounds these.
COUNTS = JUNK.filter(lambda value: type(value) is not int or value < 1000)
BOUNDED = (
    "n",
    "points",
    "max_sweeps",
    "trials",
    "steps",
    *bad_circles.BOUNDED,
    *bad_generators.BOUNDED,
    *bad_learned.BOUNDED,
)


@pytest.mark.parametrize("where", VALID)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_raises_nothing_but_value_and_type_errors(where: str, data: st.DataObject) -> None:
    function, arguments = VALID[where]
    argument = data.draw(st.sampled_from(sorted(arguments)))
    junk = data.draw(COUNTS if argument in BOUNDED else JUNK)
    # What is called is the caller's own, with its errors.
    assume(not (argument == "loss" and callable(junk)))
    makes_a_spec = ("from_json", "from_git_rebasin")
    prefixes = (f"{where}: ", "WeightSpec: ") if where in makes_a_spec else f"{where}: "
    try:
        function(**(arguments | {argument: junk}))
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        return
    assert message.startswith(prefixes), message


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["axes", "shapes", "sizes"]), st.dictionaries(st.sampled_from("ab"), JUNK)
    )
)
def test_junk_inside_a_spec_raises_nothing_but_value_and_type_errors(inside: dict) -> None:
    arguments = {"axes": {"a": ("h",)}, "shapes": {"a": (3,)}} | inside
    try:
        spec = WeightSpec(**arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        assert WeightSpec.from_json(spec.to_json()) == spec
        return
    assert message.startswith("WeightSpec: "), message


def test_assert_equivariant_refuses_what_proves_nothing() -> None:
    with pytest.raises(ValueError, match=r"^assert_equivariant: the spec has no permutable axis"):
        testing.assert_equivariant(
            lambda x: x, torch.ones(1, 2), WeightSpec({"w": (None,)}, {"w": (2,)})
        )
