"""Bad arguments of population training, for the sweep in tests/test_bad_input.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weightops.population import TrainingState, population_batchnorm, population_train

TYPE, VALUE = TypeError, ValueError
LAYER, LAYERS = nn.Linear(2, 3), torch.randn(2, 9)
X, CLASSES = torch.randn(5, 2), torch.tensor([0, 2, 1, 0, 2])
NORMED = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "population_train": (
        population_train,
        {
            **{"flat": LAYERS, "spec_or_model": LAYER, "data": (X, CLASSES), "steps": 2},
            **{"optimizer": "adamw", "lr": 1e-3, "weight_decay": None, "betas": (0.9, 0.999)},
            **{"eps": 1e-8, "momentum": 0.5, "nesterov": True, "batch_size": 2, "seed": 0},
            **{"every": 1, "state": None, "progress": False},
        },
    ),
    "population_batchnorm": (
        population_batchnorm,
        {"flat": torch.rand(2, 21), "spec_or_model": NORMED, "x": X, "momentum": None},
    ),
}

NOT_A_COUNT: list[tuple[Any, type, str]] = [
    (2.0, TYPE, "{p} must be an integer, not float 2.0"),
    (True, TYPE, "{p} must be an integer, not bool True"),
    (-1, VALUE, "{p} must be at least ., not -1"),
]
NOT_A_NUMBER: list[tuple[Any, type, str]] = [
    ("1", TYPE, "{p} must be a number, not str '1'"),
    (-0.1, VALUE, r"{p} must be in \[0, .*, not -0.1"),
    (torch.nan, VALUE, r"{p} must be in \[0, .*, not nan"),
]
BAD_MODEL: list[tuple[Any, type, str]] = [
    (3, TYPE, "spec_or_model must be a module or a traced spec, not int 3"),
    (nn.Linear(3, 3), VALUE, "torch.export can't export Linear"),
]

SWEEP: dict[tuple[str, str], list[tuple[Any, type, str]]] = {
    ("population_train", "flat"): [
        ([1.0], TYPE, r"flat must be a tensor \[N, P\], not list"),
        (LAYERS[:, 1:], VALUE, "flat has shape .2, 8., but the architecture has 9 weights"),
        (LAYERS.double(), TYPE, "x must be torch.float64 as flat, not torch.float32"),
    ],
    ("population_train", "spec_or_model"): BAD_MODEL,
    ("population_train", "data"): [
        (X, TYPE, r"data must be a pair \(x, targets\), not a torch.float32 tensor"),
        ((X,), TYPE, r"data must be a pair \(x, targets\), not tuple"),
        ((X, CLASSES + 1), VALUE, r"targets must lie in 0..2, given 1 to 3"),
        ((X, CLASSES[:4]), VALUE, r"targets must have shape \[5\] or \[2, 5\]"),
        ((X[:0], CLASSES[:0]), VALUE, "x holds no sample"),
    ],
    ("population_train", "steps"): NOT_A_COUNT,
    ("population_train", "optimizer"): [
        ("adam", VALUE, "optimizer must be one of 'adamw', 'sgd', not 'adam'"),
    ],
    ("population_train", "lr"): [
        *NOT_A_NUMBER,
        (torch.ones(3), VALUE, "lr has length 3, but the population has size 2"),
        (torch.tensor([1.0, torch.inf]), VALUE, r"lr must be finite, but lr\[1\] is inf"),
        (torch.tensor([1.0, -1.0]), VALUE, "lr must not be negative"),
        (torch.tensor([1, 1]), TYPE, "lr must be floating point, not torch.int64"),
    ],
    ("population_train", "weight_decay"): NOT_A_NUMBER,
    ("population_train", "betas"): [
        (0.9, TYPE, "betas must be a pair of numbers, not float 0.9"),
        ((0.9, 1.0), VALUE, r"betas\[1\] must be in \[0, 1\), not 1.0"),
    ],
    ("population_train", "eps"): NOT_A_NUMBER,
    ("population_train", "momentum"): [
        *NOT_A_NUMBER,
        (0.0, VALUE, "nesterov needs a momentum above 0"),
    ],
    ("population_train", "nesterov"): [(1, TYPE, "nesterov must be True or False, not int 1")],
    ("population_train", "batch_size"): [
        *NOT_A_COUNT,
        (6, VALUE, "batch_size is 6, but data has 5 rows"),
    ],
    ("population_train", "seed"): [
        *NOT_A_COUNT,
        ([1], VALUE, "seed has length 1, but the population has size 2"),
        ([1, None], TYPE, "seed must be an integer, not NoneType"),
    ],
    ("population_train", "every"): NOT_A_COUNT,
    ("population_train", "state"): [
        (3, TYPE, "state must be a TrainingState, not int 3"),
        (TrainingState(1, torch.zeros(1, 2, 9)), VALUE, "state must have torch.float32 moments"),
    ],
    ("population_train", "progress"): [(1, TYPE, "progress must be True or False, not int 1")],
    ("population_batchnorm", "flat"): [
        (LAYERS, VALUE, "flat has shape .2, 9., but the architecture has 21 weights"),
    ],
    ("population_batchnorm", "spec_or_model"): [
        *BAD_MODEL,
        (
            nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)),
            VALUE,
            "spec_or_model has no batch norm with running statistics",
        ),
    ],
    ("population_batchnorm", "x"): [
        (X[:1], VALUE, "x must have two samples at least"),
        (X.double(), TYPE, "x must be torch.float32 as flat, not torch.float64"),
    ],
    ("population_batchnorm", "momentum"): [
        *NOT_A_NUMBER,
        (1.5, VALUE, r"momentum must be in \[0, 1\), not 1.5"),
    ],
}
