"""CLIP-I and CLIP-T against transformers' CLIPModel and its processor, on the same pictures and prompts."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sdjax.data import pocketland
from sdjax.formats import judge, pipeline
from sdjax.methods import likeness

PLACES = (  # context, style, accessory
    ("beach", "photo", "none"), ("forest", "pencil", "none"), ("snow", "watercolor", "none"), ("city", "neon", "none"),
    ("meadow", "mosaic", "hat"), ("space", "comic", "none"), ("desert", "photo", "glasses"), ("room", "photo", "scarf"),
)  # fmt: skip
TEXTS = ["a photo of a face on the beach", "a mosaic of a cat"]


def clip_folder(folder, eos=None):
    """Writes a small random CLIPModel with a tokenizer and a processor; returns its folder."""
    tokenizer = pipeline.load("random:tiny").tokenizers["text_encoder"]
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos if eos is None else eos}
    text = {**size, **ids, "pad_token_id": tokenizer.pad, "vocab_size": tokenizer.size}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": tokenizer.length, "hidden_size": 24, "intermediate_size": 32},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=20,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


def pictures(*shapes):
    rng = np.random.default_rng(0)
    return [np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(shape)) for shape in shapes]


def by_transformers(folder, made, texts):
    """Returns (image embeddings, text embeddings), unit rows, of transformers' own loader, processor and tokenizer."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(made, return_tensors="pt")["pixel_values"]
    ids = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


@pytest.mark.parametrize("shapes", [((32, 32), (32, 32)), ((70, 50), (41, 97))])
def test_figures_are_those_of_transformers(clip, shapes):
    made, own = pictures(*shapes), pictures((64, 64), (33, 60), (90, 40))
    images, said = by_transformers(clip, made, TEXTS)
    others, _ = by_transformers(clip, own, TEXTS)
    loaded = judge.load(clip)
    found = likeness.figures(loaded, made, likeness.images(loaded, own), TEXTS)
    assert found["clip-i"] == pytest.approx((images @ others.T).mean(), abs=1e-5)
    assert found["clip-t"] == pytest.approx((images * said).sum(-1).mean(), abs=1e-5)


def test_a_tower_alone_has_no_texts(clip, tmp_path):
    vision = transformers.CLIPVisionConfig.from_pretrained(clip, projection_dim=20)
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(clip, config=vision)
    tower.save_pretrained(tmp_path / "vision")
    made = pictures((40, 40), (50, 60))
    alone, both = (judge.load(place) for place in (tmp_path / "vision", clip))
    by_both = likeness.figures(both, made, likeness.images(both, made[:1]), TEXTS)
    by_one = likeness.figures(alone, made, likeness.images(alone, made[:1]), TEXTS)
    assert set(by_both) == {"clip-i", "clip-t"} and by_one == {"clip-i": by_both["clip-i"]}


def test_a_model_judges_by_its_own_clip():
    assert set(judge.load("random:tiny").parts) == {"image_encoder"}  # without a text projection
    assert judge.of(pipeline.load("random:tiny").with_parts(image_encoder=None)) is None


def test_a_source_without_a_clip_is_told(tmp_path):
    for source in ("random:sd15-less", str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="^judge=.*expected a CLIPModel, or a model with an image encoder$"):
            judge.load(source)


def test_pocket_finds_the_prompt_of_a_held_out_picture():
    """Of eight prompts; by chance one of eight pictures is right."""
    own = judge.load("pocket")
    places = [pocketland.scene(700 + k, *kind) for k, kind in enumerate(PLACES)]
    people = [pocketland.identity(pocketland.HELDOUT[0] + k) for k in range(20)]
    made = [pocketland.draw(who, place) for who in people for place in places]
    prompts = [pocketland.prompt({"context": c, "style": s, "accessory": a}, subject="a face") for c, s, a in PLACES]
    right = (likeness.images(own, made) @ likeness.texts(own, prompts).T).argmax(1) == np.tile(np.arange(8), 20)
    assert right.mean() > 0.75
