"""Reading pictures of every kind, and the published preprocessing, exact to the pixel."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fmg.core.errors import RewardError, UsageError
from fmg.rewards.images import (
    CLIP_MEAN,
    CLIP_STD,
    normalize,
    read_image,
    resize_and_crop,
    resize_and_crop_floats,
    resize_and_pad,
    to_bytes,
)

NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = BytesIO()
    picture.save(file, format=kind)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_rgb_from_a_path_and_from_bytes(tmp_path: Path) -> None:
    picture = Image.fromarray(NOISE[..., :3])
    picture.save(tmp_path / "a.png")
    expected = torch.from_numpy(NOISE[..., :3].copy()).permute(2, 0, 1).float() / 255
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(picture)):
        image = read_image(source)
        assert image.dtype == torch.float32
        assert torch.equal(image, expected)


def test_transparency_is_composited_on_white() -> None:
    image = read_image(encoded(Image.fromarray(NOISE)))
    color, alpha = (torch.from_numpy(x.copy()).float().permute(2, 0, 1) for x in (NOISE[..., :3], NOISE[..., 3:]))
    expected = (color * alpha / 255 + 255 - alpha) / 255
    torch.testing.assert_close(image, expected, rtol=0, atol=1.01 / 255)
    clear = NOISE.copy()
    clear[..., 3] = 0
    assert torch.equal(read_image(encoded(Image.fromarray(clear))), torch.ones(3, 9, 7))


def test_transparent_palette_entry_is_white() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    file = BytesIO()
    picture.save(file, format="PNG", transparency=1)
    assert torch.equal(read_image(file.getvalue()), torch.ones(3, 4, 4))


def test_grey_is_repeated() -> None:
    image = read_image(encoded(Image.fromarray(NOISE[..., 0])))
    assert torch.equal(image[0] * 255, torch.from_numpy(NOISE[..., 0].copy()).float())
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_precision(kind: str) -> None:
    levels = np.array([[0, 1, 256], [32768, 65534, 65535]], dtype=np.uint16)
    image = read_image(encoded(Image.fromarray(levels), kind))
    expected = torch.from_numpy(levels.astype(np.float32) / 65535).expand(3, -1, -1)
    torch.testing.assert_close(image, expected, rtol=0, atol=0)


def test_cmyk_and_bilevel() -> None:
    red = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert torch.equal(read_image(encoded(red, "TIFF"))[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(read_image(encoded(Image.new("1", (2, 2), 1))), torch.ones(3, 2, 2))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(UsageError, match="unknown range"):
        read_image(encoded(Image.new(mode, (2, 2)), "TIFF"))


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.tile(NOISE[..., :3], (20, 20, 1))))
    with pytest.raises(UsageError, match="cannot be decoded"):
        read_image(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not an image"):
        read_image(b"GIF or so")
    with pytest.raises(UsageError, match="not an image"):
        read_image(b"")
    with pytest.raises(UsageError, match=r"no image file '.*none\.png'"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UsageError):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", ["DDS", "PCX", "TGA", "ICO", "EPS", "SGI"])
def test_rare_formats_are_not_images(kind: str) -> None:
    # some decoders raise errors of any kind, and that of EPS runs another program
    with pytest.raises(UsageError, match="not an image"):
        read_image(encoded(Image.new("RGB", (8, 8)), kind))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, ZeroDivisionError, OverflowError])
def test_whatever_a_decoder_raises_is_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*args: object) -> None:
        raise error("first\nsecond")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", stumble)
    with pytest.raises(UsageError, match="cannot be decoded") as refused:
        read_image(encoded(Image.new("RGB", (8, 8))))
    assert "\n" not in str(refused.value)


def test_animations_and_turned_photos_are_read(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    for kind in ("GIF", "WEBP", "TIFF", "AVIF", "PNG"):
        red.save(tmp_path / "a", kind, save_all=True, append_images=[blue])
        image = read_image(tmp_path / "a")
        assert image.shape == (3, 4, 6)
        assert image[0].mean() > 0.9 > 0.1 > image[2].mean()
    turned = Image.Exif()
    turned[0x0112] = 6
    red.save(tmp_path / "b.jpg", exif=turned)
    assert read_image(tmp_path / "b.jpg").shape == (3, 4, 6)
    red.convert("CMYK").save(tmp_path / "c.jpg")
    red.convert("P").save(tmp_path / "d.png")
    for name in ("c.jpg", "d.png"):
        assert read_image(tmp_path / name)[0].mean() > 0.9


def test_sizes_are_checked_before_decoding() -> None:
    for size in ((20_000, 20_000), (5_793, 5_793), (60_000, 60_000)):
        with pytest.raises(UsageError, match="more than 33,554,432 pixels"):
            read_image(png_of_size(*size))
    with pytest.raises(UsageError):
        read_image(png_of_size(0, 0))
    small = encoded(Image.fromarray(NOISE[..., :3]))
    with pytest.raises(UsageError, match="more than 62 pixels"):
        read_image(small, max_pixels=62)
    assert read_image(small, max_pixels=63).shape == (3, 9, 7)


def test_to_bytes_rounds_halves_to_even_and_clamps() -> None:
    values = torch.tensor([0.0, 0.5 / 255, 1.5 / 255, 254.5 / 255, 1.0, 1.1]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 2, 254, 255, 255]


@pytest.mark.parametrize(("height", "width"), [(512, 512), (224, 224), (100, 301), (640, 333)])
def test_crop_rounded_down_is_the_image_processor_of_transformers(height: int, width: int) -> None:
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(x) for x in to_bytes(images)]
    expected = CLIPImageProcessorPil()(images=pictures, return_tensors="pt").pixel_values
    ours = normalize(resize_and_crop(images, 224, "down"), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "offset"), [(224, 0), (225, 0), (226, 1), (227, 2), (229, 2), (231, 4)])
def test_crop_offset_is_rounded_half_to_even(width: int, offset: int) -> None:
    ramp = (torch.arange(width) % 256 / 255).expand(1, 3, 224, width)
    crop = resize_and_crop(ramp, 224)
    assert crop.shape == (1, 3, 224, 224)
    assert torch.equal(crop, resize_and_crop_floats(ramp, 224))
    assert torch.equal((crop[0, 0, 0] * 255).round().int(), ((torch.arange(224) + offset) % 256).int())


def test_upright_and_oblong_are_treated_alike() -> None:
    coarse = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(coarse, (40, 66), mode="bilinear")
    for resize in (resize_and_crop, resize_and_crop_floats, resize_and_pad):
        across, upright = resize(images, 32), resize(images.transpose(-1, -2), 32)
        torch.testing.assert_close(across, upright.transpose(-1, -2), rtol=0, atol=2.01 / 255)


def test_padding_is_black_centred_and_put_in_before_normalizing() -> None:
    padded = resize_and_pad(torch.ones(1, 3, 20, 41), 32)
    # round(20 * 32 / 41) = 16 rows of picture between 8 and 8 of black
    assert torch.equal(padded[:, :, :8], torch.zeros(1, 3, 8, 32))
    assert torch.equal(padded[:, :, 24:], torch.zeros(1, 3, 8, 32))
    torch.testing.assert_close(padded[:, :, 8:24], torch.ones(1, 3, 16, 32), rtol=0, atol=1e-5)
    odd = resize_and_pad(torch.ones(1, 3, 21, 32), 32)
    assert torch.equal(odd[0, 0, :, 0], F.pad(torch.ones(21), (5, 6)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (1, 201), (4020, 20)])
def test_images_that_no_resize_is_defined_for(size: tuple[int, int]) -> None:
    for resize in (resize_and_crop, resize_and_crop_floats, resize_and_pad):
        with pytest.raises(RewardError, match=f"{size[1]} x {size[0]} pixels"):
            resize(torch.zeros(1, 3, *size), 32)
