"""Previews of latents by a linear map: fitted once, kept, and like the pictures that the autoencoder makes."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.sampling import generate
from sdjax.service.latent_colours import Colours, Kept

CORRELATION = 0.9


@pytest.fixture(scope="module")
def drawn():
    """Returns (pocket, latents [4 h w c], what they decode to) of drawn faces."""
    sd = pipeline.load("pocket")
    faces = [pocketland.draw(pocketland.identity(i), pocketland.scene(i)) for i in range(4)]
    z = generate.encode(sd, np.stack(faces), jax.vmap(jax.random.key)(np.arange(4, dtype=np.uint32)))
    return sd, np.asarray(z), generate.decode(sd, z)


def small(pictures, side):
    count, height, width, _ = pictures.shape
    return pictures.reshape(count, side, height // side, side, width // side, 3).mean((2, 4))


def test_one_picture_tells_the_colours_of_others(drawn):
    _, z, pictures = drawn
    colours = Colours.fit(z[:1], pictures[:1])
    for latents, wanted in zip(z[1:], small(pictures[1:], z.shape[1]), strict=True):
        made = colours.picture(latents)
        assert made.shape == (*z.shape[1:3], 3) and made.dtype == np.uint8
        assert np.corrcoef(made.ravel(), wanted.ravel())[0, 1] >= CORRELATION


def test_a_linear_map_is_found_as_it_is():
    noise = np.random.default_rng(0)
    z, weights = noise.normal(size=(2, 8, 8, 4)), noise.normal(size=(4, 3))
    pictures = np.kron(100 + 20 * z @ weights, np.ones((1, 2, 2, 1)))
    made = Colours.fit(z, pictures)
    np.testing.assert_allclose(made.weights[:-1], 20 * weights, atol=0.1)
    np.testing.assert_allclose(made.weights[-1], 100, atol=0.1)
    with pytest.raises(ValueError, match="a multiple"):
        Colours.fit(z, pictures[:, :15])
    assert made.picture(np.full((8, 8, 4), np.nan)).shape == (8, 8, 3)


def test_it_is_fitted_once_for_an_autoencoder_and_kept(drawn, tmp_path):
    sd, z, pictures = drawn
    kept = Kept(tmp_path)
    assert kept.of(sd) is None
    kept.learn(sd, z[:1], pictures[:1])
    first = kept.of(sd).weights
    kept.learn(sd, z[1:], pictures[1:])
    np.testing.assert_array_equal(kept.of(sd).weights, first)
    np.testing.assert_array_equal(Kept(tmp_path).of(sd).weights, first)
    (path,) = tmp_path.iterdir()
    for text in ("no json", "{}", '{"weights": [[1, 2]]}', '{"weights": "x"}'):
        path.write_text(text)
        assert Kept(tmp_path).of(sd) is None
    image = Image.open(io.BytesIO(kept.of(sd).png(z[0], sd.factor)))
    assert image.size == (64, 64)
