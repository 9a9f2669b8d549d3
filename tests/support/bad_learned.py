"""Bad arguments of learned optimizers, for the sweep in tests/test_bad_input.py."""

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightops import WeightSpec
from weightops.learned import Functional, LearnedOptimizer, State, meta_train, start, step

TYPE, VALUE = TypeError, ValueError
Rows = list[tuple[Any, type, str]]

MODEL = nn.Linear(2, 3)
SPEC = WeightSpec({"weight": (None, None), "bias": (None,)}, {"weight": (3, 2), "bias": (3,)})
OTHER = WeightSpec({"w": ("h", None)}, {"w": (3, 2)})
FUNCTIONAL = Functional(SPEC, hidden=2, layers=2)
FLAT, GRADS = torch.randn(2, 9), torch.randn(2, 9)
X, TIME, THETA = torch.randn(2, 9, 8), torch.randn(11), FUNCTIONAL.flatten()
DATA = torch.randn(5, 2), torch.tensor([0, 2, 1, 0, 2])
FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)
PATH, OPTIMIZER_PATH = (Path(FOLDER.name) / f"{name}.safetensors" for name in ("f", "o"))
FUNCTIONAL.save(PATH)
LearnedOptimizer(SPEC, FUNCTIONAL, 0.1, 0.1, MODEL).save(OPTIMIZER_PATH)


def optimizer() -> LearnedOptimizer:
    return LearnedOptimizer(SPEC, FUNCTIONAL, 0.1, 0.1, MODEL, [MODEL.weight])


VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "Functional": (
        Functional,
        {
            **{"spec": SPEC, "kind": "unf", "hidden": 2, "layers": 2, "equivariant": 1},
            **{"eps": 1e-5},
        },
    ),
    "Functional.forward": (
        lambda **arguments: FUNCTIONAL(**arguments),
        {"x": X, "time": TIME, "theta": THETA},
    ),
    "Functional.on": (FUNCTIONAL.on, {"spec": SPEC}),
    "Functional.load_flat_": (FUNCTIONAL.load_flat_, {"theta": THETA}),
    "Functional.load": (Functional.load, {"path": PATH, "spec": SPEC}),
    "LearnedOptimizer": (
        LearnedOptimizer,
        {
            **{"spec": SPEC, "functional": FUNCTIONAL, "alpha": 0.1, "beta": 0.1, "model": MODEL},
            **{"params": [MODEL.weight], "momentum": 0.9, "nonfinite": "skip"},
        },
    ),
    "LearnedOptimizer.add_param_group": (
        lambda **arguments: optimizer().add_param_group(**arguments),
        {"param_group": {"params": MODEL.bias}},
    ),
    "LearnedOptimizer.measure": (
        lambda **arguments: optimizer().measure(**arguments),
        {"repeats": 2},
    ),
    "LearnedOptimizer.load": (
        lambda path, spec: LearnedOptimizer.load(path, spec, MODEL),
        {"path": OPTIMIZER_PATH, "spec": SPEC},
    ),
    "meta_train": (
        meta_train,
        {
            **{"functional": FUNCTIONAL, "flat": FLAT, "spec_or_model": MODEL, "data": DATA},
            **{"iterations": 1, "particles": 2, "truncation": 2, "horizon": 4, "batch_size": 2},
            **{"alpha": 0.1, "beta": 0.1, "momentum": 0.9, "estimator": "pes", "sigma": 0.01},
            **{"lr": 1e-3, "clip": 1.0, "most": 10.0, "seed": 0, "every": 1},
            "progress": False,
        },
    ),
    "start": (start, {"flat": FLAT, "momentum": 0.9}),
    "step": (
        step,
        {
            **{"flat": FLAT, "grads": GRADS, "state": start(FLAT), "functional": FUNCTIONAL},
            **{"alpha": 0.1, "beta": 0.1, "momentum": 0.9, "theta": THETA},
        },
    ),
}

COUNT: Rows = [
    (0, VALUE, "{p} must be at least 1, not 0"),
    (2.0, TYPE, "{p} must be an integer, not float 2.0"),
    (True, TYPE, "{p} must be an integer, not bool True"),
]
NOT_A_NUMBER: Rows = [
    ("1", TYPE, "{p} must be a number, not str '1'"),
    (None, TYPE, "{p} must be a number, not NoneType None"),
    (torch.nan, VALUE, r"{p} must be in \[.*, not nan"),
    (torch.inf, VALUE, r"{p} must be in \[.*, not inf"),
]
NEGATIVE: Rows = [(-0.1, VALUE, r"{p} must be in \[0.0, .*, not -0.1")]
SIGNED: Rows = [(-0.1, VALUE, r"{p} must be (in|above) .*, not -0.1")]
NOT_A_SPEC: Rows = [
    (None, TYPE, "spec must be a WeightSpec, not NoneType None"),
    ({"w": (3, 2)}, TYPE, "spec must be a WeightSpec, not dict"),
]
ANOTHER: Rows = [(OTHER, VALUE, r"spec is of another architecture .* w \(label 0, .\)")]
NOT_A_PATH: Rows = [
    (3, TYPE, "path must be a path, not int 3"),
    (b"f", TYPE, "path must be a path, not bytes"),
    ("f\0", VALUE, "path must be a path, which has no null character"),
]
NOT_A_FILE: Rows = [
    *NOT_A_PATH,
    ("missing.safetensors", VALUE, "missing.safetensors: No such file"),
]
NO_FUNCTIONAL: Rows = [
    (None, TYPE, "functional must be a Functional, not NoneType None"),
    (nn.Linear(2, 3), TYPE, "functional must be a Functional, not Linear"),
]
NO_MODEL: Rows = [
    (None, TYPE, "model must be a module, not NoneType None"),
    (nn.Linear(3, 3), VALUE, r"weight has shape \[3, 3\], the spec's is \[3, 2\]"),
    (nn.Linear(2, 3, bias=False), VALUE, "model has no tensor 'bias', which the spec names"),
    (nn.Sequential(MODEL), VALUE, "model has no tensor 'weight', which the spec names"),
    (nn.Linear(2, 3).half(), TYPE, "weight must be float32 or float64, not torch.float16"),
    (nn.Linear(2, 3, device="meta"), VALUE, "weight is on meta, but functional is on cpu"),
]
NO_PARAMS: Rows = [
    (3, TYPE, "params must be parameters of the model, or None, not int 3"),
    (MODEL.weight, TYPE, "params must be parameters of the model, or None, not a torch.float32"),
    ([nn.Parameter(torch.ones(3, 2))], VALUE, r"params\[0\] is none of the model's parameters"),
    ([("a", torch.ones(2))], VALUE, "a is none of the model's parameters"),
    ([3], TYPE, r"params\[0\] must be a tensor of the model, not int 3"),
    ([], VALUE, "params must hold a parameter, but is empty"),
]
BAD_CHOICE: Rows = [
    ("warn", VALUE, "nonfinite must be one of 'raise', 'skip', not 'warn'"),
    (None, TYPE, "nonfinite must be a string, not NoneType None"),
]


def networks(name: str) -> Rows:
    return [
        ([1.0], TYPE, rf"{name} must be a tensor \[N, P\], not list"),
        (FLAT[0], VALUE, rf"{name} must have shape \[N, P\], not \[9\]"),
        (FLAT[:, 1:], VALUE, f"{name} has shape .2, 8., but the spec's networks have 9 weights"),
        (FLAT.half(), TYPE, f"{name} must be float32 or float64, not torch.float16"),
    ]


def per_network(name: str) -> Rows:
    return [
        (torch.ones(3), VALUE, f"{name} has length 3, but flat's axis 0 has size 2"),
        (torch.ones(2, 1), VALUE, rf"{name} must have shape \[N\], not \[2, 1\]"),
        (torch.ones(2).double(), TYPE, f"{name} is torch.float64, but flat is torch.float32"),
    ]


SWEEP: dict[tuple[str, str], Rows] = {
    ("Functional", "spec"): NOT_A_SPEC,
    ("Functional", "kind"): [
        ("cnn", VALUE, "kind must be one of 'unf', 'nfn', 'deep_sets', not 'cnn'"),
        (None, TYPE, "kind must be a string, not NoneType None"),
    ],
    ("Functional", "hidden"): COUNT,
    ("Functional", "layers"): COUNT,
    ("Functional", "equivariant"): [
        *COUNT,
        (3, VALUE, "equivariant must be at most layers, 2, not 3"),
    ],
    ("Functional", "eps"): [*NOT_A_NUMBER, (-1.0, VALUE, r"eps must be in \[0, 1\), not -1.0")],
    ("Functional.forward", "x"): [
        ([1.0], TYPE, r"x must be a tensor \[N, P, 8\], not list"),
        (X[0], VALUE, r"x must have shape \[N, P, 8\], not \[9, 8\]"),
        (X[:, 1:], VALUE, r"x must have shape \[N, 9, 8\], not \[2, 8, 8\]"),
        (X.double(), TYPE, "x is torch.float64, but theta is torch.float32"),
        (X.to("meta"), VALUE, "x is on meta, but theta is on cpu"),
    ],
    ("Functional.forward", "time"): [
        (3, TYPE, r"time must be a tensor \[11\] or \[N, 11\], not int 3"),
        (TIME[1:], VALUE, r"time must have shape \[11\] or \[2, 11\], not \[10\]"),
        (TIME.expand(3, -1), VALUE, r"time must have shape \[11\] or \[2, 11\], not \[3, 11\]"),
        (TIME.double(), TYPE, "time is torch.float64, but theta is torch.float32"),
    ],
    ("Functional.forward", "theta"): [
        ([1.0], TYPE, r"theta must be a tensor \[D\] or \[N, D\], not list"),
        (THETA[1:], VALUE, r"theta must have shape \[.*\] or \[2, .*\], not"),
        (THETA.expand(3, -1), VALUE, r"theta must have shape \[.*\] or \[2, .*\], not \[3"),
        (THETA.double(), TYPE, "x is torch.float32, but theta is torch.float64"),
    ],
    ("Functional.on", "spec"): [*NOT_A_SPEC, *ANOTHER],
    ("Functional.load_flat_", "theta"): [
        ([1.0], TYPE, r"theta must be a tensor \[D\], not list"),
        (THETA[1:], VALUE, "theta has length .*, but the functional has size"),
        (THETA.long(), TYPE, "theta must be floating point, not torch.int64"),
    ],
    ("Functional.load", "path"): NOT_A_FILE,
    ("Functional.load", "spec"): [*NOT_A_SPEC, *ANOTHER],
    ("LearnedOptimizer", "spec"): [*NOT_A_SPEC, *ANOTHER],
    ("LearnedOptimizer", "functional"): NO_FUNCTIONAL,
    ("LearnedOptimizer", "alpha"): [*NOT_A_NUMBER, *NEGATIVE],
    ("LearnedOptimizer", "beta"): NOT_A_NUMBER,
    ("LearnedOptimizer", "momentum"): [
        *NOT_A_NUMBER,
        *NEGATIVE,
        (1, VALUE, r"{p} must be in \[0.0, 1.0\), not 1"),
    ],
    ("LearnedOptimizer", "model"): NO_MODEL,
    ("LearnedOptimizer", "params"): NO_PARAMS,
    ("LearnedOptimizer", "nonfinite"): BAD_CHOICE,
    ("LearnedOptimizer.add_param_group", "param_group"): [
        ([MODEL.bias], TYPE, "param_group must be a dict with params, not list"),
        ({"lr": 0.1}, TYPE, "param_group must be a dict with params, not dict"),
        ({"params": [torch.ones(3)]}, VALUE, r"params\[0\] is none of the model's parameters"),
        ({"params": MODEL.weight}, VALUE, r"params\[0\] is in a group already"),
        ({"params": MODEL.bias, "lr": "1"}, TYPE, "alpha must be a number, not str '1'"),
        ({"params": MODEL.bias, "beta": torch.nan}, VALUE, r"beta must be in .*, not nan"),
    ],
    ("LearnedOptimizer.measure", "repeats"): COUNT,
    ("LearnedOptimizer.load", "path"): [
        *NOT_A_FILE,
        (PATH, VALUE, ".*: holds a functional, but no alpha"),
    ],
    ("LearnedOptimizer.load", "spec"): [*NOT_A_SPEC, *ANOTHER],
    ("meta_train", "functional"): NO_FUNCTIONAL,
    ("meta_train", "flat"): [
        *[(value, error, text.replace("N, P", "M, P")) for value, error, text in networks("flat")],
        (FLAT / 0, VALUE, r"flat must be finite, but flat\[0, 0\] is"),
        (FLAT[:0], VALUE, "flat holds no network"),
    ],
    ("meta_train", "spec_or_model"): [
        (3, TYPE, "spec_or_model must be a module or a traced spec, not int 3"),
        (SPEC, VALUE, "spec_or_model is a spec without layers, as .* pass the model"),
    ],
    ("meta_train", "data"): [
        (DATA[0], TYPE, r"data must be a pair \(x, targets\), not a torch.float32 tensor"),
        ((DATA[0], DATA[1] + 1), VALUE, "targets must lie in 0..2, given 1 to 3"),
        ((DATA[0], DATA[1][:4]), VALUE, r"targets must have shape \[5\] or"),
        (
            (DATA[0][None], DATA[1]),
            VALUE,
            "data must be samples .* that all networks share|targets must have shape",
        ),
        ((DATA[0], DATA[1][None]), VALUE, "data must have targets .* that all networks share"),
    ],
    ("meta_train", "iterations"): [(-1, VALUE, "{p} must be at least 0, not -1"), *COUNT[1:]],
    **{
        ("meta_train", name): COUNT
        for name in ("particles", "truncation", "horizon", "batch_size", "every")
    },
    **{
        ("meta_train", name): [*NOT_A_NUMBER, *SIGNED, (0.0, VALUE, "{p} must be above 0, not 0.0")]
        for name in ("alpha", "beta", "momentum", "sigma", "lr", "clip")
    },
    ("meta_train", "most"): [*NOT_A_NUMBER[:1], *NOT_A_NUMBER[2:], *SIGNED],
    ("meta_train", "estimator"): [
        ("es", VALUE, "estimator must be one of 'pes', 'backprop', not 'es'"),
        (None, TYPE, "estimator must be a string, not NoneType None"),
    ],
    ("meta_train", "seed"): [(-1, VALUE, "seed must be at least 0, not -1"), *COUNT[1:]],
    ("meta_train", "progress"): [(1, TYPE, "progress must be True or False, not int 1")],
    ("start", "flat"): networks("flat")[:2] + networks("flat")[3:],
    ("start", "momentum"): [*NOT_A_NUMBER, *NEGATIVE, *per_network("momentum")],
    ("step", "flat"): [
        *networks("flat"),
        (FLAT.double(), TYPE, "grads is torch.float32, but flat"),
    ],
    ("step", "grads"): [
        *networks("grads"),
        (GRADS[:1], VALUE, "grads has length 1, but flat's axis 0 has size 2"),
        (GRADS.double(), TYPE, "grads is torch.float64, but flat is torch.float32"),
        (GRADS.to("meta"), VALUE, "grads is on meta, but flat is on cpu"),
    ],
    ("step", "state"): [
        (None, TYPE, "state must be a State, not NoneType None"),
        (start(FLAT[:1]), VALUE, r"state must have momenta \[6, 2, 9\], not .*\[6, 1, 9\]"),
        (start(FLAT, 0.7), VALUE, r"state must have momenta \[6, 2, 9\], not .*\[7, 2, 9\]"),
        (State(start(FLAT).momenta, -1), VALUE, "state.step must be at least 0, not -1"),
        (State(start(FLAT).momenta, "1"), TYPE, "state.step must be an integer, not str '1'"),
        (State(start(FLAT).momenta, torch.ones(3)), VALUE, "state.step has length 3, but flat's"),
    ],
    ("step", "functional"): NO_FUNCTIONAL,
    ("step", "alpha"): [*NOT_A_NUMBER, *NEGATIVE, *per_network("alpha")],
    ("step", "beta"): [*NOT_A_NUMBER, *per_network("beta")],
    ("step", "momentum"): [*NOT_A_NUMBER, *NEGATIVE, *per_network("momentum")],
    ("step", "theta"): [
        ([1.0], TYPE, r"theta must be a tensor \[D\] or \[N, D\], not list"),
        (THETA[1:], VALUE, r"theta must have shape \[.*\] or \[2, .*\], not"),
    ],
}
#: reasonable memory bounds these
BOUNDED = (
    *("hidden", "layers", "repeats", "iterations", "particles", "truncation", "horizon"),
    "batch_size",
)
