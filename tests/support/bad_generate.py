"""The sweep of bad input to weightops.generate: arguments that its functions take, and ways to get them wrong."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightops import WeightSpec, generate

TYPE, VALUE = TypeError, ValueError
Rows = list[tuple[Any, type, str]]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w1.mT).tanh() @ self.w2.mT


MODEL = Layers()
SPEC = WeightSpec({"w1": ("h", None), "w2": (None, "h")}, {"w1": (3, 2), "w2": (4, 3)})
OTHER = WeightSpec({"w1": (None,)}, {"w1": (17,)})
P = SPEC.numel
FLAT = torch.randn(3, P, generator=torch.Generator().manual_seed(0))
X, TARGETS, TASK = torch.randn(5, 2), torch.tensor([0, 3, 1, 2, 0]), torch.tensor([0, 1, 1])
ERRORS = torch.tensor([[True, False], [False, False], [True, True]])

# The sweep's own directory, which goes when the process ends.
_kept = tempfile.TemporaryDirectory()
DIRECTORY = Path(_kept.name)
FILE = DIRECTORY / "network.safetensors"
save_file({name: tensor[0].clone() for name, tensor in SPEC.unflatten(FLAT).items()}, FILE)


def _write(flat: Any = FLAT, task: Any = TASK) -> generate.Zoo:
    with generate.ZooWriter(DIRECTORY / "zoo", SPEC, classes={"task": 2}) as writer:
        writer.add(flat, task=task)
    return generate.Zoo(DIRECTORY / "zoo")


def _import(**arguments: Any) -> generate.Zoo:
    return generate.import_state_dicts(out=DIRECTORY / "imported", progress=False, **arguments)


def _fine_tune(steps: Any, **arguments: Any) -> generate.FineTuned:
    if isinstance(steps, (list, tuple)) and any(type(n) is int and n > 100 for n in steps):
        raise ValueError("fine_tune: steps are too many for a test")
    return generate.fine_tune(steps=steps, **arguments)


ZOO = _write()
SPAN = generate.span(ZOO)
EVALUATED = {"flat": FLAT, "model": MODEL, "x": X, "targets": TARGETS}

VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "Zoo": (generate.Zoo, {"path": DIRECTORY / "zoo"}),
    "ZooWriter": (
        generate.ZooWriter,
        {
            **{"path": DIRECTORY / "new", "spec": SPEC, "shard_size": 2},
            **{"classes": {"task": 2}, "about": {"data": "digits"}},
        },
    ),
    "add": (_write, {"flat": FLAT, "task": TASK}),
    "batches": (ZOO.batches, {"size": 2, "shuffle": 0}),
    "Zoo.select": (ZOO.select, {"task": 1}),
    "import_state_dicts": (
        _import,
        {
            **{"paths": [FILE, FILE], "spec": SPEC, "metadata": {"task": [0, 1]}},
            **{"classes": {"task": 2}, "about": None, "shard_size": 8},
        },
    ),
    "span": (generate.span, {"zoo": FLAT, "spec": SPEC}),
    "validate": (
        generate.validate,
        EVALUATED | {"span": SPAN, "margin": 0.5, "floor": 0.2},
    ),
    "evaluate": (generate.evaluate, EVALUATED),
    "select": (generate.select, {"flat": FLAT, "scores": FLAT[:, 0], "k": 2}),
    "retrieve": (
        generate.retrieve,
        {"zoo": ZOO, "model": MODEL, "x": X, "targets": TARGETS},
    ),
    "fine_tune": (
        _fine_tune,
        {
            **{"flat": FLAT, "model": MODEL, "data": (X, TARGETS), "steps": [1, 2]},
            **{"test": (X, TARGETS), "learning_rate": 0.1, "batch_size": 2, "seed": 0},
        },
    ),
    "partial": (
        generate.partial,
        {"base": FLAT[0], "generated": FLAT, "spec": SPEC, "names": ["w1"]},
    ),
    "novelty": (
        generate.novelty,
        {
            **{"flat": FLAT, "zoo_flat": FLAT, "spec": SPEC, "errors": ERRORS},
            **{"zoo_errors": ERRORS, "seed": 0, "progress": False},
        },
    ),
}


def _bad_networks(
    name: str = "flat",
    shape: str = "[N, P]",
    dtypes: str = "float16, bfloat16, float32 or float64",
) -> Rows:
    text = re.escape(shape)
    return [
        ([1.0], TYPE, rf"{name} must be a tensor {text}, not list \[1.0\]"),
        (FLAT.to_sparse(), TYPE, f"{name} must be a dense tensor, not torch.sparse_coo"),
        (
            FLAT.long(),
            TYPE,
            f"{name} must be {dtypes}, not torch.int64",
        ),
        (FLAT[:, 1:], VALUE, rf"{name} has shape \[3, {P - 1}\], but"),
    ]


def _bad_count(least: int, name: str = "{p}") -> Rows:
    return [
        (2.5, TYPE, f"{name} must be an integer, not float 2.5"),
        (True, TYPE, f"{name} must be an integer, not bool True"),
        (least - 1, VALUE, f"{name} must be at least {least}, not {least - 1}"),
    ]


def _bad_number(low: str) -> Rows:
    return [
        ("1", TYPE, "{p} must be a number, not str '1'"),
        (-1, VALUE, rf"{{p}} must be in \[{low}, .*\), not -1"),
        (torch.nan, VALUE, r"{p} must be in .*, not nan"),
    ]


NO_PATH: Rows = [
    (3, TYPE, "{p} must be a path, not int 3"),
    (b"zoo", TYPE, "{p} must be a path, not bytes"),
    ("a\0b", VALUE, "{p} must be a path, which has no null character"),
]
NO_SPEC: Rows = [({"w1": (3, 2)}, TYPE, "spec must be a WeightSpec, not dict")]
NOT_A_MODEL: Rows = [
    (None, TYPE, "model must be a module, not NoneType"),
    (SPEC, TYPE, "model must be a module, not WeightSpec"),
]
OTHER_MODEL: Rows = [
    (nn.Linear(2, 4), VALUE, rf"flat has shape \[3, {P}\], but model has 12 weights"),
    (nn.Linear(5, 3), VALUE, r".*torch.export can't export Linear"),
]
BAD_X: Rows = [
    ([1.0], TYPE, r"{p} must be a tensor \[B, ...\] or .* not list"),
    (X[:0], VALUE, r"x must hold examples, not shape \[0, 2\]"),
    (X[:, :1], VALUE, r"torch.export can't export"),
    (X.double(), TYPE, "x must be torch.float32 as flat, not torch.float64"),
    (X.to("meta"), VALUE, "{p} is on meta, but flat is on cpu"),
    (X[:4], VALUE, r"targets must have shape \[4\] or"),
]
BAD_TARGETS: Rows = [
    ([0], TYPE, r"{p} must be a tensor \[B\].* not list"),
    (TARGETS[None], VALUE, r"{p} must have shape \[5\] or \[., 5\], not \[1, 5\]"),
    (TARGETS.float(), TYPE, "{p} must be classes of dtype int64, not torch.float32"),
    (TARGETS + 1, VALUE, "{p} must lie in 0..3, given 1 to 4"),
    (TARGETS - 1, VALUE, "{p} must lie in 0..3, given -1 to 2"),
]
BAD_DATA: Rows = [
    (X, TYPE, r"{p} must be \(x, targets\), not a torch.float32 tensor"),
    ((X[:0], TARGETS[:0]), VALUE, "{p}: x must hold examples"),
    ((X, TARGETS + 9), VALUE, "{p}: targets must lie in 0..3, given 9 to 12"),
    ((X, TARGETS[:4]), VALUE, r"{p}: targets must have shape \[5\]"),
]
BAD_SEED: Rows = [*_bad_count(0), (2**64, VALUE, "{p} must be below 2\\^64")]
BAD_CLASSES: Rows = [
    ([2], TYPE, "classes must map metadata to numbers of classes, not list"),
    ({3: 2}, TYPE, "classes must have names, not int 3"),
    ({"task": 0}, VALUE, r"classes\['task'\] must be at least 1, not 0"),
    ({"task": 2.0}, TYPE, r"classes\['task'\] must be an integer, not float 2.0"),
]
BAD_ABOUT: Rows = [
    ("digits", TYPE, "about must map names to facts, not str 'digits'"),
    ({"x": X}, TYPE, "about must be what JSON can hold: .*Tensor"),
    ({"x": torch.nan}, TYPE, "about must be what JSON can hold"),
]
BAD_METADATA: Rows = [
    ("one", TYPE, "task must be numbers or a tensor, not str 'one'"),
    ([[0], [1, 2]], TYPE, "task is no metadata: "),
    (TASK[:2], VALUE, "task has length 2, but the number of networks has size 3"),
    (TASK + 1, VALUE, r"task\[1\] is 2, outside 0..1 \(2 classes\)"),
    (TASK.float(), VALUE, "task must be int64 or int32, as it has 2 classes"),
]
BAD_ERRORS: Rows = [
    (None, TYPE, r"{p} must be a tensor \[., B\], not NoneType"),
    (ERRORS.long(), TYPE, "{p} must be bool, not torch.int64"),
    (ERRORS[:2], VALUE, "{p} has length 2, but the number of networks has size 3"),
    (ERRORS[:, :1], VALUE, "errors axis 1 has length .* but zoo_errors's axis 1 has size"),
]
MANY = [(FLAT[0], VALUE, rf"{{p}} must have shape \[[NM], P\], not \[{P}\]")]
NAN = [(FLAT * torch.nan, VALUE, r"{p}\[0\]: w1\[0, 0\] is nan|{p}\[0\]: weights\[0\] is nan")]

SWEEP: dict[tuple[str, str], Rows] = {
    ("Zoo", "path"): [*NO_PATH, (DIRECTORY, VALUE, ".*zoo.json: No such file")],
    ("ZooWriter", "path"): NO_PATH,
    ("ZooWriter", "spec"): NO_SPEC,
    ("ZooWriter", "shard_size"): _bad_count(1),
    ("ZooWriter", "classes"): BAD_CLASSES,
    ("ZooWriter", "about"): BAD_ABOUT,
    ("add", "flat"): [*_bad_networks(shape="[n, P] or [P]"), *NAN],
    ("add", "task"): BAD_METADATA,
    ("batches", "size"): _bad_count(1),
    ("batches", "shuffle"): BAD_SEED,
    ("Zoo.select", "task"): [
        ("one", TYPE, "task must be numbers or a tensor, not str 'one'"),
        (2, VALUE, r"no network of the zoo has {'task': 2}"),
    ],
    ("import_state_dicts", "paths"): [
        (FILE, TYPE, "paths must be a list of paths, not PosixPath"),
        ("ab", TYPE, "paths must be a list of paths, not str"),
        ([], VALUE, "paths is empty"),
        ([FILE, 3], TYPE, r"paths\[1\] must be a path, not int 3"),
        ([FILE, DIRECTORY / "no.pt"], VALUE, ".*no.pt: No such file"),
        ([FILE, DIRECTORY / "no.txt"], VALUE, ".*no.txt: must end in one of .safetensors"),
        ([FILE], VALUE, r"metadata\['task'\] has length 2, but paths has size 1"),
    ],
    ("import_state_dicts", "spec"): [
        *NO_SPEC,
        (OTHER, VALUE, r".*network.safetensors: w1 has shape \[3, 2\], the spec's is \[17\]"),
    ],
    ("import_state_dicts", "metadata"): [
        ([0, 1], TYPE, "metadata must map keys to values, not list"),
        ({"task": "one"}, TYPE, "task must be numbers or a tensor"),
        ({3: [0, 1]}, TYPE, "metadata must have names, not int 3"),
        ({}, VALUE, "task is missing"),
    ],
    ("import_state_dicts", "classes"): BAD_CLASSES,
    ("import_state_dicts", "about"): BAD_ABOUT,
    ("import_state_dicts", "shard_size"): _bad_count(1),
    ("span", "zoo"): [
        *_bad_networks("zoo"),
        *MANY,
        *NAN,
        (FLAT[:0], VALUE, "zoo holds no network"),
        (FLAT.to("meta"), VALUE, "zoo is on meta"),
    ],
    ("span", "spec"): [*NO_SPEC, (None, TYPE, "spec must be a WeightSpec, not NoneType")],
    ("validate", "flat"): [*_bad_networks(), *MANY],
    ("validate", "span"): [(ZOO, TYPE, "span must be a Span, not Zoo")],
    ("validate", "margin"): _bad_number("0"),
    ("validate", "floor"): [
        *_bad_number("0"),
        (None, TYPE, r"a check set needs model, x, targets and floor, not \['floor'\] None"),
    ],
    ("validate", "model"): [
        (SPEC, TYPE, "model must be a module, not WeightSpec"),
        (nn.Linear(2, 4), VALUE, "model has no tensor 'w1', which the spec names"),
    ],
    ("validate", "x"): BAD_X,
    ("validate", "targets"): BAD_TARGETS,
    ("evaluate", "flat"): [*_bad_networks(dtypes="float32 or float64"), *MANY],
    ("evaluate", "model"): [*NOT_A_MODEL, *OTHER_MODEL],
    ("evaluate", "x"): BAD_X,
    ("evaluate", "targets"): BAD_TARGETS,
    ("select", "flat"): [*_bad_networks()[:3], *MANY],
    ("select", "scores"): [
        ([1.0], TYPE, r"scores must be a tensor \[N\], not list"),
        (FLAT, VALUE, rf"scores must have shape \[N\], not \[3, {P}\]"),
        (FLAT[:2, 0], VALUE, "scores has length 2, but flat's axis 0 has size 3"),
        (TASK, TYPE, "scores must be float16, bfloat16, float32 or float64, not torch.int64"),
    ],
    ("select", "k"): [*_bad_count(1), (4, VALUE, "k is 4, but flat has 3 networks")],
    ("retrieve", "zoo"): [(FLAT, TYPE, "zoo must be a Zoo, not a torch.float32 tensor")],
    ("retrieve", "model"): [
        *NOT_A_MODEL,
        (nn.Linear(2, 4), VALUE, "model has no tensor 'w1', which the spec names"),
    ],
    ("retrieve", "x"): BAD_X,
    ("retrieve", "targets"): BAD_TARGETS,
    ("fine_tune", "flat"): [*_bad_networks(dtypes="float32 or float64"), *MANY],
    ("fine_tune", "model"): [*NOT_A_MODEL, *OTHER_MODEL],
    ("fine_tune", "data"): BAD_DATA,
    ("fine_tune", "test"): BAD_DATA,
    ("fine_tune", "steps"): [
        (5, TYPE, "steps must be a list of integers, not int 5"),
        ([], VALUE, "steps must ascend, and be one or more"),
        ([5, 1], VALUE, r"steps must ascend, .* not \[5, 1\]"),
        *[([n], error, text) for n, error, text in _bad_count(0, r"steps\[0\]")],
    ],
    ("fine_tune", "learning_rate"): _bad_number(".*"),
    ("fine_tune", "batch_size"): _bad_count(1),
    ("fine_tune", "seed"): BAD_SEED,
    ("partial", "base"): [
        *[row for row in _bad_networks("base", "[P] or [N, P]") if "float16" not in row[2]],
        (FLAT[:2], VALUE, rf"base must have shape \[P\] or \[3, {P}\] as generated, not \[2,"),
        (FLAT[0].double(), TYPE, "base is torch.float64, but generated is torch.float32"),
    ],
    ("partial", "generated"): [*_bad_networks("generated"), *MANY],
    ("partial", "spec"): NO_SPEC,
    ("partial", "names"): [
        ("w1", TYPE, "names must be a list of names, not str 'w1'"),
        ([3], TYPE, "names must hold names, not int 3"),
        ([], VALUE, "names is empty"),
        (["w3"], VALUE, r"names has 'w3', which is no tensor or module; the spec has \['w1'"),
    ],
    ("novelty", "flat"): [*_bad_networks(), *MANY, *NAN],
    ("novelty", "zoo_flat"): [
        *_bad_networks("zoo_flat", "[M, P]"),
        *MANY,
        *NAN,
        (FLAT[:0], VALUE, "zoo_flat holds no network"),
        (FLAT.double(), TYPE, "zoo_flat is torch.float64, but flat is torch.float32"),
    ],
    ("novelty", "spec"): [(FLAT, TYPE, "spec must be a WeightSpec, not a torch.float32 tensor")],
    ("novelty", "errors"): BAD_ERRORS,
    ("novelty", "zoo_errors"): BAD_ERRORS,
    ("novelty", "seed"): BAD_SEED,
    ("novelty", "progress"): [(1, TYPE, "progress must be True or False, not int 1")],
}
