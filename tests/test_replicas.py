"""The same pictures on one device and on several, in one process and in two, at any batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.formats import pipeline
from sdjax.runtime import replicas
from sdjax.sampling import generate
from sdjax.sampling.settings import TextToImage

ROOT = Path(__file__).parents[1]
PROMPTS = [f"a photo of a face, number {i}" for i in range(8)]
SETTINGS = {"steps": 2, "sampler": "euler_a"}


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


@pytest.fixture(scope="module")
def alone(sd):
    """Eight pictures, one at a time on one device."""
    return [sdjax.text2img(sd, [PROMPTS[i]], seeds=[i], **SETTINGS)[0].astype(int) for i in range(8)]


def test_there_are_four_devices():
    assert len(jax.local_devices()) == 4


@pytest.mark.parametrize("spread", [False, True], ids=["1 device", "4 devices"])
@pytest.mark.parametrize("batch", [3, 8])
def test_a_seed_is_the_same_picture(sd, alone, spread, batch):
    here = sdjax.spread(sd) if spread else sd
    made = sdjax.text2img(here, PROMPTS[:batch], seeds=range(batch), **SETTINGS)
    differences = [np.abs(one - other).max() for one, other in zip(alone, made, strict=False)]
    print("largest differences of 255:", differences)
    assert max(differences) <= 1
    assert np.abs(alone[0] - alone[1]).max() > 8


def test_each_device_computes_its_own_rows(sd):
    here = sdjax.spread(sd)
    job = generate.job(TextToImage, PROMPTS, **SETTINGS)
    latents = generate.run(here, job, job.start_noise((16, 16, 4)))
    assert [shard.data.shape for shard in latents.addressable_shards] == [(2, 16, 16, 4)] * 4
    three, place = replicas.share(here, 3)
    assert replicas.count(place(latents[:3])) == 3
    assert {replicas.count(leaf) for leaf in jax.tree.leaves(three)} == {3}
    assert {replicas.count(leaf) for leaf in jax.tree.leaves(replicas.share(here, 1)[0])} == {1}


def test_a_model_that_was_not_spread_stays(sd):
    here, place = replicas.share(sd, 4)
    z = np.zeros((4, 2))
    assert here is sd and place(z) is z and replicas.spread(sd, jax.devices()[:1]) is sd


def test_pictures_from_pictures_too(sd):
    given = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(4)]
    here, there = (sdjax.img2img(one, PROMPTS[:4], given, **SETTINGS) for one in (sd, sdjax.spread(sd)))
    assert np.abs(here.astype(int) - there).max() <= 1


def test_two_processes_divide_a_list(sd, alone, tmp_path):
    """Started alike, without a part: each finds its part by its place among those started; nothing is drawn twice."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps({"prompt": prompt, "seed": i}) for i, prompt in enumerate(PROMPTS[:6])))
    line = ["train/launch/local.sh", "2", sys.executable, "sample/batch.py", str(jobs), "--out", str(tmp_path)]
    line += ["--model", "random:tiny", "--batch", "3", "--steps", "2", "--sampler", "euler_a"]
    port = 20000 + os.getpid() % 20000
    env = {**os.environ, "PYTHONPATH": ".", "XLA_FLAGS": "", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    run = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("3 pictures made, 0 already existed") == 2
    for i in range(6):
        made = np.asarray(Image.open(tmp_path / f"{i + 1:06d}.png"))
        assert np.abs(alone[i] - made).max() <= 1
