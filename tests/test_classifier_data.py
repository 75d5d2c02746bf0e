"""Splits and batches of the image classifiers."""

import pytest
import torch
from classifiers import NAMES, labelled

from classification_ext.data import Rows, augment, in_order, make_splits, pixels_of, shuffled
from classification_ext.settings import ForgetConfig


def test_class_split_takes_every_image_of_the_class_and_no_other():
    train, test = labelled(10), labelled(5, seed=1)
    splits = make_splits(train, test, ForgetConfig(forget_class=["east", "west"]))
    assert splits.forget.labels.unique().tolist() == [1, 3] and splits.retain.labels.unique().tolist() == [0, 2]
    assert len(splits.forget) == 20 and len(splits.retain) == 20
    assert splits.test.labels.unique().tolist() == [0, 2]  # TA speaks of retained labels alone
    assert splits.forget_test.labels.unique().tolist() == [1, 3] and len(splits.forget_test) == 10


def test_random_split_is_disjoint_complete_and_decided_by_its_seed():
    train, test = labelled(10), labelled(5, seed=1)
    splits = [make_splits(train, test, ForgetConfig(forget_fraction=0.3, forget_seed=seed)) for seed in (0, 0, 1)]
    first = splits[0]
    assert len(first.forget) == 12 and len(first.retain) == 28 and len(first.test) == len(test)
    chosen = set(first.forget_rows.tolist())
    kept = [row for row in range(len(train)) if row not in chosen]
    assert torch.equal(first.retain.images, train.images[kept])
    assert torch.equal(first.forget.images, train.images[sorted(chosen)])
    assert torch.equal(splits[0].forget_rows, splits[1].forget_rows)
    assert not torch.equal(splits[0].forget_rows, splits[2].forget_rows)
    before = torch.get_rng_state()
    assert len(make_splits(train, test, ForgetConfig(forget_count=7)).forget) == 7
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_class": "up"}, "no label 'up'; the data has north, east"),
        ({"forget_class": NAMES}, "every training image is to be forgotten"),
        ({"forget_count": 40}, "40 of 40 training images"),
        ({"forget_fraction": 0.001}, "0 of 40 training images"),
    ],
)
def test_impossible_splits(settings, message):
    with pytest.raises(ValueError, match=message):
        make_splits(labelled(10), labelled(5), ForgetConfig(**settings))


def test_contradictory_or_empty_settings():
    with pytest.raises(ValueError, match="forget_class and forget_count are given"):
        ForgetConfig(forget_class="east", forget_count=3)
    with pytest.raises(ValueError, match="forget_fraction is 1, but must be in"):
        ForgetConfig(forget_fraction=1)
    with pytest.raises(ValueError, match="forget_class is empty"):
        ForgetConfig(forget_class=[])


def test_an_epoch_reads_every_image_once_in_an_order_that_the_seed_decides():
    images = labelled(8)
    epochs = [list(shuffled(images, 8, seed)) for seed in (3, 3, 4)]
    seen = [torch.cat([batch["images"].flatten(1) for batch in batches]) for batches in epochs]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0].sort(0).values, images.images.flatten(1).sort(0).values)
    again = torch.cat([batch["images"] for batch in in_order(images, 5)])
    assert torch.equal(again, images.images)
    assert torch.equal(Rows(images)[3]["images"], images.images[3])
    with pytest.raises(ValueError, match="32 images cannot be shared between 40 processes"):
        shuffled(images, 8, 0, 40)


def test_augmentation_mirrors_and_shifts_whole_images():
    pixels = pixels_of(in_order(labelled(4), 16)[0])
    torch.manual_seed(0)
    assert torch.equal(augment(pixels, False, 0), pixels)
    mirrored = augment(pixels, True, 0)
    kinds = [torch.equal(new, old) for new, old in zip(mirrored, pixels, strict=True)]
    flips = [torch.equal(new, old.flip(2)) for new, old in zip(mirrored, pixels, strict=True)]
    assert all(a != b for a, b in zip(kinds, flips, strict=True)) and 0 < sum(flips) < 16
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    windows = [padded[..., top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    shifted = augment(pixels, False, 1)
    for index, image in enumerate(shifted):
        assert sum(torch.equal(image, window[index]) for window in windows) == 1
