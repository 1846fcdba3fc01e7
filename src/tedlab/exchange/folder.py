"""Folders as transformers writes them: ``config.json``, safetensors files, and an index if there are several.

Nothing in them is executed. Reading holds one tensor at a time, or a slice of one, and so does writing.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tedlab.checkpoint.manifest import is_file_name
from tedlab.exchange.mxfp4 import BLOCK, dequantised

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_MXFP4, _BLOCKS, _SCALES = "MXFP4", "_blocks", "_scales"
_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is like.

    Attributes:
        file: Name of its file.
        dtype: Its dtype as safetensors calls it.
        shape: Its shape.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class Folder:
    """A folder with a model.

    Raises:
        ValueError: If it is none, or one that could only be read by running code; the message says why.

    Attributes:
        path: Its path.
        config: The content of ``config.json``.
        tensors: All tensors of its files, by name; what is packed as MXFP4 as it is when dequantised.
    """

    def __init__(self, path: Path) -> None:
        if not (path / CONFIG).is_file():
            what = "there is no such folder on this machine (tedlab downloads none)"
            if path.exists():
                what = f"it has no {CONFIG}" if path.is_dir() else f"it is a file; give the folder with {CONFIG}"
            raise ValueError(f"{path} is no folder with a model: {what}")
        self.path, self.config = path, _read_json(path / CONFIG)
        self._open: dict[str, Any] = {}
        self._files = ExitStack()
        self.tensors: dict[str, Stored] = {}
        placed = self._placed()
        for name in sorted({*placed.values()}) if placed is not None else [SINGLE]:
            try:
                file = self._opened(name)
                for tensor in file.keys():  # noqa: SIM118 (it is no dictionary)
                    if tensor in self.tensors:
                        raise ValueError(
                            f"{path} has {tensor} twice, in {self.tensors[tensor].file} and in {name}: delete the file "
                            f"that is not of this model, and what {INDEX} says of it"
                        )
                    part = file.get_slice(tensor)
                    self.tensors[tensor] = Stored(name, part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path / name} is damaged, or is no safetensors file: {error}") from None
        for tensor, name in (placed or {}).items():
            if tensor not in self.tensors or self.tensors[tensor].file != name:
                raise ValueError(f"{path / INDEX} says that {tensor} is in {name}, which does not have it")
        self._packed = dict(self._take_packed())

    def _take_packed(self) -> Iterator[tuple[str, tuple[Stored, Stored]]]:
        """Replaces blocks and scales of MXFP4 by what they say, and yields them by its name."""
        for name in [name for name in self.tensors if name.endswith(_BLOCKS)]:
            whole = name.removesuffix(_BLOCKS)
            blocks, scales = self.tensors[name], self.tensors.get(whole + _SCALES)
            if scales is None or {blocks.dtype, scales.dtype} != {"U8"} or blocks.shape != (*scales.shape, BLOCK):
                continue
            *experts, rows, groups = scales.shape
            self.tensors[whole] = Stored(blocks.file, _MXFP4, (*experts, 2 * BLOCK * groups, rows))
            del self.tensors[name], self.tensors[whole + _SCALES]
            yield whole, (blocks, scales)

    def _placed(self) -> dict[str, str] | None:
        """Returns which file has which tensor, or None if there is one file and no index."""
        if (self.path / INDEX).is_file():
            placed = _read_json(self.path / INDEX).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(n, str) and is_file_name(n) for n in placed.values()):
                raise ValueError(
                    f"{self.path / INDEX} must have, as weight_map, the name of a file in this folder for each tensor"
                )
            names = sorted(set(placed.values()))
            absent = [name for name in names if not (self.path / name).is_file()]
            if absent:
                raise ValueError(f"{self.path} is not complete: its index names {', '.join(absent[:3])}: not there")
            return placed
        if (self.path / SINGLE).is_file():
            return None
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise ValueError(
                f"{self.path} has no safetensors files but pickled ones, which can run code when they are read; "
                "transformers' save_pretrained writes safetensors"
            )
        raise ValueError(f"{self.path} has no weights: neither {SINGLE} nor {INDEX}")

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor.

        Raises:
            ValueError: If it is none of floating-point numbers of 16 bits or more.
        """
        stored = self.tensors[name].dtype
        if stored == _MXFP4:
            return torch.bfloat16
        if stored not in _DTYPES:
            raise ValueError(
                f"{name} in {self.path} is stored as {stored}, as quantised models are: dequantise it to bfloat16 first"
            )
        return _DTYPES[stored]

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Reads a tensor, or what it has at an index of its first dimension."""
        if name in self._packed:
            parts = zip(self._packed[name], (_BLOCKS, _SCALES), strict=True)
            return dequantised(*(self._read(of.file, name + part, index) for of, part in parts))
        return self._read(self.tensors[name].file, name, index)

    def _read(self, file: str, name: str, index: int | None) -> Tensor:
        opened = self._opened(file)
        return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    def _opened(self, name: str) -> Any:
        """Opens a file, and closes the one before: what is mapped of it counts as memory of the process."""
        if name not in self._open:
            self.close()
            self._open[name] = self._files.enter_context(safe_open(self.path / name, framework="pt", device="cpu"))
        return self._open[name]

    def close(self) -> None:
        """Closes the file that is open."""
        self._open.clear()
        self._files.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no fields with values")
    return content


def write(
    path: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterator[tuple[str, Tensor]],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder with a model, holding one tensor at a time.

    A safetensors file is the length of its header, its header (what :func:`safetensors.torch.save_file` would only
    write of tensors that all exist), and the numbers.

    Args:
        path: An empty folder.
        config: Content of ``config.json``.
        shapes: Dtype and shape of each tensor, in the order in which they come.
        tensors: The tensors by name, each whole or in parts that follow each other in its first dimension.
        shard_bytes: How large a file may be, if it has several tensors.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in shapes.items()}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in names:
            dtype, shape = shapes[name]
            start, end = end, end + sizes[name]
            header[name] = {"dtype": _WORDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
            places[name] = file
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for expected in names:
                dtype, shape = shapes[expected]
                left = torch.Size(shape).numel()
                while left > 0:
                    name, part = next(tensors)
                    assert name == expected
                    left -= part.numel()
                    numbers = part.to(dtype).contiguous()
                    stream.write(numbers.flatten().view(torch.uint8).numpy().data)
                assert left == 0
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
