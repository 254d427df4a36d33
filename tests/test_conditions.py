"""Conditions: edges as OpenCV's, lines, sketches, skeletons, regions; the same in training, sampling and by hand."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from programs import sample

import sdjax
from sdjax import conditions
from sdjax.conditions import files, openpose
from sdjax.data import batches, pocketland
from sdjax.data.batches import Data
from sdjax.formats import pipeline
from sdjax.methods import controlnet
from sdjax.sampling import generate
from sdjax.sampling.settings import ControlNet
from sdjax.settings import SettingError, override
from sdjax.training import checks
from sdjax.training.settings import Train

MADE = ("canny", "softedge", "scribble", "lines")
THRESHOLDS = [(100, 200), (20, 60), (300, 100), (0, 2040)]


def pictures():
    """Returns 20 pictures: noise, soft noise, and drawn people."""
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (37 + i, 53, 3)).astype(np.uint8) for i in range(8)]
    soft = [255 - cv2.GaussianBlur(one, (0, 0), 1 + i / 2) // 1 for i, one in enumerate(noise[:4])]
    drawn = [pocketland.draw(*pocketland.example(4 * i, 4, 0.2, 0), 96) for i in range(8)]
    return [*noise, *soft, *drawn]


@pytest.mark.parametrize(("low", "high"), THRESHOLDS)
def test_canny_is_that_of_opencv(low, high):
    found = 0
    assert len(pictures()) == 20
    for picture in pictures():
        ours = conditions.of(f"canny:low={low},high={high}").make(picture)
        assert ours.shape == picture.shape and ours.dtype == np.uint8
        wanted = cv2.Canny(picture, low, high)
        np.testing.assert_array_equal(ours, np.repeat(wanted[..., None], 3, -1))
        grey = np.ascontiguousarray(picture[..., 0])
        np.testing.assert_array_equal(conditions.canny.edges(grey, low, high), cv2.Canny(grey, low, high) > 0)
        found += (wanted > 0).sum()
    assert found > 1000 or (low, high) == (0, 2040)


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_a_picture_shows_where_things_end(name):
    """A dark square on light ground: something at its border, nothing far from it; the same for any size."""
    picture = np.full((128, 160, 3), 220, np.uint8)
    picture[32:96, 48:112] = 30
    made = conditions.of(name).make(picture)
    assert made.shape == picture.shape and made.dtype == np.uint8 and (made == made[..., :1]).all()
    assert made.max() == 255 and made[:16].max() == 0 and made[:, -24:].max() == 0
    border = np.zeros((128, 160), bool)
    border[28:100, 44:116] = True
    border[40:88, 56:104] = False
    assert made[border].max() == 255 and (made[..., 0] > 0)[border].mean() > 0.05
    assert conditions.of(name).make(np.full((32, 32, 3), 77, np.uint8)).max() == 0


def test_lines_are_straight_and_long():
    page = np.full((96, 96, 3), 255, np.uint8)
    cv2.line(page, (10, 20), (80, 60), (0, 0, 0), 2)
    cv2.circle(page, (70, 20), 4, (0, 0, 0), 1)
    made = conditions.of("lines:length=0.3").make(page)[..., 0] > 0
    y, x = np.nonzero(made)
    assert len(x) > 60 and np.abs((y - 20) - (x - 10) * 40 / 70).max() < 4


def person():
    """Returns points of somebody who stands with both arms raised, in shares of the picture."""
    head, neck = [(0.5, 0.2)], [(0.5, 0.3)]
    arms = [(0.4, 0.3), (0.3, 0.2), (0.25, 0.1), (0.6, 0.3), (0.7, 0.2), (0.75, 0.1)]
    legs = [(0.45, 0.6), (0.45, 0.75), (0.45, 0.9), (0.55, 0.6), (0.55, 0.75), (0.55, 0.9)]
    places = [*head, *neck, *arms, *legs, (0.48, 0.18), (0.52, 0.18), (0.45, 0.2), (0.55, 0.2)]
    return np.array([(x, y, 0.9) for x, y in places], np.float32)


def write_pose(path, points, **more):
    path.write_text(json.dumps({"people": [{"pose_keypoints_2d": np.ravel(points).tolist()}], **more}))
    return path


def test_skeletons_have_the_colours_that_controlnets_know(tmp_path):
    maker = conditions.of("openpose")
    made = maker.read(write_pose(tmp_path / "a.json", person()), (256, 512))
    assert made.shape == (256, 512, 3)
    table = [[255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0], [85, 255, 0], [0, 255, 0],
             [0, 255, 85], [0, 255, 170], [0, 255, 255], [0, 170, 255], [0, 85, 255], [0, 0, 255], [85, 0, 255],
             [170, 0, 255], [255, 0, 255], [255, 0, 170], [255, 0, 85]]  # fmt: skip
    for (x, y, _), colour in zip(person(), table, strict=True):
        assert made[int(256 * y), int(512 * x)].tolist() == colour
    middle = (person()[1] + person()[8]) / 2  # neck to right hip: the seventh limb
    assert made[int(256 * middle[1]), int(512 * middle[0])].tolist() == [0, 153, 0]
    pixels = person() * (512, 256, 1)
    body = np.zeros((25, 3), np.float32)
    body[list(openpose.BODY_25)] = pixels
    wide = {"canvas_width": 512, "canvas_height": 256}
    np.testing.assert_array_equal(maker.read(write_pose(tmp_path / "b.json", body, **wide)), made)
    few = person()
    few[4] = 0  # a wrist that was not found
    assert (maker.read(write_pose(tmp_path / "c.json", few), (256, 512))[:40, 100:160] == 0).all()
    for text in ("{}", '{"people": [{"pose_keypoints_2d": [1, 2]}]}', "[" * 5000, '{"people": [{}]}', "\x00"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ValueError, match="d.json: expected OpenPose's JSON"):
            maker.read(tmp_path / "d.json", (64, 64))
    with pytest.raises(ValueError, match="canvas_width and canvas_height"):
        maker.read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a canvas of 999999 x 64 pixels"):
        maker.read(write_pose(tmp_path / "e.json", body, canvas_width=999999, canvas_height=64))


def test_regions_masks_and_pictures_come_from_files(tmp_path):
    numbers = np.zeros((32, 48), np.uint8)
    numbers[:, 24:] = 15
    Image.fromarray(numbers).save(tmp_path / "a.png")
    made = conditions.of("segmentation").read(tmp_path / "a.png")
    assert made[0, 0].tolist() == [0, 0, 0] and made[0, -1].tolist() == [192, 128, 128]  # a person, in VOC's colours
    assert conditions.of("mask").read(tmp_path / "a.png").max() == 0
    Image.fromarray(made).save(tmp_path / "b.png")
    for name in ("segmentation", "files"):
        np.testing.assert_array_equal(conditions.of(name).read(tmp_path / "b.png"), made)
    mask = conditions.of("mask").read(tmp_path / "b.png")
    assert mask[0, 0, 0] == 0 and mask[0, -1, 0] == 255


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_depth_comes_from_a_model_of_transformers(tmp_path):
    """A small random one in a folder, as transformers itself estimates with it; near is white."""
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    transformers.set_seed(0)
    model = transformers.DPTForDepthEstimation(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.constant_(model.head.head[-2].bias, 5.0)  # a rectifier stands behind it
    model.save_pretrained(tmp_path / "dpt")
    transformers.DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dpt")
    picture = tiny.pictures(1, 40)[0]
    made = conditions.of(f"depth:model={tmp_path / 'dpt'}").make(picture)
    theirs = transformers.pipeline("depth-estimation", model=str(tmp_path / "dpt"))(Image.fromarray(picture))
    wanted = theirs["predicted_depth"].numpy()
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255
    assert made.shape == picture.shape and (made.min(), made.max()) == (0, 255)
    assert np.abs(made[..., 0] - wanted).max() <= 1
    with pytest.raises(ValueError, match='condition "depth": model='):
        conditions.of(f"depth:model={tmp_path}").make(picture)


# ---- in training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


def folder(path, count=3):
    for i, picture in enumerate(tiny.pictures(count, 48, seed=3)):
        Image.fromarray(picture).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text("a face")
    return path


def hints(data, sd):
    return batches.build(data, sd, 0)[0]["control"]["hint"]


def test_edges_are_made_of_the_pictures_as_they_are_shown(sd, tmp_path):
    data = Data(path=str(folder(tmp_path)), size=32, batch=2, crop="random", flip=0.5, condition="canny:low=20,high=40")
    batch = batches.build(data, sd, 0)[0]
    for pixels, hint in zip(batch["pixels"], batch["control"]["hint"], strict=True):
        shown = np.round((pixels + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(hint, data.maker.make(shown).astype(np.float32) / 255)
    kept = override(data, [f"cache={tmp_path / 'cache'}", "crop=center", "flip=0.0"])
    plain = hints(override(kept, ["cache=''"]), sd)
    np.testing.assert_array_equal(hints(kept, sd), plain)
    assert plain.max() == 1 and plain.dtype == np.float32


@pytest.mark.parametrize("elsewhere", [False, True])
def test_files_are_cut_with_their_pictures(sd, tmp_path, elsewhere):
    place = tmp_path / ("others" if elsewhere else "pictures")
    (tmp_path / "pictures").mkdir()
    place.mkdir(exist_ok=True)
    path = folder(tmp_path / "pictures")
    ending = ".png" if elsewhere else files.PICTURES[0]
    for i in range(3):
        Image.open(path / f"{i}.png").resize((96, 96), Image.Resampling.NEAREST).save(place / f"{i}{ending}")
    more = [f"condition_folder={place}"] if elsewhere else []
    data = override(Data(path=str(path), size=48, batch=3, flip=0.5, condition="files"), more)
    batch = batches.build(override(data, ["encode=false"]), sd, 0)[0]
    assert len(batch["pixels"]) == 3
    np.testing.assert_allclose(batch["control"]["hint"], (batch["pixels"] + 1) / 2, atol=0.1)
    kept = batches.build(override(data, [f"cache={tmp_path / 'cache'}"]), sd, 0)[0]
    assert "moments" in kept and "pixels" not in kept
    np.testing.assert_array_equal(kept["control"]["hint"], batch["control"]["hint"])  # mirrored with the moments
    (place / f"1{ending}").unlink()
    with pytest.raises(ValueError, match=r"1\.png \(1 of 3 pictures\): no file for data.condition='files'"):
        batches.build(data, sd, 0)


def test_skeletons_lie_beside_pictures(sd, tmp_path):
    path = folder(tmp_path)
    for i in range(3):
        write_pose(path / f"{i}_keypoints.json", person())
    made = hints(Data(path=str(path), size=48, batch=2, condition="openpose"), sd)
    wanted = conditions.of("openpose").read(path / "0_keypoints.json", (48, 48)) / np.float32(255)
    np.testing.assert_allclose(made, np.stack([wanted] * 2), atol=1e-6)
    Image.fromarray(np.zeros((48, 24, 3), np.uint8)).save(path / "0.condition.png")
    for i in (1, 2):
        Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(path / f"{i}.condition.png")
    with pytest.raises(
        ValueError, match="0.condition.png: 24 x 48 pixels; expected the proportions of the picture's 48"
    ):
        batches.build(Data(path=str(path), size=48, batch=2, condition="files"), sd, 0).source.check(48)


# ---- in sampling ---------------------------------------------------------------------------------


def test_the_program_makes_edges_and_draws_skeletons(tmp_path, monkeypatch, capsys):
    photo, jobs = tiny.pictures(1, 48, seed=3)[0], []
    Image.fromarray(photo).save(tmp_path / "photo.png")
    pose = write_pose(tmp_path / "pose.json", person(), canvas_width=48, canvas_height=48)

    def stub(sd, job):
        jobs.append(job)
        return np.full((len(job.pictures), 32, 32, 3), 127, np.uint8)

    monkeypatch.setattr(generate, "drawn", stub)
    model = tiny.model()
    monkeypatch.setattr(pipeline, "load", lambda *source, **given: model)
    base = ["--prompt", "a cat", "--control", "random:tiny", "--control-image"]
    (path,) = sample("controlnet", tmp_path / "out", *base, str(tmp_path / "photo.png"), "--preprocess", "canny:low=20")
    (one,) = jobs[-1].control
    np.testing.assert_array_equal(one.picture, photo)
    assert one.preprocess == conditions.of("canny:low=20") and path.is_file()
    sample("controlnet", tmp_path / "out", *base, str(pose), "--preprocess", "openpose")
    (one,) = jobs[-1].control
    np.testing.assert_array_equal(one.picture, conditions.of("openpose").read(pose))
    assert one.preprocess is None
    assert sample("controlnet", tmp_path / "out", *base, str(tmp_path / "photo.png"), "--preprocess", "cany") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --preprocess='cany': expected one of canny")


def test_a_condition_is_made_at_the_size_of_the_picture_that_is_made():
    sd, photo = tiny.model(), tiny.pictures(1, 64, seed=3)[0]
    net = sdjax.load_control("random:tiny")
    made = sdjax.text2img(sd, ["a cat"], steps=3, control=net.on(photo, preprocess="canny:low=20,high=40"))
    small = np.asarray(Image.fromarray(photo).resize((32, 32), Image.Resampling.LANCZOS))
    edges = conditions.of("canny:low=20,high=40").make(small)
    assert edges.max() == 255
    np.testing.assert_array_equal(made, sdjax.text2img(sd, ["a cat"], steps=3, control=net.on(edges)))


def test_a_skeleton_is_not_mirrored_with_its_picture():
    """Its colours tell left from right."""
    assert not conditions.known()["openpose"].mirrors and conditions.known()["canny"].mirrors
    train = Train(method=controlnet.ControlNet(), data=Data(condition="canny", flip=0.5))
    checks.alone(train)
    checks.alone(dataclasses.replace(train, data=Data(condition="openpose")))
    with pytest.raises(SettingError, match=r"data.flip=0.5: expected 0 with data.condition='openpose:score=0.1'"):
        checks.alone(dataclasses.replace(train, data=Data(condition="openpose:score=0.1", flip=0.5)))


def test_a_model_of_depths_is_named_by_who_starts_the_program_alone():
    made = ControlNet(prompt="a", control=("x",), control_image=("y",), preprocess=("depth",), depth_model="folder")
    assert made.makers()[0].model == "folder"
    with pytest.raises(SettingError, match=r"preprocess='depth:model=/etc': expected depth"):
        ControlNet(prompt="a", control=("x",), control_image=("y",), preprocess=("depth:model=/etc",))
    with pytest.raises(SettingError, match="preprocess="):
        ControlNet(prompt="a", control=("x",) * 3, control_image=("y",) * 3, preprocess=("canny", "canny"))
