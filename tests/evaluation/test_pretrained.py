"""Networks from the user's files, with small random models: what they see, what they give, what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from measured import random_state
from PIL import Image

from immiscible.errors import UserError
from immiscible.evaluation import pretrained
from immiscible.evaluation.pretrained import (
    ClipFeatures,
    DinoFeatures,
    Published,
    TorchScriptFeatures,
    TransformersFeatures,
    local_features,
    published_features,
)

CPU = torch.device("cpu")
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a red cat", "a photograph of a rocket", "green galaxies, mostly dark, " * 30]


def images(count, height=48, width=48):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def seen_by(processor_mean, processor_std, batch, side):
    """Pixels as the published code prepares them, image by image."""
    made = []
    for image in batch.permute(0, 2, 3, 1).numpy():
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        made.append((np.asarray(resized, np.float64) / 255 - processor_mean) / processor_std)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder as CLIP's, and the model in it."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(vocabulary)}, [], pad_token="<|endoftext|>", model_max_length=77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**VISION, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**VISION, "image_size": 32, "patch_size": 8}, projection_dim=16)).eval()
    for parameter in model.parameters():  # at their first values all embeddings are nearly equal
        parameter.data += torch.randn_like(parameter) * 0.1
    folder = tmp_path_factory.mktemp("tiny-clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=518)).eval()
    folder = tmp_path_factory.mktemp("tiny-dino")
    model.save_pretrained(folder)
    return folder, model


def test_clip_embeds_images_and_texts_as_its_own_model(clip):
    folder, model = clip
    before = random_state()
    features = ClipFeatures(folder)
    assert random_state() == before and features.name == f"FD-{folder.name}" and (features.num_features, features.side) == (16, 32)
    found, texts = features(images(3)), features.texts(TEXTS)
    assert found.shape == (3, 16) and texts.shape == (3, 16) and found.dtype == texts.dtype == torch.float64
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = seen_by([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], images(3), 32)
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)  # of length 1 already
    assert torch.allclose(found.float(), expected.image_embeds, atol=1e-5) and torch.allclose(
        texts.float(), expected.text_embeds, atol=1e-5
    )
    assert torch.allclose(found.norm(dim=1), torch.ones(3).double()) and (found[0] - found[1]).norm() > 0.01
    assert features.texts([]).shape == (0, 16) and torch.allclose(features.texts(TEXTS[1:]), texts[1:], atol=1e-6)


def test_clip_sees_the_middle_square(clip, monkeypatch, tmp_path):
    features = ClipFeatures(clip[0])
    wide = images(2, 48, 64)
    found = features(wide)
    assert torch.equal(found, features(wide[..., 8:56])) and torch.equal(found, features.outputs(wide)["image_embeddings"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert torch.equal(features.kept(wide), found) and torch.equal(features.kept(wide), found)


def test_dinov2_gives_the_class_token_of_the_whole_image(dino):
    folder, model = dino
    features = DinoFeatures(folder)
    batch = images(2, 48, 40)
    pixels = seen_by([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], batch, 224)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    assert features.name == f"FD-{folder.name}" and features.num_features == 32
    assert torch.allclose(features(batch).float(), expected, atol=1e-5) and expected.std() > 0.1


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_any_vision_model_is_normalized_as_its_folder_says(tmp_path, kind):
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    if kind == "vit":  # without the weights of a pooler, which transformers would draw
        model = ViTModel(ViTConfig(**VISION, image_size=24, patch_size=8), add_pooling_layer=False)
    else:
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    model.eval().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        local_features(tmp_path, 48, CPU)
    told = {"size": {"height": 24, "width": 24}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    features = local_features(tmp_path, 48, CPU)
    assert type(features) is TransformersFeatures
    with torch.no_grad():
        found = model(seen_by(told["image_mean"], told["image_std"], images(2), 24))
    expected = found.last_hidden_state.mean(1) if kind == "vit" else found.pooler_output.flatten(1)
    assert torch.allclose(features(images(2)).float(), expected, atol=1e-5)


def test_folders_say_what_they_hold(clip, dino):
    assert type(local_features(clip[0], 48, CPU)) is ClipFeatures
    features = local_features(dino[0], 48, CPU, "clean-bicubic")
    assert type(features) is DinoFeatures and features.resize == "clean-bicubic"
    assert features.weights_sha256 == DinoFeatures(dino[0]).weights_sha256 != ClipFeatures(clip[0]).weights_sha256


def test_published_networks_are_told_by_their_shape(clip, dino, monkeypatch):
    with pytest.raises(
        UserError, match=r"does not hold openai/clip-vit-base-patch32: its hidden_size is 32, not 768, .*patch_size is 8, not 32"
    ):
        published_features("clip", clip[0], CPU)
    monkeypatch.setitem(pretrained.PUBLISHED, "dinov2", Published("facebook/dinov2-large", {"hidden_size": 32}))
    assert published_features("dinov2", dino[0], CPU).name == "FD-DINOv2"


def test_networks_come_from_the_hubs_cache_and_are_never_downloaded(dino, monkeypatch):
    import huggingface_hub

    asked = []

    def cached(repository, local_files_only):
        asked.append((repository, local_files_only))
        return str(dino[0])

    monkeypatch.setitem(pretrained.PUBLISHED, "dinov2", Published("facebook/dinov2-large", {"hidden_size": 32}))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", cached)
        assert published_features("dinov2", None, CPU).num_features == 32 and asked == [("facebook/dinov2-large", True)]
    with pytest.raises(UserError, match=r"`hf download facebook/dinov2-large` fetches it .* --feature_weights") as error:
        published_features("dinov2", None, CPU)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_what_is_missing_or_broken_is_one_line(dino, tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        local_features(tmp_path / "nothing", 48, CPU)
    from safetensors.torch import load_file, save_file

    for path in dino[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if not name.startswith("layernorm")}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of Dinov2Model: layernorm\.bias and 1 others"):
        local_features(tmp_path, 48, CPU)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not hold a model that transformers loads as Dinov2Model"):
        local_features(tmp_path, 48, CPU)
    weights.unlink()
    with pytest.raises(UserError, match="does not hold a model that transformers loads as Dinov2Model"):
        local_features(tmp_path, 48, CPU)


class Averages(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_a_torchscript_file(tmp_path):
    path = tmp_path / "averages.pt"
    torch.jit.script(Averages()).save(str(path))
    features = local_features(path, 48, CPU)
    assert type(features) is TorchScriptFeatures and (features.name, features.num_features) == ("FD-averages", 3)
    assert torch.allclose(features(images(2)), images(2).double().mean((2, 3)), rtol=1e-5)
    with pytest.raises(UserError, match="resizes images by itself"):
        local_features(path, 48, CPU, "tf-bilinear")
    torch.jit.script(torch.nn.Identity()).save(str(path))
    with pytest.raises(UserError, match="does not give a row of features per image"):
        local_features(path, 48, CPU)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="does not hold a network in TorchScript"):
        local_features(path, 48, CPU)
