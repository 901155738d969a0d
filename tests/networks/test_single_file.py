"""Checkpoints in one file: written, read by diffusers alone, and read here into a folder of parts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_text import model_folder

from immiscible.errors import UserError
from immiscible.networks.arguments import TextModelArguments
from immiscible.networks.checkpoint_parts import CheckpointParts
from immiscible.networks.families import load_checkpoint
from immiscible.networks.single_file import NAME, check_single_file, save_single_file
from immiscible.networks.single_file_names import renamed, unet_rules, vae_rules
from immiscible.networks.stable_diffusion import StableDiffusion
from immiscible.networks.stable_diffusion_3 import StableDiffusion3
from immiscible.networks.stable_diffusion_xl import StableDiffusionXL

PIPELINES = {1: "StableDiffusionPipeline", 2: "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
PIPELINES |= dict.fromkeys(("3", "3.5", "3.5-without-t5"), "StableDiffusion3Pipeline")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "immiscible" / "checkpoints"


def loaded(name: Path, **changes) -> CheckpointParts:
    arguments = TextModelArguments(pretrained_model_name_or_path=str(name), **changes)
    return load_checkpoint(arguments, resolution=32, cache_dir=None, from_scratch=False)


def parts_of(version: int | str) -> CheckpointParts:
    """Of a tiny checkpoint; as in the published ones, the first text encoder of Stable Diffusion 3 projects nothing."""
    parts = loaded(model_folder(version))
    if parts.network_part == "transformer":
        torch.nn.init.eye_(parts.encoders["text_encoder"].text_projection.weight)
    return parts


def networks(parts: CheckpointParts) -> dict[str, torch.nn.Module]:
    return {parts.network_part: parts.network, **parts.frozen}


def check_equal(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    theirs, ours = found.state_dict(), wanted.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("version", PIPELINES)
def test_diffusers_reads_what_is_written(tmp_path, version):
    parts = parts_of(version)
    check_single_file(parts)
    save_single_file(parts, tmp_path)
    absent = {part: None for part in parts.optional if part not in parts.encoders | parts.tokenizers}
    kind = getattr(diffusers, PIPELINES[version])
    pipeline = kind.from_single_file(str(tmp_path / NAME), config=str(model_folder(version)), **absent)
    for part, wanted in networks(parts).items():
        check_equal(getattr(pipeline, part), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, "xl", "3.5-without-t5"])
def test_a_file_is_read_as_its_folder(tmp_path, cache, caplog, version):
    """The tensors of Stable Diffusion 3 that are written without T5 are read with none, in their precision, and converted once."""
    parts = parts_of(version)
    save_single_file(parts, tmp_path)
    config = Path(shutil.copytree(model_folder(version), tmp_path / "config"))
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    if version == 1:  # as the published one has them
        index = json.loads((config / "model_index.json").read_text())
        unused = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
        unused |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
        (config / "model_index.json").write_text(json.dumps({**index, **unused}))
    with caplog.at_level(logging.WARNING, "immiscible"):
        found = loaded(tmp_path / NAME, single_file_config=str(config))
        again = loaded(tmp_path / NAME, single_file_config=str(config))
    assert found.digest == again.digest == parts.digest_of(network=False) and type(found) is type(parts)
    for part, wanted in networks(parts).items():
        check_equal(networks(found)[part], wanted)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert found.name == str(folder) and folder.name.startswith("model-")
    assert sum("was converted into" in record.message for record in caplog.records) == 1
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "num_train_timesteps": 500}))
    assert loaded(tmp_path / NAME, single_file_config=str(config)).scheduler.config.num_train_timesteps == 500


@pytest.mark.slow
def test_precision_is_that_of_the_file(tmp_path):
    save_single_file(parts_of(1), tmp_path)
    half = {"alphas_cumprod": torch.ones(1000)}  # of no part
    half |= {name: tensor.half() for name, tensor in load_file(tmp_path / NAME).items()}
    only = tmp_path / "downloads"
    only.mkdir()
    save_file(half, only / "some_model.safetensors")
    found = loaded(only, single_file_config=str(model_folder()))  # the folder of one file
    unet = load_file(Path(found.name) / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    assert torch.equal(unet["conv_in.weight"], half["model.diffusion_model.input_blocks.0.0.weight"])
    torch.save({"state_dict": half}, only / "some_model.ckpt")
    pickled = loaded(only / "some_model.ckpt", single_file_config=str(model_folder()))
    assert pickled.digest == found.digest


@pytest.mark.slow
def test_what_a_file_lacks_comes_from_the_folder_of_its_configuration(tmp_path):
    save_single_file(parts_of(1), tmp_path)
    bare = {name: tensor for name, tensor in load_file(tmp_path / NAME).items() if not name.startswith("cond_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    found = loaded(tmp_path / "bare.safetensors", single_file_config=str(model_folder()))
    check_equal(found.text_encoder, loaded(model_folder()).text_encoder)
    config = Path(shutil.copytree(model_folder(), tmp_path / "config"))
    (config / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bare\.safetensors has no text_encoder \(cond_stage_model"):
        loaded(tmp_path / "bare.safetensors", single_file_config=str(config))


WHOLE = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
BROKEN = {
    "adapters": ({"unet.to_k.lora_A.weight": torch.zeros(2)}, {}, "holds adapters; .*--network_weights"),
    "one part": ({"conv_in.weight": torch.zeros(2)}, {}, "is no whole checkpoint: it has no model.diffusion_model"),
    "no configuration": (WHOLE, {"single_file_config": "no/where/there"}, "--single_file_config no/where/there is not to be found"),
    "none on the hub": (WHOLE, {}, "is read by the configuration of .*, which is not to be found .*give --single_file_config"),
    "another family": ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2)}, {}, "is of the kind flux"),
    "no VAE": (WHOLE, {"single_file_config": "CONFIG"}, r"has no vae \(first_stage_model"),
    "a variant": (WHOLE, {"variant": "fp16"}, "--variant fp16 is of a checkpoint of several files"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, cache, case):
    tensors, changes, message = BROKEN[case]
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    changes = {name: str(tmp_path / "config") if value == "CONFIG" else value for name, value in changes.items()}
    save_file(tensors, tmp_path / NAME)
    with pytest.raises(UserError, match=message) as raised:
        loaded(tmp_path / NAME, **changes)
    assert "\n" not in str(raised.value)
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_a_file_that_is_not_there_or_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"x\.safetensors: there is no such file"):
        loaded(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--single_file_config is of a checkpoint in one file, and some/name is none: leave it out"):
        loaded(Path("some/name"), single_file_config="another/name")
    for name in ("y.safetensors", "y.ckpt"):
        (tmp_path / name).write_bytes(b"weights")
        with pytest.raises(UserError, match=rf"{name}: not a file of weights .*a pickle is read if it holds tensors alone"):
            loaded(tmp_path / name)
    save_file(WHOLE, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match=r"several files \(y\.safetensors, z\.safetensors\); give one"):
        loaded(tmp_path)


def test_a_configuration_of_another_family_is_one_line(tmp_path, cache):
    save_single_file(parts_of("xl"), tmp_path)
    with pytest.raises(UserError, match=r"does not go with the configuration of .*; --single_file_config names"):
        loaded(tmp_path / NAME, single_file_config=str(model_folder("3")))
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_configuration_of_other_sizes_is_one_line(tmp_path):
    save_single_file(parts_of(1), tmp_path)
    for version, message in {2: "does not go with the configuration", "xl": "has no text_encoder"}.items():
        config = Path(shutil.copytree(model_folder(version), tmp_path / f"config-{version}"))
        for weights in config.rglob("*.safetensors"):
            weights.unlink()
        with pytest.raises(UserError, match=message):
            loaded(tmp_path / NAME, single_file_config=str(config))


BLOCKS = {"down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, **BLOCKS}
XL |= {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20)}
LINEAR = {"use_linear_projection": True}
SD3 = {"in_channels": 16, "out_channels": 16, "sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
CLIP = {"L": (768, 12, "quick_gelu"), "H": (1024, 23, "gelu"), "G": (1280, 32, "gelu")}
MEDIUM = {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
LARGE = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
PUBLISHED = {  # what diffusers takes a file for: the settings of its network, and its CLIP models
    "v1": (StableDiffusion, {"cross_attention_dim": 768}, "L"),
    "v2": (StableDiffusion, {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), **LINEAR}, "H"),
    "xl_base": (StableDiffusionXL, {"cross_attention_dim": 2048, **XL, **LINEAR}, "LG"),
    "sd3": (StableDiffusion3, {**MEDIUM, "pos_embed_max_size": 192}, "LG"),
    "sd35_medium": (StableDiffusion3, {**MEDIUM, **DUAL}, "LG"),
    "sd35_large": (StableDiffusion3, {**LARGE, "pos_embed_max_size": 192}, "LG"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_diffusers_knows_the_published_sizes(monkeypatch, tmp_path, kind):
    """Of networks without memory: it tells the family by names and shapes, and finds each weight of the network again."""
    from diffusers.loaders import single_file_utils

    family, settings, clips = PUBLISHED[kind]
    network_class = getattr(diffusers, family.network_class)
    with torch.device("meta"):
        network = network_class(**settings)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        encoders = {}
        for part, clip in zip(family.encoder_classes, clips, strict=False):
            width, layers, activation = CLIP[clip]
            config = transformers.CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, hidden_act=activation, intermediate_size=8)
            encoders[part] = getattr(transformers, family.encoder_classes[part])(config)
    parts = family(network=network, vae=vae, encoders=encoders, tokenizers={}, scheduler=None, name=kind, options={})
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr("immiscible.networks.single_file.save_tensors", lambda tensors, path: written.update(tensors))
    save_single_file(parts, tmp_path)
    assert single_file_utils.infer_diffusers_model_type(written) == kind
    convert = {"unet": "convert_ldm_unet_checkpoint", "transformer": "convert_sd3_transformer_checkpoint_to_diffusers"}
    inner = {name: tensor for name, tensor in written.items() if name.startswith("model.diffusion_model.")}
    for module, found in (
        (network, getattr(single_file_utils, convert[family.network_part])(dict(inner), config=network.config)),
        (vae, single_file_utils.convert_ldm_vae_checkpoint(dict(written), config=vae.config)),
    ):
        wanted = module.state_dict()
        assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in wanted.items()}


def test_names_of_the_published_sizes():
    """Names that stand in `diffusers.loaders.single_file_utils`, where the published files are told apart by them."""
    unet = ["down_blocks.1.resnets.0.conv1.weight", "up_blocks.3.resnets.2.conv_shortcut.weight", "up_blocks.0.upsamplers.0.conv.bias"]
    unet += ["down_blocks.0.downsamplers.0.conv.weight", "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight"]
    unet += ["up_blocks.1.upsamplers.0.conv.bias", "up_blocks.1.attentions.0.norm.weight", "mid_block.resnets.1.norm2.bias"]
    assert list(renamed(unet, unet_rules(unet, 2)).values()) == [
        "input_blocks.4.0.in_layers.2.weight",
        "output_blocks.11.0.skip_connection.weight",
        "output_blocks.2.1.conv.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.5.2.conv.bias",
        "output_blocks.3.1.norm.weight",
        "middle_block.2.out_layers.0.bias",
    ]
    vae = ["decoder.up_blocks.0.upsamplers.0.conv.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"]
    assert list(renamed(vae, vae_rules(4)).values()) == ["decoder.up.3.upsample.conv.weight", "encoder.down.1.block.0.nin_shortcut.weight"]
    with pytest.raises(UserError, match=r"a layer down_blocks\.0\.resnets\.0\.new\.weight"):
        renamed(["down_blocks.0.resnets.0.new.weight"], unet_rules([], 2))


@pytest.mark.slow
def test_a_projection_that_readers_would_leave_out_is_refused():
    parts = loaded(model_folder("3.5-without-t5"))
    torch.nn.init.eye_(parts.encoders["text_encoder"].text_projection.weight)
    check_single_file(parts)
    parts.encoders["text_encoder"].text_projection.weight[0, 0] = 2
    with pytest.raises(UserError, match=r"--save_single_file: the first text encoder of .* has a projection"):
        check_single_file(parts)
