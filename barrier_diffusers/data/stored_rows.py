"""Tensors with one row for each image or prompt that stay on the disk: written as they are computed, read row by row.

The files are safetensors files with a hash, as `cached_tensors` writes them; memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from barrier_diffusers.utils.files import WriteError, written_whole

HASH = "sha256"  # of the tensors of a cache file, in its header
BLOCK = 1 << 22  # bytes read at once where a whole file is looked through
ROWS = 64  # copied at once where a file is laid out anew
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class StoredRows:
    """A tensor (N, ...) of a safetensors file; indexing reads the rows that are asked for.

    Args:
        start: of its numbers, in bytes from the beginning of the file.
    """

    def __init__(self, path: Path, dtype: torch.dtype, shape: Sequence[int], start: int):
        self.path, self.dtype, self.shape, self._start = path, dtype, torch.Size(shape), start
        self._row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One row for a number, (len(rows), ...) for several."""
        if isinstance(rows, Tensor):
            rows = rows.tolist()
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        if isinstance(rows, int):
            return self._row(rows)
        return torch.stack([self._row(row) for row in rows]) if rows else torch.empty(0, *self.shape[1:])

    def _row(self, row: int) -> Tensor:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        content = self._read(self._start + row % len(self) * self._row_bytes)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape[1:])

    def _read(self, offset: int) -> bytearray:
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        if hasattr(os, "pread"):  # one position for all processes that inherit the file would not do
            content = bytearray(os.pread(self._file.fileno(), self._row_bytes, offset))
        else:
            self._file.seek(offset)
            content = bytearray(self._file.read(self._row_bytes))
        if len(content) != self._row_bytes:
            raise ValueError(f"cache file {str(self.path)!r} ends too early: delete it")
        return content

    def close(self) -> None:
        """Let go of the file until it is read again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which open the file themselves."""
        return {**self.__dict__, "_file": None}


def stored_rows(
    path: Path, num_rows: int, batches: Callable[[], Iterable[Mapping[str, Tensor]]]
) -> dict[str, StoredRows]:
    """The tensors of a cache file by name; what is not there yet is computed once, batch by batch, and written whole
    or not at all. A file without a hash, of an earlier version, is computed anew.

    Args:
        num_rows: of every tensor.
        batches: the next rows of all tensors, in float32 or another dtype that safetensors has.

    Raises:
        ValueError: the file is not as it was written, or the batches have another number of rows.
    """
    found = _opened(path) if path.is_file() else None
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        failed: list[Exception] = []
        try:
            with written_whole(path) as temporary:
                _write(temporary, num_rows, _noting(batches(), failed))
        except WriteError:
            if failed:
                raise failed[0] from None
            raise
        found = _opened(path)
        assert found is not None
    return found


def _noting(batches: Iterable[Mapping[str, Tensor]], failed: list[Exception]) -> Iterator[Mapping[str, Tensor]]:
    """The batches; an error of the one who computes them is told from one of the disk."""
    try:
        yield from batches
    except Exception as error:
        failed.append(error)
        raise


def _opened(path: Path) -> dict[str, StoredRows] | None:
    try:
        with safe_open(path, "pt") as file:  # it refuses a header that lies
            digest = (file.metadata() or {}).get(HASH)
    except SafetensorError as error:
        raise ValueError(f"cache file {str(path)!r} is damaged ({error}): delete it") from error
    if digest is None:
        print(f"cache file {str(path)!r} has no hash, as an earlier version left it: computed anew")
        return None
    tensors = _tensors(path)
    if _hash(path, tensors) != digest:
        raise ValueError(f"cache file {str(path)!r} is damaged, it is not as it was written: delete it")
    return tensors


def _tensors(path: Path) -> dict[str, StoredRows]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredRows(path, DTYPES[facts["dtype"]], facts["shape"], 8 + size + facts["data_offsets"][0])
        for name, facts in header.items()
    }


def _hash(path: Path, tensors: Mapping[str, StoredRows]) -> str:
    """`encoding.tensors_hash` of what the file holds, block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, rows in sorted(tensors.items()):
            digest.update(f"{name} {rows.dtype} {tuple(rows.shape)} ".encode())
            file.seek(rows._start)
            left = len(rows) * rows._row_bytes
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    break
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], digest: str) -> bytes:
    """The beginning of a safetensors file; its length does not depend on the digest."""
    content: dict[str, Any] = {"__metadata__": {HASH: digest}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def padded(rows: Tensor, length: int) -> Tensor:
    """Rows (N, L, ...) as (N, length, ...), with zeros behind; others as they are."""
    missing = length - rows.shape[1] if rows.ndim > 1 else 0
    return torch.cat([rows, rows.new_zeros(len(rows), missing, *rows.shape[2:])], 1) if missing else rows


class _Writer:
    """A file that gets rows batch by batch. Where later ones have more tokens, those before get zeros behind."""

    def __init__(self, path: Path, num_rows: int, first: Mapping[str, Tensor]):
        self.path, self.num_rows, self.done = path, num_rows, 0
        self._lay_out({name: (value.dtype, (num_rows, *value.shape[1:])) for name, value in first.items()})

    def _lay_out(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))  # so that all are aligned
        self.shapes = {name: shapes[name] for name in order}
        empty = _header(self.shapes, "0" * hashlib.sha256().digest_size * 2)
        with self.path.open("wb") as file:
            file.write(empty)
            file.truncate(len(empty) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.shapes.values()))
        self.tensors = _tensors_of(self.path, self.shapes, len(empty))

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Write the next rows."""
        numbers = {len(value) for value in batch.values()}
        if len(numbers) != 1 or self.done + max(numbers) > self.num_rows:
            raise ValueError(
                f"{self.path.name}: {self.num_rows} rows were announced, but the batches have more or differ"
            )
        longer = [name for name, value in batch.items() if value.ndim > 1 and value.shape[1] > self.shapes[name][1][1]]
        if longer:
            self._widen({name: batch[name].shape[1] for name in longer})
        with self.path.open("r+b") as file:
            for name, value in batch.items():
                whole = padded(value, self.shapes[name][1][1]) if value.ndim > 1 else value
                file.seek(self.tensors[name]._start + self.done * self.tensors[name]._row_bytes)
                file.write(whole.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.done += max(numbers)

    def _widen(self, lengths: Mapping[str, int]) -> None:
        """Lay the file out anew for more tokens, and write what was there once more."""
        done, before, old = self.done, self.tensors, self.path.with_name(f".narrow{self.path.name}")
        os.replace(self.path, old)
        try:
            for rows in before.values():
                rows.path = old
            self._lay_out(
                {
                    name: (dtype, (shape[0], lengths.get(name, shape[1]), *shape[2:]) if len(shape) > 1 else shape)
                    for name, (dtype, shape) in self.shapes.items()
                }
            )
            self.done = 0
            for start in range(0, done, ROWS):
                self.add({name: rows[start : min(start + ROWS, done)] for name, rows in before.items()})
        finally:
            for rows in before.values():
                rows.close()
            old.unlink()

    def finish(self) -> None:
        """Write the hash."""
        if self.done != self.num_rows:
            raise ValueError(
                f"{self.path.name}: {self.num_rows} rows were announced, but the batches have {self.done}"
            )
        with self.path.open("r+b") as file:
            file.write(_header(self.shapes, _hash(self.path, self.tensors)))


def _write(path: Path, num_rows: int, batches: Iterator[Mapping[str, Tensor]]) -> None:
    writer = None
    for batch in batches:
        writer = writer or _Writer(path, num_rows, batch)
        writer.add(batch)
    if writer is None:
        raise ValueError(f"no row was computed for {path.name}, but {num_rows} were announced")
    writer.finish()


def _tensors_of(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], start: int
) -> dict[str, StoredRows]:
    tensors: dict[str, StoredRows] = {}
    for name, (dtype, shape) in shapes.items():
        tensors[name] = StoredRows(path, dtype, shape, start)
        start += math.prod(shape) * dtype.itemsize
    return tensors
