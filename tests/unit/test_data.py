"""Datasets, the files they are read from, and the preparation of images."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from bdense_core import data
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import BadValue, EvaluationError


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def as_bytes(images):
    """What a loaded dataset was before, [N, H, W, C]."""
    return data.to_uint8(images).permute(0, 2, 3, 1).numpy()


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(content, format="PNG")
    return content.getvalue()


@pytest.fixture(params=["folder", "zip"])
def write_dataset(request, tmp_path):
    """A function that makes a folder, or a zip, of {name: content}, and returns its path."""

    def write(files):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return str(tmp_path / "set.zip")
        for name, content in files.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "set")

    return write


# --- digits and bytes -----------------------------------------------------------------------------------


def test_digits_are_the_1797_scans_of_scikit_learn_in_their_order():
    from sklearn.datasets import load_digits

    images, labels = data.load("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    raw = load_digits()
    assert torch.equal((images[:, 0] + 1) * 8, torch.from_numpy(raw.images).float())
    assert labels.tolist() == raw.target.tolist()


def test_digits_span_the_range_from_minus_one_to_one():
    images, labels = data.load("digits")
    assert (images.min(), images.max()) == (-1, 1)
    assert sorted(set(labels.tolist())) == list(range(10))


def catmull_rom(num_small, num_large):
    """Weights that enlarge a line of pixels: Keys' cubic with a = -1/2, cut off at both ends and summing to 1 there."""
    centres = (np.arange(num_large) + 0.5) * num_small / num_large - 0.5
    d = np.abs(centres[:, None] - np.arange(num_small))
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def test_digits16_are_the_digits_enlarged_by_a_catmull_rom_filter():
    """Bytes after each direction: half a level from each, the first through a filter of absolute sum 1.2."""
    small, labels = data.load("digits")
    large, same_labels = data.load("digits16")
    assert large.shape == (1797, 1, 16, 16)
    enlarge = catmull_rom(8, 16)
    wide = (data.to_uint8(small)[:, 0].numpy() @ enlarge.T).clip(0, 255)
    expected = (enlarge @ wide).clip(0, 255)
    assert np.abs(data.to_uint8(large)[:, 0].numpy() - expected).max() < 1.2
    assert torch.equal(labels, same_labels)


def test_digits16_are_whole_bytes_from_minus_one_to_one():
    images, _ = data.load("digits16")
    assert torch.equal(data.to_uint8(images).float() / 127.5 - 1, images)
    assert (images.min(), images.max()) == (-1, 1)


def test_the_names_that_study_files_know_are_those_of_the_data_sets():
    assert tuple(data.DATASETS) == DATASET_NAMES


def test_a_misspelt_dataset_is_answered_with_the_nearest():
    with pytest.raises(BadValue, match="did you mean 'digits'"):
        data.load("digit")


def test_bytes_are_those_of_edm():
    """By hand: -1 gives 0.5, 0 gives 128, 1 gives 255.5 clipped to 255; beyond the range they saturate."""
    levels = torch.tensor([-3.0, -1.0, -0.996, 0.0, 0.5, 1.0, 3.0])
    assert data.to_uint8(levels).tolist() == [0, 0, 1, 128, 191, 255, 255]


# --- arrays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_arrays_are_read_in_both_orders_and_every_byte_comes_back(tmp_path, channels, channels_last):
    pixels = np.resize(np.arange(256, dtype=np.uint8), (2, 16, 8, channels))  # all 256 levels
    stored = pixels if channels_last else pixels.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "set.npz", images=stored, labels=np.array([7, 2]))
    images, labels = data.load(str(tmp_path / "set.npz"))
    assert images.shape == (2, channels, 16, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    assert np.array_equal(as_bytes(images), pixels)
    assert labels.tolist() == [7, 2]


def test_where_both_orders_are_possible_channels_come_last(tmp_path):
    np.savez(tmp_path / "set.npz", images=random_bytes(2, 3, 8, 1))
    assert data.load(str(tmp_path / "set.npz"))[0].shape == (2, 1, 3, 8)


def test_without_labels_there_is_one_class(tmp_path):
    np.savez(tmp_path / "set.npz", images=random_bytes(3, 4, 4, 1))
    assert data.load(str(tmp_path / "set.npz"))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"pictures": random_bytes(2, 4, 4, 1)}, "images is not a file"),
        ({"images": random_bytes(2, 4, 4)}, r"uint8 \[2, 4, 4\]"),
        ({"images": random_bytes(2, 4, 4, 2)}, "1 or 3 channels"),
        ({"images": random_bytes(0, 4, 4, 1)}, r"uint8 \[0, 4, 4, 1\]"),
        ({"images": np.zeros((2, 4, 4, 1))}, "float64"),
        ({"images": np.array([{}], dtype=object)}, "cannot be read as an npz"),
        ({"images": random_bytes(2, 4, 4, 1), "labels": np.zeros(3, dtype=int)}, r"int64 \[3\] for 2 images"),
        ({"images": random_bytes(2, 4, 4, 1), "labels": np.zeros(2)}, "float64"),
        ({"images": random_bytes(2, 4, 4, 1), "labels": np.eye(2, dtype=int)}, "one whole number for each"),
        ({"images": random_bytes(2, 4, 4, 1), "labels": np.array([-1, 0])}, "from -1 to 0"),
        ({"images": random_bytes(2, 4, 4, 1), "labels": np.array([{}, 1])}, "cannot be read as an npz"),
    ],
)
def test_arrays_that_are_no_dataset_are_refused(tmp_path, arrays, problem):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(EvaluationError, match=problem):
        data.load(str(tmp_path / "set.npz"))


def test_a_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=random_bytes(2, 4, 4, 1))
    whole = path.read_bytes()
    for content in (b"", b"no arrays", whole[:150]):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="cannot be read as an npz"):
            data.load(str(path))


# --- CIFAR's binary versions ----------------------------------------------------------------------------


def write_batches(folder):
    """CIFAR-10 with five batches of two records, and the labels 0 to 9."""
    records = random_bytes(10, 1 + 3072)
    records[:, 0] = np.arange(10)
    for number in range(5):
        (folder / f"data_batch_{number + 1}.bin").write_bytes(records[2 * number : 2 * number + 2].tobytes())
    return records


def write_train(folder):
    """CIFAR-100 with ten records: coarse labels 0 to 9, fine labels 90 to 99."""
    records = random_bytes(10, 2 + 3072)
    records[:, 0] = np.arange(10)
    records[:, 1] = np.arange(90, 100)
    (folder / "train.bin").write_bytes(records.tobytes())
    (folder / "test.bin").write_bytes(records[:1].tobytes())  # no training images
    return records


@pytest.mark.parametrize(("write", "labels"), [(write_batches, range(10)), (write_train, range(90, 100))])
def test_binary_records_are_read_in_order_plane_by_plane_with_their_finest_label(tmp_path, write, labels):
    records = write(tmp_path)
    images, found = data.load(str(tmp_path))
    assert found.tolist() == list(labels)
    planes = records[:, -3072:].reshape(10, 3, 32, 32)  # the format: red, green, blue, each row by row
    assert np.array_equal(data.to_uint8(images).numpy(), planes)


@pytest.mark.parametrize(
    ("write", "file", "label", "size"),
    [(write_batches, "data_batch_3.bin", b"\x0a", 6145), (write_train, "train.bin", b"\x14", 30739)],
)
def test_short_empty_and_mislabelled_records_are_refused(tmp_path, write, file, label, size):
    """10 is no label of CIFAR-10, 20 no coarse one of CIFAR-100."""
    write(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    wrong = rf"up to \[{label[0]}.* classes; unpack CIFAR-10"
    for content, problem in ((whole[:-1], f"has {size} bytes"), (b"", "has 0 bytes"), (label + whole[1:], wrong)):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match=problem):
            data.load(str(tmp_path))


def test_a_missing_batch_is_named(tmp_path):
    write_batches(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(EvaluationError, match=r"data_batch_3\.bin cannot be read .*unpack CIFAR-10 again"):
        data.load(str(tmp_path))


def test_bytes_are_loaded_as_they_are_stored(tmp_path):
    records = write_batches(tmp_path)
    images, labels = data.load_bytes(str(tmp_path))
    assert (images.dtype, images.shape) == (torch.uint8, (10, 3, 32, 32))
    assert np.array_equal(images.flatten().numpy(), records[:, 1:].flatten())
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_bytes_of_a_shipped_data_set_are_those_of_its_images(name):
    images, labels = data.load(name)
    stored, same_labels = data.load_bytes(name)
    assert torch.equal(stored, data.to_uint8(images))
    assert torch.equal(same_labels, labels)


# --- image files ----------------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(write_dataset):
    pixels = random_bytes(3, 4, 5, 3)
    files = {"dogs/b.png": png(pixels[2]), "cats/a.png": png(pixels[0]), "dogs/A.PNG": png(pixels[1])}
    images, labels = data.load(write_dataset(files | {"README.txt": b"hello", "dogs/.thumb.png": b""}))
    assert np.array_equal(as_bytes(images), pixels)
    assert labels.tolist() == [0, 1, 1]


def test_a_flat_folder_is_one_class(write_dataset):
    pixels = random_bytes(2, 4, 4, 1)
    images, labels = data.load(write_dataset({"1.png": png(pixels[0]), "2.png": png(pixels[1])}))
    assert np.array_equal(as_bytes(images), pixels)
    assert labels.tolist() == [0, 0]


def test_the_labels_of_edm_come_before_folders_which_are_mere_shelves_there(write_dataset):
    pixels = random_bytes(3, 4, 4, 3)
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    files = {name: png(image) for name, image in zip(names, pixels, strict=True)}
    note = {"labels": [[names[2], 4], [names[0], 6], [names[1], 9]]}
    images, labels = data.load(write_dataset(files | {"dataset.json": json.dumps(note).encode()}))
    assert np.array_equal(as_bytes(images), pixels)
    assert labels.tolist() == [6, 9, 4]


def test_edm_without_labels_is_one_class(write_dataset):
    files = {f"0000{k}/{k}.png": png(random_bytes(4, 4, 3)) for k in range(2)}
    assert data.load(write_dataset(files | {"dataset.json": b'{"labels": null}'}))[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("note", "problem"),
    [
        (b"{", "does not say"),
        (b"[]", "does not say"),
        (b'{"labels": [["1.png"]]}', "does not say"),
        (b'{"labels": [["1.png", 0]]}', "gives 2.png the label None"),
        (b'{"labels": [["1.png", 0], ["2.png", 0.5]]}', "gives 2.png the label 0.5"),
        (b'{"labels": [["1.png", 0], ["2.png", -1]]}', "from -1 to 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(write_dataset, note, problem):
    image = png(random_bytes(4, 4, 1))
    with pytest.raises(EvaluationError, match=problem):
        data.load(write_dataset({"1.png": image, "2.png": image, "dataset.json": note}))


@pytest.mark.parametrize("shape", [(5, 4, 1), (4, 4, 3)])
def test_mixed_sizes_and_colours_are_refused_and_named(write_dataset, shape):
    files = {"a.png": png(random_bytes(4, 4, 1)), "b.png": png(random_bytes(*shape))}
    with pytest.raises(EvaluationError, match=r"a\.png is \[1, 4, 4\], b\.png "):
        data.load(write_dataset(files))


def test_a_damaged_image_is_named(write_dataset):
    image = png(random_bytes(40, 40, 3))
    with pytest.raises(EvaluationError, match=r"image 2\.png of .* is damaged"):
        data.load(write_dataset({"1.png": image, "2.png": image[:900]}))


def test_images_beside_folders_of_images_are_refused(write_dataset):
    image = png(random_bytes(4, 4, 1))
    with pytest.raises(EvaluationError, match=r"stray\.png beside them"):
        data.load(write_dataset({"cats/1.png": image, "stray.png": image}))


def test_no_images_is_an_error(write_dataset):
    with pytest.raises(BadValue, match="holds no image"):
        data.load(write_dataset({"README.txt": b"hello"}))


def test_damaged_zips_are_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", png(random_bytes(40, 40, 3)))
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-30])
    with pytest.raises(EvaluationError, match="cannot be read as a zip"):
        data.load(str(path))
    whole[500] ^= 1
    path.write_bytes(whole)
    with pytest.raises(EvaluationError, match=r"1\.png of .* cannot be read"):
        data.load(str(path))


def test_paths_that_lead_nowhere_or_to_something_else_are_refused(tmp_path):
    with pytest.raises(BadValue, match=r"missing\.npz' does not exist"):
        data.load("missing.npz")
    with pytest.raises(BadValue, match="does not exist; correct the path"):
        data.load(str(tmp_path / "missing"))
    (tmp_path / "batch.pkl").write_bytes(b"")
    with pytest.raises(BadValue, match="of an unknown kind"):
        data.load(str(tmp_path / "batch.pkl"))
