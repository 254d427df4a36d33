"""A run as several processes: rules that divide weights, one global batch, equal losses, checkpoints for any number.

The slow tests start real processes on every layout, and kill one of four.  benchmarks/pods.py kills 20 times.
"""

import dataclasses
import json

import jax
import numpy as np
import programs
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sdjax.runtime import locks, mesh
from sdjax.settings import SettingError
from sdjax.training import checkpoint
from sdjax.training.settings import Train

SMALL = ("method.pattern=attn2", "data.batch=4", "steps=2", "ema=0")
TO_Q, TO_OUT = "trained.unet.attn1.to_q.kernel", "opt.1.mu.unet.attn1.to_out.0.kernel"


@pytest.fixture
def pods(monkeypatch):
    return programs.load("benchmarks/pods.py", monkeypatch)


# ---- how a mesh divides leaves -----------------------------------------------------------------


def divided(shape, name="", rules=(), **axes):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    return tuple(mesh.shard(leaf, {"data": 1, "fsdp": 1, "tensor": 1} | axes, name, (*rules, *mesh.RULES)))


def test_layers_in_pairs_divide_their_inner_width():
    assert divided((1024, 2048), TO_Q, tensor=2) == (None, "tensor")
    assert divided((2048, 1024), TO_OUT, tensor=2) == ("tensor", None)
    assert divided((3, 3, 640, 1280), "down_blocks.1.resnets.0.conv1.kernel", tensor=4) == (None, None, None, "tensor")
    assert divided((2048, 1024), TO_OUT, fsdp=2, tensor=2) == ("tensor", "fsdp")
    assert divided((1024, 2048), "trained.unet.time", tensor=2) == ()


def test_only_leaves_large_enough_and_divisible_are_divided():
    assert divided((64, 64), TO_Q, fsdp=2, tensor=2) == ()
    assert divided((1024, 2047), TO_Q, fsdp=2, tensor=2) == ("fsdp", None)
    assert divided((1025, 2047), TO_Q, fsdp=2, tensor=2) == ()
    assert divided((1024, 2048), fsdp=2) == (None, "fsdp")  # the largest dimension


def test_own_rules_come_first():
    assert divided((1024, 2048), TO_Q, ((r"to_q\.kernel$", "fsdp,tensor"),), fsdp=2, tensor=2) == ("fsdp", "tensor")
    assert divided((1024, 2048), TO_Q, (("to_q", "-,-"),), fsdp=2, tensor=2) == (None, "fsdp")
    assert divided((1024, 2048), TO_Q, (("to_q", "data,-"),), data=2) == ("data", None)
    assert divided((4, 1024, 2048), TO_Q, (("to_q", "fsdp,-"),), fsdp=2) == (None, "fsdp", None)


@pytest.mark.parametrize("dimensions", ["fsdp,fsdp", "model", ""])
def test_rules_that_cannot_be_read(dimensions):
    with pytest.raises(SettingError, match="sharding=.*: expected an axis"):
        Train(sharding=(("to_q", dimensions),))
    with pytest.raises(SettingError, match="sharding=.*: expected a regular expression"):
        Train(sharding=(("to_q(", "fsdp"),))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("single", "parallel='single': runs in one process; 2 processes take mesh"),
        ("pmap", "parallel='pmap': runs in one process"),
        ("mesh:data=2", "parallel='mesh:data=2': 2 processes take all of their 4 devices, not 2"),
    ],
)
def test_several_processes_take_a_mesh_of_all_devices(text, line, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=line):
        mesh.parse(text)
    assert mesh.parse("mesh:data=2,tensor=2") == ("mesh", {"data": 2, "tensor": 2})


def test_the_axis_tensor_does_not_divide_a_batch():
    assert mesh.count("mesh:data=2,tensor=2") == 2 and mesh.count("mesh") == 4
    assert mesh.described("mesh:data=2,tensor=2") == "4 cpu (mesh: data=2, tensor=2)"
    assert list(mesh.rows("mesh:data=2,tensor=2", 6)) == list(range(6))
    with pytest.raises(ValueError, match="data.batch=5: .* spreads it over 2 devices, which must divide it"):
        mesh.rows("mesh:data=2,tensor=2", 5)


# ---- several slices -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.fixture
def two_slices(monkeypatch):
    """Eight devices, the slices' in turn, as no launcher promises their order."""
    devices = [Device(i, i % 2) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    return devices


def held(found):
    """The slice of each device of a mesh."""
    return np.vectorize(lambda device: device.slice_index)(found.devices)


def test_data_goes_across_slices_and_the_other_axes_stay_within_one(two_slices):
    found = held(mesh.meshed({"data": 4, "fsdp": 2, "tensor": 1}))
    assert found.shape == (4, 2, 1) and (found == found[:, :1]).all()
    assert found[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert held(mesh.meshed({"data": 2, "fsdp": 2, "tensor": 2}))[1].all()
    assert held(mesh.meshed(mesh.sizes("mesh")))[:, 0, 0].tolist() == [0] * 4 + [1] * 4
    assert mesh.described("mesh:data=4,fsdp=2") == "8 cpu in 2 slices (mesh: data=4, fsdp=2)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mesh:fsdp=8", "data=1 on 2 slices; expected a multiple of 2, .* within a slice of 4 devices"),
        ("mesh:data=3", r"takes \[2, 1\] devices of the slices; expected as many of each"),
    ],
)
def test_axes_that_do_not_stay_within_a_slice(two_slices, text, line):
    with pytest.raises(ValueError, match=f"parallel='{text}': {line}"):
        mesh.parse(text)


# ---- checkpoints -------------------------------------------------------------------------------


def test_sums_of_parts_fit_the_whole_leaves(monkeypatch):
    """As four processes would write them, each the sums of its part."""
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda x: x[None])
    devices = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    placed = [jax.device_put(values, NamedSharding(devices, PartitionSpec(*axes))) for axes in ("ab", "b", "")]
    sums = json.loads(json.dumps(checkpoint._sums_of_parts({"w": placed, "step": jax.numpy.int32(3)})))
    assert sorted(map(len, sums.values())) == [1, 1, 2, 4]
    state = {"w": [values.copy() for _ in placed], "step": np.int32(3)}
    assert checkpoint._whole(state, sums) and checkpoint._whole(state, checkpoint._sums(state))
    for damaged in range(3):
        state["w"][damaged].view(np.uint8)[7, 5] ^= 1
        assert not checkpoint._whole(state, sums)
        state["w"][damaged].view(np.uint8)[7, 5] ^= 1
    assert not checkpoint._whole({**state, "step": np.int32(4)}, sums)


# ---- processes ---------------------------------------------------------------------------------


def test_two_processes_train_as_one(pods, tmp_path, monkeypatch):
    """Two devices each, leaves that are divided; one checkpoint, read by one process, which goes on."""
    pods.PATIENCE = 280
    two, one = tmp_path / "two", tmp_path / "one"
    cache = f"data.cache={tmp_path / 'cache'}"  # which both fill
    started = pods.start(2, 2, ["parallel=mesh:data=2,fsdp=2", "checkpoint=1", cache, *SMALL], two)
    pods.end(started, two)
    assert (two / "export" / "model_index.json").is_file() and not (two / "run.lock").exists()
    assert any(isinstance(told, list) and len(told) > 1 for told in pods.sums(two, 2).values())
    assert (tmp_path / "cache" / "moments.records").stat().st_size > 10_000
    assert not any("error" in line for i in range(2) for line in pods.said(two, i))
    run = programs.load("train/run.py", monkeypatch)
    monkeypatch.setattr(mesh, "SHARD_FROM", mesh.SHARD_FROM)  # the recipe changes it
    assert run.main([pods.RECIPE, f"out={one}", *SMALL]) == 0
    assert run.main([pods.RECIPE, f"out={two}", *SMALL, "steps=3"]) == 0
    assert pods.difference(pods.losses(two), pods.losses(one)) <= pods.DIGITS
    assert sorted(pods.losses(two)) == [1, 2, 3]


@pytest.mark.slow
def test_every_layout_has_the_losses_of_one_device(pods, tmp_path):
    found = pods.law(list(pods.LAYOUTS)[1:], tmp_path)
    assert len(found) == 7 and max(found.values()) <= pods.DIGITS, found


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(pods, tmp_path):
    found = pods.kills(tmp_path, 2)
    assert all(map(pods.passed, found)), found


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(pods, tmp_path):
    out = tmp_path / "out"
    started = pods.start(2, 1, ["parallel=mesh", "steps=500", "checkpoint=0"], out)
    while max(pods.losses(out), default=0) < 2 and started[1].poll() is None:
        pods.time.sleep(0.1)
    started[1].terminate()
    assert [process.wait(pods.PATIENCE) for process in started] == [143, 143]
    (step,) = [int(path.name) for path in (out / "checkpoints").glob("[0-9]*")]
    assert step == max(pods.losses(out)) < 500


@pytest.mark.slow
def test_a_run_that_another_holds_ends_in_all_processes(pods, tmp_path):
    out = tmp_path / "out"
    with locks.held(out):
        started = pods.start(2, 1, ["parallel=mesh"], out)
        assert [process.wait(pods.PATIENCE) for process in started] == [1, 1]
    lines = [line for i in range(2) for line in pods.said(out, i) if line.startswith("error")]
    assert len(lines) == 1 and f"out='{out}'" in lines[0]
