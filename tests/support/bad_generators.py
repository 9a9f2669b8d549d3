"""The sweep of bad input to models of weightops.generate: arguments they take, and ways to get them wrong."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightops import generate, testing

TYPE, VALUE = TypeError, ValueError
Rows = list[tuple[Any, type, str]]

SPEC = testing.mlp_spec(4, 3, 2)
P = SPEC.numel
FLAT, TASKS = torch.randn(4, P), torch.tensor([0, 1, 0, 1])
INPUTS, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
DATASET = (INPUTS, LABELS)
OPTIONS = {
    "autoencoder": {"hidden": (4,)},
    "encoder": {"hidden": 4, "heads": 2, "points": 1},
    "diffusion": {"width": 4, "blocks": 1, "times": 40},
}
SIZES = {"latent": 2, "condition": 3, "examples": 1, "drop": 0.1, "options": OPTIONS}
VECTORS = torch.randn(3, 5)

VAE = generate.WeightVAE(5, 4, hidden=(4, 3), chunks=2)
ENCODER = generate.DatasetEncoder(4, 2, 3, hidden=4, heads=2, points=1)
DIFFUSION = generate.LatentDiffusion(2, 3, width=4, blocks=1, times=40, drop=0.1)
CHUNK, RANDOM = torch.tensor([0, 1, 0]), torch.Generator()
LATENTS, CONDITIONS = torch.randn(3, 2), torch.randn(3, 3)
EXAMPLES = torch.randn(3, 2, 5, 4)

# The sweep's own directory, which goes when the process ends.
_kept = tempfile.TemporaryDirectory()
DIRECTORY = Path(_kept.name)


def _model() -> generate.WeightGenerator:
    return generate.WeightGenerator(SPEC, 4, 2, **SIZES)


MODEL = _model()
MODEL.save(DIRECTORY / "model.safetensors")
(DIRECTORY / "empty.safetensors").touch()


def _bounded(function: Callable, *names: str) -> Callable:
    """``function``, but for arguments that hold numbers which only a larger machine could take."""

    def call(**arguments: Any) -> Any:
        for name in names:
            if any(large in repr(arguments[name]) for large in (str(2**31), str(2**63), "0" * 9)):
                raise ValueError(f"{function.__name__}: {name} is too much for a test")
        return function(**arguments)

    return call


def _fit(**arguments: Any) -> Any:
    if not (arguments["checkpoint"] is None or isinstance(arguments["checkpoint"], (int, float))):
        # Junk may be the name of a file.
        arguments["steps"] = (0, 0, 0)
        if isinstance(arguments["checkpoint"], str):
            arguments["checkpoint"] = str(DIRECTORY / "no" / arguments["checkpoint"])
    return _bounded(MODEL.fit, "steps")(**arguments)


def _save(path: Any) -> None:
    MODEL.save(str(DIRECTORY / "no" / path) if isinstance(path, str) else path)


#: integers that memory bounds
BOUNDED = (
    *("width", "latent", "side", "chunks", "features", "classes", "hidden", "heads", "points"),
    *("condition", "blocks", "times", "chunk", "examples", "batch", "redraws", "num_networks"),
)

VALID: dict[str, tuple[Callable, dict[str, Any]]] = {
    "WeightVAE": (
        _bounded(generate.WeightVAE, "hidden", "channels"),
        {
            **{"width": 5, "latent": 4, "form": "convolution", "hidden": (4, 3)},
            **{"side": 8, "channels": (2, 2), "chunks": 2},
        },
    ),
    "DatasetEncoder": (
        generate.DatasetEncoder,
        {
            **{"features": 4, "classes": 2, "width": 3},
            **{"hidden": 4, "heads": 2, "points": 1, "extractor": None},
        },
    ),
    "WeightVAE.encode": (VAE.encode, {"x": VECTORS, "chunk": CHUNK}),
    "WeightVAE.decode": (VAE.decode, {"z": torch.randn(3, 4), "chunk": CHUNK}),
    "WeightVAE.loss": (
        VAE.loss,
        {"x": VECTORS, "chunk": CHUNK, "kl": 1e-4, "noise": 0.1, "generator": RANDOM},
    ),
    "WeightVAE.sample": (VAE.sample, {"n": 2, "generator": RANDOM}),
    "DatasetEncoder.forward": (ENCODER, {"examples": EXAMPLES}),
    "LatentDiffusion.loss": (
        DIFFUSION.loss,
        {"x": LATENTS, "condition": CONDITIONS, "generator": RANDOM},
    ),
    "LatentDiffusion.sample": (
        DIFFUSION.sample,
        {"condition": CONDITIONS, "generator": RANDOM, "steps": 2, "guidance": 1.5},
    ),
    "alignment_loss": (
        generate.alignment_loss,
        {"datasets": VECTORS, "networks": VECTORS, "temperature": 0.1},
    ),
    "LatentDiffusion": (
        generate.LatentDiffusion,
        {"latent": 2, "condition": 3, "width": 4, "blocks": 1, "times": 40, "drop": 0.1},
    ),
    "WeightGenerator": (
        _bounded(generate.WeightGenerator, "options"),
        {
            **{"spec": SPEC, "features": 4, "classes": 2, "form": "mlp", "chunk": 4},
            **{"extractor": None, **SIZES},
        },
    ),
    "fit": (
        _fit,
        {
            **{"flat": FLAT, "tasks": TASKS, "datasets": [DATASET, DATASET], "steps": (1, 1, 1)},
            **{"batch": 2, "rate": 1e-3, "kl": 1e-4, "noise": 0.02, "decay": 0.9, "redraws": 2},
            **{"seed": 0, "checkpoint": None, "every": 1, "progress": False},
        },
    ),
    "generate": (
        MODEL.generate,
        {"dataset": DATASET, "num_networks": 2, "steps": 2, "guidance": 1.5, "seed": 0},
    ),
    "reconstruct": (MODEL.reconstruct, {"flat": FLAT}),
    "save": (_save, {"path": DIRECTORY / "again.safetensors"}),
    "load": (
        generate.WeightGenerator.load,
        {"path": DIRECTORY / "model.safetensors", "extractor": None},
    ),
}


def bad_count(least: int = 1) -> Rows:
    return [
        (1.5, TYPE, "{p} must be an integer, not float 1.5"),
        (True, TYPE, "{p} must be an integer, not bool True"),
        (least - 1, VALUE, f"{{p}} must be at least {least}, not {least - 1}"),
    ]


def bad_number(low: float, high: float) -> Rows:
    within = re.escape(f"[{low}, {high})")
    return [
        ("1", TYPE, "{p} must be a number, not str '1'"),
        (torch.nan, VALUE, rf"{{p}} must be in {within}, not nan"),
        (low - 1, VALUE, rf"{{p}} must be in {within}, not"),
    ]


BAD_SIZES: Rows = [
    (4, TYPE, "{p} must be a non-empty list of integers, not int 4"),
    ((), TYPE, r"{p} must be a non-empty list of integers, not tuple \(\)"),
    ((4, 0), VALUE, r"{p}\[1\] must be at least 1, not 0"),
]
BAD_EXTRACTOR: Rows = [(len, TYPE, "extractor must be a module or None, not builtin")]
BAD_FORM: Rows = [
    (None, TYPE, "form must be a string, not NoneType"),
    ("unet", VALUE, "form must be one of 'mlp', 'convolution', not 'unet'"),
]
BAD_SEED: Rows = [*bad_count(0), (2**64, VALUE, r"seed must be below 2\^64")]
BAD_FLAT: Rows = [
    ([1.0], TYPE, r"flat must be a tensor \[N, P\], not list"),
    (FLAT[0], VALUE, r"flat must have shape \[N, P\], not"),
    (
        FLAT[:, 1:],
        VALUE,
        rf"flat has shape \[4, {P - 1}\], but the spec's networks have {P} weights",
    ),
    (FLAT.long(), TYPE, "flat must be floating point, not torch.int64"),
    (FLAT.to_sparse(), TYPE, "flat must be a dense tensor, not torch.sparse_coo"),
    (FLAT.to("meta"), VALUE, "flat is on meta, where tensors hold no values"),
]
BAD_PATH: Rows = [
    (3, TYPE, "{p} must be a path, not int 3"),
    (b"x", TYPE, "{p} must be a path, not bytes"),
    ("a\0", VALUE, "{p} must be a path, which has no null character"),
]


def bad_dataset(name: str) -> Rows:
    name = re.escape(name)
    return [
        (INPUTS, TYPE, rf"{name} must be a pair \(inputs, labels\), not a torch.float32 tensor"),
        ((INPUTS, [0, 1]), TYPE, rf"{name}'s labels must be a tensor \[B\], not list"),
        ((INPUTS.long(), LABELS), TYPE, f"{name}'s inputs must be floating point, not torch.int64"),
        (
            (INPUTS, LABELS.float()),
            TYPE,
            f"{name}'s labels must be int64 or int32, not torch.float",
        ),
        ((INPUTS, LABELS[1:]), VALUE, f"{name}'s labels has length 5, but its inputs has size 6"),
        ((INPUTS[:0], LABELS[:0]), VALUE, f"{name} holds no example"),
        ((INPUTS, LABELS + 1), VALUE, rf"{name}'s labels\[1\] is 2, outside 0..1"),
        ((INPUTS, LABELS * 0), VALUE, f"{name} has no example of class 1"),
        ((INPUTS * torch.nan, LABELS), VALUE, f"{name}'s inputs must be finite, but "),
        (
            (INPUTS.to("meta"), LABELS.to("meta")),
            VALUE,
            f"{name} is on meta, where tensors hold no values",
        ),
    ]


def _vectors(name: str) -> Rows:
    return [
        ([1.0], TYPE, rf"{name} must be a tensor \[B, E\], not list"),
        (VECTORS[0], VALUE, rf"{name} must have shape \[B, E\], not \[5\]"),
        (VECTORS[1:], VALUE, r"networks must have shape .* as datasets, not"),
        (VECTORS.double(), TYPE, "networks is torch.float.*, but datasets is torch.float"),
        (VECTORS.to("meta"), VALUE, "networks is on .*, but datasets is on"),
    ]


def bad_input(name: str, value: torch.Tensor, shape: str) -> Rows:
    """What a module's tensor argument ``value`` ``[3, n]`` can't be."""
    axes = re.escape(shape)
    return [
        ([1.0], TYPE, rf"{name} must be a tensor {axes}, not list"),
        (value.double(), TYPE, f"{name} must be torch.float32, not torch.float64"),
        (value.to_sparse(), TYPE, f"{name} must be a dense tensor, not torch.sparse_coo"),
        (value.to("meta"), VALUE, f"{name} is on meta, but the model is on cpu"),
        (value[:, 1:], VALUE, rf"{name} must have shape \[.*{value.shape[1]}\], not \[3, "),
        (value[0], VALUE, rf"{name} must have shape \[.*{value.shape[1]}\], not \["),
    ]


BAD_CHUNK: Rows = [
    ([0, 1, 0], TYPE, r"chunk must be a tensor \[...\], not list"),
    (CHUNK.float(), TYPE, "chunk must be int64 or int32, not torch.float32"),
    (CHUNK[1:], VALUE, r"chunk must have shape \[3\] as [xz] \[3, .\], not \[2\]"),
    (CHUNK + 1, VALUE, r"chunk\[1\] is 2, outside 0..1"),
    (CHUNK.to("meta"), VALUE, "chunk is on meta, but [xz] is on cpu"),
    (None, VALUE, r"[xz] must have shape \[..., 2, .\] without chunk, not \[3, .\]"),
]
BAD_GENERATOR: Rows = [(3, TYPE, "generator must be a torch.Generator.*, not int 3")]

SWEEP: dict[tuple[str, str], Rows] = {
    **{("WeightVAE", name): bad_count() for name in ("width", "chunks")},
    ("WeightVAE", "latent"): [
        *bad_count(),
        (6, VALUE, "latent must be a multiple of 4, the pixels of the smallest image, not 6"),
    ],
    ("WeightVAE", "side"): [
        *bad_count(),
        (6, VALUE, "side must be a multiple of 4, as each of the 2 channels halves it, not 6"),
    ],
    ("WeightVAE", "form"): BAD_FORM,
    ("WeightVAE", "hidden"): BAD_SIZES,
    ("WeightVAE", "channels"): BAD_SIZES,
    **{
        ("DatasetEncoder", name): bad_count()
        for name in ("features", "classes", "width", "heads", "points")
    },
    ("DatasetEncoder", "hidden"): [
        *bad_count(),
        (5, VALUE, "hidden 5 must be a multiple of heads 2"),
    ],
    ("DatasetEncoder", "extractor"): BAD_EXTRACTOR,
    ("WeightVAE.encode", "x"): bad_input("x", VECTORS, "[..., 5]"),
    ("WeightVAE.decode", "z"): bad_input("z", torch.randn(3, 4), "[..., 4]"),
    ("WeightVAE.loss", "x"): bad_input("x", VECTORS, "[..., 5]"),
    **{(f"WeightVAE.{name}", "chunk"): BAD_CHUNK for name in ("encode", "decode", "loss")},
    **{("WeightVAE.loss", name): bad_number(0, 1e9) for name in ("kl", "noise")},
    ("WeightVAE.sample", "n"): bad_count(0),
    **{
        (name, "generator"): BAD_GENERATOR
        for name in (
            *("WeightVAE.loss", "WeightVAE.sample"),
            *("LatentDiffusion.loss", "LatentDiffusion.sample"),
        )
    },
    ("DatasetEncoder.forward", "examples"): [
        ([1.0], TYPE, r"examples must be a tensor \[B, K, S, ...\], not list"),
        (EXAMPLES.double(), TYPE, "the extractor must give torch.float32 features, not torch.fl"),
        (EXAMPLES.to("meta"), VALUE, "examples is on meta, but the model is on cpu"),
        (EXAMPLES[:, :, :0], VALUE, r"examples must have shape \[B, 2, S, ...\] with S > 0"),
        (EXAMPLES[:, :1], VALUE, r"examples must have shape \[B, 2, S, ...\] with S > 0"),
        (EXAMPLES[..., 1:], VALUE, r"the extractor must give features \[30, 4\], not \[30, 3\]"),
    ],
    ("LatentDiffusion.loss", "x"): bad_input("x", LATENTS, "[B, L]"),
    ("LatentDiffusion.loss", "condition"): [
        *bad_input("condition", CONDITIONS, "[B, C]"),
        (CONDITIONS[1:], VALUE, "condition has length 2, but x's axis 0 has size 3"),
    ],
    ("LatentDiffusion.sample", "condition"): bad_input("condition", CONDITIONS, "[B, C]"),
    ("LatentDiffusion.sample", "steps"): [
        *bad_count(),
        (41, VALUE, "steps must be at most 40, not 41"),
    ],
    ("LatentDiffusion.sample", "guidance"): bad_number(0, 1e9),
    ("alignment_loss", "datasets"): _vectors("datasets"),
    ("alignment_loss", "networks"): [
        *_vectors("networks"),
        (VECTORS.long(), TYPE, "networks must be floating point, not torch.int64"),
    ],
    ("alignment_loss", "temperature"): [
        ("1", TYPE, "temperature must be a number, not str"),
        (0, VALUE, r"temperature must be in \[1e-06, inf\), not 0"),
        (
            VECTORS,
            TYPE,
            "temperature must be a number or a floating tensor of no axis, not a torch",
        ),
    ],
    **{
        ("LatentDiffusion", name): bad_count()
        for name in ("latent", "condition", "width", "blocks")
    },
    ("LatentDiffusion", "times"): bad_count(40),
    ("LatentDiffusion", "drop"): bad_number(0, 1),
    ("WeightGenerator", "spec"): [(None, TYPE, "spec must be a WeightSpec, not NoneType")],
    **{
        ("WeightGenerator", name): bad_count()
        for name in ("features", "classes", "latent", "chunk", "condition", "examples")
    },
    ("WeightGenerator", "form"): BAD_FORM,
    ("WeightGenerator", "drop"): bad_number(0, 1),
    ("WeightGenerator", "extractor"): BAD_EXTRACTOR,
    ("WeightGenerator", "options"): [
        (3, TYPE, "options must map parts to options, not int 3"),
        ({"unet": {}}, VALUE, "options must be one of 'autoencoder', 'encoder', 'diffusion', not"),
        ({"encoder": 3}, TYPE, r"options\['encoder'\] must map names to values, not int 3"),
        (
            {"encoder": {"depth": 3}},
            VALUE,
            r"options\['encoder'\] must be one of 'hidden', 'heads'",
        ),
        ({"autoencoder": {"hidden": 3}}, TYPE, "hidden must be a non-empty list of integers, not"),
    ],
    ("fit", "flat"): [
        *BAD_FLAT,
        (FLAT[:0], VALUE, "flat holds no network"),
        (FLAT * torch.inf, VALUE, r"flat must be finite, but flat\[0, 0\] is"),
    ],
    ("fit", "tasks"): [
        ([0], TYPE, r"tasks must be a tensor \[N\], not list"),
        (TASKS.float(), TYPE, "tasks must be int64 or int32, not torch.float32"),
        (TASKS[1:], VALUE, "tasks has length 3, but flat's axis 0 has size 4"),
        (TASKS + 1, VALUE, r"tasks\[1\] is 2, outside 0..1, as there are 2 datasets"),
        (TASKS.to("meta"), VALUE, "tasks is on meta, but flat is on cpu"),
    ],
    ("fit", "datasets"): [
        ([], TYPE, r"datasets must be a non-empty list of \(inputs, labels\), not list"),
        ([DATASET], VALUE, r"tasks\[1\] is 1, outside 0..0, as there are 1 datasets"),
        (
            [DATASET, (INPUTS[:, 1:], LABELS)],
            VALUE,
            r"datasets\[1\] has inputs \[3\], datasets\[0\]",
        ),
        *(([DATASET, bad], *rest) for bad, *rest in bad_dataset("datasets[1]")),
    ],
    ("fit", "steps"): [
        (3, TYPE, "steps must be three integers, of autoencoder, alignment, diffusion, not int 3"),
        ((1, 1), TYPE, "steps must be three integers, of"),
        ((1, -1, 1), VALUE, "steps of the alignment must be at least 0, not -1"),
    ],
    **{("fit", name): bad_count() for name in ("batch", "redraws", "every")},
    ("fit", "rate"): bad_number(0, 1.0),
    ("fit", "kl"): bad_number(0, 1e9),
    ("fit", "noise"): bad_number(0, 1e9),
    ("fit", "decay"): bad_number(0, 1),
    ("fit", "seed"): BAD_SEED,
    ("fit", "checkpoint"): [
        *BAD_PATH[:2],
        (DIRECTORY / "empty.safetensors", VALUE, ".*empty.safetensors: is truncated or no safeten"),
    ],
    ("fit", "progress"): [(1, TYPE, "progress must be True or False, not int 1")],
    ("generate", "dataset"): bad_dataset("dataset"),
    ("generate", "num_networks"): bad_count(0),
    ("generate", "steps"): [*bad_count(), (41, VALUE, "steps must be at most 40, not 41")],
    ("generate", "guidance"): bad_number(0, 1e9),
    ("generate", "seed"): BAD_SEED,
    ("reconstruct", "flat"): BAD_FLAT,
    ("save", "path"): [
        *BAD_PATH,
        (DIRECTORY / "no" / "a", VALUE, ".*a: can't be written: .*no is no folder"),
    ],
    ("load", "path"): [
        *BAD_PATH,
        (DIRECTORY / "none", VALUE, ".*none: No such file or directory"),
        (DIRECTORY / "empty.safetensors", VALUE, ".*empty.safetensors: is truncated or no safeten"),
    ],
    ("load", "extractor"): [
        *BAD_EXTRACTOR,
        (nn.Linear(4, 4), VALUE, ".*model.safetensors: does not fit the model: Missing key"),
    ],
}
