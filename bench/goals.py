"""What the benchmarks are to reach, by the names of their groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

# group -> (most times over the floor, least times faster than the best peer)
GOALS: dict[str, tuple[float | None, float | None]] = {
    "permute_axes 64x128x128": (2.0, 4.0),
    "permute_axes 8x512x512": (2.0, 4.0),
    "permute_axes 8x2048x2048": (1.3, 4.0),
    "permute_axes 64x512x512": (1.8, 1.8),
    "permute_axes 8x512x512x3x3": (2.8, 2.2),
    "permute vgg16x1": (1.8, 8.0),
    "permute resnet20x1": (3.0, 4.0),
    "merge 8x2048x2048x8": (1.6, None),
    **{
        f"assign {family}-64x{n}": (None, 1.0)
        for family in ("gram", "uniform")
        for n in (64, 256, 512, 1024)
    },
    "barrier 784-512-512-512-10 segment of 25": (None, 1.6),
    **{
        f"manifold per-sample {n}->{n} B={batch} K=3 {passes}": (None, 1.9)
        for n in (256, 1024)
        for batch in (32, 512, 4096)
        for passes in ("forward", "forward+backward")
    },
    "universe gradient 8 x MLP 784-512x3-10": (None, 5.0),
    "manifold per-sample 1024->1024 B=512 K=3 bfloat16 forward": (None, 1.0),
    "manifold per-sample 1024->1024 B=1 K=9 forward": (1.2, None),
    "manifold synthesize 25,600,000 weights K=3 G=1": (1.1, None),
    "population 64 CNNs forward": (1.4, 8.0),
    "population 256 MLPs 64-32-10 forward": (None, 3.0),
    "population 64 MLPs 784-128-10 forward": (None, 1.0),
    **{f"circles training {n} networks": (1.7, None) for n in (16, 64)},
}
for _network, _least in (
    ("vgg16", 10.0),
    ("mlp", 6.0),
    ("resnet20 1x", 4.0),
    ("resnet20 4x", 2.0),
):
    GOALS[f"match {_network}"] = (None, _least)
for _network in ("mlp", "resnet20 1x"):
    # Eight at four times the time of one.
    GOALS[f"match {_network}, 8 networks"] = (None, 2.0)
for _space, _forward in (
    ("mlp", 1.6),
    ("transformer", 1.6),
    ("cnn", 2.0),
    ("rnn", 2.0),
    ("gru", 2.0),
):
    for _layer in ("16->16 B=8", "32->32 B=8", "16->16 B=32"):
        GOALS[f"equivariant {_space} {_layer} forward"] = (_forward, None)
        GOALS[f"equivariant {_space} {_layer} forward+backward"] = (1.8, None)
for _space in ("mlp 64-32-10", "cnn 1-16-32", "rnn 32-128-32"):
    GOALS[f"equivariant {_space} 32->1, 32 particles"] = (3.0, None)

LAYER_CALL_GOAL_US = 60.0
TRACE_GOAL_S = 15.0
WARM_GOAL = 4.0  # times faster than cold, on Grams of 256 and more
CALL_GOAL_US = 25.0  # over the copy
EXTRA_MEMORY_GOAL = 0.1  # of CondConv's


@dataclass(frozen=True)
class Against:
    """A further row of a group: one of our implementations against the best of some peers.

    Goals are at least so many times faster, or at most so many times their time.
    """

    what: str
    peers: tuple[str, ...]  # patterns
    least: float | None = None
    most: float | None = None
    ours: str = "weightops"

    @property
    def goal(self) -> str:
        if self.least is not None:
            return f">= {self.least:g} x"
        return "" if self.most is None else f"<= {self.most:g} x its time"

    def met(self, times_faster: float) -> bool | None:
        if self.least is not None:
            return times_faster >= self.least
        return None if self.most is None else 1 / times_faster <= self.most


def _peers(**least: float | None) -> list[Against]:
    names = {name.replace("_", "-"): goal for name, goal in least.items()}
    return [Against(f"against {peer}", (peer,), goal) for peer, goal in names.items()]


_EAGER = ("matmuls", "scaled-matmuls", "concatenat*", "wide", "einsum", "bmm")
_IN_PLACE = ("mul-add*", "foreach", "matmul")
_PER_SAMPLE = [
    Against("against medium", ("medium-*",), most=1.15),
    Against("medium against medium", ("medium-*",), most=1.15, ours="weightops-medium"),
    Against("high against default", _EAGER, ours="weightops-high"),
]
_GROUPED = [
    Against("against per-sample eager", _EAGER, least=4.0),
    Against("against a loop over contexts", ("loop*",), least=1.7),
    Against("against F.linear", ("F.linear",), most=0.85),
    Against("medium against a loop at medium", ("medium-loop*",), ours="weightops-medium"),
    Against("medium against F.linear at medium", ("medium-F.linear",), ours="weightops-medium"),
]
# patterns of groups -> their further rows
AGAINST: dict[str, list[Against]] = {
    "population training 32 MLPs*": _peers(loop=6.0, batched_torch=2.0),
    "population training 16 CNNs": _peers(loop=5.0, batched_torch=2.0),
    "population training 16 MLPs*": _peers(loop=None, batched_torch=None),
    "population 256 MLPs*": [
        Against("medium against medium", ("medium-*",), 3.0, ours="weightops-medium")
    ],
    "population 64 *": [
        Against("medium against medium", ("medium-*",), 1.0, ours="weightops-medium")
    ],
    "circles training *": [
        *_peers(loop=7.0, vmap=None, factored=2.0),
        Against("against factored at medium", ("medium-factored",)),
        Against(
            "probes of every step, against none", ("weightops",), most=1.03, ours="weightops-probes"
        ),
        Against("against 16 networks at a time", ("weightops-16s",), most=1.1),
    ],
    "token_pair_linear *": _peers(linear_loop=None, linear_batched=None, factored=None),
    "fourier_signal *": _peers(fft=None, rfft=None),
    "learned step *": [
        Against("against AdamW with forward and backward", ("adamw-step",), most=4.0)
    ],
    "learned meta-training *": _peers(loop=10.0),
    "tokens pack resnet18*": [
        Against("against copying the tokens", ("clone",), most=2.0),
        *_peers(layer_by_layer=10.0, sane_style=10.0),
    ],
    "equivariant mlp *": _peers(per_term=10.0, per_term_compiled=10.0, nfn=6.0),
    "equivariant cnn *": _peers(nfn=6.0),
    "equivariant transformer *": _peers(per_term=10.0),
    "equivariant rnn *": _peers(per_term=20.0, per_term_compiled=20.0),
    "equivariant gru *": _peers(per_term=20.0),
    "equivariant stack *": _peers(singly=1.25),
    "manifold per-sample *": _PER_SAMPLE,
    "manifold 8 contexts * forward": _GROUPED,
    "manifold 8 contexts * forward+backward": [
        replace(each, least=None, most=None) for each in _GROUPED
    ],
    "manifold conv *": _peers(condconv=5.0, vmap=5.0),
    "manifold synthesize *": [
        Against("against einsum", ("einsum",), 8.0),
        Against("against eager in place", _IN_PLACE, 1.6),
    ],
    "manifold step *": [
        Against("against torch by hand", ("by-hand*",), 2.0),
        Against("against autograd", ("autograd",), 10.0),
    ],
}


def against(group: str) -> list[Against]:
    return [row for pattern, rows in AGAINST.items() if fnmatchcase(group, pattern) for row in rows]
