"""Latents and text embeddings that stay on the disk: the same bits, flat memory, files of earlier versions."""

import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from barrier_diffusers.data.encoding import EncodedImages, cached_tensors, cat_padded, tensors_hash
from barrier_diffusers.data.stored_rows import HASH, StoredRows, stored_rows
from barrier_diffusers.utils.files import WriteError

TENSORS = {
    "wide": torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7.0).to(torch.bfloat16)[:, None],
    "mask": torch.arange(7) % 2 == 0,
}


def batches(size=3, tensors=TENSORS):
    return [{name: value[start : start + size] for name, value in tensors.items()} for start in range(0, 7, size)]


def test_what_is_written_in_batches_is_the_file_that_is_written_at_once(tmp_path):
    found = stored_rows(tmp_path / "a" / "rows.safetensors", 7, batches)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["rows.safetensors"]
    assert load_file(tmp_path / "a" / "rows.safetensors").keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(load_file(tmp_path / "a" / "rows.safetensors")[name], value)
        assert (found[name].shape, found[name].dtype, len(found[name])) == (value.shape, value.dtype, 7)
        for rows in (2, -1, torch.tensor(4), [5, 0, 5], torch.tensor([6, 1]), slice(1, 6, 2), slice(None), []):
            assert torch.equal(found[name][rows], value[rows]), (name, rows)
    # what holds a whole tensor in memory reads the same file, and the other way round
    assert torch.equal(cached_tensors(tmp_path / "a" / "rows.safetensors", dict)["wide"], TENSORS["wide"])
    cached_tensors(tmp_path / "b.safetensors", lambda: TENSORS)
    assert torch.equal(stored_rows(tmp_path / "b.safetensors", 7, list)["wide"][:], TENSORS["wide"])


def test_rows_before_longer_ones_get_zeros_behind(tmp_path):
    tensors = [
        {"tokens": torch.full((2, length, 3), float(length)), "pooled": torch.full((2, 4), float(length))}
        for length in (5, 2, 7, 6, 9)
    ]
    found = stored_rows(tmp_path / "a.safetensors", 10, lambda: tensors)
    assert torch.equal(found["tokens"][:], cat_padded([batch["tokens"] for batch in tensors]))
    assert torch.equal(found["pooled"][:], torch.cat([batch["pooled"] for batch in tensors]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_caches_of_earlier_versions_go_on_loading(tmp_path, capsys):
    """Those with a hash; those before are computed anew, as they were until now."""
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={HASH: tensors_hash(TENSORS)})
    assert torch.equal(stored_rows(tmp_path / "a.safetensors", 7, list)["half"][:], TENSORS["half"])
    save_file({"wide": torch.zeros(7, 1)}, tmp_path / "b.safetensors")
    assert torch.equal(stored_rows(tmp_path / "b.safetensors", 7, batches)["wide"][:], TENSORS["wide"])
    assert capsys.readouterr().out.count("has no hash, as an earlier version left it: computed anew") == 1


def test_it_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(None)
        return batches()

    for _ in range(2):
        stored_rows(tmp_path / "a.safetensors", 7, compute)
    assert len(calls) == 1


@pytest.mark.parametrize("place", [20, -20])
def test_a_flipped_bit_is_found(tmp_path, place):
    path = tmp_path / "a.safetensors"
    stored_rows(path, 7, batches)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cache file '{re.escape(str(path))}' is damaged.*: delete it"):
        stored_rows(path, 7, batches)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    rows = stored_rows(path, 7, batches)["wide"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="ends too early"):
        rows[6]
    with pytest.raises(IndexError, match="row 7 of 7"):
        rows[7]


def failing():
    yield batches()[0]
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("compute", "error", "message"),
    [
        (failing, RuntimeError, "^no memory$"),  # not a failure of the disk
        (lambda: [], ValueError, "7 were announced"),
        (lambda: batches()[:2], ValueError, "7 rows were announced, but the batches have 6"),
        (lambda: [*batches(), *batches()], ValueError, "7 rows were announced, but the batches have more"),
    ],
)
def test_nothing_is_left_where_it_fails(tmp_path, compute, error, message):
    with pytest.raises(error, match=message) as raised:
        stored_rows(tmp_path / "a.safetensors", 7, compute)
    assert not isinstance(raised.value, WriteError)
    assert list(tmp_path.iterdir()) == []


def test_batches_of_a_data_set_on_the_disk_are_those_of_one_in_memory(tmp_path):
    """Also in other processes."""
    stored = stored_rows(tmp_path / "a.safetensors", 7, batches)
    ids, anchors = torch.tensor([3, 0, 6, 6, 2]), torch.tensor([1, 1, 2, 0, 0])
    kept, read = (
        EncodedImages(values["wide"], ids, anchors, {"c": values["wide"], "h": values["half"]}, empty_id=5)
        for values in (TENSORS, stored)
    )
    assert isinstance(pickle.loads(pickle.dumps(read)).moments, StoredRows)
    for workers in (0, 2):
        pairs = zip(*(DataLoader(one, batch_size=2, num_workers=workers) for one in (kept, read)), strict=True)
        for expected, found in pairs:
            assert expected.keys() == found.keys()
            assert torch.equal(expected["moments"], found["moments"])
            for part in ("condition", "anchor", "unconditional"):
                assert all(torch.equal(expected[part][name], found[part][name]) for name in ("c", "h"))


GROWTH = """
import sys, torch
from pathlib import Path
from barrier_diffusers.data.encoding import EncodedImages
from barrier_diffusers.data.stored_rows import stored_rows
from torch.utils.data import DataLoader

def highest():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

for num in (200, 3200):
    batches = lambda: ({"a": torch.full((50, 64, 256), float(start))} for start in range(0, num, 50))
    rows = stored_rows(Path(sys.argv[1]) / f"{num}.safetensors", num, batches)["a"]
    images = EncodedImages(rows, torch.arange(num), None, {"c": rows})
    total = sum(batch["moments"].sum().item() for batch in DataLoader(images, batch_size=8, shuffle=True))
    assert total == 64 * 256 * 50 * sum(range(0, num, 50))
    print(highest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's VmHWM")
def test_memory_is_flat_for_16_times_the_data(tmp_path):
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = map(int, done.stdout.split())
    assert (tmp_path / "3200.safetensors").stat().st_size > 209e6
    assert many - few < 40e6  # of 197e6 more; what Python and malloc keep back varies
