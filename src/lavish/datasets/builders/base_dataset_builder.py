"""What makes the datasets of one name: config, files (fetched where a URL is known), classes, processors.

Names and signatures are those of LAVIS: a builder of one's own subclasses `BaseDatasetBuilder`, sets its two classes
and `DATASET_CONFIG_DICT`, and is registered. Source: salesforce/LAVIS, lavis/datasets/builders/base_dataset_builder.py.
Unlike there the whole config is checked before anything is fetched (`check`), downloads resume and are compared with
their md5, and a misspelt key raises. Relative storage is under the cache folder, as LAVIS lays it out, so that
LAVISH_CACHE may name a cache that LAVIS has filled.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import SplitResult, unquote, urlsplit

from torch.utils.data import IterableDataset

from lavish.checkpoints.download import cache_folder, fetch, is_url, offline
from lavish.common import dist
from lavish.common.config import find_default, load_yaml
from lavish.common.errors import ConfigError, DataError, check_path, did_you_mean, shown
from lavish.common.registry import registry
from lavish.datasets.datasets.annotations import local_path
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.processors.base_processor import BaseProcessor

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
DATA_TYPES = ("images", "videos", "features")
PROCESSORS = ("vis_processor", "text_processor", "kw_processor")
SECTION_KEYS = ("type", "dataset_card", "data_type", "data_dir", "build_info", "max_broken", *PROCESSORS)
"""What a dataset's section may hold; `data_dir` stands in LAVIS's recipes, and is not read there either."""
BUILD_KEYS = ("annotations", *DATA_TYPES)
"""What `build_info` may hold; a builder adds its own."""
ANNOTATION_KEYS = ("url", "md5", "storage")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MD5 = re.compile(r"[0-9a-fA-F]{32}")
MAX_BROKEN = 0.01
"""Share of training samples that may be broken before the run ends."""


@dataclass(frozen=True)
class AnnotationFile:
    """One file of a split: where it is or goes, and where it comes from."""

    split: str
    path: Path
    url: str | None
    md5: str | None


class BaseDatasetBuilder:
    """Make the datasets by split: `train` with `train_dataset_cls`, `val` and `test` with `eval_dataset_cls`."""

    train_dataset_cls: Any = None
    eval_dataset_cls: Any = None
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {}
    """Default YAML by type; relative paths stand in lavish's package, or else beside the builder's module."""
    BUILD_INFO_KEYS: ClassVar[tuple[str, ...]] = ()
    """What `build_info` may hold besides `BUILD_KEYS`."""
    EXTRA_ANNOTATIONS: ClassVar[tuple[str, ...]] = ()
    """What `build_info.annotations` may hold besides `SPLITS`."""

    def __init__(self, cfg: Any = None) -> None:
        """`cfg` is a dataset's section, the path of a YAML that holds one, or None for the default one."""
        if cfg is None:
            self.config = load_dataset_config(self.default_config_path())
        elif isinstance(cfg, str | Path):
            self.config = load_dataset_config(cfg)
        else:
            self.config = _section(cfg)
        self.data_type: str = self.config.get("data_type")
        self.vis_processors: dict[str, Any] = {"train": BaseProcessor(), "eval": BaseProcessor()}
        self.text_processors: dict[str, Any] = {"train": BaseProcessor(), "eval": BaseProcessor()}
        self.kw_processors: dict[str, Any] = {}

    @classmethod
    def default_config_path(cls, type: str = "default") -> str:
        """Give the path of the default YAML of a type.

        Raises:
            ConfigError: no such type.
        """
        if type not in cls.DATASET_CONFIG_DICT:
            known = ", ".join(cls.DATASET_CONFIG_DICT) or "none"
            raise ConfigError(
                f"{cls.__name__} has no config of the type {type!r}."
                f"{did_you_mean(str(type), cls.DATASET_CONFIG_DICT)} Known: {known}."
            )
        return str(find_default(cls.DATASET_CONFIG_DICT[type], cls))

    # -- what is asked for

    def check(self) -> None:
        """Check the whole config, processors included; nothing is fetched and no annotation is read.

        Raises:
            ConfigError: an unknown key, data type or processor, or urls and files that do not pair.
            DataError: a file is absent, and no URL is known for it or the network is forbidden.
        """
        self._check_keys(self.config, SECTION_KEYS, "")
        info = self.build_info
        self._check_keys(info, (*BUILD_KEYS, *self.BUILD_INFO_KEYS), "build_info.")
        if self.data_type not in DATA_TYPES and self.data_type not in info:
            raise ConfigError(
                f"data_type is {shown(self.data_type)}; it is one of {', '.join(DATA_TYPES)}."
                f"{did_you_mean(str(self.data_type), DATA_TYPES)}"
            )
        share = self.config.get("max_broken", MAX_BROKEN)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"max_broken is {shown(share)}; it is a share of the samples, from 0 to 1.")
        self._check_keys(self._annotations(), (*SPLITS, *self.EXTRA_ANNOTATIONS), "build_info.annotations.")
        for split in self.splits():
            made = self._class_of(split)
            if made is None:
                raise ConfigError(f"{type(self).__name__} has no dataset class for the split {split!r}.")
            if "max_broken" in self.config and isinstance(made, type) and issubclass(made, IterableDataset):
                raise ConfigError(
                    f"datasets.{self._name()}.max_broken: {split} is a stream, of which no share is known; take it "
                    "out: what is broken is told and passed over."
                )
        self.build_processors()
        try:
            self._check_visual_root()
            for file in self.annotation_files():
                self._check_file(file)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be looked at ({error.strerror}).") from error

    def build_datasets(self) -> dict[str, Any]:
        """Check the config, fetch what is absent (one process only), and give the datasets by split."""
        self.check()
        self._download_data()
        return self.build()

    def build_processors(self) -> None:
        """Make the processors that the config names; what it leaves out is the identity.

        Raises:
            ConfigError: an unknown processor or setting.
        """
        for kind, made in (("vis_processor", self.vis_processors), ("text_processor", self.text_processors)):
            section = self.config.get(kind) or {}
            self._check_keys(section, ("train", "eval"), f"{kind}.")
            for mode in ("train", "eval"):
                if section.get(mode) is not None:
                    made[mode] = self._build_proc_from_cfg(section[mode])
        named = self.config.get("kw_processor") or {}
        self._check_keys(named, tuple(map(str, named)) if isinstance(named, Mapping) else (), "kw_processor.")
        for name, section in named.items():
            self.kw_processors[str(name)] = self._build_proc_from_cfg(section)

    @staticmethod
    def _build_proc_from_cfg(cfg: Any) -> Any:
        if cfg is None:
            return None
        if not isinstance(cfg, Mapping) or not isinstance(cfg.get("name"), str):
            raise ConfigError(f"A processor's section needs the 'name' of one, found {shown(cfg)}.")
        return registry.get_processor_class(cfg["name"]).from_config(cfg)

    # -- where the files are

    @property
    def build_info(self) -> DictConfig:
        """The section `build_info`."""
        info = self.config.get("build_info")
        if not isinstance(info, Mapping):
            raise ConfigError(f"build_info is {shown(info)}; a dataset needs it, with annotations and storage.")
        return info  # type: ignore[return-value]

    def splits(self) -> list[str]:
        """Name the splits that the config has files for; `val: null` leaves one out."""
        return [split for split in SPLITS if self._annotations().get(split) is not None]

    def annotation_files(self, split: str | None = None) -> list[AnnotationFile]:
        """Give the annotation files of a split, or all, those that are no split (`ans2label`) too.

        Raises:
            ConfigError: a section of another shape, or another number of urls or md5 than of files.
        """
        files = []
        for name, section in self._annotations().items():
            if section is not None and split in (None, name):
                files += self._files(str(name), section)
        return files

    def _annotations(self) -> Mapping[str, Any]:
        sections = self.build_info.get("annotations") or {}
        if not isinstance(sections, Mapping):
            raise ConfigError(f"build_info.annotations is {shown(sections)}; it holds a section for each split.")
        return sections

    def _files(self, split: str, section: Any) -> list[AnnotationFile]:
        where = f"build_info.annotations.{split}"
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where} is {shown(section)}; it holds {', '.join(ANNOTATION_KEYS)}.")
        self._check_keys(section, ANNOTATION_KEYS, f"{where}.")
        storage, urls, sums = (_texts(section.get(name), f"{where}.{name}") for name in ("storage", "url", "md5"))
        if not storage and not urls:
            raise ConfigError(f"{where} names no file; give storage (a path), and url where it can be fetched.")
        if not storage:
            storage = [f"{self._name()}/annotations/{_file_name(url, where)}" for url in urls]
        for name, given in (("url", urls), ("md5", sums)):
            if given and len(given) != len(storage):
                raise ConfigError(
                    f"{where} has {len(storage)} storage paths and {len(given)} of {name}; they pair up. For files of "
                    f"your own set {name}: null."
                )
        files = []
        for place, url, md5 in zip(storage, urls or [None] * len(storage), sums or [None] * len(storage), strict=True):
            if not place:
                raise ConfigError(f"{where}.storage has an empty path.")
            if md5 is not None and not _MD5.fullmatch(md5):
                raise ConfigError(f"{where}.md5 is {shown(md5)}; 32 digits from 0 to f are expected.")
            path = self.storage_path(place)
            if url is not None and not is_url(url):  # LAVIS copies such a file; here it is read where it is
                path, url = path if path.is_file() else _local_file(url, where), None
            files.append(AnnotationFile(split, path, url, md5))
        return files

    def _name(self) -> str:
        names = [name for name in registry.list_datasets() if registry.get_builder_class(name) is type(self)]
        return names[0] if names else type(self).__name__

    @staticmethod
    def storage_path(place: str | Path) -> Path:
        """Give the path of a storage: relative ones are under the cache folder (or `registry`'s "cache_root")."""
        path = local_path(place, "storage")
        return path if path.is_absolute() else cache_root() / path

    def visual_root(self) -> Path | None:
        """Give the folder of the visual data; None where the config has none."""
        section = self.build_info.get(self.data_type)
        storage = section.get("storage") if isinstance(section, Mapping) else section
        if storage is not None and not isinstance(storage, str | Path):
            raise ConfigError(
                f"build_info.{self.data_type}.storage is {shown(storage)}; the path of a folder is expected."
            )
        return None if storage is None else self.storage_path(storage)

    def _check_visual_root(self) -> None:
        section = self.build_info.get(self.data_type)
        if isinstance(section, Mapping):
            self._check_keys(section, ("storage",), f"build_info.{self.data_type}.")
        root = self.visual_root()
        if root is not None and root.is_file():
            raise ConfigError(f"{root}: storage of the {self.data_type} is a file; name the folder that holds them.")

    def _check_file(self, file: AnnotationFile) -> None:
        check_path(file.path, f"build_info.annotations.{file.split}.storage")
        if file.path.is_dir():
            raise ConfigError(f"{file.path}: storage of the annotations {file.split!r} is a folder; name a file.")
        if file.path.is_file():
            return
        if file.url is None:
            raise DataError(
                f"{file.path}: the annotations {file.split!r} of {self._name()} are not here, and no public URL is "
                f"known for them. Put the file there, or name yours: build_info.annotations.{file.split}.storage."
            )
        if variable := offline():
            raise DataError(
                f"{file.path}: the annotations {file.split!r} of {self._name()} are not here and {variable} is set. "
                f"Fetch {file.url} elsewhere and put it there."
            )

    # -- fetching

    def _download_data(self) -> None:
        self._download_ann()
        self._download_vis()

    def _download_ann(self) -> None:
        self.fetch_annotations()

    def fetch_annotations(self) -> list[Path]:
        """Fetch the annotation files that are absent, and give all; of several processes one does, the others wait.

        Raises:
            DataError: one cannot be fetched now, or is another one than its md5 says.
        """
        for file in self.annotation_files():
            if file.url is not None:
                fetch(file.url, file.path, md5=file.md5, error=DataError)
        return list(dict.fromkeys(file.path for file in self.annotation_files()))

    def _download_vis(self) -> None:
        """Warn when the visual data are absent: annotations can be looked at without them. Nothing is fetched."""
        root = self.visual_root()
        if root is not None and not root.exists() and dist.is_main():
            logger.warning(
                "%s: the %s of %s are not here; samples cannot be read. Put them there, or name their folder with "
                "vis_path= (build_info.%s.storage).",
                root,
                self.data_type,
                self._name(),
                self.data_type,
            )

    # -- datasets

    def build(self) -> dict[str, Any]:
        """Give the datasets by split from files that are here; override it for what differs."""
        self.build_processors()
        return {split: self.build_split(split) for split in self.splits()}

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split."""
        mode = "train" if split == "train" else "eval"
        root = self.split_root(split)
        dataset = self._class_of(split)(
            vis_processor=self.vis_processors[mode],
            text_processor=self.text_processors[mode],
            ann_paths=[str(file.path) for file in self.annotation_files(split)],
            vis_root=None if root is None else str(root),
            **self.dataset_options(split),
        )
        if mode == "train" and isinstance(dataset, BaseDataset):
            dataset.max_broken = float(self.config.get("max_broken", MAX_BROKEN))
        return dataset

    def split_root(self, split: str) -> Path | None:
        """Give the folder of the visual data of one split."""
        return self.visual_root()

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give what the dataset class of a split takes besides processors, paths and root."""
        return {}

    def _class_of(self, split: str) -> Any:
        return self.train_dataset_cls if split == "train" else self.eval_dataset_cls

    def _check_keys(self, section: Any, known: Iterable[str], where: str) -> None:
        """Refuse unknown keys; a builder of one's own may have more, but none that is nearly a known one."""
        known = tuple(known)
        if not isinstance(section, Mapping):
            name = where.rstrip(".")
            raise ConfigError(f"datasets.{self._name()}.{name} is {shown(section)}; keys and values are expected.")
        for key in section:
            hint = did_you_mean(str(key), known, nearness=0.75)
            is_ours = type(self).__module__.startswith("lavish.")
            if key not in known and (is_ours or hint):
                raise ConfigError(
                    f"datasets.{self._name()}.{where}{key}: unknown key.{hint} Known: {', '.join(known)}."
                )


def cache_root() -> Path:
    """Give the folder that relative storage is under: what a program registered as "cache_root", else the cache."""
    try:
        return Path(registry.get_path("cache_root"))
    except ConfigError:
        return cache_folder()


def load_dataset_config(cfg_path: str | Path, name: str | None = None) -> DictConfig:
    """Read the section of a dataset out of a YAML file with `datasets: {<name>: ...}`.

    Raises:
        ConfigError: no such file or section, or several and no name (LAVIS takes the first).
    """
    sections = load_yaml(local_path(cfg_path, "cfg_path")).get("datasets")
    if not isinstance(sections, Mapping) or not sections:
        raise ConfigError(f"{cfg_path}: has no section `datasets` with a dataset in it.")
    if name is None and len(sections) > 1:
        raise ConfigError(f"{cfg_path}: holds several datasets, {', '.join(map(str, sections))}; name one.")
    chosen = name if name in sections else next(iter(sections))
    if name is not None and name not in sections and len(sections) > 1:
        raise ConfigError(
            f"{cfg_path}: has no dataset {name!r}.{did_you_mean(name, map(str, sections))} It has "
            f"{', '.join(map(str, sections))}."
        )
    return _section(sections[chosen])


def _section(cfg: Any) -> DictConfig:
    """Give a copy of a section, so that one builder's changes are not another's."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(cfg, Mapping):
        raise ConfigError(f"A dataset's section holds keys and values, found {shown(cfg)}.")
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    return OmegaConf.create(plain)  # type: ignore[return-value]


def _split_url(url: str, where: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{where}.url is {shown(url)}, which is no URL: {error}.") from error


def _file_name(url: str | None, where: str) -> str:
    """Give the name of a URL's file, for one without a storage."""
    name = "" if url is None else Path(unquote(_split_url(url, where).path)).name
    if name in ("", ".."):
        raise ConfigError(f"{where}.url is {shown(url)}, which names no file; give storage too.")
    return name


def _local_file(url: str, where: str) -> Path:
    """Give the path that a file:// URL, or a path in the place of a URL, stands for."""
    if url.startswith("file://"):
        return Path(unquote(_split_url(url, where).path))
    if _SCHEME.match(url):
        raise ConfigError(f"{where}.url is {shown(url)}; only https is fetched: fetch the file, and give storage.")
    return local_path(url, f"{where}.url")


def _texts(value: Any, where: str) -> list[str | None]:
    """Give one text or a list of them as a list; inside a list null stands for none."""
    values: Sequence[Any] = [] if value is None else [value] if isinstance(value, str | Path) else value
    is_list = isinstance(values, Sequence)  # so are the lists of OmegaConf
    if not is_list or not all(one is None or isinstance(one, str | Path) for one in values):
        raise ConfigError(f"{where} is {shown(value)}; a text or a list of texts is expected.")
    return [None if one is None else str(one) for one in values]
