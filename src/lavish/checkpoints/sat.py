"""The checkpoints of SwissArmyTransformer (SAT): a folder with model_config.json, `latest`, and one folder for each
iteration, in which every rank of model parallelism has a file.

    <root>/model_config.json
    <root>/latest                                         an iteration's number, or the word "release"
    <root>/<iteration>/mp_rank_00_model_states.pt         01, 02 ... beside it

The ranks are laid together lazily, by CUTS and by shape. What a training run writes beside the weights (random states,
DeepSpeed's entries, optimizer files) is left alone. Names stay SAT's; what they mean is in `models/<family>/sat.py`.
Source: THUDM/SwissArmyTransformer, sat/training/model_io.py, sat/mpu/layers.py, sat/model/finetune/lora2.py.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavish.checkpoints.hf import inside
from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.pickles import read_tree
from lavish.checkpoints.tensor_map import Assembled, Piece, Stored, TensorInfo, TensorMap, view
from lavish.checkpoints.zip_directory import open_archive
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, UnknownLayout, shown

logger = logging.getLogger(__name__)

CONFIG, LATEST, RELEASE = "model_config.json", "latest", "release"
WEIGHTS = "module"
"""The key of the weights in a rank's file."""
PARALLEL = "model_parallel_size"
RANK_FILE = "mp_rank_{:02d}_model_states.pt"
_RANK = re.compile(r"mp_rank_(\d{2,3})_model_states\.pt")
_ITERATION = re.compile(r"(\d{1,15}|release)(-ema)?")
MAX_RANKS = 64
"""SAT's own scripts split into 2, 4 and 8."""

BESIDE_THE_WEIGHTS = frozenset(
    {
        "argparse Namespace",
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy._core.multiarray scalar",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    }
)
"""Classes that a training run's file may name for its random states and arguments. They are stepped over, not made."""


@dataclass(frozen=True)
class Cut:
    """Along which dimension the tensors of some names are cut among the ranks, and how long they are uncut."""

    pattern: str
    dim: int
    size: str
    """Field of model_config.json that has the length of one block."""
    blocks: int = 1
    """Blocks that lie behind each other and are each cut: query, key and value are 3."""
    section: str | None = None
    """Where in model_config.json the field stands; None: at the top."""

    def length(self, fields: Mapping[str, Any], where: Path) -> int:
        """Give the length of the uncut tensor.

        Raises:
            CheckpointError: model_config.json does not say it.
        """
        table = fields if self.section is None else fields.get(self.section)
        value = table.get(self.size) if isinstance(table, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            name = self.size if self.section is None else f"{self.section}.{self.size}"
            raise CheckpointError(
                f"{where / CONFIG}: {name} is {shown(value)}; it is a whole number above 0, and the ranks cannot be "
                "laid together without it. Fetch the file again."
            )
        return self.blocks * value


def _transformer(prefix: str, section: str | None) -> tuple[Cut, ...]:
    """Give the cuts of one of SAT's transformers, LoRA's matrices included."""
    attention, mlp = f"{prefix}transformer.layers.*.attention", f"{prefix}transformer.layers.*.mlp"
    return (
        *(
            Cut(f"{attention}.query_key_value.{name}", 0, "hidden_size", 3, section)
            for name in ("weight", "bias", "original.weight", "original.bias")
        ),
        Cut(f"{attention}.query_key_value.matrix_B.*", 0, "hidden_size", 1, section),
        *(
            Cut(f"{attention}.dense.{name}", 1, "hidden_size", 1, section)
            for name in ("weight", "original.weight", "matrix_A.*")
        ),
        Cut(f"{mlp}.dense_h_to_4h.*", 0, "inner_hidden_size", 1, section),
        Cut(f"{mlp}.dense_4h_to_h.weight", 1, "inner_hidden_size", 1, section),
    )


VOCABULARY = ("transformer.word_embeddings.weight", "mixins.lm.lm_head.weight")
"""Cut by rows, but whole on every rank where the vocabulary is small: when reading, the shape decides."""
LEAST_CUT_VOCABULARY = 1000
CUTS: tuple[Cut, ...] = (
    *(Cut(name, 0, "vocab_size") for name in VOCABULARY),
    *_transformer("", None),
    Cut("mixins.rotary.vision_query_key_value_list.*.weight", 0, "hidden_size", 3),
    Cut("mixins.rotary.vision_dense_list.*.weight", 1, "hidden_size"),
    Cut("mixins.mlp.gate_proj.*.weight", 0, "inner_hidden_size"),
    Cut("mixins.mlp.vision_gate_proj.*.weight", 0, "inner_hidden_size"),
    Cut("mixins.mlp.vision_dense_h_to_4h_list.*.weight", 0, "inner_hidden_size"),
    Cut("mixins.mlp.vision_dense_4h_to_h_list.*.weight", 1, "inner_hidden_size"),
    *_transformer("mixins.eva.vit_model.", "eva_args"),
)
"""What the ranks share. Everything else is whole on each of them and equal: the biases of row-parallel layers too."""
_BY_PATTERN = {cut.pattern: cut for cut in CUTS}


@dataclass(frozen=True)
class SatCheckpoint:
    """A checkpoint before its weights are read."""

    root: Path
    folder: Path
    """The iteration's folder."""
    fields: dict[str, Any]
    """model_config.json."""
    tensors: TensorMap
    num_ranks: int
    iteration: int | None
    """As a training run's file says it; a file for inference does not."""


def read(path: str | Path) -> TensorMap:
    """Open the weights under SAT's names, all ranks as one; no tensor is read.

    `path` is the root folder, an iteration's folder (also one that ends in `-ema`), or a rank's file.

    Raises: as `open_checkpoint`.
    """
    return open_checkpoint(path).tensors


def open_checkpoint(path: str | Path) -> SatCheckpoint:
    """Open a checkpoint: its config, and the headers of its ranks.

    Raises:
        UnknownLayout: no such folder, or several iterations and nothing that says which.
        MissingKeys: a rank's file is absent, or a rank lacks a tensor.
        ShapeMismatch: tensors that are neither whole nor a rank's share.
        UnsafeCheckpoint: a pickle asks for more than tensors, or a link leaves the folder.
        CheckpointError: damaged, ranks of different iterations, or unequal where they must be equal.
    """
    path = Path(path)
    root = find_root(path)
    if root is None:
        raise UnknownLayout(f"{path}: no SAT checkpoint; looked for {CONFIG} and {LATEST} there and above it.")
    fields = read_config(root)
    folder = _folder(root, path)
    trees = _ranks(root, folder, fields)
    iterations = [tree.get("iteration") for tree in trees]
    if any(number != iterations[0] for number in iterations):
        raise CheckpointError(
            f"{folder}: its ranks are of different iterations ({', '.join(map(str, iterations))}), so they are no one "
            "model. Fetch all ranks of one."
        )
    tables = [_weights(folder / RANK_FILE.format(rank), tree) for rank, tree in enumerate(trees)]
    iteration = iterations[0] if isinstance(iterations[0], int) else None
    return SatCheckpoint(root, folder, fields, TensorMap(root, _merged(root, tables, fields)), len(tables), iteration)


def read_config(root: Path) -> dict[str, Any]:
    """Read model_config.json.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    return read_object(inside(root, CONFIG))


def find_root(path: Path) -> Path | None:
    """Give the folder with model_config.json that a path is or belongs to; None: it is no SAT checkpoint."""
    if path.is_file():
        is_part = path.name == CONFIG or _RANK.fullmatch(path.name)
        return find_root(path.parent) if is_part else None
    if (path / CONFIG).is_file():
        return path
    holds_ranks = (path / RANK_FILE.format(0)).is_file() or _ITERATION.fullmatch(path.name)
    return path.parent if holds_ranks and (path.parent / CONFIG).is_file() else None


def iterations(root: Path) -> list[str]:
    """Name the folders of a root that hold ranks."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and any(map(_RANK.fullmatch, _names(entry))))


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _folder(root: Path, path: Path) -> Path:
    """Give the iteration's folder: the one that was named, else what `latest` says, else the only one."""
    named = path.parent if path.is_file() else path
    if named != root or any(map(_RANK.fullmatch, _names(root))):
        return named
    found = iterations(root)
    latest = root / LATEST
    if not latest.is_file():
        if len(found) == 1:
            logger.info("%s has no %r; taken: %s, the only iteration that it holds.", root, LATEST, found[0])
            return inside(root, found[0])
        held = f"holds {len(found)} iterations ({', '.join(found[:8])})" if found else "holds no iteration's folder"
        raise UnknownLayout(f"{root}: has no file {LATEST!r} and {held}. Name one: {root / (found or ['1'])[0]}")
    name = _read_latest(latest)
    for candidate in (name, f"{name}-ema"):
        if candidate in found:
            return inside(root, candidate)
    others = f"; there are {', '.join(found[:8])}, name one: {root / found[0]}" if found else "; fetch its folder"
    raise MissingKeys(f"{latest} says iteration {name!r}, and {root} has no such folder with ranks in it{others}")


def _read_latest(latest: Path) -> str:
    """Give the name of the folder that `latest` means.

    Raises:
        CheckpointError: neither a number nor "release".
    """
    with latest.open("rb") as handle:
        raw = handle.read(100)
    text = raw.decode("utf-8", "replace").strip()
    if text == RELEASE:
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise CheckpointError(
            f"{latest}: says {shown(text)}; it holds an iteration's number or the word {RELEASE!r}. Correct it, or "
            "name the iteration's folder itself."
        )
    return str(int(text))


def _ranks(root: Path, folder: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the headers of all ranks.

    Raises:
        MissingKeys: there are fewer files than model_config.json says.
        CheckpointError: there are more, or one is damaged.
    """
    numbers = sorted(int(found[1]) for name in _names(folder) if (found := _RANK.fullmatch(name)))
    size = fields.get(PARALLEL, 1)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
        raise CheckpointError(f"{root / CONFIG}: {PARALLEL} is {shown(size)}; it is a number from 1 to {MAX_RANKS}.")
    absent = [rank for rank in range(max(size, *numbers, 0)) if rank not in numbers]
    if absent:
        first = RANK_FILE.format(absent[0])
        elsewhere = [name for name in iterations(root) if name != folder.name and (root / name / first).is_file()]
        hint = f"; {elsewhere[0]!r} holds one, of another iteration: ranks of two do not mix" if elsewhere else ""
        raise MissingKeys(
            f"{folder}: {len(absent)} of {max(size, *numbers, 0)} ranks are absent, first {first}{hint}. Fetch "
            f"{', '.join(RANK_FILE.format(rank) for rank in absent[:4])}."
        )
    if len(numbers) != size:
        raise CheckpointError(
            f"{folder}: holds {len(numbers)} ranks, and {root / CONFIG} says {PARALLEL} {size}. One of the two is of "
            "another checkpoint: fetch both again, or take out the ranks that do not belong here."
        )
    trees = []
    for rank in numbers:
        file = inside(folder, RANK_FILE.format(rank))
        tree = read_tree(file, BESIDE_THE_WEIGHTS)
        if not isinstance(tree, dict) or not isinstance(tree.get(WEIGHTS), dict) or not tree[WEIGHTS]:
            keys = f"a dict of {', '.join(map(str, list(tree)[:6]))}" if isinstance(tree, dict) else type(tree).__name__
            raise CheckpointError(f"{file}: holds {keys} and no weights under {WEIGHTS!r}, where SAT keeps them.")
        trees.append(tree)
    return trees


def _weights(file: Path, tree: Mapping[str, Any]) -> dict[str, TensorInfo]:
    table = tree[WEIGHTS]
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, TensorInfo):
            raise CheckpointError(
                f"{file}: holds a {type(value).__name__} as {name!r:.100} of {WEIGHTS!r}, where SAT has tensors only."
            )
    return table


# -- ranks laid together -----------------------------------------------------------------------------------------------


def cut_of(name: str) -> Cut | None:
    """Give how the tensors of a name are cut; None: they are whole on every rank."""
    shape = re.sub(r"\.\d+(?=\.|$)", ".*", name)  # numbers are all that the patterns leave open, but for one leaf
    return _BY_PATTERN.get(shape) or _BY_PATTERN.get(f"{shape.rpartition('.')[0]}.*")


def share(info: Stored, cut: Cut, rank: int, num_ranks: int) -> Stored:
    """Give the part of a whole tensor that one rank holds, as a view of the files that the tensor lies in.

    Raises:
        ShapeMismatch: the tensor does not divide by the ranks.
    """
    block, over = divmod(info.shape[cut.dim], cut.blocks)
    part, rest = divmod(block, num_ranks)
    if over or rest:
        raise ShapeMismatch(
            f"{info.file}: a tensor of shape {info.shape} does not divide among {num_ranks} ranks along dimension "
            f"{cut.dim}{f' in {cut.blocks} blocks' if cut.blocks > 1 else ''}."
        )
    firsts = [index * block + rank * part for index in range(cut.blocks)]
    return laid_together([view(info, cut.dim, first, first + part) for first in firsts], cut.dim)


def laid_together(parts: Sequence[Stored], dim: int) -> Stored:
    """Give stored tensors behind each other along a dimension as one."""
    if len(parts) == 1:
        return parts[0]
    pieces: list[Piece] = []
    begin = 0
    for part in parts:
        inner = part.boxed().pieces if isinstance(part, Assembled) else (Piece(part, (0,) * len(part.shape)),)
        for piece in inner:
            corner = tuple(at + begin if axis == dim else at for axis, at in enumerate(piece.start))
            pieces.append(Piece(piece.info, corner))
        begin += part.shape[dim]
    shape = tuple(begin if axis == dim else size for axis, size in enumerate(parts[0].shape))
    return Assembled(shape, parts[0].dtype, tuple(pieces))


def _merged(root: Path, tables: Sequence[dict[str, TensorInfo]], fields: Mapping[str, Any]) -> dict[str, Stored]:
    names = list(tables[0])
    for rank, table in enumerate(tables):
        if set(table) != set(names):
            odd = next(iter(set(table) ^ set(names)))
            holds, lacks = (rank, 0) if odd in table else (0, rank)
            raise MissingKeys(
                f"{root}: rank {lacks} has no {odd!r}, which rank {holds} has; the ranks are of two checkpoints."
            )
    sums = [_Checksums({info.file for info in table.values()}) for table in tables] if len(tables) > 1 else []
    merged: dict[str, Stored] = {}
    for name in names:
        parts = [table[name] for table in tables]
        cut = cut_of(name)
        if cut is not None and _is_cut(root, name, parts, cut, fields):
            merged[name] = _joined(name, parts, cut)
        else:
            _check_equal(root, name, parts, sums)
            merged[name] = parts[0]
    return merged


def _is_cut(root: Path, name: str, parts: Sequence[TensorInfo], cut: Cut, fields: Mapping[str, Any]) -> bool:
    """Tell whether the ranks hold shares of a tensor, by its shape; one rank holds all of it.

    Raises:
        ShapeMismatch: its shape is neither that of the whole tensor nor that of a share.
        CheckpointError: it is whole where it should be a share, or a share where it should be whole.
    """
    shape, whole = parts[0].shape, cut.length(fields, root)
    if len(parts) == 1 and cut.dim >= len(shape):
        return False  # whoever knows the network says what it should be
    if any(part.shape != shape for part in parts) or cut.dim >= len(shape):
        shapes = ", ".join(str(part.shape) for part in parts)
        raise ShapeMismatch(
            f"{root}: {name!r} has the shapes {shapes} on the {len(parts)} ranks; they are equal in SAT."
        )
    length = shape[cut.dim]
    if len(parts) == 1:
        if length and length < whole and whole % length == 0 and whole // length in (2, 4, 8):
            raise CheckpointError(
                f"{root}: {name!r} is {shape}, one of {whole // length} shares, and {CONFIG} says {PARALLEL} 1. The "
                f"other ranks' files are absent, or {CONFIG} is of the merged checkpoint: fetch both again."
            )
        return False
    if length * len(parts) == whole:
        return True
    if length == whole:
        if name in VOCABULARY:
            return False
        raise CheckpointError(
            f"{root}: {name!r} is {shape} on each of {len(parts)} ranks, which is the whole tensor and no share of it: "
            f"these files are a merged checkpoint saved {len(parts)} times. Keep {RANK_FILE.format(0)} alone, and set "
            f"{PARALLEL} to 1 in {CONFIG} (in eva_args too)."
        )
    raise ShapeMismatch(
        f"{root}: {name!r} is {shape} on each of {len(parts)} ranks; by {CONFIG} it is {whole} along dimension "
        f"{cut.dim}, so each has {whole / len(parts):g}. Do config and weights belong together?"
    )


def _joined(name: str, parts: Sequence[TensorInfo], cut: Cut) -> Stored:
    """Lay the shares of a tensor together: block by block, and in each rank by rank."""
    length, over = divmod(parts[0].shape[cut.dim], cut.blocks)
    if over:
        raise ShapeMismatch(f"{parts[0].file}: {name!r} is {parts[0].shape}, which is no {cut.blocks} equal blocks.")
    pieces = [
        view(part, cut.dim, index * length, (index + 1) * length) for index in range(cut.blocks) for part in parts
    ]
    return laid_together(pieces, cut.dim)


class _Checksums:
    """What the zip files say of the bytes of their records, so that ranks are compared without reading them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._records: dict[Path, list[tuple[int, int, int]]] = {}
        for file in files:
            with open_archive(file) as archive:
                entries = archive.infolist()
            self._records[file] = sorted((entry.header_offset, entry.file_size, entry.CRC) for entry in entries)

    def of(self, info: TensorInfo) -> int:
        """Give the checksum of a tensor that fills its record; 0: it does not, or there is none."""
        records = self._records[info.file]
        _, size, checksum = records[bisect_right(records, (info.offset,)) - 1]
        return checksum if info.stride is None and size == info.nbytes else 0


def _check_equal(root: Path, name: str, parts: Sequence[TensorInfo], sums: Sequence[_Checksums]) -> None:
    """Check that what no rank has a share of is equal on all; bytes are read only where checksums do not say so."""
    first = parts[0]
    for rank, part in enumerate(parts[1:], start=1):
        is_same = (part.shape, part.dtype) == (first.shape, first.dtype)
        if is_same and (checksum := sums[0].of(first)) and checksum == sums[rank].of(part):
            continue
        if not is_same or not _holds_equal(first, part):
            raise CheckpointError(
                f"{root}: {name!r} of rank {rank} differs from rank 0's, and all ranks hold the same of it in SAT. The "
                "ranks are of different iterations, or one is damaged: fetch all of one again."
            )


def _holds_equal(one: TensorInfo, other: TensorInfo) -> bool:
    import torch

    values = [TensorMap(info.file, {"": info})[""].contiguous().reshape(-1).view(torch.uint8) for info in (one, other)]
    return torch.equal(*values)
