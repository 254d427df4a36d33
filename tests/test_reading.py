"""Image folders: finding, decoding, cutting, and what is refused."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from sdjax.data.batches import Data
from sdjax.data.sources.folder import Folder
from sdjax.images import reading
from sdjax.sampling.settings import TextToImage
from sdjax.service import records


def ramp(width, height):
    """Returns a picture whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 0 * x], -1).round().astype(np.uint8)


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def settings(path, **changes):
    return Data(path=str(path), **changes)


def read(path, size=32, masked=False):
    (item,) = reading.find(path)
    return reading.decode(item, size, masked)


# ---- finding -----------------------------------------------------------------------------------


def test_find_lists_pictures_by_name_and_leaves_out_the_rest(tmp_path):
    for name in ("b.png", "a.jpg", "C.WEBP", "sub/d.jpeg", "b.mask.png", "a-masklabel.png", ".hidden/e.png", ".f.png"):
        write(tmp_path / name, ramp(20, 20), format="PNG" if name.endswith("png") else None)
    (tmp_path / "notes.md").write_text("text")
    items = reading.find(tmp_path)
    assert [i.path.relative_to(tmp_path).as_posix() for i in items] == ["C.WEBP", "a.jpg", "b.png", "sub/d.jpeg"]
    assert [i.mask and i.mask.name for i in items] == [None, "a-masklabel.png", "b.mask.png", None]
    assert [i.subject for i in items] == ["", "", "", "sub"]


def test_captions_come_from_text_files_before_metadata(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        write(tmp_path / name, ramp(20, 20))
    (tmp_path / "a.txt").write_text("\ufeff a cat\n on a sofa \n", encoding="utf-8")
    rows = [{"file_name": n, "text": f"from {n}"} for n in ("a.png", "b.png", "sub/d.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [i.caption for i in reading.find(tmp_path)] == ["a cat on a sofa", "from b.png", "", "from sub/d.png"]
    assert reading.find(tmp_path / "a.png")[0].caption == "a cat on a sofa"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.png"}', "line 2: expected"),
        ("[1, 2]", "line 2: expected"),
        ("{", "line 2: expected"),
        ('{"file_name": "a.png", "text": 3}', "line 2: expected"),
        ('{"file_name": "a.png", "text": "' + "x" * 70000 + '"}', "line 2: expected"),
        ('{"file_name": "../../etc/passwd", "text": "x"}', "1 entries without a picture, such as '../../etc/passwd'"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, line, words):
    write(tmp_path / "a.png", ramp(20, 20))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}) + "\n" + line)
    with pytest.raises(ValueError) as error:
        reading.find(tmp_path)
    assert words in str(error.value) and "metadata.jsonl" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe\x00", "not UTF-8"), (b"x" * 70000, "longer than")])
def test_bad_caption_files_are_refused(tmp_path, content, words):
    write(tmp_path / "a.png", ramp(20, 20))
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: {words}"):
        reading.find(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path='.*none': no such file or folder"):
        reading.find(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data\.path='.*': no images; expected \.jpg \.png \.webp"):
        reading.find(tmp_path)


# ---- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    undo = {  # what was done to the upright picture before it was stored, by EXIF 2.32, tag 0x0112
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "a.png", np.ascontiguousarray(undo[orientation](ramp(48, 32))), exif=exif)
    write(tmp_path / "a.mask.png", ramp(48, 32)[..., 0])
    picture, mask = read(tmp_path / "a.png", masked=True)
    np.testing.assert_array_equal(np.asarray(picture), ramp(48, 32))
    np.testing.assert_array_equal(np.asarray(mask), ramp(48, 32)[..., 0])


STORED = {"png": ("L", "P", "1", "LA", "RGBA", "I;16"), "jpg": ("L", "CMYK"), "webp": ("L", "LA", "RGBA")}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in STORED.items() for mode in modes])
def test_every_mode_becomes_rgb(tmp_path, suffix, mode):
    grey = ramp(40, 24)[..., 0]
    image = Image.fromarray(grey.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    picture, _ = read(tmp_path / f"a.{suffix}")
    assert picture.mode == "RGB" and picture.size == (40, 24)
    error = np.abs(np.asarray(picture)[..., 0].astype(int) - grey)
    assert error.mean() < (130 if mode == "1" else 4)


def test_alpha_is_over_white_and_is_the_mask(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (255, 0, 0, 255)
    write(tmp_path / "a.png", pixels)
    picture, mask = read(tmp_path / "a.png", masked=True)
    assert picture.getpixel((2, 2)) == (255, 255, 255) and picture.getpixel((30, 2)) == (255, 0, 0)
    assert (mask.getpixel((2, 2)), mask.getpixel((30, 2))) == (0, 255)
    assert read(tmp_path / "a.png")[1] is None


def test_a_mask_file_goes_before_alpha_and_none_at_all_is_white(tmp_path):
    pixels = np.full((32, 32, 4), 128, np.uint8)
    write(tmp_path / "a.png", pixels)
    write(tmp_path / "a.mask.png", np.full((32, 32), 7, np.uint8))
    assert read(tmp_path / "a.png", masked=True)[1].getextrema() == (7, 7)
    write(tmp_path / "b.png", pixels[..., :3])
    assert read(tmp_path / "b.png", masked=True)[1].getextrema() == (255, 255)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_large_pictures_are_averaged_down_to_at_least_twice_the_size(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", ramp(500, 300))
    write(tmp_path / "a.mask.png", ramp(500, 300)[..., 0])
    picture, mask = read(tmp_path / f"a.{suffix}", size=32, masked=True)
    assert 64 <= min(picture.size) < 128 and mask.size == picture.size
    whole = np.asarray(Image.fromarray(ramp(500, 300)).resize(picture.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(picture) - whole).mean() < 3
    assert np.abs(np.asarray(mask) - whole[..., 0]).mean() < 3


def damaged(folder):
    whole = write(folder / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).read_bytes()
    photo = write(folder / "whole.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).read_bytes()
    huge = bytearray(whole)
    huge[16:24] = (30000).to_bytes(4, "big") * 2  # IHDR's width and height, and then its checksum
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return {
        "text.png": (b"hello", "not an image; expected .jpg .png .webp"),
        "empty.jpg": (b"", "not an image"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "gif.png": (b"GIF89a" + b"\0" * 40, "not an image"),
        "short.png": (whole[: len(whole) // 2], "cannot be decoded"),
        "short.jpg": (photo[: len(photo) // 2], "cannot be decoded"),
        "header.png": (whole[:20], "not an image"),
        "bomb.png": (bytes(huge), "more than 89478485 pixels"),
    }


@pytest.mark.parametrize(
    "name", ["text.png", "empty.jpg", "drawing.png", "gif.png", "short.png", "short.jpg", "header.png", "bomb.png"]
)
def test_what_is_no_image_is_refused_by_name(tmp_path, name):
    content, words = damaged(tmp_path)[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and words in str(error.value)
    assert "\n" not in str(error.value)


def mutated(data, random):
    """Returns a file with up to 5 bytes replaced, the checksums of a PNG's parts made right again."""
    data = bytearray(data)
    for _ in range(random.integers(1, 6)):
        data[random.integers(len(data))] = random.integers(256)
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") if end < len(data) else b""
        at = end + 4
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_damaged_pictures_and_records_are_read_or_refused_in_one_line_by_name(tmp_path, kind):
    path, refused, ways = tmp_path / f"a.{kind}", 0, (reading.picture, reading.mask, records.read)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, records.to_json(records.of(TextToImage(prompt="a cat"), (64, 64)))
    image = Image.fromarray(ramp(32, 20))
    (image.convert("P") if kind == "png" else image).save(path, exif=exif)
    whole = path.read_bytes()
    assert reading.picture(path).shape == (32, 20, 3) and records.read(path)["prompt"] == "a cat"
    for seed in range(300):
        path.write_bytes(mutated(whole, np.random.default_rng(seed)))
        for read_it in ways:
            try:
                read_it(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1, seed
                refused += 1
    assert 30 < refused < 870


@pytest.mark.parametrize(("width", "height"), [(1, 1), (100, 15)])
def test_a_tiny_picture_is_refused(tmp_path, width, height):
    write(tmp_path / "a.png", ramp(width, height))
    with pytest.raises(ValueError, match=rf"a\.png: {width} x {height} pixels; expected at least 16 on each side"):
        read(tmp_path / "a.png")


def test_more_pixels_than_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 900)
    write(tmp_path / "a.png", ramp(31, 30))
    with pytest.raises(ValueError, match=r"a\.png: 31 x 30 pixels; expected at most 900 pixels"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (ramp(31, 32)[..., 0], "31 x 32 pixels; expected the picture's 32 x 32"),
        (np.zeros((32, 32), np.uint8), "the mask is empty"),
    ],
)
def test_bad_masks_are_refused(tmp_path, mask, words):
    write(tmp_path / "a.png", ramp(32, 32))
    write(tmp_path / "a.mask.png", mask)
    with pytest.raises(ValueError, match=rf"a\.mask\.png: {words}"):
        read(tmp_path / "a.png", masked=True)


# ---- cutting -----------------------------------------------------------------------------------


def test_square_of_a_square_of_that_size_is_the_picture():
    np.testing.assert_array_equal(reading.cut(Image.fromarray(ramp(32, 32)), 32), ramp(32, 32))


@pytest.mark.parametrize(("place", "left"), [((0, 0), 0), ((0.5, 0.5), 16), ((1, 1), 32)])
def test_square_cuts_where_it_is_told_and_flips_after(place, left):
    image = Image.fromarray(ramp(64, 32))
    cut = reading.cut(image, 32, place)
    np.testing.assert_array_equal(cut, ramp(64, 32)[:, left : left + 32])
    np.testing.assert_array_equal(reading.cut(image, 32, place, flip=True), cut[:, ::-1])


def test_square_resizes_the_short_side_without_aliasing():
    stripes = np.repeat(np.tile([0, 255], 64)[None, :], 128, 0).astype(np.uint8)
    cut = reading.cut(Image.fromarray(np.stack([stripes] * 3, -1)), 32)
    assert cut.shape == (32, 32, 3) and cut.dtype == np.uint8
    assert np.abs(cut.astype(int) - 127).max() < 12  # a pick of every fourth pixel would be 0 or 255
    assert reading.cut(Image.fromarray(ramp(20, 40)), 64).shape == (64, 64, 3)


# ---- the folder --------------------------------------------------------------------------------


def test_an_example_is_a_function_of_its_generator(tmp_path):
    write(tmp_path / "a.png", ramp(96, 40))
    folder = Folder(settings(tmp_path, word="cat", templates="object", crop="random", flip=0.5))
    one, again, other = (folder.example(0, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (
        one["caption"] == again["caption"]
        and one["picture"].shape == (32, 32, 3)
        and set(one) == {"picture", "caption"}
    )
    np.testing.assert_array_equal(one["picture"], again["picture"])
    assert (one["picture"] != other["picture"]).any()


def test_random_crops_reach_both_ends_and_flips_are_as_frequent_as_asked(tmp_path):
    write(tmp_path / "a.png", ramp(96, 32))
    folder = Folder(settings(tmp_path, word="cat", crop="random", flip=0.25))
    rows = [folder.example(0, 32, np.random.default_rng(seed))["picture"][0, :, 0].astype(int) for seed in range(400)]
    assert 0.19 < np.mean([row[0] > row[-1] for row in rows]) < 0.31
    lefts = [min(row[0], row[-1]) for row in rows]
    assert min(lefts) < 5 and max(lefts) > 165
    still = Folder(settings(tmp_path, word="cat"))
    assert {tuple(still.example(0, 32, np.random.default_rng(s))["picture"][0, :, 0]) for s in range(9)} == {
        tuple(still.picture(0, 32)[0, :, 0])
    }


def test_the_mask_is_cut_and_flipped_with_its_picture(tmp_path):
    write(tmp_path / "a.png", ramp(96, 40))
    write(tmp_path / "a.mask.png", ramp(96, 40)[..., 0])
    folder = Folder(settings(tmp_path, word="cat", crop="random", flip=0.5, mask=True))
    for seed in range(8):
        item = folder.example(0, 32, np.random.default_rng(seed))
        assert item["mask"].shape == (32, 32) and item["mask"].dtype == np.float32 and item["mask"].max() <= 1
        assert np.abs(item["mask"] * 255 - item["picture"][..., 0]).max() < 8


def test_subjects_are_sub_folders(tmp_path):
    for name in ("a.png", "f.png", "x/b.png", "x/c.png", "x/d.png", "y/e.png"):
        write(tmp_path / name, ramp(20, 20))
    folder = Folder(settings(tmp_path, word="cat"))
    found = [{int(folder.other(i, np.random.default_rng(s))) for s in range(30)} for i in range(6)]
    assert found == [{0}, {1}, {3, 4}, {2, 4}, {2, 3}, {5}]


def test_the_fingerprint_follows_the_bytes(tmp_path):
    path = write(tmp_path / "a.png", ramp(20, 20))
    before = Folder(settings(tmp_path, word="cat")).fingerprint()
    assert Folder(settings(path, word="dog")).fingerprint() == before
    write(path, ramp(20, 20)[::-1])
    assert Folder(settings(tmp_path, word="cat")).fingerprint() != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(), "a.png (1 of 1 pictures): no caption; write one to a.txt"),
        (dict(word="cat", mask=True), "data.mask=True: no picture"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, words):
    write(tmp_path / "a.png", ramp(20, 20))
    with pytest.raises(ValueError) as error:
        Folder(settings(tmp_path, **changes))
    assert words in str(error.value)


def test_without_captions_prompts_can_be_left_out(tmp_path):
    write(tmp_path / "a.png", ramp(20, 20))
    assert Folder(settings(tmp_path, templates="none")).example(0, 32, np.random.default_rng(0))["caption"] == ""
