"""Aspect-ratio buckets: few shapes, nothing scaled up, every picture as often as the others, a function of the step."""

import collections
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.buckets import Plan, assign, spread
from sdjax.formats import pipeline
from sdjax.images import reading
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.runtime import mesh
from sdjax.settings import load
from sdjax.tasks.text2img import TextToImage
from sdjax.training import optim
from sdjax.training.begin import begin
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import initial_state, of_run

ROOT = Path(__file__).parents[1]
SHAPES = [(40, 40), (64, 40), (40, 66), (35, 35), (90, 50), (48, 90), (70, 70), (41, 64)]
RANDOM = np.random.default_rng(0)
SIZES = [tuple(RANDOM.integers(70, 400, 2).tolist()) for _ in range(60)]


def divide(*arguments):
    """Returns {shape (h, w): numbers of its pictures}."""
    shapes, which = assign(*arguments)
    return {shape: np.flatnonzero(which == k).tolist() for k, shape in enumerate(shapes)}


def shown(plan, steps):
    """Returns {picture: how often it is shown in so many steps}."""
    return collections.Counter(plan.picture(step, row)[1] for step in range(steps) for row in range(plan.rows))


def test_shapes_are_few_and_no_picture_is_scaled_up():
    found = divide(SIZES, 128, 16, 5)
    assert 2 <= len(found) <= 5 and sorted(i for numbers in found.values() for i in numbers) == list(range(60))
    for (h, w), numbers in found.items():
        assert h % 16 == w % 16 == 0 and h * w <= 128**2 and max(h, w) <= 3 * min(h, w)
        for i in numbers:
            assert SIZES[i][0] >= h and SIZES[i][1] >= w
            mine = abs(np.log(SIZES[i][0] / SIZES[i][1] * w / h)) - np.log(h * w)
            assert all(
                mine <= abs(np.log(SIZES[i][0] / SIZES[i][1] * b / a)) - np.log(a * b) + 1e-9
                for a, b in found if SIZES[i][0] >= a and SIZES[i][1] >= b
            )  # fmt: skip
    assert divide([(200, 200), (300, 310)], 128, 16, 4) == {(128, 128): [0, 1]}
    assert list(divide(SIZES, 128, 16, 1))[0] == (64, 64)  # which covers nothing larger than any of them
    with pytest.raises(ValueError, match="data.buckets=3: a picture of 90 x 15 pixels is smaller than every bucket"):
        divide([*SIZES, (15, 90)], 128, 16, 3)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_every_picture_is_shown_once_an_epoch(rows):
    numbers = {(64, 64): list(range(9)), (48, 80): list(range(9, 22)), (80, 48): [22, 23, 23]}
    plan = Plan(numbers, rows, 5)
    times = collections.Counter(i for some in numbers.values() for i in some)
    for epochs in (1, 2, 3, 20):
        steps = plan.batches(epochs)
        assert steps <= epochs * 25 / rows and steps > epochs * 25 / rows - 3  # what fills no batch of a bucket yet
        found = shown(plan, steps)
        for i, each in times.items():
            assert each * (epochs - -(-rows // 3)) <= found[i] <= each * epochs
    exact = Plan({(64, 64): list(range(8)), (48, 80): list(range(8, 12))}, 4, 5)
    assert shown(exact, exact.batches(3)) == {i: 3 for i in range(12)}
    assert [exact.at(step)[0] for step in range(30)] != [Plan(exact.buckets, 4, 6).at(step)[0] for step in range(30)]


def test_each_bucket_takes_its_batches_in_turn_whatever_step_is_asked_first():
    numbers = {(64, 64): list(range(9)), (48, 80): list(range(9, 22))}
    plan = Plan(numbers, 4, 0)
    backwards = [plan.at(step) for step in reversed(range(200))][::-1]
    again = Plan(numbers, 4, 0)
    assert backwards == [again.at(step) for step in range(200)]
    for shape in numbers:
        assert sorted(k for at, k in backwards if at == shape) == list(range(sum(at == shape for at, _ in backwards)))


def test_parts_of_other_proportions_are_cut_where_it_is_told():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 60, 3))
    made = reading.cut(Image.fromarray(np.ascontiguousarray(ramp)), (20, 60), (0.5, 1.0))
    np.testing.assert_array_equal(made, ramp[20:40])
    assert reading.cut(Image.fromarray(np.ascontiguousarray(ramp)), (40, 8), (1.0, 0.0)).shape == (40, 8, 3)
    assert reading.cut(Image.new("RGB", (33, 50)), (48, 32), (1.0, 1.0)).shape == (48, 32, 3)


@functools.cache
def folder(place):
    random = np.random.default_rng(1)
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"a face, number {i}, red, blue, green")
    return str(place)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("photos"))
    data = Data(path=path, size=32, buckets=3, batch=4, crop="random", flip=0.5)
    return Train(
        model="random:tiny", method=Full(("unet",), "attn2"), data=data, optim=Optim(lr=1e-3), steps=6, checkpoint=2,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    """Learns a factor of every channel, by pictures of any shape."""

    pixels = True

    def split(self, sd, key=None):
        return {"factor": jnp.ones(3)}, sd

    def join(self, frozen, trained, key=None):
        return frozen

    def loss(self, frozen, trained, batch, key, step, axis=None):
        errors = ((batch["pixels"] * trained["factor"][None, None, None] - 0.1) ** 2).mean((1, 2, 3))
        return jnp.mean(batch["weight"] * errors), {}


def losses(settings, mode):
    """Returns (losses of the run's steps, how many programs were compiled, shapes of its batches)."""
    settings = dataclasses.replace(settings, method=Toy(), parallel=mode, steps=12)
    trained, frozen, data, _ = begin(settings)
    tx, evaluate = optim.optimizer(settings.optim, settings.steps)
    place, advance = mesh.compile(of_run(settings, tx, evaluate, TextToImage()), mode, settings.data.batch)
    state, fixed, found, shapes = place.state(initial_state(trained, tx)), place.frozen({}), [], []
    for _, batch in zip(range(settings.steps), data.iterate(), strict=False):
        state, metrics = advance(state, fixed, place.batch(batch))
        found.append(float(metrics["loss"]))
        shapes.append(batch["pixels"].shape)
    return found, advance._cache_size() if mode == "single" else None, shapes


def test_batches_have_few_shapes_each_compiled_once_and_modes_agree(run):
    found, compiled, shapes = losses(run, "single")
    assert len(set(shapes)) == 3 == compiled and len(set(found)) == 12
    np.testing.assert_allclose(losses(run, "pmap")[0], found, rtol=2e-5)
    np.testing.assert_allclose(losses(run, "mesh:data=2,fsdp=2")[0], found, rtol=2e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_rows_of_one_batch(run, count):
    whole = batches.build(run.data, pipeline.load("random:tiny"), 0)
    many = run.data.batch // count
    parts = [whole.of(range(i * many, (i + 1) * many)) for i in range(count)]
    for step in range(4):
        jax.tree.map(
            lambda wanted, *some: np.testing.assert_array_equal(np.concatenate(some), wanted),
            whole[step], *(part[step] for part in parts),
        )  # fmt: skip


def test_a_run_resumed_within_an_epoch_ends_in_the_same_bits(run, tmp_path):
    """With buckets, moments and prompts from files, the first ones made before the run is stopped."""
    data = dataclasses.replace(run.data, buckets=2, batch=2, crop="center", flip=0.0, dropout=0.2)
    settings = dataclasses.replace(run, data=dataclasses.replace(data, cache=str(tmp_path / "one")), log=1)
    train(settings, tmp_path / "whole")
    settings = dataclasses.replace(settings, data=dataclasses.replace(data, cache=str(tmp_path / "other")))
    train(dataclasses.replace(settings, steps=3), tmp_path / "parts")
    train(settings, tmp_path / "parts")
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [line["step"] for line in lines[1] if "event" in line] == [0, 3]
    one, other = ([line["loss"] for line in some if "loss" in line] for some in lines)
    assert one == other and len(one) == 6
    trained, _, _, base = begin(settings, pictures=False)
    like = initial_state(trained, optim.optimizer(run.optim, run.steps)[0])
    one, other = (Checkpoints(tmp_path / name / "checkpoints").restore(like, base) for name in ("whole", "parts"))
    assert int(one["step"]) == int(other["step"]) == 6 and trees.digest(one) == trees.digest(other)


@pytest.mark.slow
def test_a_killed_run_with_buckets_shuffled_captions_and_a_cache_ends_in_the_same_bits(run, tmp_path):
    def start(out):
        line = [sys.executable, "train/run.py", "configs/full.py", "model=random:tiny", f"data.path={run.data.path}",
                "data.size=32", "data.buckets=2", "data.batch=2", "data.shuffle=true", f"data.cache={out}.cache",
                "method.pattern=attn2", "steps=16", "checkpoint=1", "log=1", f"out={out}"]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with open(f"{out}.txt", "a") as said:
            return subprocess.Popen(line, cwd=ROOT, env=env, stdout=said, stderr=said)

    def losses(out):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        begun = [line["step"] for line in lines if "event" in line]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}, begun

    assert start(tmp_path / "whole").wait(300) == 0, (tmp_path / "whole.txt").read_text()[-2000:]
    process, end = start(tmp_path / "parts"), time.monotonic() + 120
    while not any(one.name.isdigit() for one in (tmp_path / "parts").glob("checkpoints/*")) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert start(tmp_path / "parts").wait(300) == 0, (tmp_path / "parts.txt").read_text()[-2000:]
    (whole, _), (parts, begun) = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(begun) == 2 and 0 < begun[1] < 16
    assert len(whole) == 16 and set(parts) >= set(range(begun[1] + 1, 17))  # a kill may come before a line is written
    assert parts == {step: whole[step] for step in parts}
    one, other = (tmp_path / name / "export" / "unet" for name in ("whole", "parts"))
    (file,) = (path.name for path in one.glob("*.safetensors"))
    assert (one / file).read_bytes() == (other / file).read_bytes()


def test_masks_and_conditions_are_cut_with_their_pictures(run, tmp_path):
    for i, (height, width) in enumerate([(64, 40), (40, 66)]):
        pixels = np.full((height, width, 4), 255, np.uint8)
        pixels[: height // 2, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = Data(path=str(tmp_path), size=32, buckets=2, batch=2, word="a", mask=True, encode=False)
    made = batches.build(data, pipeline.load("random:tiny"), 0)
    assert len(made.plan.shapes) == 2
    for step in range(2):
        batch, (h, w) = made[step], made.plan.at(step)[0]
        assert batch["pixels"].shape == (2, h, w, 3) and batch["mask"].shape[1] * w == batch["mask"].shape[2] * h
        np.testing.assert_allclose(batch["mask"].mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(("counts", "wanted"), [([3, 1, 4], [6, 2, 8]), ([1, 0, 99], [1, 1, 14])])
def test_class_pictures_are_spread_over_the_subjects_shapes(counts, wanted):
    sizes, shapes = np.array([(64 + i, 64) for i in range(16)])[::-1], [(64, 64), (48, 80), (80, 48)]
    _, which = spread(sizes, shapes, counts)
    assert [int((which == k).sum()) for k in range(3)] == wanted
    ratios = [sizes[which == k, 0] / sizes[which == k, 1] for k in (1, 0, 2)]  # from wide to tall
    assert ratios[0].max() < ratios[1].min() and ratios[1].max() < ratios[2].min()
    with pytest.raises(ValueError, match="data.buckets=3: expected at most 2, the number of class pictures"):
        spread(sizes[:2], shapes, counts)


@pytest.mark.parametrize("recipe", ["lora", "full", "dreambooth", "controlnet", "textual_inversion"])
def test_recipes_cut_squares_as_squares_and_portraits_as_portraits(tmp_path, recipe):
    def built(path, **changes):
        data = load(ROOT / "configs" / f"{recipe}.py", [f"data.path={path}", "data.word=a cat", "data.size=32"]).data
        return batches.build(dataclasses.replace(data, encode=False, **changes), pipeline.load("random:tiny"), 0)

    for name, (width, height) in {"squares": (40, 40), "portraits": (40, 60)}.items():
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (width + i, height + i), (50 * i,) * 3).save(tmp_path / name / f"{i}.png")
    for path in (tmp_path / "squares", "pocketland"):
        ours, plain = built(path), built(path, buckets=0)
        assert ours.squares and ours.plan.shapes == [(32, 32)]
        jax.tree.map(np.testing.assert_array_equal, ours[3], plain[3])
    portraits = built(tmp_path / "portraits")
    assert portraits.plan.shapes == [(36, 28)] and not portraits.squares


def test_what_buckets_do_not_go_with(run):
    with pytest.raises(ValueError, match="^buckets=2: expected 0 with concept='same'"):
        Data(buckets=2, concept="same")
