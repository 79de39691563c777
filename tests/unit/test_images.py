"""Image files: what is read, what is written, and what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bdense_core.errors import BadValue, EvaluationError, ShapeMismatch
from bdense_core.images import read_image, write_grid, write_pngs


def random_bytes(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def encoded(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_read_back_equal_under_their_numbers(tmp_path, channels):
    images = random_bytes(3, channels, 4, 5)
    paths = write_pngs(images, tmp_path / "new", first=98)
    assert [path.name for path in paths] == ["000098.png", "000099.png", "000100.png"]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    for path, image in zip(paths, images, strict=True):
        assert torch.equal(read_image(path.read_bytes(), path.name), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_goes_row_by_row_and_ends_in_black(tmp_path, channels):
    images = random_bytes(5, channels, 2, 3)
    write_grid(images, tmp_path / "grid.png", columns=3)
    grid = read_image((tmp_path / "grid.png").read_bytes(), "grid")
    assert grid.shape == (channels, 4, 9)
    assert torch.equal(grid[:, :2, 3:6], images[1])
    assert torch.equal(grid[:, 2:, :3], images[3])
    assert not grid[:, 2:, 6:].any()


def test_a_grid_is_no_wider_than_its_images(tmp_path):
    write_grid(random_bytes(2, 1, 2, 2), tmp_path / "grid.png", columns=8)
    assert read_image((tmp_path / "grid.png").read_bytes(), "grid").shape == (1, 2, 4)


def test_palettes_and_black_and_white_keep_their_colours():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert read_image(encoded(red.convert("P")), "p")[:, 0, 0].tolist() == [255, 0, 0]
    assert read_image(encoded(Image.new("1", (2, 2), 1)), "1").tolist() == [[[255, 255], [255, 255]]]


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_other_formats_are_read_too(kind, options):
    image = read_image(encoded(Image.new("RGB", (8, 8), (10, 200, 30)), kind, **options), "x")
    assert image.shape == (3, 8, 8)
    assert torch.allclose(image[:, 4, 4].float(), torch.tensor([10.0, 200.0, 30.0]), atol=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "CMYK"])
def test_images_whose_pixels_would_change_are_refused(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    with pytest.raises(EvaluationError, match=r"image a is .*8-bit grey or RGB"):
        read_image(encoded(Image.new(mode, (2, 2)), kind), "a")


def test_a_transparent_palette_is_refused():
    with pytest.raises(EvaluationError, match="P with transparency"):
        read_image(encoded(Image.new("P", (2, 2)), transparency=0), "a")


def test_damaged_and_foreign_images_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpeg = encoded(noise), encoded(noise, "JPEG")
    bitmap = encoded(noise, "BMP")
    for content in (b"", b"no image", png[:2000], png[:20], jpeg[:700], bitmap):
        with pytest.raises(EvaluationError, match="image a is damaged or no PNG"):
            read_image(content, "a")


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 2, 2), random_bytes(3, 2, 2), random_bytes(1, 2, 2, 2), random_bytes(0, 3, 2, 2)],
)
def test_what_are_no_images_is_not_written(tmp_path, images):
    with pytest.raises(ShapeMismatch, match="give uint8"):
        write_grid(images, tmp_path / "grid.png", columns=1)
    with pytest.raises(ShapeMismatch, match="give uint8"):
        write_pngs(images, tmp_path, first=0)
    assert list(tmp_path.iterdir()) == []


def test_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(BadValue, match="columns is 0"):
        write_grid(random_bytes(1, 1, 2, 2), tmp_path / "grid.png", columns=0)
    with pytest.raises(BadValue, match="first is -1"):
        write_pngs(random_bytes(1, 1, 2, 2), tmp_path, first=-1)


def test_a_failed_write_keeps_the_old_picture_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    write_grid(random_bytes(1, 1, 2, 2), path, columns=1)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(EvaluationError, match=r"cannot write the image .*grid\.png: No space left"):
        write_grid(random_bytes(2, 1, 2, 2), path, columns=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
