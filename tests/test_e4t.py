"""E4T against its specification: sizes on Stable Diffusion 1.5, rank and start of the offsets, the word, its folder."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax import convert, trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t, kinds
from sdjax.formats.storage import parameters
from sdjax.images import grid
from sdjax.methods import offsets
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T, look, plain_model
from sdjax.methods.full import Full
from sdjax.methods.seen import level_maps, map_widths
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.models.reference import Reference
from sdjax.models.unet import UNet, UNetConfig
from sdjax.stable_diffusion import to_pictures
from sdjax.training import preview, run_folder
from sdjax.training.begin import begin
from sdjax.training.settings import Train


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


def noised(tree):
    keys = iter(jax.random.split(jax.random.key(9), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), tree)


def test_sizes_on_stable_diffusion_1_5():
    config = UNetConfig(sample_size=64, cross_attention_dim=768)
    assert (len(map_widths(config)), sum(map_widths(config))) == (13, 10880)
    assert sum(map_widths(config)[i] for i in level_maps(config)) == 3520 and level_maps(config) == (2, 5, 8, 12)
    uneven = dataclasses.replace(config, layers_per_block=(1, 2, 1, 2))
    assert level_maps(uneven) == (1, 4, 6, 10) and len(map_widths(uneven)) == 11
    unet = parameters.template(UNet(config))
    weights = trees.matching(unet, offsets.TARGETS)
    shapes = collections.Counter(leaf.shape[::-1] for leaf in weights.values())  # (out, in)
    expected = {(320, 320): 20, (640, 640): 20, (1280, 1280): 24, (320, 768): 10, (640, 768): 10, (1280, 768): 12}
    assert shapes == expected
    sizes = {
        (i, o): trees.count(offsets._generator((i, o), offsets._uniform(jax.random.key(0)), offsets._zeros))
        for o, i in shapes
    }
    assert sum(number * sizes[i, o] for (o, i), number in shapes.items()) == 143_226_592


def test_three_outer_products_equal_the_published_products(key):
    generator = noised(offsets._generator((6, 5), offsets._uniform(key), offsets._zeros))
    a = generator["v"] @ generator["linear1"]["kernel"] + generator["linear1"]["bias"]
    b = generator["v"] @ generator["linear2"]["kernel"] + generator["linear2"]["bias"]
    column, row = generator["linear_column"], generator["linear_row"]
    first = column["kernel"].T @ jnp.outer(a, b) + column["bias"][:, None] * jnp.ones((1, 5))
    second = first @ row["kernel"] + jnp.ones((6, 1)) * row["bias"][None]
    np.testing.assert_allclose(offsets.offset(generator), second, rtol=1e-5, atol=1e-6)
    assert np.linalg.matrix_rank(np.asarray(offsets.offset(generator)), tol=1e-5) == 3


def test_offsets_start_at_zero_and_leave_the_unet_bit_for_bit(sd, key):
    made = offsets.apply(sd.parts["unet"], offsets.create(sd.parts["unet"], key))
    assert trees.digest(made) == trees.digest(sd.parts["unet"])


def test_scale_zero_is_the_class_word(sd, key):
    method = E4T(scale=0.0)
    trained, frozen = method.split(sd, key)
    plain = frozen.denoise(*_inputs(frozen, "a face"))[0]
    trained = {**trained, "head": noised(trained["head"])}
    word = method.join(frozen, trained).denoise(*_inputs(frozen, "a *s"))[0]
    np.testing.assert_allclose(word, plain, atol=1e-6)


def test_encoder_moves_the_word_and_only_the_word(sd, key):
    method = E4T()
    trained, frozen = method.split(sd, key)
    joined = method.join(frozen, {**trained, "head": noised(trained["head"])})
    change = [
        float(jnp.abs(joined.denoise(*_inputs(frozen, text))[0] - frozen.denoise(*_inputs(frozen, text))[0]).max())
        for text in ("a *s", "a face")
    ]
    assert change[0] > 1e-3 and change[1] < 1e-5


def test_features_come_from_the_pretrained_unet(sd, key):
    method = Chain((E4T(), Full()))
    trained, frozen = method.split(sd, key)
    z, t, cond = _inputs(frozen, "a *s")
    maps = [
        method.join(frozen, tree).conditioners[0].kind.maps(method.join(frozen, tree), z, t)
        for tree in (trained, {**trained, "1": noised(trained["1"])})
    ]
    for one, other in zip(*maps, strict=True):
        np.testing.assert_array_equal(one, other)


def _inputs(sd, text):
    cond = sd.condition(sd.tokenize([text])).with_own(concept=jnp.full((1, 32, 32, 3), 0.3))
    return jax.random.normal(jax.random.key(1), (1, 16, 16, 4)), jnp.array([300.0]), cond


@pytest.mark.parametrize(
    "how",
    [
        dict(prompts=["a *s"], clip_skip=2),
        dict(prompts=["a photo"], negative_prompt="a *s"),
        dict(prompts=["a photo AND a *s"], grammar="a1111"),
        dict(prompts=["a photo"], negative_prompt="a *s", grammar="a1111", clip_skip=2),
    ],
    ids=lambda how: " ".join(map(str, how)),
)
def test_the_word_is_the_encoders_wherever_it_stands(sd, key, how):
    """An encoder that always says the same is a fixed row of the token table; so must the pictures be."""
    method = E4T()
    trained, frozen = method.split(sd, key)
    move = jax.random.normal(jax.random.key(5), trained["head"]["final"]["bias"].shape)
    trained = {**trained, "head": {**trained["head"], "final": {**trained["head"]["final"], "bias": move}}}
    joined = look(method.join(frozen, trained), jnp.zeros((32, 32, 3)))
    row = frozen.embed("text_encoder", frozen.tokenize(["face"])["text_encoder"])[0, 1] + method.scale * move
    fixed = frozen.with_rows(frozen.words["*s"], {"text_encoder": row[None]})
    pictures = [sdjax.text2img(model, seeds=[0], steps=2, guidance=4.0, **how) for model in (joined, fixed, frozen)]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    assert np.abs(pictures[0].astype(int) - pictures[2]).max() > 1


@pytest.mark.parametrize("change", [{"features": 3}, {"scale": 10**18}, {"scale": 10**400}, {"penalty": "a"}])
def test_settings_that_cannot_be_name_their_file(sd, change, tmp_path):
    (tmp_path / "e4t").mkdir()
    settings = dataclasses.asdict(E4T()) | {"reference": False} | change
    (tmp_path / "e4t" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="e4t/config.json") as error:
        kinds.opened(tmp_path, sd)
    assert "\n" not in str(error.value)


def test_a_tower_that_trains_keeps_the_picture(sd, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    method = E4T(vision=True)
    settings = Train(
        model="random:tiny",
        method=method,
        data=Data(path=str(tmp_path / "a.png"), word="*s", templates="face", size=32),
    )
    trained, frozen, data, _ = begin(settings)
    trained = {**trained, "head": noised(trained["head"])}
    joined = method.join(frozen, trained)
    z, t, cond = _inputs(joined, "a *s")
    one, other = (
        joined.denoise(z, t, cond.with_own(concept=pixels))[0] for pixels in (data.single[None], 0 * data.single[None])
    )
    cond = cond.replace(own={})
    assert np.array_equal(joined.denoise(z, t, cond)[0], one) and not np.array_equal(one, other)
    run_folder.export(method, frozen, trained, tmp_path / "out")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "e4t" / "concept.png")), picture)


def test_domain_must_be_one_token(sd, key):
    with pytest.raises(
        ValueError, match="domain='watercolor face': expected a word of one token for this model, not of 2"
    ):
        E4T(domain="watercolor face").split(sd, key)
    with pytest.raises(ValueError, match=r"parts.1.domain='watercolor face': expected a word of one token"):
        Chain((TextualInversion("<cat>", "cat"), E4T(domain="watercolor face"))).split(sd, key)


@pytest.mark.parametrize("vision", [False, True])
def test_folder_round_trip(sd, key, tmp_path, vision):
    method = E4T(vision=vision)
    trained, frozen = method.split(sd, key)
    trained = noised(trained)
    run_folder.export(method, frozen, trained, tmp_path / "pretrained")
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    mine = look(method.join(frozen, trained), jnp.asarray(picture / 127.5 - 1, jnp.float32))
    read = e4t.personalise(sdjax.load(tmp_path / "pretrained"), tmp_path / "pretrained", picture)
    z, t, cond = _inputs(frozen, "a *s")
    np.testing.assert_allclose(mine.denoise(z, t, cond)[0], read.denoise(z, t, cond)[0], atol=1e-5)


def test_tuned_folder_loads_with_its_picture(sd, key, tmp_path):
    method = Chain((E4T(), Full()))
    trained, frozen = method.split(sd, key)
    trained = noised(trained)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    frozen = method.look(frozen, trained, jnp.asarray(picture / 127.5 - 1, jnp.float32))
    folder = run_folder.export(method, frozen, trained, tmp_path / "tuned")[0]
    assert np.array_equal(np.asarray(Image.open(folder / "e4t" / "concept.png")), picture)
    z, t, cond = _inputs(frozen, "a *s")
    mine, read = method.join(frozen, trained), sdjax.load(folder)
    np.testing.assert_allclose(mine.denoise(z, t, cond)[0], read.denoise(z, t, cond)[0], atol=1e-5)
    with pytest.raises(ValueError, match="was tuned on one picture"):
        e4t.personalise(read, folder, picture)
    with pytest.raises(ValueError, match="model=.*tuned'.*pass the model it came from"):
        begin(
            Train(
                model=str(folder), method=method, data=Data(path=str(folder / "e4t" / "concept.png"), templates="face")
            )
        )


def test_settings_that_an_encoder_was_trained_with_are_kept(sd, key, tmp_path):
    trained, frozen = E4T().split(sd, key)
    run_folder.export(E4T(), frozen, trained, tmp_path / "face")
    method = Chain((E4T(scale=0.3), Full()))
    trained, frozen = method.split(sd, key)
    with pytest.raises(ValueError, match="method.parts.0.scale=0.3: expected 0.1, with which .* was trained"):
        run_folder.start(method, trained, frozen, "face", kinds.opened(tmp_path / "face", sd))


def test_pictures_without_one_to_look_at_are_refused(sd, key):
    method = E4T()
    trained, frozen = method.split(sd, key)
    z, t, cond = _inputs(frozen, "a *s")
    with pytest.raises(ValueError, match="data.concept=''"):
        method.join(frozen, trained).denoise(z, t, cond.replace(own={}))


def test_reference_is_kept_where_it_is_not_of_the_parts_beside_it(sd, key, tmp_path):
    """Also by a run that leaves the UNet alone and started from one that did not; and left out where asked."""
    tuning, alone = Chain((E4T(), Full())), E4T()
    trained, frozen = tuning.split(sd, key)
    trained = {"0": noised(trained["0"]), "1": jax.tree.map(lambda x: 1.05 * x, trained["1"])}
    run_folder.export(tuning, frozen, trained, tmp_path / "tuned")
    tuned = sdjax.load(tmp_path / "tuned")
    opened = kinds.opened(tmp_path / "tuned", tuned)
    trained, frozen = run_folder.start(alone, *alone.split(tuned), "tuned", opened)
    run_folder.export(alone, frozen, trained, tmp_path / "again")
    z, t, cond = _inputs(frozen, "a *s")
    both = [(tmp_path / name / "e4t" / "reference.safetensors").read_bytes() for name in ("tuned", "again")]
    assert both[0] == both[1]

    method = Chain((TextualInversion("<cat>", "cat"), E4T()))
    trained, frozen = method.split(sd, key)
    run_folder.export(method, frozen, trained, tmp_path / "words")
    assert convert.main([str(tmp_path / "tuned"), str(tmp_path / "small"), "--no-reference"]) == 0
    for name in ("words", "small"):
        assert not (tmp_path / name / "e4t" / "reference.safetensors").exists()
    picture = np.zeros((32, 32, 3), np.uint8)
    small, again = (
        e4t.personalise(sdjax.load(tmp_path / name), tmp_path / name, picture).denoise(z, t, cond)[0]
        for name in ("small", "again")
    )
    assert float(jnp.abs(small - again).max()) > 1e-4


def test_one_picture_may_be_seen_while_only_a_part_of_the_unet_trains(sd, key):
    method = Chain((E4T(), Full(("unet",), "attn2")))
    trained, frozen = method.split(sd, key)
    frozen = method.look(frozen, trained, jnp.full((32, 32, 3), 0.2))
    z, t, cond = _inputs(frozen, "a *s")
    assert jnp.isfinite(method.join(frozen, trained).denoise(z, t, cond)[0]).all()


def test_plain_model_runs_no_encoder_and_stands_for_the_same_word(sd, key, tmp_path):
    method = E4T()
    trained, frozen = method.split(sd, key)
    trained = noised(trained)
    seen = look(method.join(frozen, trained), jnp.full((32, 32, 3), 0.2))
    row = plain_model(seen)
    assert row.conditioners == () and row.reference == Reference()
    z, t, cond = _inputs(frozen, "a *s")
    full, ids = seen.denoise(z, t, cond)[0], {"text_encoder": cond.words["text_encoder"]["ids"]}
    far, near = (float(jnp.abs(other.denoise(z, t, other.condition(ids))[0] - full).max()) for other in (frozen, row))
    assert near < far / 2
    sdjax.save(row, tmp_path / "plain")
    assert not (tmp_path / "plain" / "e4t").exists()


def test_a_plain_model_keeps_the_encoders_strength_and_what_else_the_model_refers_to(sd, key):
    method, clip = E4T(), {"logit_scale": jnp.float32(2)}
    trained, frozen = method.split(sd.with_reference(clip=clip).with_own(mine=jnp.ones(3)), key)
    seen = look(method.join(frozen, noised(trained)), jnp.full((32, 32, 3), 0.2))
    strengths = {s: seen.replace(conditioners=(seen.conditioners[0].replace(strength=s),)) for s in (0.0, 0.5, 1.0)}
    none, half, full = (plain_model(one).rows("*s")["text_encoder"] for one in strengths.values())
    assert jnp.abs(full - none).max() > 1e-3
    np.testing.assert_allclose(half, (none + full) / 2, atol=1e-6)
    reference = plain_model(seen).reference
    assert reference.clip is clip and list(reference.own) == ["mine"]


def test_preview_shows_every_subject_beside_its_pictures(sd, key, tmp_path):
    method = E4T(word="*s", domain="face")
    trained, frozen = method.split(sd, key)
    settings = Train(
        model="random:tiny",
        method=method,
        data=Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16), concept="other"),
        prompts=("a *s", "a drawing of *s"),
    )
    data = batches.build(settings.data, frozen, 0)
    preview.write(tmp_path / "grid.png", method, method.join(frozen, trained), data, settings)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape[1] == 3 * (32 + grid.EDGE) + grid.EDGE
    below = picture.shape[0] - 4 * (32 + grid.EDGE)  # the labels are above
    assert below > grid.EDGE
    subject = picture[below : below + 32, grid.EDGE : grid.EDGE + 32]
    np.testing.assert_array_equal(subject, to_pictures(data[0]["concept"])[0])


def test_without_a_key_nothing_is_drawn(sd, key, tmp_path, monkeypatch):
    """SD 1.5's offsets are 143 million numbers that a file replaces: neither a run with init nor a look draws them."""
    shapes, _ = E4T(vision=True).split(sd)
    whole, frozen = E4T(vision=True).split(sd, key)
    sizes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (shapes, whole)]
    assert sizes[0] == sizes[1]
    assert {type(x) for x in jax.tree.leaves([shapes["head"], shapes["offsets"]])} == {jax.ShapeDtypeStruct}
    run_folder.export(E4T(vision=True), frozen, noised(whole), tmp_path / "face")
    monkeypatch.setattr(offsets, "_uniform", lambda key: pytest.fail("drawn"))
    e4t.personalise(sd, tmp_path / "face", np.zeros((32, 32, 3), np.uint8))
    data = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8), word="*s", concept="same")
    method = Chain((E4T(), Full(("unet", "text_encoder"))))
    trained, *_ = begin(
        Train(model="random:tiny", init=str(tmp_path / "face"), method=method, data=data), pictures=False
    )
    assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(trained))
