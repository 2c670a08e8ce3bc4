"""From what the user typed to a local folder: a path, a Hugging Face id, or `modelscope:` and an id.

Downloads go through the hub's own client, which resumes, shows progress and obeys HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE. Only data is fetched: never a `.py`, and a pickle only where the repository has no safetensors. torch
is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lavish.common.errors import CheckpointError, ConfigError, MissingDependency, shown

MODELSCOPE = "modelscope:"
GITHUB = "github:"
LAVIS = "lavis:"
"""Before a model and type of LAVIS, `lavis:blip_caption/base_coco`: one file on a web server, by the type's YAML."""
DATA_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.yaml", "other_params.bin"]
"""Weights, configs, tokenizers, templates; the last is the projector of a CLIP + Qwen run, which has this form only."""
PICKLE_FILES = ["pytorch_model*.bin", "adapter_model*.bin"]
NEVER_FETCHED = ["*.py", "*/*"]
"""Code, and folders beside the weights (other formats, training states)."""

RENAMED_OWNERS = {"THUDM": "zai-org"}
"""Owners that were renamed on Hugging Face, old name to new. The hub forwards the old one; a cache keeps the one that
was asked for."""

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?=.{{1,96}}\Z)(?!.*(--|\.\.|\.git\Z)){_NAME}/{_NAME}")
"""As the hub's client checks it: what is not of this form would be an error of the client's."""


SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""What a repository holds beside its weights, of which `resolve_small` fetches no more."""


def is_id(name: str) -> bool:
    """Tell whether a name can be that of a repository: `org/name[@revision]`, on whichever hub."""
    return _ID.fullmatch(name.removeprefix(MODELSCOPE).partition("@")[0]) is not None


def spellings(repo_id: str) -> tuple[str, ...]:
    """Give a Hugging Face id (with its revision, if it has one) as it is, then with the other name of its owner."""
    owner, slash, rest = repo_id.partition("/")
    both = {**RENAMED_OWNERS, **{new: old for old, new in RENAMED_OWNERS.items()}}
    return (repo_id, f"{both[owner]}/{rest}") if slash and owner in both else (repo_id,)


def cached_config(repo_id: str, revision: str | None = None) -> tuple[str, Path] | None:
    """Give the spelling of an id and the config.json under which the local cache holds it, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in spellings(repo_id):
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            return name, Path(found)
    return None


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Give the local path of `name_or_path`, and fetch it only if it is a hub id.

    An id is `org/name[@revision]` or `modelscope:org/name[@revision]`. What exists as a path is that path, even if it
    could be an id.

    Raises:
        ConfigError: neither a path nor an id, or no such repository or revision.
        CheckpointError: the repository cannot be fetched now and is not in the cache.
        MissingDependency: `modelscope:` without the modelscope client.
    """
    name = str(name_or_path)
    if os.path.exists(name):
        return Path(name)
    repo_id, _, wanted = name.removeprefix(MODELSCOPE).partition("@")
    if name.startswith(GITHUB):
        raise ConfigError(
            f"{name!r}: comes in pieces that no hub holds; lavish does not fetch them. The model's page in docs/ says "
            "where they are; then give their folder."
        )
    if name.startswith(LAVIS):
        return _from_lavis(name)
    if isinstance(name_or_path, Path) or not is_id(name):
        raise ConfigError(
            f"{shown(name)}: no such file or folder, and not a hub id. Give the path of a model's folder, 'org/name' "
            "or 'org/name@revision' "
            "for Hugging Face, or 'modelscope:org/name'."
        )
    if wanted and revision and wanted != revision:
        raise ConfigError(
            f"{name!r}: asks for revision {wanted!r} and the revision option for {revision!r}; give one of them."
        )
    fetch = _from_modelscope if name.startswith(MODELSCOPE) else _from_hugging_face
    return fetch(repo_id, wanted or revision)


def resolve_small(name_or_path: str | Path) -> Path:
    """Give the local path of `name_or_path`; of a Hugging Face id only configs and tokenizers are fetched, no weights.

    Raises: as `resolve`.
    """
    name = os.path.expanduser(str(name_or_path))
    repo_id, _, revision = name.partition("@")
    if os.path.exists(name) or isinstance(name_or_path, Path) or not is_id(name) or name.startswith(MODELSCOPE):
        return resolve(name_or_path if os.path.exists(str(name_or_path)) else name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = cached_config(repo_id, revision or None)
    repo_id = repo_id if cached is None else cached[0]
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(SMALL_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: its tokenizer and config cannot be fetched now and are not in the cache "
            f"({str(error).splitlines()[0]}). Give the path of its folder."
        ) from error


def _from_lavis(name: str) -> Path:
    from importlib.resources import files

    from lavish.checkpoints.download import fetch, is_url
    from lavish.common.config import load_yaml

    layouts = Path(str(files("lavish") / "configs" / "models"))
    model, _, model_type = name.removeprefix(LAVIS).partition("/")
    file = layouts / f"{model}_{model_type}.yaml"
    section = load_yaml(file).get("model") if file.parent == layouts and file.is_file() else None
    url = section and (section.get("finetuned") or section.get("pretrained"))
    if not is_url(url):
        raise ConfigError(f"{shown(name)}: no released file of LAVIS that lavish knows; `lavish zoo` lists them.")
    return fetch(str(url))


def _fetch(snapshot: Callable[[list[str]], str]) -> Path:
    """Fetch data files, and pickles only if no safetensors came with them."""
    folder = Path(snapshot(DATA_FILES))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot([*DATA_FILES, *PICKLE_FILES]))


def _from_hugging_face(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(patterns: list[str]) -> str:
        return snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=NEVER_FETCHED)

    asked = f"{repo_id}@{revision}" if revision else repo_id
    cached = cached_config(repo_id, revision)
    if cached is not None:
        repo_id = cached[0]  # fetched under the owner's other name: not 39 GB once more
    try:
        return _fetch(snapshot)
    except GatedRepoError as error:
        raise ConfigError(
            f"{asked}: its owner asks for consent first. Accept it on the model's page, then log in: hf auth login."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{asked}: {constants.ENDPOINT} has the repository but not this revision.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{asked}: no such file or folder, and no repository of this name on {constants.ENDPOINT} (or a "
            "private one: hf auth login)."
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise CheckpointError(
            f"{asked}: {why}, and it is not completely in the cache {constants.HF_HUB_CACHE}. Connect "
            "(HF_ENDPOINT chooses a mirror), "
            "or give the path of its folder."
        ) from error
    except OSError as error:  # every other answer of the server, a full disk
        raise CheckpointError(
            f"{asked}: could not be fetched from {constants.ENDPOINT}: {error}. Run again: it resumes."
        ) from error


def _from_modelscope(repo_id: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
        from modelscope_hub.errors import HubError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(
            f"{MODELSCOPE}{repo_id}: needs the modelscope client, which is not installed: pip install "
            "'modelscope>=1.38'."
        ) from error
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

    def snapshot(patterns: list[str]) -> str:
        return snapshot_download(
            repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=NEVER_FETCHED, local_files_only=offline
        )

    try:
        return _fetch(snapshot)
    except (HubError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{MODELSCOPE}{repo_id}: could not be fetched: {error}. Check the name, or give the path of its folder."
        ) from error
