"""Settings in the pictures of other programs, as these write them."""

import json

import pytest
from PIL import Image, PngImagePlugin

from sdjax.service import records
from sdjax.service.foreign import read

GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 20, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
        "model": ["4", 0], "positive": ["12", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "../../secret.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "10": {"class_type": "KSampler", "inputs": {
        "seed": 9, "steps": 5, "cfg": 3, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["11", 0]}},
    "11": {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 1024, "height": 1536}},
    "12": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "strength": 1.0}},
    "20": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}},
}  # fmt: skip
WORKFLOW = {
    "nodes": [
        {"id": 3, "type": "KSampler", "widgets_values": [7, "randomize", 20, 6.5, "dpmpp_2m", "karras", 1],
         "inputs": [{"name": "positive", "link": 1}, {"name": "negative", "link": 2},
                    {"name": "latent_image", "link": 3}]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a cat"], "inputs": [{"name": "clip", "link": None}]},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["blurry"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1]},
    ],
    "links": [[1, 6, 0, 3, 1, "CONDITIONING"], [2, 7, 0, 3, 2, "CONDITIONING"], [3, 5, 0, 3, 3, "LATENT"]],
}  # fmt: skip
INVOKEAI = {
    "positive_prompt": "a cat", "negative_prompt": "blurry", "seed": 7, "steps": 20, "cfg_scale": 6.5,
    "scheduler": "dpmpp_2m_k", "width": 512, "height": 768, "model": {"key": "/etc/passwd"},
}  # fmt: skip
OLD_INVOKEAI = {"model": "stable diffusion", "image": {
    "prompt": [{"prompt": "a cat [blurry]", "weight": 1.0}], "seed": 7, "steps": 20, "cfg_scale": 6.5,
    "sampler": "k_dpmpp_2m", "width": 512, "height": 768,
}}  # fmt: skip
NOVELAI = {"steps": 20, "seed": 7, "scale": 6.5, "sampler": "k_dpmpp_2m", "noise_schedule": "karras", "uc": "blurry",
           "width": 512, "height": 768}  # fmt: skip
FOOOCUS = {
    "prompt": "a cat", "negative_prompt": "blurry", "steps": 20, "resolution": "(512, 768)", "guidance_scale": 6.5,
    "sampler": "dpmpp_2m_gpu", "scheduler": "karras", "seed": "7", "base_model": "juggernautXL",
}  # fmt: skip
KOHYA = {
    "prompt": "a cat",
    "negative-prompt": "blurry",
    "seed": "7",
    "steps": "20",
    "scale": "6.5",
    "sampler": "dpmsolver++",
}
SAID = {
    "ComfyUI": {"prompt": json.dumps(GRAPH), "workflow": "{}"},
    "ComfyUI, workflow": {"workflow": json.dumps(WORKFLOW)},
    "InvokeAI": {"invokeai_metadata": json.dumps(INVOKEAI)},
    "InvokeAI, 2": {"sd-metadata": json.dumps(OLD_INVOKEAI)},
    "NovelAI": {"Description": "a cat", "Comment": json.dumps(NOVELAI), "Software": "NovelAI"},
    "Fooocus": {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"},
    "kohya": KOHYA,
}


CIRCLE = {"1": {"inputs": {"positive": ["1", 0], "steps": "x", "seed": ["1", 0], "latent_image": [[], 1]}}}
ODD = {"nodes": [3, {"id": [], "widgets_values": 4, "inputs": ["x", {"link": 1}]}], "links": [[2], 2]}


def written(path, texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("case", SAID)
def test_pictures_of_other_programs_name_their_settings(case, tmp_path):
    record = records.read(written(tmp_path / "a.png", SAID[case]))
    wanted = {"prompt": "a cat", "negative_prompt": "blurry", "seed": 7, "steps": 20, "guidance": 6.5,
              "sampler": "dpmpp_2m"}  # fmt: skip
    assert {name: record.settings[name] for name in wanted} == wanted
    assert record.task == "text2img" and record.more == {"Made by": case.split(",")[0]}
    if case != "kohya":
        assert record.settings["size"] == (768, 512)
    if case not in ("kohya", "InvokeAI, 2"):
        assert record.settings["schedule"] == "karras"
    assert not {"model", "vae", "adapter", "image"} & record.settings.keys()
    assert records.request(record).prompt == "a cat" and "Seed: 7" in records.text(record)


def test_a_sample_of_a_training_names_its_seed(tmp_path):
    for name in ("cat_e000002_00_20231101123456_42.png", "000100_01_20231101123456_42.png"):
        assert records.read(written(tmp_path / name, {})).settings == {"seed": 42}
    with pytest.raises(ValueError, match="no record"):
        records.read(written(tmp_path / "cat_42.png", {}))


def test_a1111s_text_and_our_record_come_first(tmp_path):
    text = "a dog\nSteps: 5, Sampler: Euler, Seed: 1, Size: 64x64"
    assert records.read(written(tmp_path / "a.png", {"parameters": text, **SAID["ComfyUI"]}))["prompt"] == "a dog"


@pytest.mark.parametrize("texts", [
    {"prompt": "{"}, {"prompt": "[" * 5000}, {"prompt": '{"a": ' * 5000},
    {"prompt": json.dumps({"1": 3, "2": {"inputs": []}})},
    {"prompt": json.dumps(CIRCLE)}, {"workflow": json.dumps(ODD)},
    {"sd-metadata": json.dumps({"image": {"prompt": [1, {}], "seed": []}})}, {"Comment": '{"steps": [], "seed": {}}'},
    {"parameters": '{"prompt": [], "resolution": "()"}'}, {"invokeai_metadata": '{"width": true, "seed": NaN}'},
])  # fmt: skip
def test_damaged_texts_are_no_record_or_one_without_the_damaged_values(texts, tmp_path):
    try:
        record = records.read(written(tmp_path / "a.png", texts))
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        records.request(record, prompt="a")


def test_values_that_no_setting_accepts_are_shown_and_not_applied(tmp_path):
    said = json.dumps(INVOKEAI | {"steps": -3, "scheduler": "heunpp2"})
    record = records.read(written(tmp_path / "a.png", {"invokeai_metadata": said}))
    assert "steps" not in record.settings and record.more["Steps"] == "-3" and record.settings["sampler"] == "heunpp2"
    assert read({"invokeai_metadata": said}, "a.png")[0] == "InvokeAI"
