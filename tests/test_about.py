"""What exported files say: kohya's and ModelSpec's names, hashes as A1111 computes them, cards, what stays private."""

import getpass
import hashlib
import json
import socket

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

import sdjax
from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.formats import pipeline
from sdjax.formats.adapters import about
from sdjax.formats.adapters.about import Facts
from sdjax.formats.models import presets
from sdjax.formats.storage import hashes, headers
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.models.unet import UNet, UNetConfig
from sdjax.service import descriptions
from sdjax.training import facts, run_folder
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

CAPTIONS = ("a red cat, on grass", "a red cat, at home", "sleeping,  on grass")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "private-album"
    folder.mkdir()
    for i, text in enumerate(CAPTIONS):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


def exported(pictures, out, **more):
    """Returns the path of what a run wrote, which learned nothing, and its header."""
    method, sd = TextualInversion("<cat>", "cat"), pipeline.load("random:tiny")
    settings = Train(model="random:tiny", method=method, data=Data(path=str(pictures), size=32), steps=7, **more)
    (out / "samples").mkdir(parents=True)
    Image.new("RGB", (20, 10), (9, 8, 7)).save(out / "samples" / "0000005.png")
    trained, frozen = method.split(sd)
    path, _ = run_folder.export(method, frozen, trained, out / "export", **facts.told(settings, out, 7))
    with safetensors.safe_open(path, "np") as file:
        return path, file.metadata()


def test_a_run_says_what_it_was(pictures, tmp_path):
    path, said = exported(pictures, tmp_path / "my cat")
    assert said["ss_output_name"] == said["modelspec.title"] == "my cat"
    assert said["modelspec.trigger_phrase"] == "<cat>" and said["format"] == "pt"
    assert said["modelspec.architecture"] == "stable-diffusion/textual-inversion"
    assert (said["ss_steps"], said["ss_seed"], said["ss_num_train_images"]) == ("7", "0", "3")
    assert (said["ss_resolution"], said["modelspec.resolution"]) == ("(32, 32)", "32x32")
    tags = {"a red cat": 2, "on grass": 2, "at home": 1, "sleeping": 1}
    assert json.loads(said["ss_tag_frequency"]) == {"private-album": tags}
    assert json.loads(said["ss_dataset_dirs"]) == {"private-album": {"n_repeats": 1, "img_count": 3}}
    assert said["ss_sd_model_name"] == "random:tiny" and json.loads(said["settings"])["init"] == "cat"
    assert sdjax.attach(pipeline.load("random:tiny"), path).words
    again, _ = exported(pictures, tmp_path / "twice" / "my cat")
    assert again.read_bytes() == path.read_bytes()


def test_hashes_are_of_the_tensors(pictures, tmp_path):
    path, said = exported(pictures, tmp_path / "cat")
    data = path.read_bytes()
    wanted = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert said["sshs_model_hash"] == wanted and said["modelspec.hash_sha256"] == f"0x{wanted}"
    assert hashes.autov3(path) == wanted[:12]
    tensors, held = safetensors.numpy.load_file(path), headers.metadata(path)
    headers.tell(path, {**held, "modelspec.author": "ä"})
    assert headers.metadata(path) == {**held, "modelspec.author": "ä"} and hashes.autov3(path) == wanted[:12]
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["<cat>"], tensors["<cat>"])
    about.seal(path)
    assert headers.metadata(path)["sshs_model_hash"] == wanted


def test_the_card_is_a1111s(pictures, tmp_path):
    path, _ = exported(pictures, tmp_path / "cat")
    beside = path.with_suffix(".json")
    card = json.loads(beside.read_text())
    assert set(card) == {"description", "sd version", "activation text", "preferred weight", "negative text", "notes"}
    assert card["activation text"] == "<cat>" and card["sd version"] == "Unknown" and card["preferred weight"] == 1
    assert card["notes"].startswith(f"AutoV2 {hashes.autov2(path)}")
    assert Image.open(path.with_name("learned_embeds.preview.png")).getpixel((0, 0)) == (9, 8, 7)
    beside.write_text('{"notes": "mine"}')
    assert about.card(path, {}) == [] and json.loads(beside.read_text()) == {"notes": "mine"}


@pytest.mark.parametrize("public", [False, True])
def test_what_stays_private(public, pictures, tmp_path):
    """Never paths, users and machines; in a public file no captions, no names of folders and models either."""
    path, said = exported(pictures, tmp_path / "cat", public=public)
    written = b"".join(one.read_bytes() for one in path.parent.iterdir())
    never = [str(pictures.parent), str(tmp_path), socket.gethostname(), "Users"]
    never += [getpass.getuser()] if getpass.getuser() not in ("root",) else []
    assert not [text for text in never if text.encode() in written]
    told = [text for text in ("red cat", "on grass", "private-album", "random:tiny") if text.encode() in written]
    assert told == ([] if public else ["red cat", "on grass", "private-album", "random:tiny"])
    assert said["modelspec.trigger_phrase"] == "<cat>" and said["ss_output_name"] == "cat"
    assert set(about.PRIVATE) & said.keys() == ({"ss_output_name"} if public else set(about.PRIVATE) & said.keys())


@pytest.mark.parametrize(
    ("name", "shape", "version"),
    [
        ("sd15", "stable-diffusion-v1", "sd_v1"),
        ("sd21", "stable-diffusion-v2-768-v", "sd_v2_v"),
        ("tiny", "stable-diffusion", ""),
    ],
)
def test_base_models_have_the_names_of_others(name, shape, version):
    networks = {"unet": UNet(UNetConfig(**presets.SHAPES[name]["unet"]))}
    schedule = Schedule(prediction_type="v_prediction" if name == "sd21" else "epsilon")
    sd = pipeline.load("random:tiny").replace(networks=networks, schedule=schedule)
    told = about.metadata(Adapter(), Facts(title="x"), sd)
    assert told["modelspec.architecture"] == shape and told.get("ss_base_model_version", "") == version
    assert told["modelspec.prediction_type"] == ("v" if name == "sd21" else "epsilon")
    assert told["ss_v2"] == str(name == "sd21")


# Names that sd-scripts' train_network.py writes (version 0.9), for what a run knows.
KOHYA = """
session_id training_started_at training_finished_at output_name learning_rate text_encoder_lr unet_lr
num_train_images num_reg_images num_batches_per_epoch num_epochs epoch steps gradient_checkpointing
gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler network_module network_dim
network_alpha network_dropout network_args mixed_precision full_fp16 v2 base_model_version clip_skip
max_token_length cache_latents seed lowram fp8_base noise_offset noise_offset_random_strength
ip_noise_gamma_random_strength bucket_no_upscale resize_interpolation multires_noise_iterations
multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment optimizer max_grad_norm
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma debiased_estimation loss_type huber_schedule
huber_scale huber_c datasets tag_frequency dataset_dirs reg_dataset_dirs bucket_info resolution
batch_size_per_device total_batch_size enable_bucket min_bucket_reso max_bucket_reso shuffle_caption
keep_tokens color_aug flip_aug random_crop sd_model_name sd_model_hash new_sd_model_hash vae_name vae_hash
new_vae_hash validation_seed validation_split validate_every_n_steps max_validation_steps
""".split()


def lora_run(pictures, tmp_path, **more):
    """Returns (the header of a LoRA that learned nothing, after 7 of 12 steps; its run)."""
    classes = tmp_path / "class-album"
    classes.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(classes / "0.png")
    method = Lora(rank=2, text_encoder=True, convolutions=1, dropout=0.25, rank_dropout=0.5, max_norm=1.0)
    texts = dict(dropout=0.2, shuffle=True, keep=1, tag_dropout=0.1)
    loss = dict(huber=0.1, pyramid=0.3, perturbation=0.05)
    told = dict(author="Ada", license="CC0-1.0", description="A cat.")
    settings = Train(
        model="random:tiny",
        method=method,
        data=Data(path=str(pictures), size=32, word="sks cat", batch=2, **texts),
        class_data=ClassData(str(classes), weight=0.5, identifiers=("sks",)),
        optim=Optim(lr=1e-3, rates=((r"^text_encoder", 0.25), (r"up$", 1.0))),
        steps=12,
        **{**loss, **told, **more},
    )
    sd = pipeline.load("random:tiny")
    trained, frozen = method.split(sd, jax.random.key(0))
    told = facts.told(settings, tmp_path / "ink", 7, frozen, trained)
    path, _ = run_folder.export(method, frozen, trained, tmp_path / "ink" / "export", **told)
    return headers.metadata(path)


def test_a_lora_has_kohyas_names(pictures, tmp_path):
    said = lora_run(pictures, tmp_path)
    wanted = dict(
        learning_rate="0.001", unet_lr="0.001", text_encoder_lr="0.00025", steps="7", max_train_steps="12",
        num_train_images="3", num_reg_images="1", num_batches_per_epoch="3", num_epochs="4", epoch="3",
        network_dim="2", network_dropout="0.25", scale_weight_norms="1.0", shuffle_caption="True", keep_tokens="1",
        caption_tag_dropout_rate="0.1", caption_dropout_rate="0.2", loss_type="huber", huber_c="0.1",
        huber_schedule="snr", multires_noise_discount="0.3", multires_noise_iterations="6", ip_noise_gamma="0.05",
        prior_loss_weight="0.5", debiased_estimation="False", enable_bucket="False", zero_terminal_snr="False",
        validation_split="0.0",
    )  # fmt: skip
    assert {name: said.get(f"ss_{name}") for name in wanted} == wanted
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "1", "rank_dropout": "0.5"}
    assert json.loads(said["ss_reg_dataset_dirs"]) == {"class-album": {"n_repeats": 1, "img_count": 1}}
    assert {name.removeprefix("ss_") for name in said if name.startswith("ss_")} <= set(KOHYA)
    own = ("author", "license", "description", "trigger_phrase")
    assert [said[f"modelspec.{name}"] for name in own] == ["Ada", "CC0-1.0", "A cat.", "sks cat"]
    assert not [name for name in said if "date" in name.split(".")[-1:] or name.endswith("_at")]
    card = json.loads((tmp_path / "ink" / "export" / "ink.json").read_text())
    assert card["description"] == "A cat."


def test_a_rate_of_a_part_that_does_not_train_is_none(pictures, tmp_path):
    """A word learns at the run's rate; UNet and text encoder do not."""
    method, sd = TextualInversion("<cat>"), pipeline.load("random:tiny")
    trained, frozen = method.split(sd)
    settings = Train(model="random:tiny", method=method, data=Data(path=str(pictures)), optim=Optim(lr=5e-4))
    said = about.metadata(Adapter(), facts.of(settings, "cat", 1, frozen, trained), frozen)
    assert [said[f"ss_{name}"] for name in ("learning_rate", "unet_lr", "text_encoder_lr")] == [
        "0.0005",
        "None",
        "None",
    ]
    assert said["ss_resolution"] == "(32, 32)"  # the model's


def test_the_rates_of_the_parts_of_a_list_are_its_first_times_their_factors(pictures):
    method, optim = Lora(rank=2, text_encoder=True), Optim(lr="1e-3:5, 1e-4", rates=(("text_encoder", 0.5),))
    trained, frozen = method.split(pipeline.load("random:tiny"))
    settings = Train(model="random:tiny", method=method, data=Data(path=str(pictures)), optim=optim)
    told = facts.of(settings, "ink", 1, frozen, trained).settings
    assert (told["learning_rate"], told["unet_lr"], told["text_encoder_lr"]) == (optim.lr, 1e-3, 5e-4)


def test_dates_are_written_if_asked_and_never_in_public(pictures, tmp_path):
    said = lora_run(pictures, tmp_path, dates=True)
    assert said["modelspec.date"][:2] == "20" and float(said["ss_training_finished_at"]) > 1.7e9
    said = lora_run(pictures, tmp_path, dates=True, public=True)
    assert not set(about.PRIVATE) - {"ss_output_name"} & said.keys() and "class-album" not in str(said)
    assert said["modelspec.author"] == "Ada"


def test_buckets_are_listed_with_their_pictures(tmp_path):
    for i, size in enumerate(((64, 32), (64, 32), (32, 32))):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    settings = Train(model="random:tiny", data=Data(path=str(tmp_path), size=32, buckets=2, word="x"))
    told = facts.of(settings, "x", 1, pipeline.load("random:tiny")).settings
    found = {tuple(one["resolution"]): one["count"] for one in told["bucket_info"]["buckets"].values()}
    assert sum(found.values()) == 3 and found[(32, 32)] == 1 and max(found, key=max)[0] > max(found, key=max)[1]
    assert (told["min_bucket_reso"], told["max_bucket_reso"]) == (min(map(min, found)), max(map(max, found)))


def test_a_word_for_negative_prompts_is_no_trigger(tmp_path):
    method, sd = TextualInversion("<flaws>", negative=True), pipeline.load("random:tiny")
    trained, frozen = method.split(sd)
    settings = Train(model="random:tiny", method=method, data=Data())
    path, _ = run_folder.export(method, frozen, trained, tmp_path, **facts.told(settings, tmp_path, 1))
    said, card = headers.metadata(path), json.loads(path.with_suffix(".json").read_text())
    assert said["modelspec.is_negative_embedding"] == "true" and about.TRIGGER not in said
    assert (card["activation text"], card["negative text"]) == ("", "<flaws>") and about.unwanted(said) == ("<flaws>",)
    assert not descriptions.of("embedding", path)["words"]
    both = Chain((method, TextualInversion("<cat>")))  # in one file with a word for prompts
    told = about.metadata(Adapter(words={"<flaws>": 1, "<cat>": 1}), facts.of(Train(method=both), "x", 1), sd)
    assert told[about.TRIGGER] == "<cat>" and about.unwanted(told) == ("<flaws>",)
    assert "modelspec.is_negative_embedding" not in told
