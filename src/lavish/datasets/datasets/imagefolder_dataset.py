"""A folder for each class: ImageNet. Source: salesforce/LAVIS, lavis/datasets/datasets/imagefolder_dataset.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError
from lavish.datasets.datasets.base_dataset import BaseDataset

SAMPLE_KEYS = ("label", "image_id", "instance_id")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")


class ImageFolderDataset(BaseDataset):
    """A folder for each class, pictures in it: `image`, `label`, `image_id`, `instance_id`; `classnames` on the set."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        classnames: Sequence[str] | None = None,
    ) -> None:
        """Classes are numbered by the sorted names of their folders; `classnames` replaces those for people.

        Raises:
            DataError: no folder of pictures, or another number of names than of folders.
        """
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)
        root = Path(vis_root or "")
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; it holds a folder for each class, and pictures in those.")
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self.classnames = list(classnames) if classnames is not None else [folder.name for folder in folders]
        if len(self.classnames) != len(folders):
            raise DataError(f"{root}: {len(folders)} folders, and {len(self.classnames)} names of classes.")
        for label, folder in enumerate(folders):
            for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
                name = str(file.relative_to(root))
                self.annotation.append({"image": name, "label": label, "image_id": name})
        if not self.annotation:
            raise DataError(f"{root}: holds no pictures; it needs a folder for each class, and pictures in those.")
        self.sources = [(str(root), len(self.annotation))]
        self._add_instance_ids()

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with its class."""
        record = self.annotation[index]
        return {"image": self.picture(record["image"]), **{key: record[key] for key in SAMPLE_KEYS}}
