"""Masks: alpha where something is clear, else brightness, of every kind of picture, alike for training and painting."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdjax.data.sources.folder import Folder
from sdjax.images import reading
from sdjax.service import records

SIDE = 16
DEPTHS = {"1": (1, 0), "L2": (2, 0), "L4": (4, 0), "L8": (8, 0), "I16": (16, 0), "RGB8": (8, 2), "RGB16": (16, 2)}
HALF = np.repeat([[0, 255]], SIDE, 0).repeat(SIDE // 2, 1).astype(np.uint8)  # left black, right white


def png(path, depth, colour, samples, *chunks):
    """Writes a PNG file of samples [H W C], as the format stores them; chunks: (name, bytes) before the pixels.

    colour: PNG's number of a kind, 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha (RFC 2083).
    """

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = np.asarray(samples, np.uint16).reshape(len(samples), -1)
    bits = (rows[..., None] >> np.arange(depth)[::-1] & 1).reshape(len(rows), -1).astype(np.uint8)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    header = struct.pack(">IIBBBBB", np.shape(samples)[1], len(samples), depth, colour, 0, 0, 0)
    body = (chunk(b"IHDR", header), *(chunk(*one) for one in chunks), chunk(b"IDAT", zlib.compress(lines)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b""))
    return path


def clear_colour(path, kind, key=None, samples=HALF):
    """Writes black and white of a kind of DEPTHS, whose colour `key` (a sample) is clear."""
    depth, colour = DEPTHS[kind]
    count = 3 if colour == 2 else 1
    pixels = np.repeat((samples.astype(np.uint32) * ((1 << depth) - 1) // 255)[..., None], count, 2)
    chunks = [] if key is None else [(b"tRNS", struct.pack(f">{count}H", *[key] * count))]
    return png(path, depth, colour, pixels, *chunks)


def palette(path, colours, alphas=None, samples=HALF > 0):
    chunks = [(b"PLTE", bytes(np.ravel(colours).tolist()))] + ([(b"tRNS", bytes(alphas))] if alphas else [])
    return png(path, 8, 3, samples.astype(np.uint8)[..., None], *chunks)


@pytest.mark.parametrize("kind", DEPTHS)
@pytest.mark.parametrize("clear", ["none", "white", "black"])
def test_a_clear_colour_is_outside_the_mask_at_every_depth(tmp_path, kind, clear):
    key = {"none": None, "white": (1 << DEPTHS[kind][0]) - 1, "black": 0}[clear]
    path = clear_colour(tmp_path / "m.png", kind, key)
    expected = {"none": HALF, "white": 255 - HALF, "black": HALF}[clear]
    np.testing.assert_array_equal(reading.mask(path), expected)
    shown = {"none": HALF, "white": HALF, "black": np.full_like(HALF, 255)}[clear]  # over white
    np.testing.assert_array_equal(reading.picture(path), shown[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", ["L8", "I16", "RGB8", "RGB16", "L4"])
def test_a_clear_colour_that_no_pixel_has_leaves_brightness(tmp_path, kind):
    path = clear_colour(tmp_path / "m.png", kind, key=(1 << DEPTHS[kind][0]) // 3)
    np.testing.assert_array_equal(reading.mask(path), HALF)


def test_a_clear_grey_of_16_bits_is_one_of_65536(tmp_path):
    samples = np.full((SIDE, SIDE, 1), 0x1200)
    samples[:, :8] = 0x1234
    path = png(tmp_path / "m.png", 16, 0, samples, (b"tRNS", struct.pack(">H", 0x1234)))
    np.testing.assert_array_equal(reading.mask(path), HALF)


def test_palettes_with_clear_entries_that_are_used_or_not(tmp_path):
    ink = [(0, 0, 0), (0, 0, 0), (9, 9, 9)]
    np.testing.assert_array_equal(reading.mask(palette(tmp_path / "used.png", ink, [0, 255])), HALF)
    half = reading.mask(palette(tmp_path / "partly.png", ink, [0, 100]))
    np.testing.assert_array_equal(half, HALF // 255 * 100)
    white = [(0, 0, 0), (255, 255, 255), (9, 9, 9)]
    np.testing.assert_array_equal(reading.mask(palette(tmp_path / "unused.png", white, [255, 255, 0])), HALF)
    np.testing.assert_array_equal(reading.mask(palette(tmp_path / "none.png", white)), HALF)


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_strokes_of_any_colour_on_clear_ground_and_opaque_black_and_white(tmp_path, mode, suffix):
    count = len(mode) - 1
    for ink in (0, 255):
        strokes = np.concatenate([np.full((SIDE, SIDE, count), ink, np.uint8), HALF[..., None]], 2)
        Image.fromarray(strokes, mode).save(tmp_path / f"m.{suffix}", lossless=True)
        np.testing.assert_array_equal(reading.mask(tmp_path / f"m.{suffix}"), HALF)
    opaque = np.concatenate([HALF[..., None]] * count + [np.full((SIDE, SIDE, 1), 255, np.uint8)], 2)
    Image.fromarray(opaque, mode).save(tmp_path / f"m.{suffix}", lossless=True)
    np.testing.assert_array_equal(reading.mask(tmp_path / f"m.{suffix}"), HALF)


def test_alpha_of_16_bits(tmp_path):
    clear = np.stack([np.full((SIDE, SIDE), 0x8000), HALF.astype(np.uint16) * 257], -1)
    np.testing.assert_array_equal(reading.mask(png(tmp_path / "m.png", 16, 4, clear)), HALF)


def test_brightness_is_the_brightest_channel(tmp_path):
    blue = np.zeros((SIDE, SIDE, 3), np.uint8)
    blue[..., 2] = HALF
    Image.fromarray(blue).save(tmp_path / "m.png")
    np.testing.assert_array_equal(reading.mask(tmp_path / "m.png"), HALF)


def test_a_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.stack([HALF * 0, HALF], -1), "LA").save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(reading.mask(tmp_path / "m.png"), HALF[::-1, ::-1])


def test_masks_of_training_are_read_by_the_same_rule(tmp_path):
    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(tmp_path / "a.png")
    full = np.full_like(HALF, 255)
    for layers in ([HALF, HALF, HALF, full], [full, full, full, HALF], [0 * full, 0 * full, 0 * full, HALF]):
        Image.fromarray(np.stack(layers, -1)).save(tmp_path / "a.mask.png")
        (item,) = reading.find(tmp_path)
        np.testing.assert_array_equal(np.asarray(reading.decode(item, SIDE, masked=True)[1]), HALF)


def test_a_picture_is_its_own_mask_only_where_something_is_clear(tmp_path):
    grey, full = np.full((SIDE, SIDE), 90, np.uint8), np.full((SIDE, SIDE), 255, np.uint8)
    Image.fromarray(np.stack([grey, grey, grey, full], -1)).save(tmp_path / "a.png")
    (item,) = reading.find(tmp_path)
    assert not reading.has_mask(item)
    assert reading.decode(item, SIDE, masked=True)[1].getextrema() == (255, 255)
    data = dict(path=str(tmp_path), word="cat", templates="captions", crop="center", flip=0.0, mask=True, words=())
    with pytest.raises(ValueError, match="data.mask=True: no picture"):
        Folder(type("Data", (), data))
    clear_colour(tmp_path / "a.png", "I16", key=0)
    assert reading.has_mask(item)
    np.testing.assert_array_equal(np.asarray(reading.decode(item, SIDE, masked=True)[1]), HALF)


def test_a_palette_that_is_missing_and_exif_cut_short_are_refused_by_name(tmp_path):
    indices = np.zeros((SIDE, SIDE, 1))
    bare = png(tmp_path / "bare.png", 8, 3, indices)  # of which Pillow says AssertionError()
    short = png(tmp_path / "short.png", 8, 0, indices, (b"eXIf", b"MM\0*"))  # and here struct.error
    for path, word in ((bare, "AssertionError"), (short, "a buffer of 4 bytes")):
        for read in (reading.picture, reading.mask):
            with pytest.raises(ValueError, match=rf"^{path}: cannot be decoded \(.*{word}\)$"):
                read(path)
    with pytest.raises(ValueError, match=rf"^{short}: cannot be read \(.*a buffer of 4 bytes\)$"):
        records.read(short)
