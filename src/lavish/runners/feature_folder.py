"""Image features on disk, while what gives them is frozen: from the second epoch on the tower is not run.

A file holds what one picture gives after the last frozen step (tower, merge or Q-Former, projector). Its name is the
digest of the picture's processed pixels, in a folder whose name is the digest of the frozen weights, of the device and
of the dtypes that they compute in: other weights, another preprocessing or precision find nothing. A picture is always
computed by itself, so that its features depend on nothing else, and a run goes on to the same weights from any state of
the folder. Several runs and processes may share a folder: a file is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from lavish.common.errors import ConfigError
from lavish.common.messages import images, normalize
from lavish.nn.image_steps import ImageStep
from lavish.runners.run_folder import FULL

logger = logging.getLogger(__name__)

MAX_WARNINGS = 5
NUM_COUNTED = 1000
"""Samples of a data set whose pictures are counted."""


class FeatureFolder:
    """Gives the image features of pictures, off the disk where they are there.

    Args:
        folder: of the files, made when the first one is written.
        network: a chat family's, after what learns was chosen; without an adapter around it.

    Raises:
        ConfigError: its tower learns.
    """

    def __init__(self, folder: str | Path, network: Any) -> None:
        self.folder = Path(folder).expanduser()
        steps: tuple[ImageStep, ...] = network.image_steps()
        learns = [_learning(step) for step in steps]
        self.num_frozen = next((at for at, name in enumerate(learns) if name is not None), len(steps))
        if self.num_frozen == 0:
            raise ConfigError(
                f"model.feature_cache keeps what the vision tower gives, and the tower learns (its {learns[0]!r}), so "
                "that changes with every step. Leave the key out, or the tower: model.freeze: [tower], or "
                "model.lora.target_modules without its layers."
            )
        self._frozen, self._later = steps[: self.num_frozen], steps[self.num_frozen :]
        self._network = network
        self._weights = _digest_of_weights(self._frozen)
        self.entry_bytes = 0
        """Bytes of the newest file, read or written."""
        self.num_computed = 0
        """Pictures that were computed so far, and not read."""
        self._warned, self._is_full = 0, False

    @property
    def steps(self) -> list[str]:
        """The names of the steps whose result is kept."""
        return [step.name for step in self._frozen]

    def image_features(self, pixel_values: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        """Give what fills the slots of the pictures: (images, 3, S, S) -> (images, slots, hidden).

        Args:
            pixel_values: of the pictures.
            digests: of each picture, by `digest`.

        Raises:
            ConfigError: processes share the tower's weights, so that one cannot compute a picture by itself.
        """
        return _not_compiled(self._image_features, pixel_values, digests)  # pyright: ignore[reportCallIssue] - torch's type

    def _image_features(self, pixel_values: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        self._check_whole()
        folder = self.folder / self._place(pixel_values.device)
        kept = [self._one(folder / name[:2] / f"{name}.features", one) for one, name in zip(pixel_values, digests)]
        hidden_states = torch.cat(kept)
        for step in self._later:
            hidden_states = step.run(hidden_states)
        return hidden_states

    def _one(self, path: Path, pixels: torch.Tensor) -> torch.Tensor:
        found = self._read(path)
        if found is not None:
            return found.to(pixels.device)
        with torch.no_grad():
            hidden_states = pixels[None]
            for step in self._frozen:
                hidden_states = step.run(hidden_states)
        self.num_computed += 1
        self._write(path, hidden_states)
        return hidden_states

    def _place(self, device: torch.device) -> str:
        """Name the folder of these weights in the precision of this moment."""
        is_auto = torch.is_autocast_enabled(device.type)
        fields = self._network.config.to_dict()
        how = {
            "weights": self._weights,
            "steps": self.steps,
            "device": device.type,
            "autocast": str(torch.get_autocast_dtype(device.type)) if is_auto else None,
            "attention": str(self._network.config._attn_implementation),
            "config": {name: value for name, value in fields.items() if name != "_name_or_path"},
        }
        return hashlib.blake2b(json.dumps(how, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()

    def _check_whole(self) -> None:
        weight = next(_parameters(self._frozen[0]))
        # DTensor is FSDP2's share of a weight; DeepSpeed's ZeRO-3 marks its own by ds_id.
        if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
            raise ConfigError(
                "model.feature_cache: the processes share the tower's weights, and then all have to compute a picture "
                "together. Use run.engine ddp (or deepspeed at stage 1 or 2), or leave model.feature_cache out."
            )

    # -- files

    def _read(self, path: Path) -> torch.Tensor | None:
        """Read a file; None where there is none, or a damaged one, which is told."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"{path}: cannot be read ({error}); the picture is computed anew.")
            return None
        head, _, data = content.partition(b"\n")
        try:
            said = json.loads(head)
            if zlib.crc32(data) != said["crc32"]:
                raise ValueError("its sum is another")
            found = torch.frombuffer(bytearray(data), dtype=getattr(torch, said["dtype"])).view(said["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            self._warn(f"{path}: is damaged ({error}); the picture is computed anew.")
            return None
        self.entry_bytes = len(content)
        return found

    def _write(self, path: Path, features: torch.Tensor) -> None:
        if self._is_full:
            return
        flat = features.detach().cpu().contiguous()
        data = flat.flatten().view(torch.uint8).numpy().tobytes()
        said = {"dtype": str(flat.dtype).removeprefix("torch."), "shape": list(flat.shape), "crc32": zlib.crc32(data)}
        content = json.dumps(said).encode() + b"\n" + data
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, PermissionError) and path.is_file():  # Windows: another process has it open
                return
            if error.errno not in FULL:
                raise ConfigError(f"model.feature_cache: {self.folder} cannot be written to: {error}.") from error
            self._is_full = True
            logger.warning("%s: the disk is full; other pictures are computed each time.", self.folder)
        self.entry_bytes = len(content)

    def _warn(self, message: str) -> None:
        self._warned += 1
        if self._warned <= MAX_WARNINGS:
            logger.warning("%s", message)


@torch.compiler.disable
def _not_compiled(give: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
    """Call what reads and writes files."""
    return give(*given)


def told(entry_bytes: int, datasets: Sequence[Any]) -> str:
    """Say what the pictures of data sets take on the disk, counted on the first samples of each.

    Args:
        entry_bytes: of one picture.
        datasets: of conversations.
    """
    pictures = 0.0
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        return f"model.feature_cache: {_size(entry_bytes)} of disk a picture; of a stream nobody knows how many"
    for dataset in datasets:
        looked_at = min(len(dataset), NUM_COUNTED)
        sample = getattr(dataset, "unopened", dataset.__getitem__)  # conversations of files have it
        found = sum(_num_pictures(sample(at)) for at in range(looked_at))
        pictures += found * len(dataset) / max(looked_at, 1)
    whole = _size(pictures * entry_bytes)
    return f"model.feature_cache: {whole} of disk at most, for {pictures:,.0f} pictures of {_size(entry_bytes)}"


def _size(num_bytes: float) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB") if num_bytes >= 2**20 else (2**10, "KiB")
    return f"{num_bytes / unit:.3g} {name}"


def _num_pictures(sample: Any) -> int:
    return sum(1 for _ in images(normalize(sample["messages"], allow_videos=True)))


def digest(pixels: torch.Tensor) -> str:
    """Give the digest of one picture's processed pixels, on the CPU: their values, dtype and shape."""
    said = f"{pixels.dtype} {tuple(pixels.shape)}".encode()
    return hashlib.blake2b(_bytes(pixels), key=hashlib.sha256(said).digest(), digest_size=20).hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _named(step: ImageStep) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for at, part in enumerate(step.weights):
        if isinstance(part, nn.Module):
            found += [*part.named_parameters(), *part.named_buffers()]
        else:
            found.append((f"{step.name}.{at}", part))
    return found


def _parameters(step: ImageStep) -> Any:
    return (tensor for _, tensor in _named(step))


def _learning(step: ImageStep) -> str | None:
    """Give the name of a weight of the step that learns."""
    return next((name for name, tensor in _named(step) if tensor.requires_grad), None)


def _digest_of_weights(steps: Sequence[ImageStep]) -> str:
    summed = hashlib.blake2b(digest_size=20)
    for step in steps:
        for name, tensor in _named(step):
            summed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            summed.update(_bytes(tensor))
    return summed.hexdigest()
