"""Programs compiled for TPUs on a machine without one (`make test-tpu`): attention's kernel, a step of every recipe."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sdjax.models.kernels import attention, attention_plain, attention_splash
from sdjax.runtime import aot

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def program(monkeypatch):
    """benchmarks/aot.py as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("aot")


def qkv(rows, length, heads, width, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((rows, length, heads, width), np.float32), dtype) for _ in range(3)]


def test_bytes_between_chips_are_a_rings():
    text = """
  %all-reduce.1 = f32[256,4]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-gather.2 = bf16[8,128]{1,0} all-gather(%b), replica_groups=[2,2]<=[4], dimensions={0}
  %reduce-scatter.3 = f32[64]{0} reduce-scatter(f32[256]{0} %c), replica_groups={{0,1,2,3}}, dimensions={0}
  %collective-permute-start.4 = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%d), channel_id=4
  %add.5 = f32[4096]{0} add(%e, %f)
"""
    wanted = 2 * 4096 * 3 / 4 + 2048 / 2 + 1024 * 3 / 4 + 128
    assert aot.between(text) == wanted


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}", 2),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_groups_of_chips_in_every_notation(groups, chips):
    text = f"""HloModule jit_step, is_scheduled=true, num_partitions=8
  %all-gather.1 = f32[256]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}
"""
    assert aot.between(text) == 1024 * (chips - 1) / chips


def test_splash_is_taken_for_many_positions_where_there_is_a_tpus_compiler(monkeypatch):
    monkeypatch.setattr(attention_splash, "_compiles", lambda: True)

    def way(length, others, dtype=jnp.bfloat16):
        q, k = (jax.ShapeDtypeStruct((2, n, 8, 40), dtype) for n in (length, others))
        return attention.way("tpu", q, k)

    assert way(4096, 4096) is way(1024, 1024) is way(1536, 1536) is attention_splash.attend
    assert way(4096, 77) is way(256, 256) is way(1100, 1100) is attention_plain.attend
    assert way(1024, 1024, jnp.float32) is attention_plain.attend
    q = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.bfloat16)
    assert attention.way("cpu", q, q) is not attention_splash.attend is not attention.way("cuda", q, q)
    for kind, taken in ((AxisType.Auto, False), (AxisType.Manual, True)):  # 2 rows on 4 devices; 2 rows on each
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",), axis_types=(kind,))):
            assert (way(4096, 4096) is attention_splash.attend) == taken


def test_without_a_tpus_compiler_pallas_is_not_even_imported():
    if attention_splash._compiles():
        pytest.skip("libtpu is installed")
    q = jax.ShapeDtypeStruct((2, 1024, 8, 40), jnp.bfloat16)
    assert attention.way("tpu", q, q) is attention_plain.attend


@pytest.mark.slow
def test_splash_is_attention(monkeypatch):
    """By Pallas' interpreter on a CPU, outputs and gradients."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    made = splash.make_splash_mha_single_device
    monkeypatch.setattr(splash, "make_splash_mha_single_device", lambda *a, **k: made(*a, **k, interpret=True))
    given = qkv(1, 1024, 2, 40)

    def loss(way):
        return lambda *qkv: jnp.square(way(*qkv).astype(jnp.float32)).sum()

    for found, plain in (
        (attention_splash.attend(*given), attention_plain.attend(*given)),
        *zip(
            *(jax.grad(loss(way), (0, 1, 2))(*given) for way in (attention_splash.attend, attention_plain.attend)),
            strict=True,
        ),
    ):
        found, plain = np.asarray(found, np.float32), np.asarray(plain, np.float32)
        assert np.linalg.norm(found - plain) <= 0.01 * np.linalg.norm(plain)


@pytest.mark.tpu
def test_a_program_for_a_tpu_holds_the_kernel_once_for_layers_of_a_shape():
    device = aot.topology("v5e:2x2")[0]
    place = jax.sharding.SingleDeviceSharding(device)
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in qkv(2, 1024, 8, 80)]
    text = jax.jit(lambda q, k, v: attention.attend(attention.attend(q, k, v), k, v)).lower(*given).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.tpu
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_compiles_for_a_slice(path, program, tmp_path):
    status = program.main([str(path), "--model", "random:tiny", "--rows", "2", "--out", str(tmp_path / "aot.json")])
    (found,) = json.loads((tmp_path / "aot.json").read_text()).values()
    assert status == 0 and found["fits"] and found["chips"] == 4
    assert found["flops"] > 0 and found["sent"] > 0 and found["arguments"] > 0


@pytest.mark.tpu
def test_a_step_compiles_for_two_slices_with_the_kernel_in_it(program):
    """Pictures of 256 pixels, so that attention is a kernel, which XLA cannot divide by itself."""
    options = program.parser().parse_args([str(ROOT / "configs/lora.py"), "--model", "random:tiny"])
    options.settings = ["data.size=256"]
    found = program.measure(program.read(options), "v5e:2x2", rows=2, slices=2)
    assert found["chips"] == 8 and found["fsdp"] == 4 and found["sent"] > 0
