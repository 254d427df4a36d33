"""Textual inversion: one step against PyTorch, several words in one run, what is measured, its files both ways."""

import dataclasses
import json
import shutil

import diffusers  # noqa: F401  as adapter_files does, before torch is asked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_step
from adapter_files import fresh, made
from PIL import Image

import sdjax
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.formats.adapters import attachable, kinds
from sdjax.formats.adapters.learned_embeds import LearnedEmbeds
from sdjax.methods.chain import Chain
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.methods.textual_inversion import TextualInversion, concepts
from sdjax.settings import SettingError
from sdjax.training import preview, previewed, run_folder
from sdjax.training.begin import begin
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

ROWS = 0.3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


def test_gradients_of_a_step_are_torchs():
    """Two words of two rows, which prompts say together and apart."""
    sd, unet, text = torch_step.models()
    method = concepts({"<cat>": "cat", "<dog>": "dog"}, vectors=2)
    trained, frozen = method.split(sd)
    random = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32), trained)
    batch = torch_step.batch(frozen, ["a photo of <cat>", "<dog> and <cat>", "a photo of <dog>"])
    key = jax.random.key(3)
    loss = default_loss(method, Train(method=method))
    ours = lambda trained, frozen: loss(frozen, trained, batch, jax.random.clone(key), jnp.int32(0))[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(ours))(trained, frozen)
    seen, text = torch_step.drawn(frozen, batch, key), torch_step.fresh(text)
    table = text.get_input_embeddings()
    grown = torch.nn.Embedding(len(table.weight) + 4, table.weight.shape[1])
    places = {word: ids["text_encoder"].tolist() for word, ids in frozen.words.items()}
    with torch.no_grad():
        grown.weight[: len(table.weight)] = table.weight
        for i, ids in enumerate(places.values()):
            grown.weight[ids] = torch.from_numpy(np.array(trained[str(i)]["rows"]["text_encoder"]))
    text.set_input_embeddings(grown)
    prediction = unet(seen["z_t"], seen["t"], torch_step.context(text, batch["ids"]["text_encoder"])).sample
    there = ((prediction - seen["noise"]) ** 2).mean()
    there.backward()
    assert float(value) == pytest.approx(there.item(), rel=1e-5)
    for i, ids in enumerate(places.values()):
        wanted, ours = grown.weight.grad[ids].numpy(), np.asarray(grads[str(i)]["rows"]["text_encoder"])
        assert np.linalg.norm(wanted) > 0
        assert np.linalg.norm(ours - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.fixture
def folder(tmp_path):
    """Sub-folders cat/ and dog/ with two pictures each, without captions."""
    for name, grey in (("cat", 40), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (grey, grey, 90 * i)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_each_sub_folder_has_its_word(folder):
    data = Data(path=str(folder), words=(("cat", "<cat>"), ("dog", "<dog>")), templates="object", size=32)
    source = batches.sources.open(data)
    random = np.random.default_rng(0)
    for i in range(4):
        said = {source.caption(i, random) for _ in range(20)}
        word = "<cat>" if i < 2 else "<dog>"
        assert len(said) > 5 and all(word in text for text in said)
    with pytest.raises(SettingError, match="data.words=.*: expected sub-folders of .*: cat, dog, not 'bird'"):
        batches.sources.open(dataclasses.replace(data, words=(("bird", "<bird>"),)))
    with pytest.raises(SettingError, match="words=.*there are no sub-folders"):
        batches.sources.open(dataclasses.replace(data, path="pocketland"))


def test_a_run_of_two_words(folder, tmp_path):
    """Norms and drifts are in the metrics, each word is a file, and a step moves only the rows that were said."""
    data = Data(path=str(folder), words=(("cat", "<cat>"), ("dog", "<dog>")), templates="object", size=32, batch=2)
    method = concepts({"<cat>": "cat", "<dog>": "dog"})
    settings = Train(model="random:tiny", method=method, data=data, optim=Optim(lr=1e-2), steps=2, checkpoint=0, log=1)
    assert previewed.prompts(settings) == ("a photo of <cat>", "a photo of <dog>")
    train(settings, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "loss" in line][-1]
    rows = {}
    for word in ("cat", "dog"):
        held = safetensors.torch.load_file(tmp_path / "out" / "export" / f"learned_embeds-{word}.safetensors")
        rows[word] = held[f"<{word}>"].numpy()
        assert told[f"norm <{word}>"] == pytest.approx(np.linalg.norm(rows[word]), rel=1e-4)
    trained, *_ = begin(settings, pictures=False)
    for i, word in enumerate(rows):
        drift = np.linalg.norm(rows[word] - np.asarray(trained[str(i)]["rows"]["text_encoder"]))
        assert drift > 0 and told[f"drift <{word}>"] == pytest.approx(drift, rel=1e-4)


def test_a_known_word_stays_whatever_its_case():
    base = sdjax.load("random:tiny").add_word("<cat>", 2)
    ids = base.words["<cat>"]
    sd = base.with_rows(ids, {encoder: jnp.full_like(rows, 0.5) for encoder, rows in base.rows("<cat>").items()})
    assert sd.add_word("<Cat>", 2) is sd and sd.ids("<CAT>") == ids
    with pytest.raises(ValueError, match="word='<Cat>': the model knows it with 2 vectors, not 1$"):
        sd.add_word("<Cat>")
    method = TextualInversion("<Cat>", vectors=2)
    trained, frozen = method.split(sd)
    assert frozen.words == sd.words and all(bool((rows == 0.5).all()) for rows in trained["rows"].values())
    moved = jax.tree.map(lambda x: x + 1, trained)
    assert all(bool((rows == 1.5).all()) for rows in method.join(frozen, moved).rows("<cat>").values())


def test_norms_are_pulled_as_in_pivotal_tuning():
    """cloneofsimo's lora: norm + min(1, 100 lr) (0.4 - norm) after every step, here at its lr of 5e-4."""
    random = np.random.default_rng(4)
    rows = random.standard_normal((3, 32)).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    wanted = rows / lengths * (lengths + min(1, 100 * 5e-4) * (0.4 - lengths))
    both = concepts({"<cat>": "cat", "<dog>": "dog"}, norm=0.4)
    trained = {"0": {"rows": {"text_encoder": rows}}, "1": {"rows": {"text_encoder": np.zeros((1, 32), np.float32)}}}
    pulled = both.project(trained)
    np.testing.assert_allclose(pulled["0"]["rows"]["text_encoder"], wanted, rtol=1e-5)
    assert not pulled["1"]["rows"]["text_encoder"].any()
    at_once = TextualInversion(norm=0.4, pull=1.0).project(trained["0"])["rows"]["text_encoder"]
    np.testing.assert_allclose(np.linalg.norm(at_once, axis=-1), 0.4, rtol=1e-5)
    assert TextualInversion().project is None and concepts({"<cat>": "cat"}).project is None
    with pytest.raises(SettingError, match="^norm=-1: expected a number from 0"):
        TextualInversion(norm=-1)


def test_words_for_the_negative_prompt():
    method = TextualInversion("<flaws>", negative=True)
    settings = Train(method=method, data=Data(word="<flaws>"))
    assert method.unwanted == ("<flaws>",) and previewed.prompts(settings) == ("a photo of a face",)
    both = Chain((TextualInversion("<cat>"), method))
    assert both.unwanted == ("<flaws>",)
    assert previewed.prompts(Train(method=both, data=Data(word="<cat>"))) == ("a photo of <cat>",)
    seen = {}

    def text2img(sd, prompts, seeds, negative_prompt, **how):
        seen[prompts[0]] = negative_prompt
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview.generate, "text2img", text2img)
        preview.sheet(both, sdjax.load("random:tiny"), None, Train(method=both, data=Data(word="<cat>")))
    assert seen == {"a photo of <cat>": "<flaws>"}


@pytest.mark.parametrize("layout", ["diffusers", "diffusers-bin", "a1111"])
def test_files_that_diffusers_reads(layout, tmp_path):
    rows, held = ROWS.numpy(), {"rows": {"text_encoder": ROWS.numpy()}}
    method = TextualInversion("<toy>", vectors=3, layout=layout)
    frozen = method.split(made("sd1")[1])[1]
    path, use = run_folder.export(method, frozen, held, tmp_path)
    assert path.name == {"a1111": "toy.pt", "diffusers-bin": "learned_embeds.bin"}.get(
        layout, "learned_embeds.safetensors"
    )
    pipe = fresh("sd1")
    pipe.load_textual_inversion(tmp_path, weight_name=path.name)  # the word is in the file
    ids = pipe.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1", "<toy>_2"])
    np.testing.assert_array_equal(pipe.text_encoder.get_input_embeddings().weight[ids].detach(), rows)
    kind, adapter = kinds.opened(path, made("sd1")[1])
    (found,) = adapter.words.values()
    np.testing.assert_array_equal(found["text_encoder"], rows)
    again, _ = kind.start(adapter, method, {"rows": {"text_encoder": jnp.zeros((3, 32))}}, frozen)
    np.testing.assert_array_equal(again["rows"]["text_encoder"], rows)
    assert use[0].endswith('--prompt "a photo of <toy>"')
    negative = dataclasses.replace(method, negative=True)
    assert run_folder.export(negative, frozen, held, tmp_path)[1][0].endswith('--negative-prompt "<toy>" --prompt TEXT')


def test_what_a1111_saved_is_saved_again_as_it_was(tmp_path):
    told = {"name": "toy", "step": 99, "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5-pruned"}
    saved = {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, **told}
    torch.save(saved, tmp_path / "toy.pt")
    adapter = attachable.read(tmp_path / "toy.pt", made("sd1")[1])
    adapter = dataclasses.replace(adapter, about={**adapter.about, "method": "x", "settings": {"layout": "a1111"}})
    (tmp_path / "again").mkdir()
    path = LearnedEmbeds().write(adapter, tmp_path / "again")
    again = torch.load(path, weights_only=True)
    assert path.name == "toy.pt" and list(again) == list(saved)
    assert torch.equal(again.pop("string_to_param")["*"], saved.pop("string_to_param")["*"]) and again == saved


def test_a_run_starts_from_a_file(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "x"}, tmp_path / "x.pt")
    settings = Train(model="random:tiny", method=TextualInversion("<toy>", vectors=3), init=str(tmp_path / "x.pt"))
    np.testing.assert_array_equal(begin(settings, pictures=False)[0]["rows"]["text_encoder"], ROWS)
    with pytest.raises(ValueError, match="rows"):
        begin(dataclasses.replace(settings, method=TextualInversion("<toy>", vectors=2)), pictures=False)


def test_two_words_and_a_hypernetwork_in_one_picture(tmp_path):
    """Each of two learned words says something in a prompt with both, and a hypernetwork acts beside them."""
    sd = base = sdjax.load("random:tiny")
    random = np.random.default_rng(0)
    for word in ("<cat>", "<dog>"):
        rows = torch.from_numpy(random.standard_normal((2, 32)).astype(np.float32))
        safetensors.torch.save_file({word: rows}, tmp_path / f"{word}.safetensors")
        sd = sdjax.attach(sd, tmp_path / f"{word}.safetensors")
    method = Hypernetwork(zero=False, weight_init="XavierNormal")
    path, _ = run_folder.export(method, base, method.split(base, jax.random.key(0))[0], tmp_path)
    options = {"seeds": [0], "steps": 2, "size": 32}
    texts = ["a <cat> beside a <dog>", "a <cat> beside a dog", "a cat beside a <dog>", "a cat beside a dog"]
    made_ = [sdjax.text2img(sd, [text], **options) for text in texts]
    made_.append(sdjax.text2img(sdjax.attach(sd, path), texts[:1], **options))
    assert len({picture.tobytes() for picture in made_}) == len(made_)
    shutil.rmtree(tmp_path)
