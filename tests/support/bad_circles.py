"""Bad arguments of networks that add modulo p, and of their ops, for the sweep in tests/test_bad_input.py."""

from collections.abc import Callable
from typing import Any

import torch

from weightops import circles, fourier_signal, fourier_transform, token_pair_linear
from weightops.circles import Dynamics, State
from weightops.circles.model import initialize

TYPE, VALUE = TypeError, ValueError
Rows = list[tuple[Any, type, str]]

PAIRS = torch.tensor([[[0, 6], [3, 2]], [[1, 1], [5, 0]]])
EMBEDDING, WEIGHT, BIAS = torch.randn(2, 7, 3), torch.randn(2, 5, 6), torch.randn(2, 5)
SPEC = circles.pair_spec(7, 3, 5)
FLAT = initialize(SPEC, [0, 1], torch.float32)
SIGNALS = torch.rand(6, 2, 3)
FREQUENCIES = torch.tensor([True, False, True])
ZEROS = torch.zeros(2, 3)
DYNAMICS = Dynamics(torch.zeros(2, 3, 3).double(), ZEROS.double(), torch.zeros(2).double())
NETWORKS = {"flat": FLAT, "spec": SPEC, "pairs": PAIRS}

VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "token_pair_linear": (
        token_pair_linear,
        {"pairs": PAIRS, "embedding": EMBEDDING, "weight": WEIGHT, "bias": BIAS},
    ),
    "fourier_signal": (fourier_signal, {"embedding": EMBEDDING}),
    "fourier_transform": (fourier_transform, {"p": 7}),
    "train": (
        circles.train,
        {
            **{"num_models": 2, "p": 7, "d": 3, "steps": 2, "width": 5, "lr": 0.01},
            **{"weight_decay": 0.5, "share": 0.8, "embedding": EMBEDDING, "frozen": False},
            **{"dtype": torch.float32, "seed": 0, "data_seed": None, "probes": None},
            **{"every": 1, "state": None, "progress": False},
        },
    ),
    "PairNetwork": (circles.PairNetwork, {"p": 7, "d": 3, "width": 5}),
    "pair_spec": (circles.pair_spec, {"p": 7, "d": 3, "width": 5}),
    "pair_logits": (circles.pair_logits, NETWORKS),
    "pair_accuracy": (circles.pair_accuracy, NETWORKS),
    "single_circle_accuracy": (circles.single_circle_accuracy, NETWORKS | {"mean": True}),
    "alive": (circles.alive, {"signals": SIGNALS, "by": "level", "level": 1.0}),
    "count_circles": (circles.count_circles, {"signals": SIGNALS, "by": "mean", "level": 1.0}),
    "frequency_gradients": (circles.frequency_gradients, {"signals": SIGNALS, "step": 4}),
    "circularity": (circles.circularity, {"embedding": EMBEDDING}),
    "isolate": (
        circles.isolate,
        {"embedding": EMBEDDING, "frequencies": FREQUENCIES, "mean": False},
    ),
    "construct": (
        circles.construct,
        {
            **{"p": 7, "d": 3, "frequencies": [(1, 2), (3,)], "signals": [(1.0, 2.0), (3.0,)]},
            **{"seed": 0, "dtype": torch.float32},
        },
    ),
    "fit_dynamics": (circles.fit_dynamics, {"signals": SIGNALS, "alpha": 0.01}),
    "rollout": (DYNAMICS.rollout, {"start": SIGNALS[0], "steps": 3}),
}

NOT_A_FLAG: Rows = [(1, TYPE, "{p} must be True or False, not int 1")]
NOT_A_NUMBER: Rows = [
    ("1", TYPE, "{p} must be a number, not str '1'"),
    (-0.1, VALUE, r"{p} must be in \[0, .*, not -0.1"),
    (torch.nan, VALUE, r"{p} must be in \[0, .*, not nan"),
]
NOT_A_DTYPE: Rows = [
    (torch.float16, VALUE, "dtype must be float32 or float64, not"),
    ("float32", VALUE, "dtype must be float32 or float64, not"),
]
NOT_SIGNALS: Rows = [
    ([1.0], TYPE, r"signals must be a tensor \[.*\], not list"),
    (SIGNALS.long(), TYPE, "signals must be float32 or float64, not torch.int64"),
    (SIGNALS.half(), TYPE, "signals must be float32 or float64, not torch.float16"),
    (SIGNALS.sum(), VALUE, r"signals must have shape \[.*\], not \[\]"),
    (SIGNALS.to_sparse(), TYPE, "signals must be a dense tensor"),
]


def count(least: int) -> Rows:
    return [
        (least - 1, VALUE, f"{{p}} must be at least {least}, not {least - 1}"),
        (7.0, TYPE, "{p} must be an integer, not float 7.0"),
        (True, TYPE, "{p} must be an integer, not bool True"),
        (None, TYPE, "{p} must be an integer, not NoneType None"),
    ]


def embeddings(shortest: str, optional: bool = False) -> Rows:
    return [
        ([1.0], TYPE, r"embedding must be a tensor \[p, d\] or \[M, p, d\], not list"),
        (EMBEDDING[0, 0], VALUE, r"embedding must have shape \[p, d\] or \[M, p, d\], not \[3\]"),
        (EMBEDDING.half(), TYPE, "embedding must be float32 or float64, not torch.float16"),
        (EMBEDDING.long(), TYPE, "embedding must be float32 or float64, not torch.int64"),
        (EMBEDDING.cfloat(), TYPE, "embedding must be float32 or float64, not torch.complex64"),
        (EMBEDDING.to_sparse(), TYPE, "embedding must be a dense tensor"),
        (EMBEDDING[:, :2], VALUE, shortest),
        *([] if optional else [(None, TYPE, "embedding must be a tensor")]),
    ]


def of_networks(where: str) -> dict[tuple[str, str], Rows]:
    return {
        (where, "flat"): [
            ([1.0], TYPE, "flat must be a tensor"),
            (FLAT[0], VALUE, r"flat must have shape \[N, P\]"),
            (FLAT[:, 1:], VALUE, "flat has shape .*, but the spec's networks have"),
            (FLAT.half(), TYPE, "flat must be float32 or float64, not torch.float16"),
        ],
        (where, "spec"): [
            (None, TYPE, "spec must be a WeightSpec, not NoneType None"),
            (
                type(SPEC)({"w": ("h", None)}, {"w": (3, 2)}),
                VALUE,
                "spec must be one of pair_spec, not WeightSpec",
            ),
            (circles.pair_spec(7, 3, 6), VALUE, "flat has shape"),
        ],
        (where, "pairs"): [
            *tokens(7, "flat"),
            (PAIRS.repeat(2, 1, 1), VALUE, r"pairs must have shape \[2, B, 2\], not \[4, 2, 2\]"),
        ],
    }


def tokens(p: int, beside: str) -> Rows:
    return [
        ([0, 1], TYPE, r"pairs must be a tensor \[B, 2\] or \[M, B, 2\], not list"),
        (PAIRS.float(), TYPE, "pairs must be int64 or int32, not torch.float32"),
        (PAIRS[0, 0], VALUE, r"pairs must have shape \[B, 2\], not \[2\]"),
        (PAIRS[..., :1], VALUE, r"pairs must have shape \[2, B, 2\], not \[2, 2, 1\]"),
        (PAIRS + 1, VALUE, rf"pairs\[0, 0, 1\] is {p}, outside 0..{p - 1}"),
        (PAIRS - 1, VALUE, rf"pairs\[0, 0, 0\] is -1, outside 0..{p - 1}"),
        (PAIRS.to("meta"), VALUE, rf"pairs is on meta, but {beside} is on cpu"),
    ]


SWEEP: dict[tuple[str, str], Rows] = {
    ("token_pair_linear", "pairs"): tokens(7, "embedding"),
    ("token_pair_linear", "embedding"): [
        *embeddings(r"pairs\[0, 0, 1\] is 6, outside 0..1"),
        (EMBEDDING[..., :0], VALUE, r"embedding has no dimension \(shape \[2, 7, 0\]\)"),
        (EMBEDDING[..., :2], VALUE, r"weight must have shape \[2, h, 4\], not \[2, 5, 6\]"),
        (EMBEDDING.double(), TYPE, "weight is torch.float32, but embedding is torch.float64"),
        (EMBEDDING.to("meta"), VALUE, "weight is on cpu, but embedding is on meta"),
        (EMBEDDING[0], VALUE, r"weight must have shape \[h, 6\], not \[2, 5, 6\]"),
    ],
    ("token_pair_linear", "weight"): [
        ([1.0], TYPE, "weight must be a tensor"),
        (WEIGHT[0], VALUE, r"weight must have shape \[2, h, 6\], not \[5, 6\]"),
        (WEIGHT.double(), TYPE, "weight is torch.float64, but embedding is torch.float32"),
    ],
    ("token_pair_linear", "bias"): [
        ([1.0], TYPE, "bias must be a tensor"),
        (BIAS[:, :4], VALUE, r"bias must have shape \[2, 5\], not \[2, 4\]"),
        (BIAS.double(), TYPE, "bias is torch.float64, but embedding is torch.float32"),
        (BIAS.to("meta"), VALUE, "bias is on meta, but embedding is on cpu"),
    ],
    ("fourier_signal", "embedding"): [
        *embeddings(r"embedding must have p >= 3 tokens of d >= 1 dimensions, not shape \[2, 2, 3"),
        (EMBEDDING[..., :0], VALUE, "embedding must have p >= 3 tokens of d >= 1 dimensions"),
    ],
    ("fourier_transform", "p"): count(3),
    ("train", "num_models"): count(1),
    ("train", "steps"): count(0),
    ("train", "every"): count(1),
    ("train", "lr"): [
        *NOT_A_NUMBER,
        (torch.ones(3), VALUE, "lr has length 3, but the population has size 2"),
        (torch.tensor([1.0, -1.0]), VALUE, "lr must not be negative"),
    ],
    ("train", "weight_decay"): NOT_A_NUMBER,
    ("train", "share"): [
        *NOT_A_NUMBER,
        (1, VALUE, r"share must be in \[0, 1\), not 1"),
        (0.01, VALUE, "share is 0.01, which is not one of 49 pairs"),
    ],
    ("train", "embedding"): embeddings(
        r"embedding must have shape \[7, 3\] or \[2, 7, 3\], not \[2, 2, 3\]", optional=True
    ),
    ("train", "frozen"): NOT_A_FLAG,
    ("train", "progress"): NOT_A_FLAG,
    ("train", "dtype"): NOT_A_DTYPE,
    ("train", "seed"): [(-1, VALUE, "seed must be at least 0"), ([1], VALUE, "seed has length 1")],
    ("train", "data_seed"): [("a", TYPE, "seed must be an integer, not str 'a'")],
    ("train", "probes"): [({"a": 1}, TYPE, "probes must be a mapping of names to functions")],
    ("train", "state"): [
        (3, TYPE, "state must be a State, not int 3"),
        (
            State(1, FLAT[:1], torch.zeros(2, 1, SPEC.numel)),
            VALUE,
            r"state must have torch.float32 networks",
        ),
    ],
    **{
        (where, name): count(least)
        for where in ("train", "PairNetwork", "pair_spec")
        for name, least in (("p", 3), ("d", 1), ("width", 1))
    },
    **of_networks("pair_logits"),
    **of_networks("pair_accuracy"),
    **of_networks("single_circle_accuracy"),
    ("single_circle_accuracy", "mean"): NOT_A_FLAG,
    **{
        (where, name): rows
        for where in ("alive", "count_circles")
        for name, rows in (
            ("signals", NOT_SIGNALS),
            ("by", [("both", VALUE, "by must be one of 'mean', 'level', not 'both'")]),
            ("level", NOT_A_NUMBER),
        )
    },
    ("frequency_gradients", "signals"): NOT_SIGNALS,
    ("frequency_gradients", "step"): [
        *count(1),
        (6, VALUE, "step is 6, but signals has 6 steps"),
    ],
    ("circularity", "embedding"): embeddings("embedding must have 3 tokens at least"),
    ("isolate", "embedding"): embeddings("embedding must have 3 tokens at least"),
    ("isolate", "frequencies"): [
        ([True], TYPE, "frequencies must be a tensor"),
        (FREQUENCIES.long(), TYPE, "frequencies must be bool, not torch.int64"),
        (FREQUENCIES[:2], VALUE, r"frequencies must have shape \[3\] or \[2, 3\], not \[2\]"),
        (FREQUENCIES.to("meta"), VALUE, "frequencies is on meta, but embedding is on cpu"),
    ],
    ("isolate", "mean"): NOT_A_FLAG,
    ("construct", "p"): count(3),
    ("construct", "d"): count(1),
    ("construct", "frequencies"): [
        (3, TYPE, "frequencies must list a sequence per embedding"),
        ([1, 2], TYPE, "frequencies must list a sequence per embedding"),
        ([(1, 2)], VALUE, "signals must have one number for each of frequencies"),
        ([(1, 1), (3,)], VALUE, r"frequencies\[0\] must be different ones of 1..3, not \[1, 1\]"),
        ([(1, 4), (3,)], VALUE, r"frequencies\[0\] must be different ones of 1..3, not \[1, 4\]"),
        ([(1, 0), (3,)], VALUE, r"frequencies\[0\] must be at least 1, not 0"),
    ],
    ("construct", "signals"): [
        ([1.0], TYPE, "signals must list a sequence per embedding"),
        ([(1.0, 2.0), (-1.0,)], VALUE, r"signals\[1\] must be in \[0, .*, not -1.0"),
        ([(1.0, 2.0), ()], VALUE, "signals must have one number for each of frequencies"),
    ],
    ("construct", "seed"): [(-1, VALUE, "seed must be at least 0")],
    ("construct", "dtype"): NOT_A_DTYPE,
    ("fit_dynamics", "signals"): [
        *NOT_SIGNALS,
        (SIGNALS.to("meta"), VALUE, "signals must have values, which a meta tensor has not"),
        (SIGNALS[:2], VALUE, "signals must have 3 steps and a frequency at least"),
        (SIGNALS[..., :0], VALUE, "signals must have 3 steps and a frequency at least"),
    ],
    ("fit_dynamics", "alpha"): [
        *NOT_A_NUMBER,
        (0.0, VALUE, "alpha must be above 0, or None for least squares"),
    ],
    ("rollout", "start"): [
        ([1.0], TYPE, r"start must be a tensor \[M, K\], not list"),
        (SIGNALS, VALUE, r"start must have shape \[M, K\], not \[6, 2, 3\]"),
        (SIGNALS[0, :, :2], VALUE, r"start must have shape \[2, 3\], not \[2, 2\]"),
        (SIGNALS[0].long(), TYPE, "start must be floating point"),
        (SIGNALS[0].to("meta"), VALUE, "start must have values, which a meta tensor has not"),
    ],
    ("rollout", "steps"): count(0),
}
BOUNDED = ("num_models", "p", "d", "width")
