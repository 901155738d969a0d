"""From images to pixels: sizes, crops, flips, modes and bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import folder, grays, noise, one_batch
from PIL import Image

from immiscible.configs import UnconditionalConfig
from immiscible.data.transforms import ImageTransform
from immiscible.errors import UserError
from immiscible.flags import parse_config


@pytest.mark.parametrize("shape", [(100, 130), (131, 90), (64, 64), (20, 31), (16, 16), (47, 33)])
def test_the_adm_crop_follows_the_published_rule(shape):
    """guided-diffusion: halve (rounding down) by box filter while the short side is at least twice the size, scale the short side to
    the size by a bicubic filter with both sides rounded, and cut the middle square, the odd pixel below and right."""
    side, original = 16, noise(*shape, 3)
    image = Image.fromarray(original)
    while min(image.size) // side >= 2:
        image = image.resize([length // 2 for length in image.size], resample=Image.BOX)
    image = image.resize([round(length * (side / min(image.size))) for length in image.size], resample=Image.BICUBIC)
    top, left = ((length - side) // 2 for length in np.array(image).shape[:2])
    wanted = np.array(image)[top : top + side, left : left + side]
    for center_crop in (False, True):  # it is always the middle
        pixels = ImageTransform(side, center_crop=center_crop, crop="adm")(original, 0, 5)
        assert np.array_equal(grays(pixels).round().to(torch.uint8).permute(1, 2, 0).numpy(), wanted)


def test_adm_and_diffusers_crops_differ_and_16_bits_have_no_adm():
    original = noise(64, 64, 3)
    crops = [ImageTransform(8, center_crop=True, crop=crop)(original, 0, 0) for crop in ("adm", "diffusers")]
    assert not torch.equal(*crops)
    words = ["--train_data_dir", "x", "--crop", "adm", "--preserve_input_precision"]
    with pytest.raises(UserError, match="--crop adm is defined for 8-bit images"):
        parse_config(UnconditionalConfig, words, program="", description="")


@pytest.mark.parametrize(
    ("size", "resolution", "resized"),
    [((3, 5), 2, (2, 3)), ((5, 3), 2, (3, 2)), ((7, 9), 64, (64, 82)), ((101, 64), 64, (101, 64)), ((6, 6), 4, (4, 4))],
)
def test_resized_shape_is_torchvisions(size, resolution, resized):
    assert ImageTransform(resolution).cut(*size, 0, 0)[:2] == resized


@pytest.mark.parametrize("precise", [False, True])
def test_resize_is_bilinear_with_antialias(precise):
    # 4 -> 2: triangle of half-width 2 around 1.0 weighs the pixels at 0.5, 1.5, 2.5 with 3/7, 3/7, 1/7.
    row = [0, 70, 140, 210]
    image = np.array([row, row], dtype=np.uint8)
    pixels = ImageTransform(1, channels=1, center_crop=True, preserve_input_precision=precise)(image, 0, 0)
    assert grays(pixels).flatten().tolist() == pytest.approx([(3 * 0 + 3 * 70 + 140) / 7], abs=1e-3)  # middle of 2, halves to even: left
    other = ImageTransform(1, channels=1, center_crop=True, preserve_input_precision=precise)(image[:, ::-1].copy(), 0, 0)
    assert grays(other).flatten().tolist() == pytest.approx([160], abs=1e-3)


@pytest.mark.parametrize(("width", "left"), [(3, 0), (4, 0), (5, 1), (6, 2), (7, 2)])
def test_center_crop_of_odd_sizes(width, left):
    image = np.tile(np.arange(width, dtype=np.uint8) * 20, (3, 1))
    pixels = ImageTransform(3, channels=1, center_crop=True)(image, 0, 0)
    assert grays(pixels)[0, 0].round().tolist() == [20 * (left + i) for i in range(3)]
    upright = ImageTransform(3, channels=1, center_crop=True)(image.T.copy(), 0, 0)
    assert torch.equal(upright, pixels.transpose(1, 2))


def test_bytes_map_as_to_tensor_and_normalize_do():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = ImageTransform(16, channels=1)(image, 0, 0)
    expected = (torch.from_numpy(image).to(torch.float32) / 255 - 0.5) / 0.5
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 16, 16) and pixels.is_contiguous()
    assert torch.equal(pixels[0], expected)
    assert pixels.min() == -1 and pixels.max() == 1


def test_random_crops_cover_the_range_and_differ_between_epochs():
    image = np.tile(np.arange(10, dtype=np.uint8), (4, 1))
    transform = ImageTransform(4, channels=1, seed=3)
    lefts = [int(grays(transform(image, epoch, index))[0, 0, 0].round()) for epoch in range(2) for index in range(100)]
    assert set(lefts) == set(range(7))
    assert lefts[:100] != lefts[100:]
    assert lefts != [int(grays(replace(transform, seed=4)(image, e, i))[0, 0, 0].round()) for e in range(2) for i in range(100)]


def test_flip_mirrors_half_and_leaves_the_crop_alone():
    image = noise(9, 5)
    plain, flipping = ImageTransform(5, channels=1), ImageTransform(5, channels=1, random_flip=True)
    flipped = 0
    for index in range(200):
        a, b = plain(image, 0, index), flipping(image, 0, index)
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        flipped += not torch.equal(a, b)
    assert 70 < flipped < 130
    centered = [
        torch.equal(replace(flipping, center_crop=True)(image, 0, i), replace(plain, center_crop=True)(image, 0, i)) for i in range(50)
    ]
    assert centered == [torch.equal(flipping(image, 0, i), plain(image, 0, i)) for i in range(50)]  # nor the crop the flip


def test_flip_without_crop_is_an_exact_mirror():
    image = noise(6, 6, 3)
    results = {tuple(ImageTransform(6, random_flip=True)(image, 0, i).flatten().tolist()) for i in range(40)}
    plain = ImageTransform(6)(image, 0, 0)
    assert results == {tuple(plain.flatten().tolist()), tuple(plain.flip(-1).flatten().tolist())}


@pytest.mark.parametrize(("options", "kernel"), [({}, 2), ({"center_crop": True}, 2), ({"crop": "adm"}, 3)])
@pytest.mark.parametrize("shape", [(12, 31), (33, 13), (10, 10)])
def test_the_geometry_says_where_the_pixels_are_in_the_resized_image(options, kernel, shape):
    """Of a mirrored image, in its mirror image; the adm crop's box filter halves the first two shapes not, at 8 pixels."""
    original = noise(*shape)
    transform = ImageTransform(8, channels=1, random_flip=True, seed=5, **options)
    lefts, mirrored = set(), 0
    for epoch in range(12):
        height, width, top, left, *target = transform.geometry(*shape, epoch, 3)
        assert ((height, width), target) == (shape, [8, 8])
        cut = transform.cut(*shape, epoch, 3)
        resized = np.array(Image.fromarray(original).resize((cut.width, cut.height), kernel))
        flips = transform.flips(epoch, 3)
        seen = (resized[:, ::-1] if flips else resized)[top : top + 8, left : left + 8]
        assert np.array_equal(grays(transform(original, epoch, 3))[0].round().numpy(), seen)
        lefts.add((top, left, flips))
        mirrored += flips
    assert 0 < mirrored < 12 and len(lefts) >= (1 if shape == (10, 10) else 2)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes_become_the_wanted_channels(mode, channels, precise):
    image = Image.new(mode, (9, 7))
    pixels = ImageTransform(4, channels, preserve_input_precision=precise)(image, 0, 0)
    assert pixels.shape == (channels, 4, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    if mode in ("I", "I;16", "F") and channels == 4:
        assert pixels[:3].eq(-1).all() and pixels[3].sub(1).abs().max() < 1e-6  # opaque


def test_colors_survive_the_conversion():
    color = (200, 100, 50)
    rgb = Image.new("RGB", (8, 8), color)
    for image in (rgb, rgb.convert("RGBA"), rgb.convert("P", palette=Image.Palette.ADAPTIVE), rgb.convert("CMYK")):
        assert grays(ImageTransform(8)(image, 0, 0))[:, 4, 4].tolist() == pytest.approx(color, abs=1)
    gray = ImageTransform(8)(Image.new("L", (8, 8), 77), 0, 0)
    assert grays(gray)[:, 0, 0].tolist() == pytest.approx([77, 77, 77], abs=1e-3)


@pytest.mark.filterwarnings("error")
def test_transparent_palette_gives_no_warning():
    image = Image.new("P", (4, 4))
    image.info["transparency"] = bytes([0, 128])
    assert ImageTransform(4)(image, 0, 0).shape == (3, 4, 4)


def test_sixteen_bits_are_kept_or_rounded_but_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    source = folder(tmp_path, {"ramp.png": ramp})
    assert source.load(0).mode == "I;16"
    precise = one_batch(source, ImageTransform(64, preserve_input_precision=True), [(0, 0)])["pixel_values"][0]
    assert len(precise[0].unique()) > 256
    assert torch.equal(precise[0], precise[1]) and torch.equal(precise[0], precise[2])
    assert torch.equal(precise[0], (torch.from_numpy(ramp.astype(np.float32)) / 65535 - 0.5) / 0.5)
    coarse = one_batch(source, ImageTransform(64), [(0, 0)])["pixel_values"][0]
    assert len(coarse[0].unique()) == 256
    assert (coarse - precise).abs().max() <= 1 / 255 + 1e-6


def test_precise_scales_of_32_bit_modes():
    transform = ImageTransform(2, channels=1, preserve_input_precision=True)
    integers = np.array([[0, 2**31 - 1], [2**30, 0]], dtype=np.int32)
    assert transform(integers, 0, 0).flatten().tolist() == pytest.approx([-1, 1, 0, -1], abs=1e-6)
    floats = np.array([[0, 1], [0.25, 0.75]], dtype=np.float32)
    assert transform(floats, 0, 0).flatten().tolist() == [-1, 1, -0.5, 0.5]


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ((0, 255), np.float32, "its floats reach from 0 to 255, not from 0 to 1"),
        ((-1, 1), np.float32, "its floats reach from -1 to 1, not from 0 to 1"),
        ((0, 1.5), np.float32, "its floats reach from 0 to 1.5"),
        ((3, 255), np.int32, "its integers reach from 3 to 255 and 2147483647 is white.*save it as 8 bits"),
        ((0, 65535), np.int32, "from 0 to 65535 and 2147483647 is white.*save it as 16 bits"),
        ((-5, 2**31 - 1), np.int32, None),
        ((-(2**30), 2**31 - 1), np.int32, "from -1.07374e.09 to 2.14748e.09, not from 0"),
        ((0, 255), np.uint16, None),  # dark, as 16 bits may be
        ((0, 4095), np.uint16, None),
        ((0, 0), np.uint16, None),
        ((-0.005, 1.005), np.float32, None),  # as after a resize
    ],
)
def test_values_of_another_range_are_no_image(values, kind, told, precise):
    """They would be white or black from end to end."""
    transform = ImageTransform(2, channels=1, preserve_input_precision=precise)
    image = np.array([values, values], dtype=kind)
    if told is None:
        assert transform(image, 0, 0).shape == (1, 2, 2)
        return
    with pytest.raises(ValueError, match=told):
        transform(image, 0, 0)


def hidden(mode="RGBA"):
    """Green below transparent pixels at the left, blue at the right, half transparent in the middle."""
    image = Image.new("RGBA", (3, 3), (0, 255, 0, 0))
    for row in range(3):
        image.putpixel((1, row), (255, 0, 0, 128))
        image.putpixel((2, row), (0, 0, 255, 255))
    return image.convert(mode)


@pytest.mark.parametrize(("color", "rgb"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("black", (0, 0, 0))])
def test_transparent_pixels_show_the_color_below_and_not_what_they_hide(color, rgb):
    pixels = grays(ImageTransform(3, alpha_color=color)(hidden(), 0, 0))
    assert pixels[:, 0, 0].tolist() == pytest.approx(rgb, abs=1e-3) and pixels[:, 0, 2].tolist() == pytest.approx([0, 0, 255], abs=1e-3)
    half = [value * 128 / 255 + below * 127 / 255 for value, below in zip((255, 0, 0), rgb, strict=True)]
    assert pixels[:, 0, 1].tolist() == pytest.approx(half, abs=1)
    gray = ImageTransform(3, channels=1, alpha_color=color)(hidden("LA"), 0, 0)
    assert grays(gray)[0, 0, 0].item() == pytest.approx(Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0)), abs=1)
    kept = grays(ImageTransform(3, channels=4, alpha_color=color)(hidden(), 0, 0))
    assert kept[:, 0, 0].tolist() == [0, 255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_images_are_as_without_alpha(mode, channels):
    image = Image.fromarray(noise(6, 6, 3)).convert("L" if mode == "LA" else "RGB")
    transform = ImageTransform(6, channels=channels, alpha_color="red")
    plain = image.convert("P") if mode == "P" else image
    with_alpha = plain.copy() if mode == "P" else image.convert(mode)
    if mode == "P":
        with_alpha.info["transparency"] = bytes([255] * 256)
    assert torch.equal(transform(with_alpha, 0, 0), transform(plain, 0, 0)) and not transform.is_laid_upon(with_alpha)


def test_precise_path_agrees_with_bytes_on_8_bit_images():
    image = noise(40, 31, 3)
    coarse, precise = (ImageTransform(16, center_crop=True, preserve_input_precision=p)(image, 0, 0) for p in (False, True))
    assert (coarse - precise).abs().max() < 2.5 / 255  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("options", [{"channels": 2}, {"resolution": 0}])
def test_impossible_transforms(options):
    with pytest.raises(UserError):
        ImageTransform(**{"resolution": 8, **options})
