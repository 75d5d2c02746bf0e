"""barrier_diffusers/data/labelled_images.py: labelled images as bytes."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from barrier_diffusers.data.labelled_images import LabelledSource, as_pixels, load_labelled


def write(folder, images, labels, feature):
    rows = Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": feature})
    )
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


def picture(size=(8, 8), value=100):
    return PILImage.fromarray(np.full((size[1], size[0], 3), value, np.uint8))


def test_embedded_photos_are_balanced_and_keep_their_bytes():
    data = load_labelled(LabelledSource("assets/fashion_mnist", "test"), resolution=28, num_channels=1)
    assert data.images.shape == (4000, 1, 28, 28) and data.images.dtype == torch.uint8
    assert torch.bincount(data.labels).tolist() == [400] * 10 and data.names[9] == "boot"
    assert as_pixels(data.images).min() == -1 and as_pixels(data.images).max() == 1
    assert len(data[data.rows_of("sneaker")]) == 400
    assert data.digest() != data[:3999].digest()


def test_other_sizes_are_scaled_and_cropped(tmp_path):
    source = write(tmp_path / "d", [picture((20, 10)), picture()], ["b", "a"], Value("string"))
    data = load_labelled(LabelledSource(source, "train"), resolution=8)
    assert data.images.shape == (2, 3, 8, 8) and data.names == ["a", "b"] and data.labels.tolist() == [1, 0]


def test_names_fix_the_order_and_refuse_unknown_labels(tmp_path):
    source = write(tmp_path / "d", [picture(), picture()], [0, 1], ClassLabel(names=["x", "y"]))
    assert load_labelled(LabelledSource(source, "train"), resolution=8, names=["y", "x"]).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels y; expected are x"):
        load_labelled(LabelledSource(source, "train"), resolution=8, names=["x"])


def test_a_damaged_image_is_named(tmp_path):
    source = write(tmp_path / "d", [picture(), {"bytes": b"no png", "path": None}], ["a", "b"], Value("string"))
    with pytest.raises(ValueError, match="row 1 of split 'train'"):
        load_labelled(LabelledSource(source, "train"), resolution=8)


def test_an_unknown_label_lists_the_known_ones(tmp_path):
    data = load_labelled(
        LabelledSource(write(tmp_path / "d", [picture()], ["a"], Value("string")), "train"), resolution=8
    )
    with pytest.raises(ValueError, match="no label 'z'; the data has a"):
        data.rows_of("z")
