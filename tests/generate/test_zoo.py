"""Zoos on disk: what is written is read, whole or not at all, and what is wrong is named."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightops
from weightops.generate import Zoo, ZooWriter, _files, import_state_dicts
from weightops.generate import writer as writing
from weightops.generate._files import Manifest, Shard

SPEC = weightops.WeightSpec(
    {"fc1.weight": ("h", None), "fc1.bias": ("h",), "fc2.weight": (None, "h")},
    {"fc1.weight": (3, 2), "fc1.bias": (3,), "fc2.weight": (2, 3)},
)
FLAT = torch.randn(10, SPEC.numel, generator=torch.Generator().manual_seed(0))
TASK = torch.arange(10) % 3
ACCURACY = torch.linspace(0, 1, 10)


def write(path: Path, flat: Tensor = FLAT, **options: Any) -> Zoo:
    with ZooWriter(path, SPEC, **({"shard_size": 4, "classes": {"task": 3}} | options)) as writer:
        n = len(flat)
        writer.add(flat, task=TASK[:n], accuracy=ACCURACY[:n])
    return Zoo(path)


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    zoo = write(tmp_path / "new" / "zoo", about={"data": "digits", "sizes": [1, 2]})
    assert len(zoo) == 10
    assert zoo.spec == SPEC
    assert zoo.dtype == torch.float32
    assert zoo.about == {"data": "digits", "sizes": [1, 2]}
    assert zoo.classes == {"task": 3}
    assert set(zoo.metadata) == {"task", "accuracy"}
    assert torch.equal(zoo.metadata["task"], TASK)
    assert torch.equal(zoo.metadata["accuracy"], ACCURACY)
    assert torch.equal(zoo[:], FLAT)
    assert "10 networks of 15 weights" in repr(zoo)
    names = {f"networks-{n:05}.safetensors" for n in range(3)}
    assert set(files(tmp_path / "new" / "zoo")) == {"zoo.json", *names}


def test_networks_are_read_by_number_slice_list_index_and_mask(tmp_path: Path) -> None:
    zoo = write(tmp_path)
    for n in (0, 3, 4, 9, -1, -10):
        assert torch.equal(zoo[n], FLAT[n])
    for index in (slice(2, 9), slice(None, None, 3), slice(8, None, -2), slice(5, 5)):
        assert torch.equal(zoo[index], FLAT[range(10)[index], :])
    index = torch.tensor([9, 0, 4, 4, -1])
    assert torch.equal(zoo[index], FLAT[index])
    assert torch.equal(zoo[[1, 7]], FLAT[[1, 7]])
    assert torch.equal(zoo[TASK == 1], FLAT[TASK == 1])
    assert zoo[[]].shape == (0, SPEC.numel)
    assert [torch.equal(a, b) for a, b in zip(zoo, FLAT, strict=True)] == [True] * 10


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (10, IndexError, "there is no network 10 among 10"),
        (-11, IndexError, "there is no network -11 among 10"),
        (torch.tensor([0, 10]), IndexError, "there is no network 10 among 10"),
        (torch.tensor([True]), IndexError, "a mask of 1 does not fit 10 networks"),
        (torch.tensor([[0]]), TypeError, r"index must have shape \[n\], not \[1, 1\]"),
        (torch.tensor([0.0]), TypeError, "index must be int64 or int32, not torch.float32"),
        ("task", TypeError, r"index must be a tensor \[n\], not str 'task'"),
        (True, TypeError, r"index must be a tensor \[n\], not bool True"),
    ],
)
def test_networks_that_are_not_there_are_refused(
    tmp_path: Path, index: Any, error: type, text: str
) -> None:
    with pytest.raises(error, match=f"^Zoo: {text}"):
        write(tmp_path)[index]


def test_what_is_read_can_be_changed_without_changing_the_zoo(tmp_path: Path) -> None:
    zoo = write(tmp_path)
    zoo[:4].zero_()
    zoo[1].zero_()
    assert torch.equal(zoo[:], FLAT)
    assert torch.equal(Zoo(tmp_path)[:], FLAT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    zoo = write(tmp_path, FLAT.to(dtype))
    assert zoo.dtype == dtype
    assert torch.equal(zoo[2:7], FLAT.to(dtype)[2:7])


def test_networks_come_in_any_portions_into_shards_of_one_size(tmp_path: Path) -> None:
    with ZooWriter(tmp_path, SPEC, shard_size=3) as writer:
        buffer = FLAT[:1].clone().requires_grad_()
        writer.add(buffer, task=0, embedding=torch.zeros(1, 5))
        with torch.no_grad():
            buffer.zero_()
        writer.add(FLAT[1], task=0, embedding=torch.ones(1, 5))
        writer.add(FLAT[:0], task=0, embedding=torch.ones(0, 5))
        writer.add(FLAT[2:].T.contiguous().T, task=TASK[2:].tolist(), embedding=torch.ones(8, 5))
    zoo = Zoo(tmp_path)
    assert torch.equal(zoo[:], FLAT)
    assert zoo.metadata["task"].tolist() == [0, 0, *TASK[2:].tolist()]
    assert zoo.metadata["embedding"].shape == (10, 5)
    sizes = [len(load_file(path)["flat"]) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sizes == [3, 3, 3, 1]


def test_batches_stream_every_network_once_with_its_metadata(tmp_path: Path) -> None:
    zoo = write(tmp_path)
    in_order = list(zoo.batches(4))
    assert [len(flat) for flat, _ in in_order] == [4, 4, 2]
    assert torch.equal(torch.cat([flat for flat, _ in in_order]), FLAT)
    shuffled, again, other = (
        torch.cat([values["accuracy"] for _, values in zoo.batches(3, shuffle=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, other)
    assert torch.equal(shuffled.sort().values, ACCURACY)
    for flat, values in zoo.batches(3, shuffle=1):
        at = (values["accuracy"] * 9).round().long()
        assert torch.equal(flat, FLAT[at])
        assert torch.equal(values["task"], TASK[at])


def test_a_selection_is_a_zoo_of_its_networks(tmp_path: Path) -> None:
    zoo = write(tmp_path)
    part = zoo.select(task=[0, 2])
    fits = TASK != 1
    assert len(part) == 7
    assert torch.equal(part[:], FLAT[fits])
    assert torch.equal(part[-1], FLAT[fits][-1])
    assert torch.equal(part.metadata["accuracy"], ACCURACY[fits])
    assert torch.equal(torch.cat([flat for flat, _ in part.batches(2)]), FLAT[fits])
    one = part.select(task=2, accuracy=ACCURACY[5])
    assert torch.equal(one[:], FLAT[5:6])
    assert len(zoo) == 10
    with pytest.raises(ValueError, match=r"^Zoo.select: no network of the zoo has \{'task': 1\}"):
        part.select(task=1)
    with pytest.raises(ValueError, match=r"^Zoo.select: the zoo has metadata .* not 'tasks'"):
        part.select(tasks=1)
    with pytest.raises(
        TypeError, match=r"^Zoo.select: task must be numbers or a tensor, not str 'a'"
    ):
        part.select(task="a")


def test_a_selection_compares_numbers_in_the_metadata_s_precision(tmp_path: Path) -> None:
    with ZooWriter(tmp_path, SPEC) as writer:
        writer.add(FLAT[:2], rate=torch.tensor([0.1, 0.2], dtype=torch.float64), seed=[0, 1])
    assert torch.equal(Zoo(tmp_path).select(rate=0.1)[:], FLAT[:1])
    with pytest.raises(ValueError, match=r"^Zoo.select: no network"):
        Zoo(tmp_path).select(seed=0.5)


def sparse_zoo(path: Path, networks: int, weights: int) -> None:
    """A zoo of zeros that takes up no room on the disk."""
    spec = weightops.WeightSpec({"w": (None,)}, {"w": (weights,)})
    one = int(_files.checksums(torch.zeros(1, weights)))
    checksum = torch.full((networks,), one, dtype=torch.int64)
    bytes_of_flat = 4 * networks * weights
    offsets = [0, bytes_of_flat], [bytes_of_flat, bytes_of_flat + 8 * networks]
    header = {
        "flat": {"dtype": "F32", "shape": [networks, weights], "data_offsets": offsets[0]},
        "checksum": {"dtype": "I64", "shape": [networks], "data_offsets": offsets[1]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "networks-00000.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(bytes_of_flat, os.SEEK_CUR)
        file.write(checksum.numpy().tobytes())
    shard = Shard(
        "networks-00000.safetensors", networks, _files.checksum_of_rest({"checksum": checksum})
    )
    (path / "zoo.json").write_text(Manifest(spec, {}, {}, [shard]).to_json())


def test_opening_a_zoo_of_gigabytes_reads_no_weights_and_a_network_only_its_own(
    tmp_path: Path,
) -> None:
    sparse_zoo(tmp_path, networks=8192, weights=2**18)

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    before = resident()
    zoo = Zoo(tmp_path)
    assert len(zoo) == 8192
    opened = resident()
    assert not zoo[4000].any()
    read = resident()
    assert opened - before < 32, "MiB of 8,192"
    assert read - opened < 64, "MiB of 8,192"


@pytest.fixture
def zoo_before(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path, FLAT[:6] + 1)
    return files(tmp_path)


def test_a_zoo_is_replaced_at_once_and_readers_of_the_old_one_go_on(tmp_path: Path) -> None:
    old = write(tmp_path, FLAT[:6] + 1)
    new = write(tmp_path, FLAT[:9])
    assert torch.equal(old[:], FLAT[:6] + 1)
    assert torch.equal(new[:], FLAT[:9])
    assert len(files(tmp_path)) == 4


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_zoo_as_it_was(
    tmp_path: Path, zoo_before: dict[str, bytes], error: type
) -> None:
    with pytest.raises(error), ZooWriter(tmp_path, SPEC, shard_size=2) as writer:
        writer.add(FLAT[:7])
        assert len(files(tmp_path)) == len(zoo_before) + 3
        raise error
    assert files(tmp_path) == zoo_before


def test_an_interrupted_write_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(StopError), ZooWriter(tmp_path / "a" / "b", SPEC, shard_size=2) as writer:
        writer.add(FLAT)
        raise StopError
    assert files(tmp_path) == {}


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_at_any_rename_leaves_the_zoo_as_it_was(
    tmp_path: Path,
    zoo_before: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
) -> None:
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == call:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    # Four shards and zoo.json, which comes last.
    with (
        pytest.raises((ValueError, KeyboardInterrupt)) as raised,
        ZooWriter(tmp_path, SPEC, shard_size=2) as writer,
    ):
        writer.add(FLAT[:7])
    assert len(calls) == call
    if isinstance(error, OSError):
        assert raised.match(r"^ZooWriter: .*: can't be written: No space left on device")
    assert files(tmp_path) == zoo_before
    assert torch.equal(Zoo(tmp_path)[:], FLAT[:6] + 1)


def test_a_failing_shard_can_not_be_passed_over(
    tmp_path: Path, zoo_before: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ValueError, match=r"^ZooWriter: a shard could not be written"),
        ZooWriter(tmp_path, SPEC, shard_size=2) as writer,
    ):
        writer.add(FLAT[:3])
        monkeypatch.setattr(writing, "_sync", failing)
        with pytest.raises(ValueError, match=r"can't be written: No space left"):
            writer.add(FLAT[3:6])
        with pytest.raises(ValueError, match=r"^add: the writer is not open"):
            writer.add(FLAT[6:])
    assert files(tmp_path) == zoo_before


@pytest.mark.parametrize("call", [0, 1, 2, 4, 5])
def test_a_killed_writer_leaves_a_whole_zoo_and_the_next_one_cleans_up(
    tmp_path: Path, call: int
) -> None:
    write(tmp_path, FLAT[:6] + 1)
    (tmp_path / "spec.json").write_text(SPEC.to_json())
    save_file({"flat": FLAT[:7].clone()}, tmp_path / "flat.st")
    zoo_before = files(tmp_path)
    script = f"""
        import os, signal
        from pathlib import Path
        from safetensors.torch import load_file
        from weightops import WeightSpec
        from weightops.generate import ZooWriter
        path = Path({str(tmp_path)!r})
        replace, calls = os.replace, []
        def dying(source, target):
            calls.append(target)
            if len(calls) == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = dying
        with ZooWriter(path, WeightSpec.from_json((path / "spec.json").read_text()), shard_size=2) as writer:
            writer.add(load_file(path / "flat.st")["flat"])
            if {call} == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    package = str(Path(weightops.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": package},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert zoo_before.items() <= files(tmp_path).items()
    assert torch.equal(Zoo(tmp_path)[:], FLAT[:6] + 1)
    assert len(files(tmp_path)) > len(zoo_before)
    assert torch.equal(write(tmp_path)[:], FLAT)
    assert len(files(tmp_path)) == 6


def test_a_writer_that_got_nothing_writes_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^ZooWriter: no network was added"),
        ZooWriter(tmp_path / "zoo", SPEC),
    ):
        pass
    assert files(tmp_path) == {}


def with_nan(value: float) -> Tensor:
    flat = FLAT.clone()
    flat[7, 8] = value
    return flat


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"flat": with_nan(torch.nan)}, ValueError, r"flat\[7\]: fc1.bias\[2\] is nan"),
        ({"flat": with_nan(-torch.inf)}, ValueError, r"flat\[7\]: fc1.bias\[2\] is -inf"),
        ({"flat": FLAT.double()}, TypeError, r"flat is torch.float64 \[n, 15\], but torch.float32"),
        ({"flat": FLAT.to("meta")}, ValueError, "flat is on meta"),
        ({"task": ...}, ValueError, r"task is missing; it has \['accuracy', 'task'\]"),
        ({"seed": 1}, ValueError, "seed is not in the zoo's metadata"),
        (
            {"task": TASK[:9]},
            ValueError,
            "task has length 9, but the number of networks has size 10",
        ),
        ({"task": TASK + 1}, ValueError, r"task\[2\] is 3, outside 0..2 \(3 classes\)"),
        ({"task": TASK - 1}, ValueError, r"task\[0\] is -1, outside 0..2 \(3 classes\)"),
        ({"task": 0.5}, ValueError, "task must be int64 or int32, as it has 3 classes, not"),
        ({"accuracy": "high"}, TypeError, "accuracy must be numbers or a tensor, not str 'high'"),
        ({"accuracy": ACCURACY[:, None]}, TypeError, r"accuracy is torch.float32 \[n, 1\], but"),
        ({"accuracy": ACCURACY.cfloat()}, TypeError, "accuracy can't be a torch.complex64"),
    ],
)
def test_what_does_not_fit_is_not_added(tmp_path: Path, call: dict, error: type, text: str) -> None:
    with ZooWriter(tmp_path, SPEC, classes={"task": 3}) as writer:
        writer.add(FLAT, task=TASK, accuracy=ACCURACY)
        arguments = {"flat": FLAT, "task": TASK, "accuracy": ACCURACY} | call
        with pytest.raises(error, match=f"^add: {text}"):
            writer.add(**{key: value for key, value in arguments.items() if value is not ...})
    assert torch.equal(Zoo(tmp_path)[:], FLAT)


def test_names_of_the_zoo_s_own_are_no_metadata(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^add: checksum is a name of the zoo's own"),
        ZooWriter(tmp_path, SPEC) as writer,
    ):
        writer.add(FLAT, checksum=1)


def test_a_declared_label_is_asked_for_in_the_first_call(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^add: task is missing"),
        ZooWriter(tmp_path, SPEC, classes={"task": 3}) as writer,
    ):
        writer.add(FLAT)


def test_nothing_is_added_outside_the_with_statement(tmp_path: Path) -> None:
    writer = ZooWriter(tmp_path / "zoo", SPEC)
    with pytest.raises(ValueError, match=r"^add: the writer is not open"):
        writer.add(FLAT)
    with writer:
        writer.add(FLAT)
    with pytest.raises(ValueError, match=r"^add: the writer is not open"):
        writer.add(FLAT)


def test_every_truncation_of_every_file_is_found_at_opening(tmp_path: Path) -> None:
    write(tmp_path)
    for name, content in files(tmp_path).items():
        file = tmp_path / name
        for length in {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:length])
            with pytest.raises(ValueError, match=rf"^Zoo: .*{name}: "):
                Zoo(tmp_path)
        file.write_bytes(content)
    assert torch.equal(Zoo(tmp_path)[:], FLAT)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_single_byte_that_changes_is_found_by_reading(tmp_path: Path, flip: int) -> None:
    write(tmp_path, shard_size=8)
    for name, content in files(tmp_path).items():
        file = tmp_path / name
        for at in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[at] ^= flip
            file.write_bytes(bytes(damaged))
            try:
                flat = Zoo(tmp_path)[:]
            except ValueError as error:
                assert str(error).startswith(f"Zoo: {file}: ")  # noqa: PT017
                continue
            # White space means nothing.
            assert torch.equal(flat, FLAT), (name, at)
            assert content[at : at + 1].isspace(), (name, at)
        file.write_bytes(content)


def test_the_damaged_network_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "networks-00001.safetensors"
    content = bytearray(file.read_bytes())
    at = content.index(FLAT[6].numpy().tobytes())
    content[at + 5] ^= 1
    file.write_bytes(content)
    zoo = Zoo(tmp_path)
    assert torch.equal(zoo[:6], FLAT[:6])
    assert torch.equal(zoo[7:], FLAT[7:])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"networks-00001.safetensors: flat\[2\] is corrupt"):
            zoo[6]


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "networks-00001.safetensors"
        save_file(change(load_file(file)), file)

    return damage


def without_checksum(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / "zoo.json").read_text())
        del content["checksum"]
        change(content)
        content["checksum"] = _files._checksum_of(content)
        (path / "zoo.json").write_text(json.dumps(content))

    return damage


SECOND = "networks-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: (path / SECOND).unlink(), f"{SECOND}: No such file"),
        (lambda path: (path / "zoo.json").unlink(), "zoo.json: No such file"),
        (lambda path: (path / "zoo.json").write_text("{"), "zoo.json: is truncated or no JSON"),
        (lambda path: (path / "zoo.json").write_text("[" * 99999), "zoo.json: is truncated or no"),
        (lambda path: (path / "zoo.json").write_bytes(b"\xff\xfe"), "zoo.json: is truncated or no"),
        (lambda path: (path / "zoo.json").write_text("[]"), "zoo.json: is not of a zoo"),
        (without_checksum(lambda c: c.update(version=2)), "zoo.json: has version 2 .* reads 1"),
        (without_checksum(lambda c: c.pop("spec")), "zoo.json: is not of a zoo: KeyError"),
        (without_checksum(lambda c: c.update(networks=9)), "zoo.json: says 9 networks, .* hold 10"),
        (without_checksum(lambda c: c.update(shards=[], networks=0)), "zoo.json: the zoo is empty"),
        (
            without_checksum(lambda c: c["shards"][0].update(file="../a.safetensors")),
            "zoo.json: '../a.safetensors' is no name of a shard",
        ),
        (rewritten(lambda t: {k: t[k] for k in t if k != "flat"}), f"{SECOND}: flat is missing"),
        (rewritten(lambda t: {k: t[k] for k in t if k != "task"}), f"{SECOND}: task is missing"),
        (rewritten(lambda t: t | {"b": t["task"].clone()}), f"{SECOND}: b is not in zoo.json"),
        (
            rewritten(lambda t: t | {"flat": t["flat"][:3]}),
            rf"{SECOND}: flat has shape \[3, 15\], but zoo.json says 4 networks",
        ),
        (
            rewritten(lambda t: t | {"task": t["task"][:3]}),
            rf"{SECOND}: task has shape \[3\], but zoo.json says 4 networks",
        ),
        (
            rewritten(lambda t: t | {"flat": t["flat"][:, 1:].contiguous()}),
            rf"{SECOND}: flat has shape \[4, 14\], but the spec's networks have 15 weights",
        ),
        (rewritten(lambda t: t | {"flat": t["flat"].long()}), f"{SECOND}: flat is torch.int64"),
        (
            rewritten(lambda t: t | {"flat": t["flat"].half()}),
            rf"{SECOND}: flat is torch.float16 \[15\] a network, but torch.float32 \[15\] in net",
        ),
        (
            rewritten(lambda t: t | {"task": t["task"] + 1}),
            rf"{SECOND}: task\[1\] is 3, outside 0..2 \(3 classes\)",
        ),
        (
            rewritten(lambda t: t | {"accuracy": t["accuracy"] + 1}),
            f"{SECOND}: the checksum of its metadata is wrong",
        ),
    ],
)
def test_damaged_zoos_are_refused_with_file_tensor_and_reason(
    tmp_path: Path, damage: Callable[[Path], Any], text: str
) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"^Zoo: {tmp_path}/{text}"):
        Zoo(tmp_path)


def test_weights_that_are_not_finite_are_refused_whoever_wrote_them(tmp_path: Path) -> None:
    write(tmp_path)
    flat = with_nan(torch.nan)[4:8]
    rewritten(lambda t: t | {"flat": flat, "checksum": _files.checksums(flat)})(tmp_path)
    tensors = load_file(tmp_path / SECOND)

    def note(content: dict) -> None:
        content["shards"][1]["checksum"] = _files.checksum_of_rest(tensors)

    without_checksum(note)(tmp_path)
    with pytest.raises(ValueError, match=rf"^Zoo: .*{SECOND}: flat\[3\]: fc1.bias\[2\] is nan"):
        Zoo(tmp_path)[:]


# State dicts


class Net(nn.Module):
    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, hidden), nn.Linear(hidden, 2, bias=False)
        self.register_buffer("steps", torch.tensor(5))


def states(path: Path, count: int = 3) -> tuple[list[Path], Tensor]:
    """Files of state dicts, alternately in both formats, and what they hold."""
    paths, rows = [], []
    for n in range(count):
        torch.manual_seed(n)
        model = Net()
        paths.append(path / f"{n}.{'pt' if n % 2 else 'safetensors'}")
        (torch.save if n % 2 else save_file)(model.state_dict(), paths[-1])
        rows.append(SPEC.flatten(model).detach())
    return paths, torch.cat(rows)


def test_a_zoo_is_made_of_state_dicts(tmp_path: Path) -> None:
    paths, flat = states(tmp_path)
    zoo = import_state_dicts(
        [str(paths[0]), *paths[1:]],
        SPEC,
        tmp_path / "zoo",
        metadata={"task": [0, 2, 1], "embedding": torch.eye(3)},
        classes={"task": 3},
        about={"from": "tests"},
        shard_size=2,
        progress=False,
    )
    assert torch.equal(zoo[:], flat)
    assert zoo.metadata["task"].tolist() == [0, 2, 1]
    assert torch.equal(zoo.metadata["embedding"], torch.eye(3))
    assert zoo.classes == {"task": 3}
    assert zoo.about == {"from": "tests"}


def edited(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda path: save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated or no safetensors"),
        (lambda path: path.write_bytes(b"{}"), "is truncated or no safetensors"),
        (edited(lambda t: {}), "holds no tensor"),
        (
            edited(lambda t: {k: t[k] for k in t if k != "fc1.bias"}),
            "it has no tensor 'fc1.bias', which the spec names",
        ),
        (
            edited(lambda t: t | {"fc3": torch.ones(1)}),
            "it has a tensor 'fc3', which the spec lacks",
        ),
        (edited(lambda t: t | {"fc1.bias": torch.full((3,), torch.inf)}), r"fc1.bias\[0\] is inf"),
        (
            edited(lambda t: Net(4).state_dict()),
            r"fc1.weight has shape \[4, 2\], the spec's is \[3, 2\]",
        ),
        (
            edited(lambda t: {k: v.double() for k, v in t.items() if k != "steps"}),
            r"its tensors are torch.float64, but torch.float32 in .*/0.safetensors",
        ),
        (
            edited(lambda t: t | {"fc1.bias": t["fc1.bias"].half()}),
            "fc1.(weight|bias) is torch.float(32|16), others are",
        ),
        (edited(lambda t: t | {"fc1.bias": torch.ones(3).long()}), "fc1.(weight|bias) is torch"),
    ],
)
def test_state_dicts_that_do_not_fit_are_named_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], Any], text: str
) -> None:
    paths, _ = states(tmp_path)
    damage(paths[2])
    with pytest.raises(ValueError, match=f"^import_state_dicts: {paths[2]}: {text}"):
        import_state_dicts(paths, SPEC, tmp_path / "zoo", shard_size=1, progress=False)
    assert not (tmp_path / "zoo").exists()


def test_a_pickle_that_is_truncated_or_runs_code_is_refused(tmp_path: Path) -> None:
    paths, _ = states(tmp_path)
    for content in (paths[1].read_bytes()[:200], b"cos\nsystem\n(S'true'\ntR."):
        paths[1].write_bytes(content)
        with pytest.raises(ValueError, match=r"^import_state_dicts: .*1.pt: is truncated or no"):
            import_state_dicts(paths, SPEC, tmp_path / "zoo", progress=False)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"task": [0, 1]}, r"metadata\['task'\] has length 2, but paths has size 3"),
        ({"task": 1}, r"metadata\['task'\] has length 1, but paths has size 3"),
        ({"task": [0, 1, 3]}, r"task\[0\] is 3, outside 0..2 \(3 classes\)"),
    ],
)
def test_metadata_of_another_length_or_range_is_refused(
    tmp_path: Path, metadata: dict, text: str
) -> None:
    paths, _ = states(tmp_path)
    with pytest.raises(ValueError, match=f"^import_state_dicts: {text}"):
        import_state_dicts(
            paths, SPEC, tmp_path / "zoo", metadata=metadata, classes={"task": 3}, progress=False
        )
    assert not (tmp_path / "zoo").exists()


def test_where_a_zoo_of_state_dicts_goes_is_checked_before_any_is_read(tmp_path: Path) -> None:
    paths, _ = states(tmp_path)
    with pytest.raises(TypeError, match=r"^import_state_dicts: out must be a path, not int 3"):
        import_state_dicts(paths, SPEC, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^import_state_dicts: progress must be True or False"):
        import_state_dicts(paths, SPEC, tmp_path / "zoo", progress=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^import_state_dicts: .*0.safetensors: can't be written"):
        import_state_dicts(paths, SPEC, paths[0], progress=False)
