"""Sizes that do not fit are errors which name one that does; large attention is made in parts."""

import re
import types

import jax
import numpy as np
import pytest

import sdjax
from sdjax.models.kernels import attention, attention_cudnn
from sdjax.sampling import denoising, memory


@pytest.fixture(scope="module")
def sd():
    return sdjax.load("random:tiny")


def test_a_size_that_does_not_fit_names_one_that_does(sd):
    limit = memory.needed(sd, (64, 64), 2)
    memory.check(sd, (64, 64), 2, limit)
    with pytest.raises(ValueError, match="the largest that fits is") as error:
        memory.check(sd, (256, 512), 2, limit)
    height, width = map(int, re.search(r"fits is \((\d+), (\d+)\)", str(error.value)).groups())
    assert abs(height * 2 - width) <= 2 * sd.factor and height % sd.factor == 0
    memory.check(sd, (height // sd.factor, width // sd.factor), 2, limit)
    with pytest.raises(ValueError):
        memory.check(sd, (height // sd.factor + 1, width // sd.factor + 2), 2, limit)


def test_a_hopeless_size_is_an_error_before_anything_is_made(sd):
    with pytest.raises(ValueError, match=r"size=\(20000000, 20000000\): needs about"):
        sdjax.text2img(sd, ["a cat"], size=20_000_000)


def test_the_estimate_is_what_xla_counts():
    """For a UNet whose finest level attends, as Stable Diffusion's does; half to twice is near enough."""
    sd = sdjax.load("random:tiny")
    z, t = jax.ShapeDtypeStruct((2, 32, 32, 4), np.float32), jax.ShapeDtypeStruct((2,), np.float32)
    context = jax.ShapeDtypeStruct((2, 16, 32), np.float32)
    call = jax.jit(lambda params, *inputs: sd.networks["unet"].apply({"params": params}, *inputs)[0])
    taken = call.lower(sd.parts["unet"], z, t, context).compile().memory_analysis().temp_size_in_bytes
    assert 0.5 <= memory.unet(sd, (32, 32), 2) / taken <= 2


def test_controlnets_and_further_texts_count(sd, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "check", lambda sd, sides, rows, limit=None, controls=0: asked.append((rows, controls)))
    control = sdjax.load_control("random:tiny").on(np.zeros((32, 32, 3), np.uint8))
    sdjax.text2img(sd, ["a AND b AND c"], steps=1, grammar="a1111", control=[control, control])
    sdjax.text2img(sd, ["a"], steps=1, guidance=1.0)
    assert asked == [(4, 2), (1, 0)]
    assert memory.needed(sd, (64, 64), 2, 1) > memory.needed(sd, (64, 64), 2)


def test_a_full_device_is_an_error_of_one_line(sd, monkeypatch):
    def full(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nand more")

    monkeypatch.setattr(denoising, "_sample", full)
    with pytest.raises(ValueError, match=r"^size=\(32, 32\): out of memory with 2 at once; .*fewer$"):
        sdjax.text2img(sd, ["a", "b"], steps=1)


def test_available_memory_is_a_number_on_linux():
    assert memory.available() > 1 << 20


GB, ENDLESS = 1 << 30, str(2**63 - 4096)


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", {"memory.max": 3 * GB, "memory.current": 2 * GB}, GB),
        ("0::/a/b", {"a/memory.max": 2 * GB, "a/memory.current": GB // 2, "a/b/memory.max": "max"}, 3 * GB // 2),
        ("0::/", {"memory.max": GB, "memory.current": GB, "memory.stat": f"anon 5\ninactive_file {GB // 2}"}, GB // 2),
        ("0::/", {"memory.max": GB, "memory.current": 2 * GB}, 0),
        ("0::/gone", {"memory.max": 9 * GB, "memory.current": GB}, 4 * GB),
        ("0::/", {"memory.max": "max", "memory.current": GB}, 4 * GB),
        (
            "4:cpu,memory:/a\n0::/",
            {"memory/a/memory.limit_in_bytes": 2 * GB, "memory/a/memory.usage_in_bytes": GB,
             "memory/memory.limit_in_bytes": ENDLESS, "memory/memory.usage_in_bytes": 5 * GB},
            GB,
        ),
        ("4:memory:/elsewhere", {"memory/memory.limit_in_bytes": GB, "memory/memory.usage_in_bytes": GB // 2}, GB // 2),
    ],
)  # fmt: skip
def test_available_memory_is_the_least_that_control_groups_leave(tmp_path, monkeypatch, groups, files, free):
    files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {4 * GB // 1024} kB", "proc/self/cgroup": groups} | {
        f"groups/{name}": value for name, value in files.items()
    }
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    assert memory.available() == free


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_scores_count_where_attention_holds_them_all(sd, platform, monkeypatch):
    """A CPU makes them in parts once they leave its cache; others only where they do not fit at once."""
    config, device = sd.networks["unet"].config, types.SimpleNamespace(platform=platform)
    heads, side = max(config.levels("attention_head_dim")), 32
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    def scores(rows, side):
        flat = memory.KEPT * 4 * rows * side**2 * config.block_out_channels[0]
        return memory.unet(sd, (side, side), rows) - flat

    assert scores(2, 16) == 4 * 2 * heads * 16**4
    whole = 4 * 2 * heads * side**4
    assert scores(2, side) == (0 if platform == "cpu" else whole)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", whole - 1)
    assert scores(2, side) == 0


def test_scores_of_cudnns_attention_are_never_held(sd, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
    half = sd.with_dtype("bfloat16")
    held = memory.unet(half, (32, 32), 2)
    monkeypatch.setattr(attention_cudnn, "capability", lambda: (9, 0))
    heads = max(sd.networks["unet"].config.levels("attention_head_dim"))
    assert held - memory.unet(half, (32, 32), 2) == 4 * 2 * heads * 32**4


def test_scores_beyond_a_limit_are_made_in_parts(monkeypatch):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 2, 8)).astype(np.float32)
    whole = attention.attend(q, k, v)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 4 * 2 * 2 * 300 * 300 - 1)
    np.testing.assert_allclose(attention.attend(q, k, v), whole, atol=1e-6)
