"""How a run writes its result: one file for A1111 and ComfyUI, half precision; and training from such files."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from programs import photo

import sdjax
from sdjax import trees
from sdjax.data.batches import Data
from sdjax.formats import pipeline
from sdjax.formats.models import controlnet, single_file
from sdjax.methods.chain import Chain
from sdjax.methods.controlnet import ControlNet
from sdjax.methods.custom_diffusion import CustomDiffusion
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.methods.lora import Lora
from sdjax.methods.method import Method
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.settings import SettingError
from sdjax.training import checks, export, run_folder
from sdjax.training.begin import begin
from sdjax.training.loop import train
from sdjax.training.settings import Train


@dataclasses.dataclass(frozen=True)
class Own(Method):
    """A user's method, whose file has its trained tree."""

    def split(self, sd, key=None):
        trained, rest = trees.partition(sd.parts["unet"], r"^conv_out\.bias$")
        return trees.copy(trained, "float32"), sd.with_parts(unet=rest)

    def join(self, frozen, trained, key=None):
        return frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained))


@pytest.fixture(scope="module")
def plain():
    return pipeline.load("random:tiny")


def learned(method, sd):
    """Returns (trained, frozen) of a method whose numbers have moved."""
    trained, frozen = method.split(sd, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape), trained), frozen


def tensors(path):
    return safetensors.numpy.load_file(path)


def test_a_whole_model_as_one_file_with_its_words_beside(plain, tmp_path):
    method = Chain((TextualInversion("<cat>"), Full(("unet",), "attn2")))
    trained, frozen = learned(method, plain)
    path, lines = run_folder.export(method, frozen, trained, tmp_path / "one", form="single-file")
    assert path == tmp_path / "one" / "model.safetensors" and "to models/Stable-diffusion/; each word" in lines[-1]
    assert {p.name for p in path.parent.iterdir()} == {"model.safetensors", "model-cat.safetensors"}
    both, lines = run_folder.export(method, frozen, trained, tmp_path / "both", form="both")
    assert both == tmp_path / "both" and (both / "model.safetensors").read_bytes() == path.read_bytes()
    wanted = method.join(frozen, trained).parts["unet"]
    for source in (path, both):
        again = sdjax.load(source).parts["unet"]
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, wanted))


def test_a_controlnet_as_one_file(plain, tmp_path):
    trained, frozen = learned(ControlNet(), plain)
    path, lines = run_folder.export(ControlNet(), frozen, trained, tmp_path, form="single-file", dtype="float16")
    assert path == tmp_path / "model.safetensors" and lines[-1].endswith("to models/ControlNet/")
    assert {x.dtype.name for x in tensors(path).values()} == {"float16"}
    again = controlnet.load_control(path).params
    near = jax.tree.map(lambda x, y: np.allclose(x, y, atol=2e-3), again, trained["controlnet"])
    assert jax.tree.all(near)
    run_folder.export(ControlNet(), frozen, trained, tmp_path / "both", form="both")
    assert (tmp_path / "both" / "config.json").is_file() and (tmp_path / "both" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", [Lora(), E4T(), TextualInversion("<new>"), Chain((E4T(), Full()))])
def test_others_have_one_file_already(method):
    said = r"save_model_as='both': expected diffusers: \w+ exports another file than"
    with pytest.raises(SettingError, match=said):
        checks.alone(Train(method=method, save_model_as="both"))
    for fine in (Full(), ControlNet()):
        checks.alone(Train(method=fine, save_model_as="both", data=Data(condition="canny" * (fine != Full()))))
    with pytest.raises(SettingError, match="save_precision='fp16': expected one of float32, float16, bfloat16"):
        Train(save_precision="fp16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_half_precision(plain, tmp_path, dtype):
    method = Lora(rank=4, alpha=1.0)
    trained, frozen = learned(method, plain)
    whole, _ = run_folder.export(method, frozen, trained, tmp_path / "whole")
    half, _ = run_folder.export(method, frozen, trained, tmp_path / "half", dtype=dtype)
    with safetensors.safe_open(half, "pt") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys() if not name.endswith("alpha")}  # noqa: SIM118
    assert kinds == {f"torch.{dtype}"} and half.stat().st_size < 0.7 * whole.stat().st_size
    pictures = [sdjax.text2img(sdjax.attach(plain, path), ["a cat"], steps=1)[0].astype(int) for path in (whole, half)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 4
    for name, x in tensors(whole).items():
        if dtype == "float16":
            np.testing.assert_array_equal(tensors(half)[name], x if x.ndim == 0 else x.astype(np.float16))


@pytest.mark.parametrize(
    "method",
    [Own(), Lora(rank=2), Hypernetwork(sizes=(32,)), Chain((TextualInversion("<new>"), CustomDiffusion()))],
    ids=lambda method: type(method).__name__,
)
def test_training_continues_in_float32_from_half_precision(plain, tmp_path, method):
    trained, frozen = learned(method, plain)
    path, _ = run_folder.export(method, frozen, trained, tmp_path / "half", dtype="float16")
    photo(tmp_path / "a.png")
    data = Data(path=str(tmp_path / "a.png"), size=32, batch=1, word="<new>", templates="object")
    if path.suffix == ".safetensors":
        assert {x.dtype.name for x in tensors(path).values() if x.size > 1} == {"float16"}
    again, *_ = begin(Train(model="random:tiny", method=method, data=data, init=str(path)))
    leaves, wanted = jax.tree.leaves(again), jax.tree.leaves(trained)
    assert {x.dtype.name for x in leaves} == {"float32"}
    for x, y in zip(leaves, wanted, strict=True):
        np.testing.assert_allclose(x, np.float32(y), atol=2e-3)


def test_a_whole_model_in_half_precision(plain, tmp_path):
    method = Full(("unet",), "attn2")
    trained, frozen = learned(method, plain)
    run_folder.export(method, frozen, trained, tmp_path, dtype="float16", form="both")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "model"):
        kinds = {x.dtype.name for x in tensors(tmp_path / f"{name}.safetensors").values()}
        assert kinds - {"int64"} == {"float16"}, name
    assert single_file.read(tmp_path / "model.safetensors")[1].keys() == plain.networks.keys() - {"image_encoder"}


def test_numbers_beyond_the_precision_are_said(plain, tmp_path):
    method = Lora(rank=2)
    trained, frozen = learned(method, plain)
    trained = jax.tree.map(lambda x: x * 1e7, trained)
    with pytest.raises(SettingError, match="save_precision='float16': trained weights are too large for it; expected"):
        run_folder.export(method, frozen, trained, tmp_path, dtype="float16")
    run = dataclasses.replace(Train(), save_precision="bfloat16")
    assert run.save_precision == "bfloat16"


def test_a_run_and_its_checkpoints_are_exported_alike(tmp_path):
    photo(tmp_path / "a.png")
    data = Data(path=str(tmp_path / "a.png"), size=32, batch=1, word="a cat", templates="object")
    told = {"save_model_as": "single-file", "save_precision": "float16"}
    method = Full(("unet",), "attn2")
    train(Train(model="random:tiny", method=method, data=data, steps=1, preview=0, **told), tmp_path / "cat")
    written = tmp_path / "cat" / "export" / "cat.safetensors"
    path, _ = export.write(tmp_path / "cat", tmp_path / "again")
    assert path.name == written.name and path.read_bytes() == written.read_bytes()
    assert {one.name for one in written.parent.iterdir()} == {written.name, "cat.json"}  # A1111's card
    assert {x.dtype.name for x in tensors(path).values()} - {"int64"} == {"float16"}
