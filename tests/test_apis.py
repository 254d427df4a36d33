"""What other programs send: their requests, in their order, with the answers that they rely on."""

import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from sdjax import conditions
from sdjax.client import ServerError
from sdjax.formats import pipeline
from sdjax.formats.models import controlnet
from tests.serving import Served, wait_for

LORA = "lora_te_text_model_encoder_layers_0_mlp_fc1"
URL = "data:image/png;base64,"
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with two models, an autoencoder, a ControlNet, a LoRA and an embedding."""
    root = tmp_path_factory.mktemp("apis")
    models, adapters = root / "models", root / "adapters"
    models.mkdir()
    sd = pipeline.load("random:tiny")
    pipeline.save(sd, models / "tiny-folder")
    pipeline.save(sd, models / "sub" / "tiny.safetensors", "single-file")
    controlnet.save_control(controlnet.load_control("random:tiny"), models / "canny")
    adapters.mkdir()
    metadata = {"ss_base_model_version": "sd_v1", "ss_tag_frequency": json.dumps({"a": {"ink": 4, "pen": 2}})}
    parts = {f"{LORA}.lora_down.weight": (4, 32), f"{LORA}.lora_up.weight": (64, 4)}
    noise = np.random.default_rng(0)
    save_file(
        {name: noise.normal(size=shape).astype(np.float32) for name, shape in parts.items()},
        adapters / "ink.safetensors", metadata,
    )  # fmt: skip
    save_file({"emb_params": noise.normal(size=(2, 32)).astype(np.float32)}, adapters / "mine.safetensors")
    server = Served(root / "ui", "--models", models, "--adapters", adapters, "--batch", 2, model=models / "tiny-folder")
    yield server.start()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def picture(seed=0, size=(32, 32), **more):
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(noise).save(written := io.BytesIO(), "PNG", **more)
    return written.getvalue()


def b64(data, prefix=""):
    return prefix + base64.b64encode(data).decode()


def image(text):
    """Returns the picture of an answer, which is raw base64 of a PNG."""
    data = base64.b64decode(text, validate=True)
    assert data.startswith(b"\x89PNG")
    return Image.open(io.BytesIO(data))


def txt2img(client, **body):
    return client.post("/sdapi/v1/txt2img", {**SMALL, "seed": 3, "prompt": "a face", **body})


def img2img(client, **body):
    return client.post("/sdapi/v1/img2img", {**SMALL, "seed": 3, "prompt": "a face", "steps": 4, **body})


# ---- clients, as they ask --------------------------------------------------------------------------


def test_open_webui(client):
    """Checks the model, switches it by posting the whole options object back, and asks with a few keys."""
    options = client.get("/sdapi/v1/options")
    models = client.get("/sdapi/v1/sd-models")
    assert options["sd_model_checkpoint"] in [one["title"] for one in models]
    assert all(one["title"] and one["model_name"] for one in models)
    other = next(one["title"] for one in models if one["model_name"] == "tiny")
    client.post("/sdapi/v1/options", {**options, "sd_model_checkpoint": other})
    assert client.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("sub/tiny.safetensors")
    body = {"prompt": "a cat", "batch_size": 2, "width": 32, "height": 32, "steps": 2, "negative_prompt": "dog"}
    got = client.post("/sdapi/v1/txt2img", body)
    info = json.loads(got["info"])
    assert len(got["images"]) == 2 and image(got["images"][0]).size == (32, 32) and isinstance(got["parameters"], dict)
    assert info["sd_model_name"] == "tiny" and len(info["all_seeds"]) == len(info["infotexts"]) == 2
    assert info["all_seeds"][1] == info["all_seeds"][0] + 1 and info["negative_prompt"] == "dog"
    client.post("/sdapi/v1/options", options)
    with pytest.raises(ServerError, match="sd_model_checkpoint"):
        client.post("/sdapi/v1/options", {"sd_model_checkpoint": "nothing.safetensors [0123456789]"})


def test_sillytavern(client):
    """Pings options, reads the lists, switches the model and polls until it is idle, asks with hires fix."""
    options = client.get("/sdapi/v1/options")
    lists = {name: client.get(f"/sdapi/v1/{name}") for name in
             ("sd-models", "sd-vae", "samplers", "schedulers", "upscalers", "latent-upscale-modes")}  # fmt: skip
    samplers, upscalers = ([one["name"] for one in lists[name]] for name in ("samplers", "upscalers"))
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(samplers) and {"None", "Lanczos"} <= set(upscalers)
    assert lists["latent-upscale-modes"] == [{"name": "Latent"}]
    client.post("/sdapi/v1/options", {"sd_model_checkpoint": lists["sd-models"][0]["title"]})
    ready = lambda now: now["progress"] == 0 and now["state"]["job_count"] == 0  # noqa: E731
    assert wait_for(lambda: ready(client.get("/sdapi/v1/progress")))
    body = {
        "prompt": "a cat", "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "karras", "cfg_scale": 7,
        "enable_hr": True, "hr_upscaler": "Latent", "hr_scale": 2, "hr_second_pass_steps": 2,
        "denoising_strength": 0.7, "restore_faces": False, "seed": -1, "save_images": True, "send_images": True,
        "do_not_save_grid": False, "do_not_save_samples": False, "width": 32, "height": 32, "steps": 2,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic", "forge_additional_modules": []},
        "override_settings_restore_afterwards": True, "clip_skip": 2,
    }  # fmt: skip
    got = client.post("/sdapi/v1/txt2img", body)
    text = json.loads(got["info"])["infotexts"][0]
    assert image(got["images"][0]).size == (64, 64) and "Clip skip: 2" in text and "Hires upscale: 2" in text
    assert "Schedule type: Karras" in text and client.post("/sdapi/v1/interrupt") == {}
    assert client.get("/sdapi/v1/options")["CLIP_stop_at_last_layers"] == 1
    client.post("/sdapi/v1/options", options)


def test_swarmui(client):
    """Lists, then pictures from words with a variation and from a picture."""
    assert client.get("/sdapi/v1/samplers")[0].keys() >= {"name", "aliases", "options"}
    one = txt2img(client, subseed=9, subseed_strength=0.5, sampler_name="Euler", n_iter=2)
    assert json.loads(one["info"])["all_subseeds"] == [9, 10]
    got = img2img(client, init_images=[b64(picture())], denoising_strength=0.5, sampler_name="DPM++ 2M Karras")
    text = json.loads(got["info"])["infotexts"][0]
    assert "Denoising strength: 0.5" in text and "Sampler: DPM++ 2M, Schedule type: Karras" in text


def test_photoshop_plugin(client):
    """Inpaints with what the plugin sends, reads a picture's settings, enlarges, and asks for every list."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(written := io.BytesIO(), "PNG")
    begin = picture(4)
    body = {
        "init_images": [b64(begin, URL)], "mask": b64(written.getvalue(), URL),
        "mask_blur": 4, "inpainting_fill": 2, "inpaint_full_res": True, "inpaint_full_res_padding": 4,
        "inpainting_mask_invert": 0, "denoising_strength": 0.75, "styles": [], "alwayson_scripts": {}, "batch_size": 1,
    }  # fmt: skip
    got = img2img(client, **body)
    made, before = (np.asarray(one).astype(int) for one in (image(got["images"][0]), Image.open(io.BytesIO(begin))))
    moved = np.abs(made - before).max(-1)
    assert moved[12:20, 12:20].max() > 10 and moved[:6].max() <= 1 and "mask" not in got["parameters"]
    Image.fromarray(np.pad(mask, ((0, 32), (0, 16)))).save(larger := io.BytesIO(), "PNG")
    photo = {"init_images": [b64(picture(4, (64, 48)))], "mask": b64(larger.getvalue())}
    assert image(img2img(client, **(body | photo))["images"][0]).size == (48, 64)  # the size is the masked region's
    turned = img2img(client, **(body | {"inpainting_mask_invert": 1, "inpaint_full_res": False}))
    moved = np.abs(np.asarray(image(turned["images"][0])).astype(int) - before).max(-1)
    assert moved[12:20, 12:20].max() <= 1 and moved[:4].max() > 10
    info = client.post("/sdapi/v1/png-info", {"image": got["images"][0]})
    assert info["parameters"]["Steps"] == "4" and info["info"].startswith("a face")
    assert client.post("/sdapi/v1/png-info", {"image": b64(picture())})["info"] == ""
    extra = {"image": b64(picture(5)), "upscaling_resize": 2, "upscaler_1": "Lanczos"}
    larger = client.post("/sdapi/v1/extra-single-image", extra)
    assert image(larger["image"]).size == (64, 64)
    size = {"resize_mode": 1, "upscaling_resize_w": 48, "upscaling_resize_h": 40, "upscaling_crop": True}
    assert image(client.post("/sdapi/v1/extra-single-image", extra | size)["image"]).size == (48, 40)
    loras = {one["name"]: one for one in client.get("/sdapi/v1/loras")}
    assert set(loras) == {"ink"} and "mine" in client.get("/sdapi/v1/embeddings")["loaded"]
    assert "controlnet" in client.get("/sdapi/v1/scripts")["txt2img"]
    assert client.get("/controlnet/model_list")["model_list"] == ["canny"]
    for name in ("version", "module_list", "control_types", "settings"):
        assert client.get(f"/controlnet/{name}")
    for name in ("refresh-loras", "refresh-checkpoints", "refresh-vae", "skip", "interrupt"):
        client.post(f"/sdapi/v1/{name}")
    for name in ("memory", "cmd-flags", "prompt-styles", "hypernetworks", "face-restorers", "realesrgan-models"):
        assert client.get(f"/sdapi/v1/{name}") is not None


def test_controlnet_units(client):
    """What alwayson_scripts say makes another picture, and the same one as our own API's."""
    unit = {"image": b64(picture(6)), "module": "none", "model": "canny", "weight": 1.0, "guidance_end": 0.8}
    plain = txt2img(client)["images"][0]
    controlled = txt2img(client, alwayson_scripts={"ControlNet": {"args": [unit, {"enabled": False}]}})
    assert np.abs(np.asarray(image(controlled["images"][0])).astype(int) - np.asarray(image(plain))).max() > 5
    text = json.loads(controlled["info"])["infotexts"][0]
    assert "ControlNet: canny" in text and "End: 0.8" in text
    off = {"controlnet": {"args": [{**unit, "model": "None"}]}, "ADetailer": {"args": [False]}}
    assert txt2img(client, alwayson_scripts=off)["images"] == [plain]
    again = img2img(client, init_images=[b64(picture(7))], alwayson_scripts={"controlnet": {"args": [unit]}})
    assert "Task: controlnet" in json.loads(again["info"])["infotexts"][0]
    with pytest.raises(ServerError, match="control"):
        txt2img(client, alwayson_scripts={"controlnet": {"args": [{**unit, "model": "nothing"}]}})
    with pytest.raises(ServerError, match="module|preprocess"):
        txt2img(client, alwayson_scripts={"controlnet": {"args": [{**unit, "module": "mediapipe"}]}})


def test_preprocessors(client):
    """Modules are the conditions that are made of a picture; detect makes the one that a picture is drawn with."""
    modules = client.get("/controlnet/module_list")["module_list"]
    assert modules[0] == "none" and {"canny", "scribble", "softedge"} <= set(modules) and "openpose" not in modules
    given = picture(6)
    ends = {"controlnet_threshold_a": 60, "controlnet_threshold_b": 120}
    body = {"controlnet_module": "canny", "controlnet_input_images": [b64(given)], **ends}
    (made,) = client.post("/controlnet/detect", body)["images"]
    expected = conditions.of("canny:low=60,high=120").make(np.asarray(Image.open(io.BytesIO(given))))
    assert np.array_equal(np.asarray(image(made)), expected) and expected.any()
    unit = {"model": "canny", "weight": 1.0}
    one, other = (
        txt2img(client, alwayson_scripts={"controlnet": {"args": [{**unit, **more}]}})["images"]
        for more in (
            {"image": b64(given), "module": "canny", "threshold_a": 60, "threshold_b": 120},
            {"image": made, "module": "none"},
        )
    )
    assert np.array_equal(np.asarray(image(one[0])), np.asarray(image(other[0])))
    for wrong in ({"controlnet_module": "mediapipe"}, {"controlnet_input_images": ["http://127.0.0.1/a.png"]}):
        with pytest.raises(ServerError, match="condition|controlnet_input_images"):
            client.post("/controlnet/detect", body | wrong)


def test_an_interrupted_picture_comes_half_done(client):
    """A client that interrupts gets what is there by then, at full size, and the device is free."""
    answers = []
    asking = threading.Thread(target=lambda: answers.append(txt2img(client, steps=150, width=64, height=64)))
    asking.start()
    wait_for(lambda: client.get("/sdapi/v1/progress")["state"]["sampling_step"] > 2)
    client.post("/sdapi/v1/interrupt")
    asking.join(60)
    (half,) = answers[0]["images"]
    assert image(half).size == (64, 64) and json.loads(answers[0]["info"])["infotexts"] == []
    (whole,) = txt2img(client, steps=150, width=64, height=64)["images"]
    assert not np.array_equal(np.asarray(image(half)), np.asarray(image(whole)))


def test_the_same_request_gives_the_same_bytes(client):
    made = txt2img(client)["images"]
    assert made == txt2img(client, unknown_key=1, restore_faces=False)["images"]
    assert made != txt2img(client, seed=4)["images"]
    assert b"job" not in base64.b64decode(made[0])


def test_what_a_prompt_names_is_attached_and_what_is_not_there_is_said(client):
    plain = txt2img(client)["images"]
    assert txt2img(client, prompt="a face <lora:ink:1>")["images"] != plain
    assert txt2img(client, prompt="a mine face")["images"] != txt2img(client, prompt="a yours face")["images"]
    with pytest.raises(ServerError, match="adapter 'pen'"):
        txt2img(client, prompt="a face <lora:pen:1>")


def test_settings_of_a_text_hold_where_the_body_says_nothing(client):
    text = json.loads(txt2img(client, steps=3, cfg_scale=4, negative_prompt="b")["info"])["infotexts"][0]
    body = {"infotext": text, "width": 32, "height": 32}
    got = client.post("/sdapi/v1/txt2img", body)
    assert json.loads(got["info"])["infotexts"][0] == text


def test_errors_name_the_keys_that_were_sent(client):
    for body, said in (({"cfg_scale": "x"}, "cfg_scale"), ({"sampler_name": "Nothing"}, "sampler_name"),
                       ({"width": 33, "height": 32}, "multiples"), ({"batch_size": 0}, "batch_size"),
                       ({"enable_hr": True, "hr_upscaler": "ESRGAN"}, "hr_upscaler"),
                       ({"enable_hr": True, "hr_resize_x": "64"}, "hr_resize_x")):  # fmt: skip
        with pytest.raises(ServerError, match=said):
            txt2img(client, **body)
    for body in ({}, {"init_images": []}, {"init_images": [5]}, {"init_images": ["x"]}):
        with pytest.raises(ServerError, match="init_images"):
            img2img(client, **body)


# ---- the real clients ----------------------------------------------------------------------------------


def test_webuiapi(served):
    webuiapi = pytest.importorskip("webuiapi")
    host, _, port = served.url.removeprefix("http://").partition(":")
    api = webuiapi.WebUIApi(host=host, port=int(port), sampler="Euler a", steps=2)
    made = api.txt2img(prompt="a cat", negative_prompt="dog", seed=1003, width=32, height=32, cfg_scale=7)
    assert made.image.size == (32, 32) and made.info["seed"] == 1003 and made.info["all_seeds"] == [1003]
    assert made.info["sampler_name"] == "Euler a"
    again = api.img2img(images=[made.image], prompt="a dog", seed=5, cfg_scale=6.5, denoising_strength=0.6, width=32,
                        height=32, steps=4)  # fmt: skip
    assert again.image.size == (32, 32)
    mask = Image.new("L", (32, 32), 255)
    assert api.img2img(images=[made.image], mask_image=mask, inpainting_fill=1, prompt="a", seed=1, width=32, height=32,
                       steps=2, denoising_strength=0.8).image  # fmt: skip
    unit = webuiapi.ControlNetUnit(image=made.image, module="none", model="canny", resize_mode="Just Resize")
    assert api.txt2img(prompt="a", controlnet_units=[unit], width=32, height=32, seed=1).image.size == (32, 32)
    larger = api.extra_single_image(image=made.image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=1.5)
    assert larger.image.size == (48, 48)
    assert api.png_info(made.image).info.startswith("a cat") or api.png_info(made.image).info == ""
    assert "Euler a" in api.util_get_sampler_names() and "karras" in api.util_get_scheduler_names()
    assert api.get_options()["sd_model_checkpoint"] in api.util_get_model_names()
    api.util_set_model("tiny-folder")
    assert api.util_get_current_model().startswith("tiny-folder")
    api.util_wait_for_ready()
    assert api.controlnet_model_list() == ["canny"] and api.controlnet_version() >= 1
    for ask in (api.get_progress, api.get_cmd_flags, api.get_sd_vae, api.get_upscalers, api.get_latent_upscale_modes,
                api.get_loras, api.get_sd_models, api.get_hypernetworks, api.get_face_restorers, api.get_schedulers,
                api.get_realesrgan_models, api.get_prompt_styles, api.get_scripts, api.get_embeddings, api.get_memory,
                api.interrupt, api.skip, api.refresh_checkpoints):  # fmt: skip
        ask()


def test_openai(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=0) as api:
        assert "tiny-folder" in [one.id for one in api.models.list()]
        assert api.models.retrieve("sub/tiny.safetensors").id == "sub/tiny.safetensors"
        small = {"steps": 2, "seed": 3}
        made = api.images.generate(prompt="a cat", model="tiny-folder", n=2, size="32x32", extra_body=small)  # pyright: ignore
        assert len(made.data) == 2 and made.created > 0 and image(made.data[0].b64_json).size == (32, 32)
        other = api.images.generate(prompt="a cat", size="32x32", response_format="url", extra_body=small)  # pyright: ignore
        assert image(b64(served.client()._call(other.data[0].url.removeprefix(served.url)))).size == (32, 32)
        jpeg = api.images.generate(prompt="a", size="32x32", output_format="jpeg", extra_body=small)  # pyright: ignore
        assert base64.b64decode(jpeg.data[0].b64_json).startswith(b"\xff\xd8")
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(hole := io.BytesIO(), "PNG")
        edit = {"image": ("a.png", picture()), "prompt": "a dog", "extra_body": {"steps": 4, "seed": 1}}
        assert image(api.images.edit(**edit).data[0].b64_json).size == (32, 32)
        assert image(api.images.edit(**edit, mask=("m.png", hole.getvalue())).data[0].b64_json).size == (32, 32)
        with pytest.raises(openai.BadRequestError, match="model"):
            api.images.generate(prompt="a", model="dall-e-3")
        with pytest.raises(openai.BadRequestError, match="size"):
            api.images.generate(prompt="a", size="large")  # pyright: ignore


# ---- the library -----------------------------------------------------------------------------------------


def test_the_library_tells_what_is_there(client):
    wait_for(lambda: all("hashes" in one for one in client.get("/api/library") if one["name"] != "pocket"))
    found = {one["name"]: one for one in client.get("/api/library")}
    assert {name: one["kind"] for name, one in found.items()} == {
        "pocket": "model", "tiny-folder": "model", "sub/tiny.safetensors": "model", "canny": "controlnet",
        "ink": "lora", "mine": "embedding",
    }  # fmt: skip
    assert found["ink"]["words"] == [["ink", 4], ["pen", 2]] and found["ink"]["base"] == "sd1"
    hashes = found["ink"]["hashes"]
    assert len(hashes["sha256"]) == 64 and hashes["autov2"] == hashes["sha256"][:10] and len(hashes["autov3"]) == 12
    title = next(one["title"] for one in client.get("/sdapi/v1/sd-models") if one["model_name"] == "tiny")
    hash = found["sub/tiny.safetensors"]["hashes"]["autov2"]
    assert title == f"sub/tiny.safetensors [{hash}]"
    for name in (title, hash, "tiny", "sub/tiny", "sub/tiny.safetensors"):
        assert (
            json.loads(txt2img(client, override_settings={"sd_model_checkpoint": name})["info"])["sd_model_hash"]
            == hash
        )


def test_a_picture_of_a1111_is_read(client):
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5")
    got = client.post("/sdapi/v1/png-info", {"image": b64(picture(pnginfo=about))})
    assert got["parameters"]["Sampler"] == "Euler a" and got["parameters"]["Negative prompt"] == "dog"
