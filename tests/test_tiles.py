"""Tiles against the whole: the autoencoder's, at four times the tile, and any function's."""

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import sdjax
from sdjax.sampling import tiles
from sdjax.stable_diffusion import to_pictures, to_pixels

TILE = 64


@pytest.fixture(scope="module")
def sd():
    return sdjax.load("pocket")


@pytest.fixture(scope="module")
def pixels():
    """One picture of four tiles a side, colours and lights that change from place to place."""
    rough = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(rough).resize((4 * TILE, 4 * TILE), Image.Resampling.BICUBIC)).astype(float)
    grain = np.random.default_rng(1).normal(0, 6, smooth.shape)
    return to_pixels((smooth + grain).clip(0, 255).astype(np.uint8))[None]


def jumps(error, axis):
    """Returns the mean step of the error between neighbouring rows or columns, one number per place."""
    other = tuple(a for a in range(4) if a != axis)
    return np.abs(np.diff(error, axis=axis)).mean(other)


def test_decoding_in_tiles_is_decoding_the_whole(sd, pixels):
    z = sd.latents(tiles.moments(sd, pixels))
    whole, made = (127.5 * np.asarray(tiles.decode(sd, z, tile)) for tile in (None, TILE))
    assert made.shape == whole.shape == (1, 4 * TILE, 4 * TILE, 3)
    error = made - whole
    assert np.abs(error).mean() <= 0.5
    for axis in (1, 2):  # a seam is a line where the error steps: 37 of 255 without overlap, 3 with norms of their own
        assert jumps(error, axis).max() <= 1


def test_encoding_in_tiles_is_encoding_the_whole(sd, pixels):
    whole, made = (np.asarray(tiles.moments(sd, pixels, tile)) for tile in (None, TILE))
    assert np.abs(made - whole).mean() <= 0.01 * whole.std()


def test_statistics_are_measured_until_they_settle(sd, pixels, monkeypatch):
    measured, merge = [], tiles._merge
    monkeypatch.setattr(tiles, "_merge", lambda parts: measured.append(merge(parts)) or measured[-1])
    tiles.moments(sd, pixels, TILE)
    assert 2 <= len(measured) < tiles.PASSES  # the encoder's soon do
    assert tiles._change(*measured[-2:]) <= tiles.SETTLED < tiles._change(*measured[:2])


def test_without_the_wholes_statistics_tiles_differ(sd, pixels):
    """What the shared statistics are for."""
    z = np.asarray(sd.latents(tiles.moments(sd, pixels)))
    whole = to_pictures(tiles.decode(sd, z)).astype(int)
    alone = to_pictures(tiles.over(lambda part: tiles._decode(sd, part), z, TILE // sd.factor, 8)).astype(int)
    assert np.abs(alone - whole).mean() > 3


@pytest.mark.parametrize("size", [(20, 33), (7, 40), (16, 16)])
def test_a_local_function_in_tiles_is_the_function(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)

    def double(part):
        return np.asarray(part).repeat(2, 1).repeat(2, 2) ** 2

    np.testing.assert_allclose(tiles.over(double, x, 12, 4), double(x), rtol=1e-5)


def test_the_shares_of_tiles_add_up_to_one():
    spots = list(tiles._spots((30, 45), 16, 6, 1))
    shares, total = tiles._shares((30, 45), spots, 6, 2), np.zeros((60, 90))
    for (rows, columns), share in zip(spots, shares, strict=True):
        total[2 * rows.start : 2 * rows.stop, 2 * columns.start : 2 * columns.stop] += share
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_large_pictures_go_through_tiles_by_themselves(monkeypatch):
    sd = tiny.model()
    monkeypatch.setattr(tiles, "AT_ONCE", 32 * 32)
    monkeypatch.setattr(tiles, "TILE", 32)
    made = sdjax.img2img(sd, ["a cat"], tiny.pictures(1, 40)[0], steps=2, strength=0.5)
    monkeypatch.undo()
    whole = sdjax.img2img(sd, ["a cat"], tiny.pictures(1, 40)[0], steps=2, strength=0.5)
    assert made.shape == whole.shape == (1, 40, 40, 3)
    assert np.abs(made.astype(int) - whole).mean() < 10


def test_tiles_of_a_picture_with_hooks_keep_them(sd):
    """The norms' hook stands beside the model's own."""

    class Halved:
        def intercept(self, part, layer, args, kwargs, at, cond):
            y = layer(*args, **kwargs)
            return y / 2 if at.module.name == "conv_out" and at.method_name == "__call__" else y

    jax.tree_util.register_pytree_node(Halved, lambda hook: ((), None), lambda *_: Halved())
    z = (
        np.random.default_rng(0)
        .standard_normal((1, 8, 24, sd.networks["vae"].config.latent_channels))
        .astype(np.float32)
    )
    plain, halved = (tiles.decode(one, z, 32) for one in (sd, sd.add(hooks=Halved())))
    np.testing.assert_allclose(halved, plain / 2, atol=2e-3)
