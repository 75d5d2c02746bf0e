"""Data as people have it: each case by name, with an input made on the fly and the right value or the message."""

import json
import re
import shutil
import struct
import unicodedata

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from pipelines import build
from tiny_encoders import FASHION

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.data import folders
from barrier_diffusers.data.captions import labels_in_texts, swap_concept
from barrier_diffusers.data.columns import texts_of
from barrier_diffusers.data.concepts import (
    ConceptConfig,
    DataNeeds,
    load_concept_rows,
    load_concepts,
    rows_of_folder,
)
from barrier_diffusers.data.encoded_concepts import encode_concepts
from barrier_diffusers.data.encoding import encode_images, encode_prompts, read_pixels, to_pixels
from barrier_diffusers.data.erased_concepts import ErasedConcepts, rows_about_others
from barrier_diffusers.data.images import ImageColumn, ImageFiles
from barrier_diffusers.data.labelled_images import LabelledSource, load_labelled
from barrier_diffusers.data.pixels import as_rgb, open_rgb
from barrier_diffusers.data.prompt_checks import require_names_within_limit
from barrier_diffusers.data.readers import load_image_text, read_rows, split_concepts
from barrier_diffusers.evaluation.attacks.base import rename_concept
from barrier_diffusers.evaluation.pictures import before_after_grid, label_bars, strip, trade_off
from barrier_diffusers.evaluation.tables import print_attacks, print_metrics, print_values
from barrier_diffusers.models.publishing import ModelCardFacts, save_model_card
from barrier_diffusers.objectives import ObjectiveConfig, PromptEdit
from barrier_diffusers.objectives.uce import UceSettings, edit_keys_and_values
from barrier_diffusers.utils.shown_text import for_markdown
from barrier_diffusers.utils.words import mentions

DECOMPOSED = unicodedata.normalize("NFD", "café")

NAMED = {  # what names what: text, name
    "plural": ("two sneakers", "sneaker"),
    "singular of a plural": ("a sneaker", "sneakers"),
    "plural in -es": ("old churches", "church"),
    "plural in -ies": ("babies", "baby"),
    "plural in -ves": ("kitchen knives", "knife"),
    "plural with a doubled letter": ("two busses", "bus"),
    "plural in -zzes": ("old quizzes", "quiz"),
    "plural in -oes": ("heroes", "hero"),
    "irregular plural": ("nude people", "nude person"),
    "capitals": ("a RED Sneaker", "sneaker"),
    "sharp s": ("STRASSE", "straße"),
    "two spaces": ("by Van  Gogh", "van gogh"),
    "space that does not break": ("by Van\u00a0Gogh", "van gogh"),
    "hyphen for a space": ("a Van-Gogh sky", "van gogh"),
    "underscore, as tags have": ("van_gogh, sky", "van gogh"),
    "space for a hyphen": ("a t shirt", "t-shirt"),
    "neither": ("a tshirt", "t-shirt"),
    "hyphen that does not break": ("a t\u2011shirt", "t-shirt"),
    "compound": ("a Van Gogh-style sky", "Van Gogh"),
    "genitive": ("Van Gogh's sky", "van gogh"),
    "decomposed accent": (f"a {DECOMPOSED}", "café"),
    "composed accent": ("a café", DECOMPOSED),
    "full width": ("ｓｎｅａｋｅｒ", "sneaker"),
    "invisible character": ("snea\u200bker", "sneaker"),
    "Chinese": ("梵高的画", "梵高"),
    "Japanese": ("赤いスニーカーの写真", "スニーカー"),
    "Latin within Japanese": ("赤いsneakerの写真", "sneaker"),
    "Korean with a particle": ("한국의 음식", "한국"),
    "decomposed Korean": (unicodedata.normalize("NFD", "한국 음식"), "한국"),
    "Thai": ("ภาพแมวสีแดง", "แมว"),
    "Greek capitals": ("ΜΙΑ ΓΑΤΑ", "γατα"),
}
NOT_NAMED = {
    "part of a word": ("shirtless", "shirt"),
    "end of a word": ("a sweatshirt", "shirt"),
    "a word with one letter before": ("a red t-shirt", "shirt"),
    "the same at the beginning": ("T-shirt", "shirt"),
    "other accent": ("a resume", "résumé"),
    "no plural": ("a dres", "dress"),
    "digits": ("sneaker2", "sneaker"),
    "another word": ("a boot", "bag"),
    "nothing": ("", "boot"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_found_however_it_is_typed(name):
    text, concept = NAMED[name]
    assert mentions(text, concept)
    assert labels_in_texts([text], ["zebra", concept]) == [concept]
    assert rows_about_others(["a zebra", text], [ErasedConcepts([concept], [])]) == [0]
    for swapped in (swap_concept(text, concept, "<x>"), rename_concept([text], concept, "<x>")[0]):
        assert "<x>" in swapped and not mentions(swapped, concept)
    if text.isascii():
        with pytest.raises(ValueError, match="is to be forgotten itself, as it names"):
            ObjectiveConfig(name="rl", anchor_prompt=text).anchors_of([concept])


@pytest.mark.parametrize("name", NOT_NAMED)
def test_other_words_are_not_found(name):
    text, concept = NOT_NAMED[name]
    assert not mentions(text, concept) and labels_in_texts([text], [concept]) == [None]
    assert rows_about_others([text], [ErasedConcepts([concept], [])]) == [0]
    with pytest.raises(ValueError, match="does not name the concept"):
        swap_concept(text, concept, "x")


EXCHANGED = {  # caption, concept, other words -> the caption with these
    "one": ("a photo of a red Sneaker", "sneaker", "boot", "a photo of a red boot"),
    "plural": ("two sneakers and a sneaker", "sneaker", "ankle boot", "two ankle boots and a ankle boot"),
    "plural in -es": ("two sneakers", "sneaker", "church", "two churches"),
    "plural with a doubled letter": ("two busses", "bus", "church", "two churches"),
    "nothing else changes": ("A  Van-Gogh   sky,  é", "van gogh", "Monet", "A  Monet   sky,  é"),
    "a token has no plural": ("sneakers", "sneaker", "<token>", "<token>"),
    "decomposed": (f"a {DECOMPOSED} in {DECOMPOSED[:3]}", "café", "bar", "a bar in caf"),
    "Japanese": ("赤いスニーカーの写真", "スニーカー", "ブーツ", "赤いブーツの写真"),
    "a backslash is no pattern": ("a boot", "boot", r"\1", r"a \1"),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_words_are_exchanged(name):
    caption, concept, words, expected = EXCHANGED[name]
    assert swap_concept(caption, concept, words) == expected


REFUSED_ANCHORS = {  # settings of the objective, concepts
    "the concept": ({"anchor": "sneaker"}, ["sneaker"]),
    "but for case": ({"anchor": "Sneaker"}, ["sneaker"]),
    "but for a space": ({"anchor": " sneaker "}, ["sneaker"]),
    "but for a hyphen": ({"anchor": "van-gogh"}, ["Van Gogh"]),
    "its plural": ({"anchor": "sneakers"}, ["sneaker"]),
    "a kind of it": ({"anchor": "old sneaker"}, ["sneaker"]),
    "another concept of the list": ({"anchor": ["boot", "Sneaker"]}, ["sneaker", "bag"]),
    "a prompt that names it": ({"anchor_prompt": "a photo of a SNEAKER"}, ["sneaker"]),
}


@pytest.mark.parametrize("name", REFUSED_ANCHORS)
def test_an_anchor_that_names_the_concept_is_refused(name):
    settings, concepts = REFUSED_ANCHORS[name]
    with pytest.raises(ValueError, match=r"objective.anchor(_prompt)? .* is to be forgotten itself, as it names '"):
        ObjectiveConfig(**settings).anchors_of(concepts)


def test_a_blank_anchor_is_refused():
    for settings in ({"anchor": " "}, {"anchor": ""}, {"anchor": ["boot", ""]}, {"anchor_prompt": ""}):
        with pytest.raises(ValueError, match=r"objective.anchor(_prompt)? ' ?' is empty"):
            ObjectiveConfig(**settings).anchors_of(["sneaker", "bag"])


def test_captions_that_were_erased_are_known_however_they_are_typed():
    erased = ErasedConcepts(["x"], ["A red  thing", f"a {DECOMPOSED}"])
    assert rows_about_others(["a RED thing", "a café", "a blue thing"], [erased]) == [2]


def test_anchors_that_are_retained_are_accepted():
    assert ObjectiveConfig(anchor="t-shirt").anchors_of(["shirt"]) == ["t-shirt"]
    assert ObjectiveConfig(anchor="shirt").anchors_of(["t-shirt"]) == ["shirt"]
    assert ObjectiveConfig(anchor="pickup truck").anchors_of(["truck"], labels=True) == ["pickup truck"]


REFUSED_CONCEPTS = {
    "blank": ({"concept": " "}, "concept is empty"),
    "twice": ({"concept": ["sneaker", "Sneakers"]}, "names 'Sneakers' twice, also as 'sneaker'"),
    "empty prompt": ({"concept": "sneaker", "forget_prompts": ["a sneaker", " "]}, "forget_prompts holds an empty"),
    "prompt of both": (
        {"concept": "sneaker", "forget_prompts": ["a Shoe"], "retain_prompts": ["A  shoe"]},
        "'a shoe' stands in forget_prompts and in retain_prompts",
    ),
    "retain prompt": (
        {"concept": "sneaker", "retain_prompts": ["a boot", "two Sneakers"]},
        "retain prompt 'two Sneakers' names 'sneaker'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CONCEPTS)
def test_concepts_that_would_train_against_themselves_are_refused(name):
    settings, message = REFUSED_CONCEPTS[name]
    with pytest.raises(ValueError, match=message):
        ConceptConfig(**settings)


def grey16(values):
    return Image.fromarray(np.array(values, dtype=np.uint16))


def with_exif(image):
    """The image with the note that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    return image, {"exif": exif}


def half_transparent():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    return image


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image, {"transparency": 1}


PICTURES = {  # name -> (file name, image and how it is saved, the pixels that people see)
    "RGB": ("a.png", lambda: Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), [[[1, 2, 3], [4, 5, 6]]]),
    "16 bits": ("a.png", lambda: grey16([[0, 257 * 100, 65535]]), [[[0] * 3, [100] * 3, [255] * 3]]),
    "16 bits, dark": ("a.png", lambda: grey16([[0, 257, 255]]), [[[0] * 3, [1] * 3, [1] * 3]]),
    "16 bits, TIFF": ("a.tif", lambda: grey16([[0, 65535]]), [[[0] * 3, [255] * 3]]),
    "32 bits of which 16 are used": ("a.tif", lambda: Image.fromarray(np.int32([[0, 65535]])), [[[0] * 3, [255] * 3]]),
    "floats up to 1": ("a.tif", lambda: Image.fromarray(np.float32([[0, 1]])), [[[0] * 3, [255] * 3]]),
    "floats up to 255": ("a.tif", lambda: Image.fromarray(np.float32([[7, 255]])), [[[7] * 3, [255] * 3]]),
    "transparent is white": ("a.png", half_transparent, [[[255, 0, 0], [255, 255, 255]]]),
    "transparent WebP": (
        "a.webp",
        lambda: (half_transparent(), {"lossless": True, "exact": True}),
        [[[255, 0, 0], [255, 255, 255]]],
    ),
    "grey with transparency": (
        "a.png",
        lambda: Image.merge("LA", [Image.new("L", (2, 1), 10), half_transparent().getchannel("A")]),
        [[[10] * 3, [255] * 3]],
    ),
    "palette": ("a.gif", lambda: palette_with_transparency()[0], [[[255, 0, 0], [0, 255, 0]]]),
    "palette with transparency": ("a.png", palette_with_transparency, [[[255, 0, 0], [255, 255, 255]]]),
    "a transparent colour": (
        "a.png",
        lambda: (Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), {"transparency": (4, 5, 6)}),
        [[[1, 2, 3], [255, 255, 255]]],
    ),
    "grey": ("a.png", lambda: Image.fromarray(np.uint8([[7, 9]])), [[[7] * 3, [9] * 3]]),
    "black and white": ("a.png", lambda: Image.fromarray(np.array([[True, False]])), [[[255] * 3, [0] * 3]]),
    "CMYK": ("a.tif", lambda: Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[[255, 0, 0]]]),
    "turned by EXIF": (
        "a.png",
        lambda: with_exif(Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]]))),
        [[[1, 2, 3]], [[4, 5, 6]]],
    ),
}


def write_picture(folder, name):
    file_name, make, expected = PICTURES[name]
    made = make()
    image, options = made if isinstance(made, tuple) else (made, {})
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / file_name, **options)
    return folder / file_name, np.uint8(expected)


@pytest.mark.parametrize("name", PICTURES)
def test_every_reader_sees_the_picture_that_people_see(name, tmp_path):
    path, expected = write_picture(tmp_path / "pictures", name)
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), expected)
    (fidelity,) = list(ImageFiles(path.parent))
    np.testing.assert_array_equal(fidelity.permute(1, 2, 0), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(as_rgb(image)), expected)
    rows = load_image_text(str(path.parent), "train", caption_column=None)
    (column,) = list(ImageColumn(rows))
    np.testing.assert_array_equal(column.permute(1, 2, 0), expected)
    side = min(expected.shape[:2])
    labelled = Dataset.from_dict({"image": [str(path)], "label": ["a"]}).cast_column("image", ImageFeature())
    labelled.to_parquet(tmp_path / "labelled" / "train.parquet")
    source = LabelledSource(str(tmp_path / "labelled"), "train")
    pixels = read_pixels(rows, "image", side, range(1))
    assert load_labelled(source, resolution=side).images.shape == pixels.shape == (1, 3, side, side)
    tall = as_rgb(Image.open(path)).resize((4, 4), 0)  # a square: nothing is scaled or cropped
    tall.save(tmp_path / "tall.png")
    whole = torch.from_numpy(np.array(tall)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(to_pixels([tall], 4)[0], whole)


def ink_profile():
    """A colour profile (ICC 2, one lut8 table) of inks that are all the same grey, Lab (50, 0, 0), but for black."""
    corners = bytearray([128, 128, 128, 0, 128, 128] * 8)  # without black, with black
    corners[:3] = (255, 128, 128)  # no ink: white
    identity = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + 4 * ramp + bytes(corners) + 3 * ramp
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"i\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    parts, offset, body, index = {b"A2B0": table, b"desc": text, b"wtpt": white}, 128 + 4 + 36, b"", b""
    for name, part in parts.items():
        index += name + struct.pack(">II", offset + len(body), len(part))
        body += part + bytes(-len(part) % 4)
    head = b"lcms" + bytes((2, 0x40, 0, 0)) + b"prtrCMYKLab " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    head += bytes(28) + struct.pack(">iii", 63190, 65536, 54061) + bytes(48)
    whole = struct.pack(">I", 128 + 4 + 36 + len(body)) + head + struct.pack(">I", 3) + index + body
    assert len(head) == 124
    return whole


@pytest.mark.parametrize(
    "profile, seen",
    [(ink_profile(), [119, 255]), (None, [0, 255]), (b"no profile", [0, 255])],
    ids=["with profile", "without", "broken"],
)
@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_inks_look_as_their_profile_says(profile, seen, suffix, tmp_path):
    image = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 0), (0, 0, 8, 8))
    image.save(tmp_path / f"a.{suffix}", **({"icc_profile": profile} if profile else {}))
    pixels = np.asarray(open_rgb(tmp_path / f"a.{suffix}")).astype(int)
    assert pixels.shape == (8, 16, 3)
    for column, wanted in zip((0, 15), seen, strict=True):
        assert abs(pixels[:, column] - wanted).max() <= 3


def test_encode_images_reads_them_the_same_way(tmp_path):
    pipeline, random = build("sd"), np.random.default_rng(0)
    values = random.integers(0, 256, (32, 32), dtype=np.uint8)
    colours = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    half = np.where(np.arange(32)[:, None, None] < 16, colours, 255)
    alpha = np.repeat(np.where(np.arange(32) < 16, 255, 0)[:, None], 32, 1)
    upright, options = with_exif(Image.fromarray(np.rot90(colours)))
    upright.save(tmp_path / "upright.png", **options)
    for given, seen in (
        (grey16(values.astype(np.uint16) * 257), np.repeat(values[..., None], 3, 2)),
        (Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8)), half),
        (Image.open(tmp_path / "upright.png"), colours),
    ):
        moments = [
            encode_images(pipeline, [image], ["a"]).moments for image in (given, Image.fromarray(np.uint8(seen)))
        ]
        torch.testing.assert_close(*moments)


UNREADABLE = {
    "floats of another range": ("a.tif", Image.fromarray(np.float32([[0, 3000]])), "says nothing about brightness"),
    "negative numbers": ("a.tif", Image.fromarray(np.float32([[-1, 1]])), "says nothing about brightness"),
    "no image": ("a.png", b"no image at all", "cannot identify"),
    "cut off": ("a.png", None, "cannot be read"),
    "a huge image": ("a.png", 40_000, "pixels: scale it down"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_read_is_one_error_that_names_it(name, tmp_path, monkeypatch):
    file_name, content, message = UNREADABLE[name]
    path = tmp_path / "data" / file_name
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(path)
    else:
        Image.effect_noise((200, 200), 50).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", content and content // 4)
        if content is None:
            path.write_bytes(path.read_bytes()[:5000])
    for read in (
        lambda: open_rgb(path),
        lambda: list(ImageFiles(path.parent)),
        lambda: list(ImageColumn(load_image_text(str(path.parent), "train", caption_column=None))),
        lambda: read_pixels(load_image_text(str(path.parent), "train", caption_column=None), "image", 8, range(1)),
    ):
        with pytest.raises(ValueError, match=rf"{file_name}.* cannot be read: .*|{message}") as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_encode_images_wants_a_caption_each():
    for images, captions, message in (([], [], "no image"), ([Image.new("RGB", (8, 8))], [], "1 images, but 0 capt")):
        with pytest.raises(ValueError, match=message):
            encode_images(build("sd"), images, captions)


def picture(path, value=0):
    """A small picture of one grey, in the format that the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path, format=None if path.suffix else "PNG")


def loop(folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "again").symlink_to(folder)


def linked_folder(folder):
    picture(folder.parent / "elsewhere" / "c.png", 3)
    (folder / "linked").symlink_to(folder.parent / "elsewhere")


def run_folder(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def generated(folder):
    picture(folder / "run/cache/generated-1/images/00000.png", 200)
    run_folder(folder / "run/cache/generated-1", manifest={"denoiser": "x", "prompts": [], "sampling": {}})
    picture(folder / "earlier/before_after.png", 201)
    run_folder(folder / "earlier", manifest={"settings": {}, "hashes": {}})
    picture(folder / "older/before_after.png", 202)
    run_folder(folder / "older", erased_concepts=[])


FOLDERS = {  # name -> (what is added to a folder with a.png of grey 1 and b.png of grey 2, greys, the printed counts)
    "plain": (lambda d: None, [1, 2], "2 images found, 2 used"),
    "names with train and test": (
        lambda d: [picture(d / name, 3) for name in ("cat_test_1.png", "train-2.png", "test.png", "val 3.png")],
        [1, 2, 3, 3, 3, 3],
        "6 images found, 6 used",
    ),
    "equal files": (lambda d: picture(d / "c.png", 1), [1, 2, 1], "3 images found, 3 used"),
    "capital suffix": (lambda d: picture(d / "c.PNG", 3), [1, 2, 3], "3 images found, 3 used"),
    "other formats": (
        lambda d: [picture(d / f"c{i}.{end}", i) for i, end in enumerate(("tif", "gif", "tga", "jp2", "ppm", "ico"))],
        [1, 2, 0, 1, 2, 3, 4, 5],
        "8 images found, 8 used",
    ),
    "no suffix": (lambda d: picture(d / "c", 3), [1, 2, 3], "3 images found, 3 used"),
    "subfolders": (lambda d: picture(d / "sub" / "deep" / "c.png", 3), [1, 2, 3], "3 images found, 3 used"),
    "a linked folder": (linked_folder, [1, 2, 3], "3 images found, 3 used"),
    "links in a circle": (loop, [1, 2], "2 images found, 2 used"),
    "hidden": (
        lambda d: [picture(d / ".ipynb_checkpoints" / "a.png", 9), picture(d / ".b.png", 9)],
        [1, 2],
        "2 images found, 2 used; left out: 2 hidden",
    ),
    "a link that leads nowhere": (
        lambda d: (d / "c.png").symlink_to(d / "gone.png"),
        [1, 2],
        "3 images found, 2 used; left out: 1 links that lead nowhere",
    ),
    "a kind without reader": (
        lambda d: (d / "c.heic").write_bytes(b"x"),
        [1, 2],
        r"3 images found, 2 used; left out: 1 of a kind that cannot be read (.heic)",
    ),
    "output of earlier runs": (
        generated,
        [1, 2],
        "5 images found, 2 used; left out: 3 in folders of earlier runs",
    ),
    "other files": (lambda d: (d / "notes.md").write_text("x"), [1, 2], "2 images found, 2 used"),
    "a folder called train beside images": (
        lambda d: picture(d / "train" / "c.png", 3),
        [1, 2, 3],
        "3 images found, 3 used",
    ),
    "odd names": (
        lambda d: [picture(d / name / f"{name}.png", 3) for name in ("x [v1]", "y * ? #", "z::w", "100%", "é…")],
        [1, 2, 3, 3, 3, 3, 3],
        "7 images found, 7 used",
    ),
}


def greys(rows, column="image"):
    return [np.asarray(as_rgb(image))[4, 4, 0] for image in rows[column]]


@pytest.fixture
def unprinted(monkeypatch):
    monkeypatch.setattr(folders, "_printed", set())


@pytest.mark.parametrize("root", ["plain", "with [v1] and *", "~"])
@pytest.mark.parametrize("name", FOLDERS)
def test_one_reader_for_training_and_fidelity(name, root, tmp_path, monkeypatch, capsys, unprinted):
    add, expected, printed = FOLDERS[name]
    folder = tmp_path / "home" / ("data" if root == "~" else root)
    for index, name_of_image in enumerate(("a.png", "b.png"), 1):
        picture(folder / name_of_image, index)
    add(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = "~/data" if root == "~" else str(folder)
    rows = load_image_text(source, "train", caption_column=None)
    assert sorted(greys(rows)) == sorted(expected)
    assert [int(image[0, 4, 4]) for image in ImageFiles(source)] == greys(rows)  # FID, in the same order
    assert capsys.readouterr().out == f"{folder}: {printed}\n"


def test_splits_are_top_folders_and_nothing_else(tmp_path):
    for split, value in {"train": 1, "Validation": 2, "test": 3}.items():
        picture(tmp_path / "d" / split / "train_and_test.png", value)
    for split, value in {"train": 1, "validation": 2, "test": 3}.items():
        assert greys(load_image_text(str(tmp_path / "d"), split, caption_column=None)) == [value]
    with pytest.raises(ValueError, match="cannot read split 'dev' of .*: it has test, train, validation"):
        load_image_text(str(tmp_path / "d"), "dev", caption_column=None)
    (tmp_path / "d" / "metadata.csv").write_text("file_name,text\ntest/train_and_test.png,a boot\n")
    assert list(load_image_text(str(tmp_path / "d"), "test")["text"]) == ["a boot"]
    picture(tmp_path / "d" / "bus" / "a.png", 4)  # "train" is a class now
    rows = read_rows(str(tmp_path / "d"), "train", columns=["label"])
    assert len(rows) == 4 and texts_of(rows, "label") == ["Validation", "bus", "test", "train"]
    with pytest.raises(ValueError, match="cannot read split 'test' of .*: it has train"):
        load_image_text(str(tmp_path / "d"), "test", caption_column=None)


def three(folder):
    for index in range(3):
        picture(folder / f"{index}.png", index)
    return folder


def test_captions_from_text_files(tmp_path, capsys, unprinted):
    folder = three(tmp_path / "d")
    (folder / "0.txt").write_text("\ufeffa red\n boot \n", encoding="utf-8")
    (folder / "1.caption").write_text("a bag")
    rows = load_image_text(str(folder), "train")
    assert list(rows["text"]) == ["a red boot", "a bag"] and greys(rows) == [0, 1]
    assert capsys.readouterr().out == f"{folder}: 3 images found, 2 used; left out: 1 without a caption\n"
    config = ConceptConfig(concept="hat", forget_data_dir=str(folder), forget_prompts=["a hat"])
    assert list(rows_of_folder(config, str(folder), ["a hat"], "forget")["text"]) == ["a red boot", "a bag", "a hat"]


def test_images_that_a_metadata_file_forgot(tmp_path, capsys, unprinted):
    folder = three(tmp_path / "d")
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"a boot, red"\n2.png,a bag\ngone.png,a hat\n')
    rows = load_image_text(str(folder), "train")
    assert list(rows["text"]) == ["a boot, red", "a bag"] and greys(rows) == [0, 2]
    printed = capsys.readouterr().out
    assert "row 2 names 'gone.png', which is not there" in printed
    assert "3 images found, 2 used; left out: 1 without a caption" in printed
    (folder / "1.txt").write_text("a coat")
    assert list(load_image_text(str(folder), "train")["text"]) == ["a boot, red", "a coat", "a bag"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_of_every_kind_and_of_subfolders(kind, tmp_path):
    folder = tmp_path / "d"
    picture(folder / "x" / "0.png", 0)
    picture(folder / "x" / "1.png", 1)
    rows = [{"file_name": "0.png", "text": "a boot"}, {"file_name": "1.png", "text": "a bag"}]
    if kind == "csv":
        (folder / "x" / "metadata.csv").write_text("file_name,text\n0.png,a boot\n1.png,a bag\n", encoding="utf-8-sig")
    elif kind == "jsonl":
        (folder / "x" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(folder / "x" / "metadata.parquet")
    assert list(load_image_text(str(folder), "train")["text"]) == ["a boot", "a bag"]


BROKEN_METADATA = {
    "unquoted comma": (b"file_name,text\n0.png,a boot, red\n", "metadata.csv', line 2: more cells than columns"),
    "too few cells": (b"file_name,text\n0.png\n", "line 2: fewer cells than columns"),
    "open quote": (b'file_name,text\n0.png,"a boot\n', "metadata.csv', line 2: a quote is never closed"),
    "another encoding": ("file_name,text\n0.png,café\n".encode("latin-1"), "metadata.csv' is not in UTF-8"),
    "no file names": (b"name,text\n0.png,a boot\n", "row 0: there is no file_name; it has name, text"),
    "semicolons": (b"file_name;text\n0.png;a boot\n", "row 0: there is no file_name; it has file_name;text"),
    "an empty caption": (b"file_name,text\n0.png,\n1.png,a boot\n", "row 0 of column 'text' is empty"),
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_metadata_that_cannot_be_read_is_refused_by_name(name, tmp_path):
    content, message = BROKEN_METADATA[name]
    (three(tmp_path / "d") / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image_text(str(tmp_path / "d"), "train")


def test_metadata_that_say_two_things_of_an_image(tmp_path, capsys, unprinted):
    folder = three(tmp_path / "d")
    lines = [{"file_name": "0.png", "text": "a\u2028boot"}, {"file_name": "1.png", "text": "a bag"}]
    lines.append({"file_name": "./0.png", "text": "a hat"})
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert list(load_image_text(str(folder), "train")["text"]) == ["a\u2028boot", "a bag"]
    assert f"{path}: row 2 names '0.png' again; its first row counts" in capsys.readouterr().out
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a coat\n")
    with pytest.raises(ValueError, match=r"holds metadata.csv and metadata.jsonl: keep the one that is right"):
        load_image_text(str(folder), "train")


OTHER_SPELLINGS = {  # values of a column, concepts -> what the refusal says
    "capitals": (["boot", "Boot", "bag"], ["boot"], "rows have kind = 'Boot' beside 'boot': make them one value"),
    "a space": (["boot", "boot ", "bag"], ["boot"], "rows have kind = 'boot ' beside 'boot'"),
    "an accent": (["café", DECOMPOSED, "bag"], ["café"], "rows have kind = "),
    "no such value": (["Boot ", "bag"], ["boot"], "known are Boot , bag; the data write it 'Boot '"),
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_another_spelling_of_the_concept_is_not_retained(name):
    values, concepts, message = OTHER_SPELLINGS[name]
    rows = Dataset.from_dict({"kind": values})
    with pytest.raises(ValueError, match=re.escape(message)):
        split_concepts(rows, "kind", concepts)
    assert len(split_concepts(rows, "kind", values[:-1])[0]) == len(values) - 1  # all of them named


def test_an_image_that_changes_is_another_data_set(tmp_path):
    folder = three(tmp_path / "d")
    before = load_image_text(str(folder), "train", caption_column=None)._fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert load_image_text(str(tmp_path / "copy"), "train", caption_column=None)._fingerprint == before
    picture(folder / "1.png", 77)
    assert load_image_text(str(folder), "train", caption_column=None)._fingerprint != before


COLUMNS = {  # name -> (values, feature, words)
    "text": (["cat", "dog"], Value("string"), ["cat", "dog"]),
    "class labels": ([1, 0], ClassLabel(names=["cat", "dog"]), ["dog", "cat"]),
    "whole numbers": ([3, 7], Value("int64"), ["3", "7"]),
    "19 digits": ([9007199254740993, 1], Value("int64"), ["9007199254740993", "1"]),
    "whole numbers beside gaps": ([3.0, 7.0], Value("float64"), ["3", "7"]),
    "yes and no": ([True, False], Value("bool"), ["True", "False"]),
}
REFUSED_COLUMNS = {
    "null": (["cat", None], Value("string"), "is empty"),
    "blank": (["cat", "  "], Value("string"), "is empty"),
    "null among labels": ([0, None], ClassLabel(names=["cat", "dog"]), "is empty"),
    "an unlabelled test set": ([0, -1], ClassLabel(names=["cat", "dog"]), "is empty"),
    "not a number": ([1.0, float("nan")], Value("float64"), "is empty"),
    "measurements": ([1.0, 0.5], Value("float64"), "is '0.5' (float), but must be words"),
    "lists": ([["cat"], ["cat", "dog"]], List(Value("string")), "(list), but must be words"),
}


def one_column(values, feature):
    images = [Image.new("RGB", (8, 8), (index,) * 3) for index in range(len(values))]
    features = Features({"image": ImageFeature(), "kind": feature})
    return Dataset.from_dict({"image": images, "kind": values}, features=features)


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_becomes_words(name, tmp_path):
    values, feature, expected = COLUMNS[name]
    (tmp_path / "d").mkdir()
    one_column(values, feature).to_parquet(tmp_path / "d" / "train.parquet")
    assert texts_of(read_rows(str(tmp_path / "d"), "train"), "kind") == expected
    assert list(load_image_text(str(tmp_path / "d"), "train", caption_column="kind")["kind"]) == expected
    data = load_labelled(LabelledSource(str(tmp_path / "d"), "train", label_column="kind"), resolution=8)
    assert [data.names[label] for label in data.labels] == expected
    config = ConceptConfig(concept=expected[0], concept_column="kind", train_data_dir=str(tmp_path / "d"))
    rows = load_concept_rows(config, "train")
    assert list(rows["text"]) == [f"a photo of a {word}" for word in expected]
    forget, retain = split_concepts(rows, "kind", [expected[0]])
    assert (list(forget["kind"]), list(retain["kind"])) == ([expected[0]], [expected[1]])


@pytest.mark.parametrize("name", REFUSED_COLUMNS)
def test_every_other_column_is_refused_by_row(name, tmp_path):
    values, feature, message = REFUSED_COLUMNS[name]
    (tmp_path / "d").mkdir()
    one_column(values, feature).to_parquet(tmp_path / "d" / "train.parquet")
    source, row = str(tmp_path / "d"), 0 if name == "lists" else 1
    config = ConceptConfig(concept="cat", concept_column="kind", train_data_dir=source)
    readers = [
        lambda: load_concept_rows(config, "train"),
        lambda: load_labelled(LabelledSource(source, "train", label_column="kind"), resolution=8),
        lambda: split_concepts(read_rows(source, "train"), "kind", ["cat"]),
    ]
    if not isinstance(feature, List):
        readers.append(lambda: load_image_text(source, "train", caption_column="kind"))
    for read in readers:
        with pytest.raises(ValueError, match=rf"row {row} of column 'kind' .*{re.escape(message)}"):
            read()


def test_of_several_captions_the_first_is_taken(tmp_path):
    (tmp_path / "d").mkdir()
    values = [["a cat", "one cat"], ["a dog", "one dog"]]
    one_column(values, List(Value("string"))).to_parquet(tmp_path / "d" / "train.parquet")
    rows = load_image_text(str(tmp_path / "d"), "train", caption_column="kind")
    assert list(rows["kind"]) == ["a cat", "a dog"]
    one_column([["a cat"], []], List(Value("string"))).to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(ValueError, match="row 1 of column 'kind' is .*list"):
        load_image_text(str(tmp_path / "d"), "train", caption_column="kind")


def test_class_folders_without_captions_get_a_template(tmp_path, capsys, unprinted):
    for index, name in enumerate(("bus", "traffic_light")):
        picture(tmp_path / "d" / name / "0.png", index)
    config = ConceptConfig(
        concept="bus", concept_column="label", train_data_dir=str(tmp_path / "d"), caption_template="one {} here"
    )
    rows = load_concept_rows(config, "train")
    assert list(rows["text"]) == ["one bus here", "one traffic light here"]
    assert "no column 'text', captions are like 'one bus here'" in capsys.readouterr().out
    labelled = load_labelled(LabelledSource(str(tmp_path / "d"), "train"), resolution=8)
    assert labelled.names == ["bus", "traffic_light"] and labelled.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="must hold {} once"):
        ConceptConfig(concept="bus", caption_template="a bus")


def test_retain_images_that_show_the_concept_are_left_out(tmp_path, capsys, unprinted):
    folder = three(tmp_path / "d")
    for index, text in enumerate(("a boot", "two Sneakers", "a bag")):
        (folder / f"{index}.txt").write_text(text)
    config = ConceptConfig(concept="sneaker", retain_data_dir=str(folder))
    assert list(rows_of_folder(config, str(folder), [], "retain")["text"]) == ["a boot", "a bag"]
    assert "1 of 3 captions name the concept; left out" in capsys.readouterr().out


def test_parquet_files_in_a_folder_with_odd_characters(tmp_path):
    folder = tmp_path / "data [v1] *"
    folder.mkdir()
    one_column(["cat", "dog"], Value("string")).to_parquet(folder / "train.parquet")
    assert list(load_image_text(str(folder), "train", caption_column="kind")["kind"]) == ["cat", "dog"]


def test_a_folder_without_any_image(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "c.heic").write_bytes(b"x")
    message = r"1 images found, 0 used; left out: 1 of a kind that cannot be read \(.heic\)"
    for read in (ImageFiles, lambda source: load_image_text(source, "train")):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / "d"))


ODD_LABELS = [
    "[/x]",
    "[red]boot",
    r"a $\frac$",  # no formula that matplotlib could draw
    "<script>alert(1)</script>",
    "`code` | *bold*",
    "_x",
    ":smile:",
]


def test_labels_are_printed_as_they_are(capsys):
    shares = {label: {"value": 50.0, "interval_95": [40.0, 60.0], "num_images": 9} for label in ODD_LABELS}
    one = next(iter(shares.values()))
    details = {"per_class_after": shares, "retain_accuracy_after": one, "unlearning_accuracy": one}
    metrics = {"details": details, "retain_accuracy_after": 50.0, "unlearning_accuracy": 50.0}
    print_metrics(metrics, "class", ODD_LABELS[:2])
    print_values("[/title]", {"after": dict.fromkeys(ODD_LABELS, 0.5)})
    print_attacks(
        [{"attack": "a", "concept": label, "pre_attack": one, "post_attack": one} for label in ODD_LABELS], {"a": 1}
    )
    printed = capsys.readouterr().out
    for label in ODD_LABELS:
        assert printed.count(label.replace("_", " ")) + printed.count(label) >= 2, label
    assert "[/title]" in printed


def test_labels_are_drawn_as_they_are(tmp_path):
    images = np.zeros((len(ODD_LABELS), 8, 8, 3), np.uint8)
    before_after_grid(images, images, ODD_LABELS, ODD_LABELS[:1], tmp_path / "grid.png")
    strip(images, ODD_LABELS, tmp_path / "strip.png")
    counted = {"value": 50.0, "interval_95": [40.0, 60.0]}
    assert label_bars({}, dict.fromkeys(ODD_LABELS, counted), [])
    assert trade_off([(label, counted, 0.0, None) for label in ODD_LABELS])


def test_a_model_card_holds_labels_as_text(tmp_path):
    facts = ModelCardFacts(
        where='runs/"x"',
        base="my base (v1)",
        forgotten=ODD_LABELS,
        objective="rl",
        protection="none",
        adapter=False,
        metrics={},
    )
    save_model_card(tmp_path, facts)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "&lt;script&gt;" in card and r"\[/x\]" in card and r"\*bold\*" in card
    assert "[my base (v1)](my%20base%20%28v1%29)" in card and r'from_pretrained("runs/\"x\"")' in card
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"


def test_ordinary_names_stay_as_they_are():
    for text in (
        "fashion_sd without t-shirt",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "a photo of a boot, red",
        "-0.5",
        "1.5",
        "unlearn.objective.eta",
    ):
        assert for_markdown(text) == text


LONG = "a photo of something red and blue and green and yellow and black and white and purple and grey, "
NOTHING_READ = DataNeeds(forget_images=False, retain_images=False, retain=False)


@pytest.fixture(scope="module")
def fashion():
    return StableDiffusionPipeline.from_pretrained(FASHION, dtype=torch.float32)


@pytest.fixture
def load(fashion, tmp_path):
    def run(**settings):
        config = ConceptConfig(concept="sneaker", **settings)
        return load_concepts(config, fashion, tmp_path / "cache", base_hash="x", seed=0, needs=NOTHING_READ, erased=[])

    return run


def test_a_concept_behind_the_token_limit_is_refused(load, tmp_path, capsys, unprinted):
    with pytest.raises(ValueError, match="all forget captions name the concept only behind the tokens .* words first"):
        load(forget_prompts=[LONG + "sneaker"])
    assert not (tmp_path / "cache").exists()
    load(forget_prompts=[LONG + "sneaker", "sneaker, " + LONG])
    assert "1 of 2 forget captions name the concept only behind the tokens" in capsys.readouterr().out
    folder = three(tmp_path / "d")
    for index in range(3):
        (folder / f"{index}.txt").write_text(LONG + "a sneaker")
    with pytest.raises(ValueError, match="all forget captions name the concept only behind"):
        load(forget_data_dir=str(folder))


def test_one_tokenizer_that_reads_the_concept_is_enough():
    pipeline = build("sd3")  # its T5 reads 256 tokens, its CLIPs 24
    require_names_within_limit(pipeline, [LONG + "sneaker"], [["sneaker"]])
    with pytest.raises(ValueError, match="only behind the tokens"):
        require_names_within_limit(build("sd3_plain"), [LONG + "sneaker"], [["sneaker"]])


def test_an_anchor_that_says_the_same_stops_the_run_before_training(load, fashion, tmp_path, capsys, unprinted):
    folder = three(tmp_path / "d")
    for index, text in enumerate(("a red thing", "a red thing", "a blue thing")):
        (folder / f"{index}.txt").write_text(text)
    data, options = load(forget_data_dir=str(folder)), {"resolution": 8, "needs": NOTHING_READ}
    same = data.anchors(None, "A  RED thing", 0)
    encode_concepts(data, same, fashion, tmp_path / "cache", **options)
    assert "2 of 3 forget captions cannot be told from their anchors" in capsys.readouterr().out
    (folder / "2.txt").write_text("A red thing")
    with pytest.raises(ValueError, match="'a red thing' and its anchor 'A  RED thing' the same embedding: nothing"):
        encode_concepts(load(forget_data_dir=str(folder)), same, fashion, tmp_path / "cache", **options)


def test_the_same_for_the_closed_form_edit(fashion):
    barrier = Barrier(fashion.unet, BarrierConfig(targets=["attn2.to_k"], reduced_dim=4, lambda_interval=0.0))
    tokenize = fashion.tokenizer
    task = PromptEdit(
        maps=barrier.maps,
        pairs=[("a sneaker", "A  Sneaker")],
        preserve=[],
        tokenize=lambda prompt: tokenize(prompt).input_ids,
        embed=lambda prompts: encode_prompts(fashion, prompts)["encoder_hidden_states"],
        options=UceSettings(),
    )
    with pytest.raises(ValueError, match="'A  Sneaker' the same embedding: nothing would be forgotten"):
        edit_keys_and_values(task)
    barrier.remove()
