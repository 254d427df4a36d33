"""Runs: resumed to the same bits, alike in every parallel mode, stopped by signals and numbers that are not finite."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from programs import photo

from sdjax import trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.methods import e4t
from sdjax.methods.clip import Clip
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.runtime import mesh
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import optim, preview, run_folder
from sdjax.training.begin import begin
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss, initial_state, make_step

ROOT = Path(__file__).parents[1]
DATA = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16))
RUN = Train(
    model="random:tiny",
    method=Full(("unet",), "attn2"),
    data=DATA,
    optim=Optim(lr=1e-3),
    steps=6,
    checkpoint=2,
    ema=0.9,
)


def final(folder, settings):
    trained, _, _, base = begin(settings, pictures=False)
    like = initial_state(trained, optim.optimizer(settings.optim, settings.steps)[0], settings.ema)
    return Checkpoints(folder / "checkpoints").restore(like, base)


@pytest.mark.slow  # a killed run, below, is quick
def test_resumed_run_ends_in_the_same_bits(tmp_path):
    train(RUN, tmp_path / "whole")
    train(dataclasses.replace(RUN, steps=4, optim=RUN.optim), tmp_path / "parts")
    train(RUN, tmp_path / "parts")
    one, other = (final(tmp_path / name, RUN) for name in ("whole", "parts"))
    assert int(one["step"]) == int(other["step"]) == 6
    assert trees.digest(one) == trees.digest(other)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines if "event" in line] == [(0, "started"), (4, "resumed")]
    assert (tmp_path / "whole" / "export" / "model_index.json").is_file()


@functools.cache
def losses(mode, kind="adamw"):
    settings = dataclasses.replace(RUN, parallel=mode, data=dataclasses.replace(DATA, batch=8))
    sd = pipeline.load(settings.model)
    trained, frozen = settings.method.split(sd, jax.random.key(0))
    data = batches.build(settings.data, frozen, 0)
    tx, _ = optim.optimizer(dataclasses.replace(settings.optim, kind=kind), 5)
    step = make_step(settings.method, tx, jax.random.key(1), loss=default_loss(settings.method, settings), ema=0.9)
    place, run = mesh.compile(step, mode, 8)
    state, fixed, found = place.state(initial_state(trained, tx, 0.9)), place.frozen(frozen), []
    for _, batch in zip(range(3), data.iterate(), strict=False):
        state, metrics = run(state, fixed, place.batch(batch))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("mode", [pytest.param("mesh", marks=pytest.mark.slow), "mesh:data=2,fsdp=2", "pmap"])
def test_parallel_modes_give_the_losses_of_one_device(mode):
    np.testing.assert_allclose(losses(mode), losses("single"), rtol=2e-5)


@pytest.mark.slow
def test_muon_on_sharded_kernels_gives_the_losses_of_one_device(monkeypatch):
    monkeypatch.setattr(mesh, "SHARD_FROM", 1024)
    np.testing.assert_allclose(losses("mesh:data=2,fsdp=2", "muon"), losses("single", "muon"), rtol=2e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh:data=3,fsdp=9", "needs 27 devices; there are 4"),
        ("cluster", "accepted are single, pmap, mesh"),
        ("pmap:data=2", "accepted"),
        ("mesh:data=0", "parallel='mesh:data=0': accepted"),
        ("mesh:data=-1", "accepted"),
    ],
)
def test_parallel_settings_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        mesh.parse(text)
    with pytest.raises(ValueError, match="data.batch=6"):
        mesh.compile(None, "mesh", 6)


def test_large_leaves_are_sharded_small_ones_copied():
    large, small = jax.ShapeDtypeStruct((1024, 2048), np.float32), jax.ShapeDtypeStruct((64,), np.float32)
    axes = {"data": 1, "fsdp": 2, "tensor": 1}
    assert tuple(mesh.shard(large, axes)) == (None, "fsdp")
    assert tuple(mesh.shard(small, axes)) == ()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    """It would go over what they led to; twice, since the first time renames them."""
    train(dataclasses.replace(TOY, steps=2, checkpoint=1), tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and path.parent.name != "checkpoints":
            path.write_bytes(b"")
    before = sorted(path.name for path in (tmp_path / "export").rglob("*"))
    for _ in range(2):
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match=r"none of its checkpoints can be read \(1.damaged"),
        ):
            warnings.simplefilter("ignore")
            train(dataclasses.replace(TOY, steps=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "export").rglob("*")) == before


def test_a_run_goes_on_with_other_clipping_decay_and_rates(tmp_path):
    train(dataclasses.replace(TOY, steps=1, checkpoint=1, optim=Optim(clip=None, weight_decay=0.0)), tmp_path)
    train(dataclasses.replace(TOY, steps=2, optim=Optim(clip=1.0, rates=(("rows", 0.5),))), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["1", "2"]
    with pytest.raises(ValueError, match="another state, of another kind of optim or ema"):
        train(dataclasses.replace(TOY, steps=3, ema=0.9), tmp_path)


@pytest.mark.parametrize("mode", ["single", "pmap"])
def test_step_tells_the_norms_of_gradient_and_update(mode):
    settings = dataclasses.replace(TOY, method=Toy(), optim=Optim(kind="sgd", lr=0.5, weight_decay=0, clip=None))
    trained, frozen, data, _ = begin(settings)
    tx, _ = optim.optimizer(settings.optim, 1)
    place, run = mesh.compile(make_step(settings.method, tx, jax.random.key(0)), mode, 4)
    length = np.linalg.norm(trained["rows"]["text_encoder"])  # the state, and `trained` with it, is donated
    _, metrics = run(place.state(initial_state(trained, tx)), place.frozen(frozen), place.batch(data[0]))
    assert float(metrics["gradient"]) == pytest.approx(2 * length, rel=1e-5)
    assert float(metrics["update"]) == pytest.approx(length, rel=1e-5)
    whole = {"a": jnp.full((1 << 12, 1 << 12), 2.0), "b": jnp.ones(9, jnp.bfloat16)}  # too large for one vector
    assert float(optim.norm(whole)) == pytest.approx(np.sqrt(4 * (1 << 24) + 9))


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    """Pulls a word's row to zero; step number `at` spoils the loss or, with a finite loss, only its gradient."""

    spoils: str = ""
    at: int = -1
    row = TextualInversion("<new>", "face")

    def split(self, sd, key=None):
        return self.row.split(sd, key)

    def adapter(self, frozen, trained):
        return None

    def join(self, frozen, trained, key=None):
        return self.row.join(frozen, trained)

    def loss(self, frozen, trained, batch, key, step, axis=None):
        value, spoilt = jnp.sum(trained["rows"]["text_encoder"] ** 2), step == self.at
        if self.spoils == "loss":
            value = jnp.where(spoilt, jnp.nan, value)
        if self.spoils == "gradient":  # the square root of zero: its value is 0, its slope is not
            value += 0 * jnp.sqrt(jnp.where(spoilt, 0.0, 1.0) * jnp.sum(trained["rows"]["text_encoder"] ** 2))
        return value, {}


TOY = dataclasses.replace(RUN, method=Toy(), steps=4, checkpoint=1, ema=0.0)


@pytest.mark.parametrize("checkpoint", [0, 1, 3])
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("spoils", ["loss", "gradient"])
def test_step_that_is_not_finite_stops_the_run_and_writes_nothing(tmp_path, spoils, at, checkpoint):
    bad = dataclasses.replace(TOY, method=Toy(spoils, at), checkpoint=checkpoint)
    with pytest.raises(FloatingPointError, match=f"the {spoils} of step {at + 1} is (nan|not finite); the last good"):
        train(bad, tmp_path / "run")
    kept = [int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert max(kept, default=0) == {0: 0, 1: at, 3: 3 * (at >= 3)}[checkpoint]
    assert not (tmp_path / "run" / "export").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    train(dataclasses.replace(TOY, checkpoint=checkpoint), tmp_path / "run")  # the cause gone, it goes on
    rows = pipeline.load(tmp_path / "run" / "export").parts["text_encoder"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(rows))


def test_update_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="the update of step 1 is not finite"):
        train(dataclasses.replace(TOY, optim=Optim(lr=1e30)), tmp_path / "run")
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_what_a_run_starts_from_is_told_by_what_was_loaded(tmp_path, monkeypatch):
    """Another device computes other last bits of the empty prompt's and the picture's features."""
    paths = [photo(tmp_path / f"{i}.png", i) for i in range(2)]
    runs = [dataclasses.replace(RUN, method=E4T(), data=Data(path=path, word="*s", size=32)) for path in paths]
    _, frozen, _, base = begin(runs[0])
    assert begin(runs[1])[3] != base  # another picture
    see, condition = e4t._see, StableDiffusion.condition
    monkeypatch.setattr(e4t, "_see", lambda *inputs: see(*inputs) * (1 + 1e-6))
    monkeypatch.setattr(
        StableDiffusion, "condition", lambda *inputs: jax.tree.map(lambda x: x * (1 + 1e-6), condition(*inputs))
    )
    _, other, _, again = begin(runs[0])
    for name in ("empty", "features"):
        assert (np.asarray(getattr(e4t.seen_by(frozen), name)) != np.asarray(getattr(e4t.seen_by(other), name))).any()
    assert again == base


def test_a_new_words_mean_row_is_computed_and_the_models_weights_are_not(monkeypatch):
    settings = dataclasses.replace(TOY, method=TextualInversion("<new>"), data=dataclasses.replace(DATA, word="<new>"))
    base, load, add_word = begin(settings)[3], pipeline.load, StableDiffusion.add_word

    def other(*inputs, **options):
        sd = load(*inputs, **options)
        return sd.with_parts(unet=trees.edit(sd.parts["unet"], r"^conv_in\.bias$", lambda _, w: w.at[0].add(1e-6)))

    def moved(*inputs):
        sd = add_word(*inputs)
        rows = {encoder: some * (1 + 1e-6) for encoder, some in sd.rows("<new>").items()}
        return sd.with_rows(sd.words["<new>"], rows)

    monkeypatch.setattr(StableDiffusion, "add_word", moved)
    assert begin(settings)[3] == base
    monkeypatch.setattr(pipeline, "load", other)
    assert begin(settings)[3] != base


def test_rates_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^optim.rates: '\^1.unet' matches nothing that is trained; .* such as rows"):
        train(
            dataclasses.replace(TOY, steps=1, optim=Optim(rates=(("^rows", 0.5), ("^1.unet", 0.1)))), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_previews_that_cannot_be_made_are_said(tmp_path, capsys):
    sd = pipeline.load("random:tiny")
    sd = sd.with_parts(unet=trees.edit(sd.parts["unet"], r"^conv_in\.bias$", lambda _, w: w.at[0].set(jnp.nan)))
    preview.write(tmp_path / "0000001.png", Full(), sd, None, Train(prompts=("a",)))
    assert capsys.readouterr().out.startswith("preview: no 0000001.png: latents: not finite from step 1 of 20 on")
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_the_folder_as_it_is(tmp_path):
    train(dataclasses.replace(TOY, steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    for change, message in (
        (dict(parallel="mesh:data=3"), "data.batch=4"),
        (dict(model="new:tiny"), "its run started from another model or picture; choose"),
        (dict(method=Full(("unet",), "attn2")), "its run had method.class='Toy', this one has 'Full'; choose"),
        (dict(data=dataclasses.replace(TOY.data, word="*s")), "its run had data.word='', this one has '[*]s'; choose"),
        (
            dict(optim=Optim(accumulate=3)),
            "optim.accumulate=3: expected a number that on 1 device divides data.batch=4",
        ),
        (
            dict(optim=Optim(accumulate=2), parallel="pmap"),
            "optim.accumulate=2: expected a number that on 4 devices divides",
        ),
        (dict(data=dataclasses.replace(TOY.data, concept="same")), "data.concept='same': expected '': only E4T reads"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(TOY, **change), tmp_path / "run")
        assert (tmp_path / "run" / "config.json").read_text() == before
    with pytest.raises(ValueError, match="data.batch=4"):
        train(dataclasses.replace(TOY, parallel="mesh:data=3"), tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.slow
def test_bfloat16_recomputation_and_adafactor_together(tmp_path):
    settings = dataclasses.replace(
        RUN, optim=Optim(kind="adafactor", lr=1e-3), compute="bfloat16", frozen="bfloat16", remat=True, steps=3, log=1
    )
    train(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()
    state = final(tmp_path / "run", settings)
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in jax.tree.leaves(state["trained"]))
    made, start = pipeline.load(tmp_path / "run" / "export"), pipeline.load(settings.model, "bfloat16")
    moved = [
        name
        for (name, one), other in zip(
            trees.flatten(made.parts["unet"]).items(), jax.tree.leaves(start.parts["unet"]), strict=True
        )
        if (np.asarray(one) != np.asarray(other, np.float32)).any()
    ]
    assert moved and all("attn2" in name for name in moved)


@pytest.mark.parametrize("method", [E4T("<new>"), Full(("unet",), "attn2"), TextualInversion("<new>")])
def test_frozen_rounds_only_what_does_not_train(method):
    """An array that E4T also looks at as reference is one array still."""
    seen = "same" if method.look else ""
    settings = dataclasses.replace(RUN, method=method, data=dataclasses.replace(DATA, word="<new>", concept=seen))
    whole, exact, _, base = begin(settings, pictures=False)
    trained, frozen, _, same = begin(dataclasses.replace(settings, frozen="bfloat16"), pictures=False)
    assert trees.digest(trained) == trees.digest(whole) and base == same
    assert trees.digest(frozen) == trees.digest(trees.cast(exact, jnp.bfloat16)) != trees.digest(exact)
    alone = {id(x) for x in jax.tree.leaves(frozen)}
    assert len(alone) == len({id(x) for x in jax.tree.leaves(exact)})


def test_contrastive_training_refuses_microbatches(tmp_path):
    with pytest.raises(ValueError, match="optim.accumulate=2"):
        train(dataclasses.replace(RUN, method=Clip(), optim=Optim(accumulate=2)), tmp_path / "clip")


@pytest.mark.parametrize("method", [Clip(), Vae()])
def test_methods_of_pictures_get_them_from_a_cache_and_of_one_picture(method, tmp_path):
    for path in ("pocketland", photo(tmp_path / "a.png")):
        source = DATA.source if path == "pocketland" else None
        data = dataclasses.replace(DATA, path=path, source=source, word="a", cache=str(tmp_path))
        settings = dataclasses.replace(RUN, method=method, data=data)
        batch = begin(settings)[2][0]
        assert "pixels" in batch and "moments" not in batch


def test_textual_inversion_starts_from_what_others_and_itself_wrote(tmp_path):
    settings = dataclasses.replace(TOY, method=TextualInversion("<cat>"), data=dataclasses.replace(DATA, word="<cat>"))
    trained, frozen, *_ = begin(settings, pictures=False)
    rows = trained["rows"]["text_encoder"]
    torch.save({"string_to_param": {"*": torch.tensor(np.asarray(rows) + 1)}, "name": "cat"}, tmp_path / "cat.pt")
    path, _ = run_folder.export(settings.method, frozen, {"rows": {"text_encoder": rows + 2}}, tmp_path / "export")
    folder = path.parent
    for source, more in ((tmp_path / "cat.pt", 1), (folder, 2), (folder / "learned_embeds.safetensors", 2)):
        found = begin(dataclasses.replace(settings, init=str(source)), pictures=False)[0]["rows"]["text_encoder"]
        np.testing.assert_allclose(found, rows + more, rtol=1e-6)
    with pytest.raises(ValueError, match="none.pt: no such file"):
        begin(dataclasses.replace(settings, init=str(tmp_path / "none.pt")), pictures=False)
    with pytest.raises(ValueError, match=r"init='.*cat.pt': rows .* \(1, 32\) where .* \(2, 32\)"):
        begin(dataclasses.replace(settings, init=str(tmp_path / "cat.pt"), method=TextualInversion("<cat>", vectors=2)))


def test_batches_are_a_function_of_the_step():
    data = batches.build(DATA, pipeline.load("random:tiny"), 0)
    stream = data.iterate(start=3)
    for step in (3, 4, 5):
        one, other = next(stream), data[step]
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert one["index"].tolist() == list(range(4 * step, 4 * step + 4))


STEPS = 24
COMMAND = [
    sys.executable, "train/run.py", "tests/data/run.py", "model=random:tiny", "data.path=pocketland", "data.size=32",
    "data.count=16",
]  # fmt: skip


def start(out, *more):
    """Starts the run in a process of its own; what it says goes to a file beside `out`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(f"{out}.txt", "a") as said:
        return subprocess.Popen(
            [*COMMAND, f"out={out}", f"steps={STEPS}", *more], cwd=ROOT, env=env, stdout=said, stderr=said
        )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not any(path.glob("[0-9]*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def ended(out, process):
    """Returns the digest of the final state of a run that must end well."""
    assert process.wait(300) == 0, Path(f"{out}.txt").read_text()[-2000:]
    settings = dataclasses.replace(RUN, method=TextualInversion("<new>", "face"), steps=STEPS, optim=Optim(), ema=0.0)
    return trees.digest(final(out, settings))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return ended(out, start(out))


def killed_and_resumed(out, kill, seconds):
    """Returns the digest of a run stopped by `kill` some seconds after its first checkpoint and started again."""
    process = start(out)
    wait_for(out / "checkpoints", process)
    time.sleep(seconds)
    process.send_signal(kill)
    process.wait(60)
    return ended(out, start(out))


@pytest.mark.parametrize("kill", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_run_ends_as_the_undisturbed_one(tmp_path, kill, undisturbed):
    assert killed_and_resumed(tmp_path / "run", kill, 0.3) == undisturbed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    begun = [line["step"] for line in lines if line.get("event") in ("started", "resumed")]
    assert len(begun) == 2 and 0 < begun[1] < STEPS
    before = max(line["step"] for line in lines[: lines.index({"step": begun[1], "event": "resumed"})])
    assert all(line["gradient"] > 0 for line in lines if "gradient" in line)  # what it learns comes from its pictures
    assert begun[1] >= before - 10  # what is logged every 10 steps has a checkpoint of every step behind it


@pytest.mark.slow
def test_twenty_killed_runs_end_as_the_undisturbed_one(tmp_path, undisturbed):
    seconds = np.random.default_rng(0).uniform(0, 1.5, 20)
    same = [
        killed_and_resumed(tmp_path / str(i), signal.SIGKILL, wait) == undisturbed for i, wait in enumerate(seconds)
    ]
    assert sum(same) == 20
