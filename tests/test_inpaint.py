"""Inpainting: with mask channels against diffusers, with plain models, and what must stay as it is."""

import dataclasses
import types

import diffusers
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint as inpaint_module
import numpy as np
import pytest
import tiny
from PIL import Image

import sdjax
from sdjax.images import resize
from sdjax.sampling import choices, control, denoising, generate, inpainting, job, settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def plain():
    return tiny.model()


def hole(size=32):
    mask = np.zeros((size, size), np.uint8)
    mask[6:21, 9:24] = 255
    return mask


def make_both(sd, pipe, given, mask, strength):
    theirs = pipe(
        tiny.PROMPTS, image=[Image.fromarray(one) for one in given], mask_image=[Image.fromarray(mask)] * 2,
        strength=strength, num_inference_steps=10, guidance_scale=5.0, negative_prompt=tiny.NEGATIVE,
        output_type="np", height=32, width=32,
    ).images  # fmt: skip
    how = dict(steps=10, guidance=5.0, negative_prompt=tiny.NEGATIVE, seeds=[4, 5], strength=strength)
    asked = generate.job(settings.Inpaint, tiny.PROMPTS, **how)
    ours = inpainting.painted(sd, asked, given, np.stack([mask] * 2) > 127)
    return ours, theirs


@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_nine_channels_give_the_picture_of_diffusers(strength, tmp_path, monkeypatch):
    sd, given = tiny.model(in_channels=9), tiny.pictures()
    pipe = tiny.theirs(sd, tmp_path / "model", diffusers.StableDiffusionInpaintPipeline)
    start, own = tiny.start_noise([4, 5]), tiny.picture_noise([4, 5])
    left = tiny.give(monkeypatch, inpaint_module, *([start, own] if strength == 1 else [own, start, own]))
    ours, theirs = make_both(sd, pipe, given, hole(), strength)
    assert not left and tiny.difference(ours, theirs) <= 1


def test_a_plain_model_gives_the_picture_of_diffusers(plain, tmp_path, monkeypatch):
    """From noised pictures on; diffusers' first step from pure noise does not see the known region yet."""
    # Steps end at the picture itself, where diffusers puts the known region after the last one.
    plain = plain.replace(schedule=dataclasses.replace(plain.schedule, set_alpha_to_one=True))
    pipe = tiny.theirs(plain, tmp_path / "model", diffusers.StableDiffusionInpaintPipeline)
    own = tiny.picture_noise([4, 5])
    left = tiny.give(monkeypatch, inpaint_module, own, tiny.start_noise([4, 5]), own)
    mask = np.zeros((32, 32), np.uint8)
    mask[6:20, 8:24] = 255  # whole latent pixels: between, diffusers takes one pixel's mask and we any pixel's
    ours, theirs = make_both(plain, pipe, tiny.pictures(), mask, 0.7)
    assert not left and tiny.difference(ours, theirs) <= 1


@pytest.mark.parametrize("options", [{}, {"strength": 0.5, "sampler": "euler_a"}, {"margin": 4}, {"feather": 0}])
def test_what_lies_outside_the_mask_is_returned_bit_for_bit(plain, options):
    given = tiny.pictures(1, 39)[0][:37]  # a size that the model cannot make
    mask = np.zeros((37, 39), np.uint8)
    mask[10:20, 11:30], mask[36, 38], mask[0, 5] = 255, 200, 127
    made = sdjax.inpaint(plain, ["a cat"], given, mask, steps=3, **options)[0]
    np.testing.assert_array_equal(made[mask < 128], given[mask < 128])
    assert np.abs(made[12:18, 13:28].astype(int) - given[12:18, 13:28]).mean() > 3


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize(("top", "left"), [(40, 50), (0, 90), (55, 0)])
def test_boxes_have_the_shape_of_what_is_made(size, top, left):
    mask = np.zeros((60, 100), bool)
    mask[top : top + 5, left : left + 10] = True
    rows, columns = inpainting.box(mask, 3, size)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    assert mask[rows, columns].sum() == 50 and height * size[1] == width * size[0]
    inside = np.zeros_like(mask)
    inside[rows, columns] = True
    near = inside[max(0, top - 3) : top + 8, max(0, left - 3) : left + 13]
    assert near.all() and inside.sum() <= 2 * 16 * 16 * 2


def test_a_box_is_cut_where_the_picture_ends():
    mask = np.zeros((10, 100), bool)
    mask[:, 40:60] = True
    rows, columns = inpainting.box(mask, 0, (32, 32))
    assert (rows, columns) == (slice(0, 10), slice(40, 60))
    picture = tiny.pictures(1, 20)[0][:10]
    again = inpainting.unfilled(resize.fit(picture, (40, 40), "fill"), (10, 20))
    assert np.abs(again.astype(int) - picture).mean() < 1


def test_margins_are_those_of_each_picture_and_keep_its_shape(plain, monkeypatch):
    """What is shown has squares for squares, and a picture's does not depend on its neighbours' masks."""
    given, masks, seen = tiny.pictures(2, 60), np.zeros((2, 60, 60), np.uint8), []
    masks[0, 5:10, 5:25], masks[1, 40:58, 40:48] = 255, 255

    def grey(sd, job, shown, hidden):
        seen.append(hidden)
        return np.full_like(shown, 127)

    monkeypatch.setattr(inpainting, "painted", grey)
    together = sdjax.inpaint(plain, ["a", "b"], list(given), list(masks), margin=2)
    for i in range(2):
        alone = sdjax.inpaint(plain, ["a"], given[i], masks[i], margin=2)
        np.testing.assert_array_equal(together[i], alone[0])
        np.testing.assert_array_equal(seen[0][i], seen[i + 1][0])
    rows, columns = (seen[0][0].any(1).sum(), seen[0][0].any(0).sum())
    assert columns == pytest.approx(4 * rows, abs=3)  # the mask is 5 by 20
    with pytest.raises(ValueError, match="margin=-1: expected a whole number, 0 to 100000"):
        sdjax.inpaint(plain, ["a"], given[0], masks[0], margin=-1)


def test_with_a_margin_the_size_is_the_crops_and_the_picture_keeps_its_own(plain, monkeypatch):
    """As A1111's "only masked": the box has the aspect ratio of width and height, and is computed at that size."""
    given, mask, seen = tiny.pictures(1, 200)[0][:160], np.zeros((160, 200), np.uint8), []
    mask[60:70, 80:90] = 255

    def white(sd, some, shown, hidden):
        seen.append((shown, some.control[0].picture[0]))
        return np.full_like(shown, 255)

    monkeypatch.setattr(inpainting, "painted", white)
    edges = control.Control(None, None).on(given)
    files = dict(image="a.png", mask="m.png", control=("c",), control_image=("e.png",))
    made = settings.ControlNet(prompt="a", size="64x32", margin=3, feather=0, resize="fill", **files)
    made = inpainting.repainted(plain, job.Job((made,), control=edges), given, mask)[0]
    shown, hint = seen[0]
    assert shown.shape == (1, 32, 64, 3) and made.shape == given.shape
    assert (made[60:70, 80:90] == 255).all()
    np.testing.assert_array_equal(made[mask == 0], given[mask == 0])
    near = Image.fromarray(given[57:73, 69:101]).resize((64, 32), Image.Resampling.LANCZOS)  # 16 by 32 around the mask
    np.testing.assert_array_equal(shown[0], np.asarray(near))
    np.testing.assert_array_equal(hint, shown[0])  # the ControlNet's picture is cropped too


def test_the_masked_content_is_what_less_strength_starts_from(monkeypatch):
    given, holes = tiny.pictures(1), hole()[None] > 0
    sd = types.SimpleNamespace(factor=2)
    where = inpainting._any(holes, 2)
    seen = []
    monkeypatch.setattr(
        inpainting, "encode", lambda sd, shown, keys: seen.append(shown) or np.full((1, 16, 16, 4), 7.0)
    )
    made = {}
    for content in choices.CONTENTS:
        asked = generate.job(settings.Inpaint, ["a"], seeds=[5], image="a", mask="m", masked_content=content)
        made[content] = np.asarray(inpainting.begun(sd, asked, given, holes))
    noise = np.asarray(asked.start_noise((16, 16, 4)))
    np.testing.assert_array_equal(made["original"], 7)
    np.testing.assert_array_equal(made["fill"], 7)
    np.testing.assert_array_equal(made["nothing"], np.where(where, 0, np.full((1, 16, 16, 4), 7)))
    np.testing.assert_array_equal(made["noise"], np.where(where, noise, 7.0))
    assert (seen[0] == given).all() and (seen[1] != given)[holes].any() and (seen[1] == given)[~holes].all()


def test_a_filled_hole_has_the_colours_around_it():
    picture, inside = np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), bool)
    picture[:, :40, 0] = picture[:, 40:, 2] = 200
    inside[30:50, 8:28] = True
    made = inpainting.filled(np.where(inside[..., None], 255, picture).astype(np.uint8), inside)
    np.testing.assert_array_equal(made[~inside], picture[~inside])
    red, green, blue = made[inside].astype(int).T
    assert red.min() > 150 and green.max() == 0 and blue.max() < 50


def test_the_painted_region_fades_in():
    given, made = np.zeros((1, 20, 20, 3), np.uint8), np.full((1, 20, 20, 3), 250, np.uint8)
    holes = np.zeros((1, 20, 20), bool)
    holes[:, 5:15, 5:] = True
    row = inpainting.paste(made, given, holes, feather=4)[0, 10, :, 0]
    np.testing.assert_array_equal(row[4:11], [0, 50, 100, 150, 200, 250, 250])
    assert row[-1] == 250  # the picture's edge is no edge of the mask
    np.testing.assert_array_equal(inpainting.paste(made, given, holes)[0, :, :, 0], np.where(holes[0], 250, 0))


@pytest.mark.parametrize("most", [1, 3, 100_001])
def test_the_depth_of_a_hole_is_what_erosions_count(most):
    random = np.random.default_rng(most)
    for hole in (random.random((9, 14)) < 0.97, np.ones((4, 6), bool), np.zeros((4, 6), bool)):
        outside = np.argwhere(~hole)
        wanted = np.full(hole.shape, most, np.float32)
        for place in np.ndindex(*hole.shape) if len(outside) else ():
            wanted[place] = min(most, np.abs(outside - place).max(1).min())
        np.testing.assert_array_equal(inpainting._depth(hole, most), wanted)


def test_an_inpainting_model_makes_pictures_from_words_alone():
    sd = tiny.model(in_channels=9)
    made = sdjax.text2img(sd, ["a cat"], steps=3, seeds=[2])
    grey, everywhere = np.full((32, 32, 3), 128, np.uint8), np.full((32, 32), 255, np.uint8)
    again = sdjax.inpaint(sd, ["a cat"], grey, everywhere, steps=3, seeds=[2], feather=0)
    assert np.abs(made.astype(int) - again).max() <= 1


def test_strength_and_mask_compile_nothing(plain):
    given = tiny.pictures(1)[0]
    sdjax.inpaint(plain, ["a cat"], given, hole(), steps=4, strength=0.5)
    before = denoising._sample._cache_size()
    sdjax.inpaint(plain, ["a cat"], given, hole().T, steps=6, strength=0.8)
    assert denoising._sample._cache_size() == before


def test_prompts_of_several_sizes_keep_their_pictures_and_masks(plain):
    texts, given = ["a cat", ", ".join(["a face on the beach"] * 6)], tiny.pictures()
    masks, how = [hole(), hole()[:, ::-1]], dict(steps=3, grammar="a1111", strength=0.7)
    together = sdjax.inpaint(plain, texts, given, masks, seeds=[3, 4], **how)
    for i, text in enumerate(texts):
        alone = sdjax.inpaint(plain, [text], given[i], masks[i], seeds=[3 + i], **how)
        assert np.abs(together[i].astype(int) - alone[0]).max() <= 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((32, 32), np.uint8), "the mask is empty: expected white where to paint"),
        (np.full((16, 32), 255, np.uint8), "a mask of .16, 32. pixels for a picture of .32, 32."),
        (np.ones((32, 32), bool), "type bool"),
    ],
)
def test_masks_that_do_not_fit(plain, mask, message):
    with pytest.raises(ValueError, match=message):
        sdjax.inpaint(plain, ["a cat"], tiny.pictures(1)[0], mask)


def test_a_model_for_another_task_is_refused():
    with pytest.raises(ValueError, match="the UNet takes 7 channels, this task has 4 . 0"):
        sdjax.text2img(tiny.model(in_channels=7), ["a cat"], steps=3)
