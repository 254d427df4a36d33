"""Bodies of A1111's API as settings, without a server."""

import asyncio

import pytest

from sdjax.sampling.fields import make
from sdjax.sampling.settings import TextToImage
from sdjax.settings import SettingError
from sdjax.web import a1111_words


def asked(**body):
    async def keep(*_):
        raise AssertionError("no picture is given")

    names = ["None", "Lanczos", "Nearest", "x4 [0123456789]"]
    return asyncio.run(a1111_words.of_body("txt2img", {"prompt": "a", "enable_hr": True, **body}, {}, keep, names))


@pytest.mark.parametrize(
    "name, method, noted",
    [("None", "lanczos", 0), ("Lanczos", "lanczos", 0), ("Nearest", "nearest", 0), ("x4 [0123456789]", "lanczos", 1),
     ("Latent", "latent", 0), ("Latent (bicubic antialiased)", "latent", 1)],
)  # fmt: skip
def test_every_listed_upscaler_enlarges(name, method, noted):
    made = asked(hr_upscaler=name)
    assert make(TextToImage, made.values | {"prompt": "a"}).hires_method == method and len(made.notes) == noted
    assert all(repr(name) in note for note in made.notes)


def test_the_second_pass_of_hires_fix_has_a_prompt_and_a_sampler_of_its_own():
    body = dict(hr_prompt="b", hr_negative_prompt="c", hr_sampler_name="DPM++ 2M Karras", hr_cfg=3)
    assert make(TextToImage, asked(tiling=True).values).seamless
    made = asked(**body, hr_checkpoint_name="Use same checkpoint")
    assert not made.notes
    one = make(TextToImage, made.values)
    again = one.again()
    assert (one.prompt, one.sampler) == ("a", "euler") and again.texts == ("b", "c")
    assert (again.sampler, again.schedule, again.guidance) == ("dpmpp_2m", "karras", 3)
    same = asked(hr_prompt="", hr_sampler_name="Use same sampler", hr_scheduler="Use same scheduler")
    one = make(TextToImage, same.values)
    assert one.again() == one
    assert not any(name.startswith("hires") for name in asked(enable_hr=False, **body).values)
    assert asked(hr_checkpoint_name="other").notes == ["sdjax does not have hr_checkpoint_name"]


@pytest.mark.parametrize(
    "body, size, scale",
    [({"width": 512, "height": 512, "hr_resize_x": 0, "hr_resize_y": 768}, "512x512", 1.5),
     ({"width": 512, "height": 768, "hr_resize_x": 1024, "hr_resize_y": 1536}, "512x768", 2),
     ({"width": 512, "height": 768, "hr_resize_x": 768}, "512x768", 1.5),
     ({"hr_resize_x": 1024}, "512x512", 2), ({"hr_resize_x": 768}, "512x512", 1.5),
     ({"hr_resize_y": 640}, "512x512", 1.25),
     ({"width": 768, "hr_resize_y": 1024}, "768x512", 2), ({"hr_scale": 1.25, "hr_resize_x": 0}, None, 1.25)],
)  # fmt: skip
def test_hires_fix_in_pixels(body, size, scale):
    made = asked(**body)
    assert made.values["hires"] == scale and made.values.get("size") == size and not made.notes


def test_hires_fix_to_other_proportions_is_noted():
    made = asked(width=512, height=512, hr_resize_x=768, hr_resize_y=1152, restore_faces=True)
    assert made.values["hires"] == 2.25
    assert made.notes == ["sdjax makes 1152x1152 and does not cut it to 768x1152", "sdjax does not have restore_faces"]
    for name, value in (("hr_resize_x", "64"), ("hr_resize_y", -1), ("hr_resize_y", 64.0)):
        with pytest.raises(SettingError, match=f"{name}=.*pixels"):
            asked(**{name: value})
