"""The dataset zoo: LAVIS's `load_dataset`, `load_dataset_config` and `dataset_zoo`.

    from lavish.datasets.builders import dataset_zoo, load_dataset
    dataset_zoo.get_names()
    load_dataset("coco_caption", vis_path="coco/images")["train"][0]

The builders stand in `lavish.common.registry`; one's own are there after `@registry.register_builder("name")`.
Source: salesforce/LAVIS, lavis/datasets/builders/__init__.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.common.registry import registry

if TYPE_CHECKING:
    from lavish.datasets.builders.base_dataset_builder import load_dataset_config

__all__ = ["DatasetZoo", "dataset_zoo", "load_dataset", "load_dataset_config"]


def load_dataset(
    name: str, cfg_path: str | Path | None = None, vis_path: str | Path | None = None, data_type: str | None = None
) -> dict[str, Any]:
    """Give the datasets of a name by split, annotations fetched to the cache where they are not here yet.

    Args:
        name: as `dataset_zoo.get_names()` gives it.
        cfg_path: a YAML with the dataset's section, in place of the default one.
        vis_path: folder of the pictures, videos or features; the default is `build_info.<data type>.storage`.
        data_type: whose storage `vis_path` replaces; None: that of the config.

    Raises:
        ConfigError: an unknown name (the nearest is suggested) or a wrong config.
        DataError: a file that is absent and cannot be fetched, or is damaged.
    """
    from lavish.datasets.builders.base_dataset_builder import load_dataset_config
    from lavish.datasets.datasets.annotations import local_path

    builder_class = registry.get_builder_class(name)
    # Trap: LAVIS reads every TypeError in here as "not found"; a fault of a builder shows its own traceback.
    builder = builder_class(None if cfg_path is None else load_dataset_config(cfg_path, name))
    if vis_path is not None:
        root = local_path(vis_path, "vis_path").absolute()
        place = builder.data_type if data_type is None else data_type
        builder.config.build_info[place] = {"storage": str(root)}
        builder.data_type = place
    return builder.build_datasets()


class DatasetZoo(Mapping[str, list[str]]):
    """The names of the registered datasets, with the types of each; printed, it is a table."""

    def __getitem__(self, name: str) -> list[str]:
        """Give the types of a dataset, the first words of `datasets.<name>.type`."""
        if name not in registry.list_datasets():
            raise KeyError(name)
        return list(registry.get_builder_class(name).DATASET_CONFIG_DICT)

    def __iter__(self) -> Iterator[str]:
        return iter(registry.list_datasets())

    def __len__(self) -> int:
        return len(registry.list_datasets())

    def get_names(self) -> list[str]:
        """Give the sorted names."""
        return registry.list_datasets()

    def __str__(self) -> str:
        rows = [("dataset", "types"), *((name, ", ".join(types)) for name, types in self.items())]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {types}" for name, types in rows)


dataset_zoo = DatasetZoo()


def __getattr__(name: str) -> Any:
    if name == "load_dataset_config":  # it needs torch
        from lavish.datasets.builders.base_dataset_builder import load_dataset_config

        return load_dataset_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
