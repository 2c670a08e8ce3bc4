"""Names to folders: a prepared cache without network, and a hub of our own on this machine for what is fetched."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from lavish.checkpoints import hub
from lavish.common.errors import CheckpointError, ConfigError, MissingDependency

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import sys
from lavish.checkpoints import hub
from lavish.common.errors import LavishError
for name in sys.argv[1:]:
    try:
        print(hub.resolve(name))
    except LavishError as error:
        print(type(error).__name__, str(error))
"""


def resolve(home: Path, *names: str, **environment: str) -> list[str]:
    """Resolve in a process of its own: the client reads its environment when it is imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE"))}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", RESOLVE, *names]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environment, cwd=home)
    return run.stdout.splitlines()


def prepare(home: Path, repository: str, files: list[str], commit: str = COMMIT, reference: str = "main") -> Path:
    """Lay out a cache as the client does: blobs, a snapshot of links, a reference."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / reference).write_text(commit)
    for name in files:
        blob = hashlib.sha1(name.encode()).hexdigest()
        (root / "blobs" / blob).write_text(name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        *("cogvlm", "/absent/model", "./absent/model", "../a/b", "a/b/c", "", "org/", "a b/c", "modelscope:x"),
        *("http://h/x", "a/..", "models/模型", "models/run--2", "models/run..2", "~x/y", "a/b.git", "a/.b", "a/b-"),
        *("a/" + 95 * "b", 5000 * "a", "a\0b"),
    ],
)
def test_neither_path_nor_id(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file or folder, and not a hub id. .*'org/name'"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["a/b", "THUDM/cogvlm2-llama3-chat-19B", "0x_/v1.5", "a/" + 94 * "b"])
def test_an_id_is_one_for_the_client(name: str) -> None:
    validate_repo_id(name)
    assert hub.is_id(name)
    assert hub.is_id(f"modelscope:{name}@v1")


def test_a_path_object_is_never_an_id() -> None:
    with pytest.raises(ConfigError, match="not a hub id"):
        hub.resolve(Path("org/name"))


def test_two_revisions() -> None:
    with pytest.raises(ConfigError, match="'v1' and the revision option for 'v2'"):
        hub.resolve("org/name@v1", revision="v2")


def test_modelscope_says_what_to_install() -> None:
    if (
        "modelscope" in sys.modules
        or subprocess.run([sys.executable, "-c", "import modelscope"], check=False).returncode == 0
    ):
        pytest.skip("modelscope is installed here")
    with pytest.raises(MissingDependency, match=r"pip install 'modelscope>=1\.38'"):
        hub.resolve("modelscope:org/name")


def test_both_names_of_an_owner_are_one_repository(tmp_path: Path) -> None:
    assert hub.spellings("THUDM/a@b") == ("THUDM/a@b", "zai-org/a@b")
    assert hub.spellings("zai-org/a") == ("zai-org/a", "THUDM/a")
    assert hub.spellings("org/a") == ("org/a",)
    assert hub.spellings("THUDM") == ("THUDM",)
    snapshot = prepare(tmp_path, "THUDM/model", ["config.json", "model.safetensors"])
    found = resolve(tmp_path, "zai-org/model", "zai-org/model@main", "THUDM/model", HF_HUB_OFFLINE="1")
    assert found == [str(snapshot)] * 3


def test_a_prepared_cache_without_network(tmp_path: Path) -> None:
    whole = prepare(tmp_path, "org/name", ["config.json", "model.safetensors"])
    tagged = prepare(tmp_path, "org/name", ["config.json", "model.safetensors"], "f" * 40, "v1.0")
    pickled = prepare(tmp_path, "org/pickled", ["config.json", "pytorch_model.bin"])
    found = resolve(
        tmp_path, "org/name", "org/name@v1.0", f"org/name@{COMMIT}", "org/pickled", "org/absent", HF_HUB_OFFLINE="1"
    )
    assert found[:4] == [str(whole), str(tagged), str(whole), str(pickled)]
    assert found[4].startswith(
        "CheckpointError org/absent: HF_HUB_OFFLINE is set, and it is not completely in the cache"
    )
    assert str(tmp_path) in found[4]


REPOSITORIES = {
    "org/safe": {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 100,
        "pytorch_model.bin": b"pickle",
        "modeling_cogvlm.py": b"raise SystemExit",
        "optimizer.pt": b"pickle",
        "training_args.bin": b"pickle",
        "original/model.safetensors": b"another format",
        "tokenizer.model": b"tokens",
        "README.md": b"text",
    },
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_args.bin": b"no", "x.py": b"no"},
}


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub: the revision's info, its file tree, and the files."""

    asked: list[str]

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = REPOSITORIES.get(repository)
        if files is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if "absent" in parts:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if parts[0] == "api" and parts[4] == "tree":
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if parts[0] == "api":
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        name = "/".join(parts[4:])
        self.server.asked.append(name)  # type: ignore[attr-defined]
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay silent."""


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_only_data_is_fetched_and_pickles_only_where_there_is_nothing_else(
    tmp_path: Path, endpoint: ThreadingHTTPServer
) -> None:
    address = f"http://127.0.0.1:{endpoint.server_port}"
    names = ["org/safe", "org/pickled", "org/none", "org/safe@absent"]
    safe, pickled, none, revision = resolve(tmp_path, *names, HF_ENDPOINT=address)
    assert sorted(file.name for file in Path(safe).iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (Path(safe) / "model.safetensors").read_bytes() == b"weights" * 100
    assert sorted(file.name for file in Path(pickled).iterdir()) == ["config.json", "pytorch_model.bin"]
    assert none.startswith(f"ConfigError org/none: no such file or folder, and no repository of this name on {address}")
    assert revision.startswith(f"ConfigError org/safe@absent: {address} has the repository but not this revision")
    fetched = set(endpoint.asked)  # type: ignore[attr-defined]
    assert fetched == {"config.json", "model.safetensors", "tokenizer.model", "pytorch_model.bin"}


def test_what_was_fetched_is_found_again_without_network(tmp_path: Path, endpoint: ThreadingHTTPServer) -> None:
    address = f"http://127.0.0.1:{endpoint.server_port}"
    (online,) = resolve(tmp_path, "org/safe", HF_ENDPOINT=address)
    assert resolve(tmp_path, "org/safe", HF_HUB_OFFLINE="1") == [online]
    assert resolve(tmp_path, "org/safe", HF_ENDPOINT="http://127.0.0.1:9") == [online]  # nobody answers there


def test_an_unreachable_hub(tmp_path: Path) -> None:
    (said,) = resolve(tmp_path, "org/safe", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("CheckpointError org/safe: http://127.0.0.1:9 cannot be reached")


def test_a_release_on_github_is_not_fetched() -> None:
    with pytest.raises(ConfigError, match=r"'github:someone/model': comes in pieces that no hub holds"):
        hub.resolve("github:someone/model")


def test_a_model_of_lavis_is_the_file_that_its_yaml_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lavish.checkpoints.download.fetch", lambda url: asked.append(url) or tmp_path)
    assert hub.resolve("lavis:blip_caption/base_coco") == tmp_path
    assert hub.resolve("lavis:blip_feature_extractor/base") == tmp_path
    assert [url.rpartition("/")[2] for url in asked] == ["blip_coco_caption_base.pth", "model_base_capfilt_large.pth"]


@pytest.mark.parametrize("name", ["blip_caption/small", "x", "../../x/y", "cogvlm-base/224", "gpt_dialogue/base", "/"])
def test_no_model_of_lavis(name: str) -> None:
    with pytest.raises(ConfigError, match="no released file of LAVIS"):
        hub.resolve(f"lavis:{name}")


def test_small_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve_small(tmp_path) == tmp_path
    assert hub.resolve_small(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="no such file or folder"):
        hub.resolve_small(str(tmp_path / "nothing"))
    asked = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        if revision:
            raise OSError("the line is dead")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.resolve_small("some/model") == tmp_path
    assert asked[0][:2] == ("some/model", None)
    assert not any("safetensors" in pattern for pattern in asked[0][2])
    with pytest.raises(CheckpointError, match=r"some/model@v2: its tokenizer and config cannot be fetched now .*dead"):
        hub.resolve_small("some/model@v2")
