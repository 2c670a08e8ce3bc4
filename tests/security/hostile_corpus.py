"""Hostile checkpoints: one function a trick, each makes a whole small checkpoint in which one thing is wrong.

`CASES` maps a name to (maker, what the error must say). A maker gets an empty folder and a marker, the file that a
payload would make if it ran, and gives the path to open. `PICKLES` are put into every layout that holds a pickle.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
Maker = Callable[[Path, Path], Path]

# -- whole checkpoints, into which one thing is put


def hf_folder(folder: Path) -> Path:
    """CogVLM2 without its weights."""
    source = FIXTURES / "cogvlm2/open/checkpoint"
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    return folder


def hf_sharded(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "cogvlm2/open/checkpoint", folder, dirs_exist_ok=True)
    return folder


def _hf(folder: Path) -> tuple[Path, Path]:
    return hf_folder(folder), folder / "pytorch_model.bin"


def _sat(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "cogvlm_sat/open/checkpoint", folder, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "cogvlm_sat/open/tokenizer", folder / "tokenizer")
    return folder, folder / "1/mp_rank_00_model_states.pt"


def _lavis(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "blip_caption/open/checkpoint", folder, dirs_exist_ok=True)
    return folder, folder / "blip_coco_caption_base.pth"


def _projector(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "clip_qwen/open/checkpoint", folder, dirs_exist_ok=True)
    return folder, folder / "checkpoint-27000/other_params.bin"


def _adapter(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "clip_qwen/open/checkpoint", folder, dirs_exist_ok=True)
    return folder, folder / "checkpoint-27000/adapter_model.bin"


def _deepspeed(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(FIXTURES / "deepspeed/zero2", folder, dirs_exist_ok=True)
    shutil.copy(FIXTURES / "cogvlm2/open/checkpoint/config.json", folder)
    return folder, folder / "global_step2/mp_rank_00_model_states.pt"


WITH_PICKLES: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "hf": _hf,
    "sat": _sat,
    "lavis": _lavis,
    "projector": _projector,
    "adapter": _adapter,
    "deepspeed": _deepspeed,
}
"""Layout -> what makes a checkpoint of it; gives its path and the file that holds a pickle."""


def torch_zip(file: Path, pickled: bytes, records: dict[str, bytes] | None = None, prefix: str = "archive/") -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{prefix}data.pkl", pickled)
        for name, content in (records or {}).items():
            archive.writestr(f"{prefix}{name}", content)


# -- what a pickle may try; each gets the marker and gives the pickle


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _touch(marker: Path) -> str:
    return f"touch {marker}"


def _code(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def _getattr_chain(marker: Path) -> bytes:
    """getattr(__import__('os'), 'system')(...), by names of builtins alone."""
    imported = b"cbuiltins\n__import__\n(" + text("os") + b"tR"
    return b"\x80\x02cbuiltins\ngetattr\n(" + imported + text("system") + b"tR(" + text(_touch(marker)) + b"tR."


def _memo_trick(marker: Path) -> bytes:
    """A harmless name is put into the memo, and another takes its place before it is called."""
    named = b"(ccollections\nOrderedDict\nq\x00cos\nsystem\nq\x00t"
    return b"\x80\x02}" + named + b"h\x00(" + text(_touch(marker)) + b"tRs."


def _inside_state(marker: Path) -> bytes:
    """The call stands in the state that torch hangs on a state dict."""
    call = b"cos\nsystem\n(" + text(_touch(marker)) + b"tR"
    return b"\x80\x02ccollections\nOrderedDict\n)R}" + text("_metadata") + call + b"sb."


def _inside_key(marker: Path) -> bytes:
    return b"\x80\x02}cos\nsystem\n(" + text(_touch(marker)) + b"tRK\x01s."


def _hidden_behind_stop(marker: Path) -> bytes:
    """An empty dict, STOP, and a second pickle that some readers go on with."""
    return b"\x80\x02}." + b"cos\nsystem\n(" + text(_touch(marker)) + b"tR."


def _nested_pickle(marker: Path) -> bytes:
    inner = pickle.dumps(Calls(os.system, _touch(marker)), 2)
    return pickle.dumps({"w": Calls(pickle.loads, inner)}, 2)


def _copyreg(marker: Path) -> bytes:
    call = b"cos\nsystem\n(" + text(_touch(marker)) + b"tR"
    return b"\x80\x02ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\n" + call + b"tR."


def _text_opcodes(marker: Path) -> bytes:
    """Protocol 0 alone: INST with its arguments on the stack."""
    return b"(S'" + _touch(marker).encode() + b"'\nios\nsystem\n."


PICKLES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "reduce os.system": (lambda m: b"\x80\x02cos\nsystem\n(" + text(_touch(m)) + b"tR.", "os.system"),
    "builtins eval": (lambda m: b"\x80\x02cbuiltins\neval\n(" + text(_code(m)) + b"tR.", "builtins.eval"),
    "builtins exec": (lambda m: b"\x80\x02cbuiltins\nexec\n(" + text(_code(m)) + b"tR.", "builtins.exec"),
    "getattr chain": (_getattr_chain, "builtins"),
    "stack global": (
        lambda m: b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(_touch(m)) + b"tR.",
        "os.system",
    ),
    "stack global from the memo": (
        lambda m: b"\x80\x04" + text("os") + b"\x94h\x00" + text("system") + b"\x93(" + text(_touch(m)) + b"tR.",
        "os.system",
    ),
    "dotted stack global": (
        lambda m: b"\x80\x04" + text("torch") + text("os.system") + b"\x93(" + text(_touch(m)) + b"tR.",
        "os.system",
    ),
    "memo": (_memo_trick, "os.system"),
    "state": (_inside_state, "os.system"),
    "key": (_inside_key, "os.system"),
    "nested pickle": (_nested_pickle, "loads"),
    "copyreg": (_copyreg, "copyreg"),
    "extension registry": (lambda m: b"\x80\x02\x84\x01\x00\x00\x00)R.", "EXT4"),
    "instance": (_text_opcodes, "STRING"),
    "new object": (lambda m: b"\x80\x02csubprocess\nPopen\n(" + text(_touch(m)) + b"t\x81.", "subprocess"),
    "numpy loader": (lambda m: b"\x80\x02cnumpy\nload\n(" + text(str(m)) + b"tR.", "numpy"),
    "torch.load": (lambda m: b"\x80\x02ctorch.serialization\nload\n(" + text(str(m)) + b"tR.", "torch.serialization"),
    "import by a class": (lambda m: pickle.dumps({"a": Path("x")}, 4), "pathlib"),
}
"""Name -> (pickle, a word of the error)."""

BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a string of 4 GB": (lambda: b"\x80\x04\x8d" + struct.pack("<Q", 4 << 30) + b"x.", "damaged"),
    "bytes of 4 GB": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 4 << 30) + b"x.", ""),
    "a number of 2 GB": (lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", ""),
    "a number of 100,000 digits": (lambda: b"L" + b"9" * 100_000 + b"L\n.", ""),
    "a number in the name": (lambda: b"\x80\x02}\x8b" + struct.pack("<i", 9000) + b"\x7f" * 9000 + b"K\x01s.", ""),
    "tuples that double": (
        lambda: b"\x80\x02}" + text("w") + b"()q\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"ts.",
        "tuple",
    ),
    "tuples in tuples": (lambda: b"\x80\x02}" + text("w") + b")" + b"\x85" * 200_000 + b"s.", "tuple"),
    "a dict in itself": (lambda: b"\x80\x02}q\x00" + text("w") + b"h\x00s.", ""),
    "a list in itself": (lambda: b"\x80\x02}" + text("w") + b"]q\x00h\x00as.", "list"),
    "millions of opcodes": (lambda: b"\x80\x02}" + b"N0" * 8_000_000 + b".", ""),
    "millions of values": (lambda: b"\x80\x02}" + text("w") + b"(" + b"]" * 12_000_000 + b"ls.", ""),
    "millions of marks": (lambda: b"\x80\x02}" + b"(" * 12_000_000 + b".", ""),
    "a shape of 65 sizes": (lambda: b"\x80\x02}" + text("w") + b"(" + b"K\x01" * 65 + b"ts.", ""),
    "no end": (lambda: b"\x80\x02}", "STOP"),
    "nothing": (lambda: b"", ""),
}
"""Name -> (pickle, a word of the error): what costs time or memory."""


def with_pickle(layout: str, attack: str) -> tuple[Maker, str]:
    def make(folder: Path, marker: Path) -> Path:
        path, file = WITH_PICKLES[layout](folder)
        torch_zip(file, PICKLES[attack][0](marker), {"version": b"3\n"})
        return path

    return make, PICKLES[attack][1]


def with_bomb(layout: str, bomb: str) -> tuple[Maker, str]:
    def make(folder: Path, marker: Path) -> Path:
        path, file = WITH_PICKLES[layout](folder)
        torch_zip(file, BOMBS[bomb][0](), {"version": b"3\n"})
        return path

    return make, BOMBS[bomb][1] if layout == "hf" else ""


def raw_pickle(folder: Path, marker: Path) -> Path:
    """What torch wrote before 1.6: no zip, pickles one after the other."""
    path, file = _hf(folder)
    file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(Calls(os.system, _touch(marker)), 2))
    return path


# -- zip files


def _good_pickle(key: str = "0", nbytes: int = 16) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x04tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + text("w") + tensor + b"s."


def _zip(build: Callable[[Path, Path], None]) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        path, file = _hf(folder)
        build(file, marker)
        return path

    return make


def _many_entries(file: Path, marker: Path) -> None:
    """A directory of 400,000 empty files, made by hand: zipfile takes minutes."""
    body, entries = io.BytesIO(), []
    local = struct.pack("<4s2B4HL2L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0)
    body.write(local + b"a")
    for index in range(400_000):
        name = f"a/{index}".encode()
        entries.append(
            struct.pack(
                "<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0
            )
            + name
        )
    start = body.tell()
    directory = b"".join(entries)
    body.write(directory)
    body.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), start, 0))
    file.write_bytes(body.getvalue())


def _member(name: str, content: bytes = b"x" * 16) -> Callable[[Path, Path], None]:
    def build(file: Path, marker: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", _good_pickle())
            archive.writestr(name, content)

    return build


def _pickle_in_a_member(file: Path, marker: Path) -> None:
    """The bytes of a weight are a pickle themselves."""
    torch_zip(file, _good_pickle(), {"data/0": pickle.dumps(Calls(os.system, _touch(marker)), 2)})


def _compressed(file: Path, marker: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + b"N0" * 20_000_000 + b".")


def _patched(change: Callable[[bytearray], None]) -> Callable[[Path, Path], None]:
    def build(file: Path, marker: Path) -> None:
        torch_zip(file, _good_pickle(), {"data/0": b"\0" * 16, "version": b"3\n"})
        data = bytearray(file.read_bytes())
        change(data)
        file.write_bytes(data)

    return build


def _at(data: bytearray, signature: bytes, offset: int, value: bytes, last: bool = True) -> None:
    place = (data.rfind if last else data.find)(signature) + offset
    data[place : place + len(value)] = value


# -- safetensors


def safetensors(header: Any, data: bytes = b"", header_bytes: int | None = None) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        hf_folder(folder)
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(raw) if header_bytes is None else header_bytes
        (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw + data)
        return folder

    return make


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# -- folders: indices, links, configs


def index_names(shard: str) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        outside = folder / "outside.safetensors"
        inside = folder / "model"
        hf_sharded(inside)
        shutil.copy(inside / "model-00001-of-00002.safetensors", outside)
        index = inside / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        first = next(iter(content["weight_map"]))
        content["weight_map"][first] = shard.replace("OUTSIDE", str(outside))
        index.write_text(json.dumps(content))
        return inside

    return make


def linked(make_it: Callable[[Path], tuple[Path, Path]]) -> Maker:
    """The file of weights is a link out of the folder."""

    def make(folder: Path, marker: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        path, file = make_it(inside)
        outside = folder / "elsewhere.bin"
        if file.exists():
            shutil.move(file, outside)
        else:
            outside.write_bytes(b"secret")
        file.symlink_to(outside)
        return path

    return make


def changed_text(make_it: Callable[[Path], Any], name: str, content: str | bytes) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        made = make_it(inside)
        path = made[0] if isinstance(made, tuple) else made
        raw = content if isinstance(content, bytes) else content.encode()
        (path / name).write_bytes(raw)
        return path

    return make


def config_with(**fields: Any) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        hf_sharded(folder)
        config = json.loads((folder / "config.json").read_text())
        for name, value in fields.items():
            if isinstance(value, dict) and isinstance(config.get(name), dict):
                config[name] |= value
            else:
                config[name] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def code_in_the_folder(folder: Path, marker: Path) -> Path:
    """config.json names code beside it, which makes the marker when it is imported; the weights are cut off."""
    hf_sharded(folder)
    for name in ("modeling_cogvlm.py", "configuration_cogvlm.py", "tokenization_cogvlm.py", "visual.py", "__init__.py"):
        (folder / name).write_text(_code(marker) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
        "AutoTokenizer": ["tokenization_cogvlm.T", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    return folder


def sat_latest(content: str) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        path, _ = _sat(inside)
        shutil.copytree(inside / "1", folder / "elsewhere")
        (inside / "latest").write_text(content)
        return path

    return make


def sat_linked_iteration(folder: Path, marker: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    _sat(inside)
    shutil.move(inside / "1", folder / "elsewhere")
    (inside / "1").symlink_to(folder / "elsewhere")
    return inside


def deepspeed_latest(folder: Path, marker: Path) -> Path:
    inside = folder / "model"
    inside.mkdir()
    _deepspeed(inside)
    shutil.move(inside / "global_step2", folder / "global_step2")
    (inside / "latest").write_text("../global_step2")
    return inside


def deepspeed_recursion(folder: Path, marker: Path) -> Path:
    """Both ranks say `param_shapes`, which holds itself."""
    path, _ = _deepspeed(folder)
    body = (
        b"\x80\x02}q\x00(" + text("module") + b"}" + text("param_shapes") + b"h\x00" + text("ds_version") + b"h\x00u."
    )
    for file in sorted((folder / "global_step2").iterdir()):
        torch_zip(file, body, {"version": b"3\n"})
    return path


# -- MindSpore's protobuf


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def message(number: int, content: bytes, length: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(content) if length is None else length) + content


def tensor_value(
    tag: str = "w",
    dims: tuple[int, ...] = (4,),
    kind: str = "Float32",
    content: bytes = b"\0" * 16,
    content_length: int | None = None,
) -> bytes:
    sizes = b"".join(varint(1 << 3) + varint(size & (1 << 64) - 1) for size in dims)
    body = sizes + message(2, kind.encode()) + message(3, content, content_length)
    return message(1, message(1, tag.encode()) + message(2, body))


def mindspore(content: bytes | Callable[[], bytes]) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        hf_folder(folder)
        file = folder / "model.ckpt"
        file.write_bytes(content if isinstance(content, bytes) else content())
        return file

    return make


def mindspore_linked_rank(folder: Path, marker: Path) -> Path:
    inside = folder / "model"
    shutil.copytree(FIXTURES / "mindspore_ckpt/open/checkpoint/ms_2cards", inside)
    shutil.move(inside / "rank_1/checkpoint_1.ckpt", folder / "elsewhere.ckpt")
    (inside / "rank_1/checkpoint_1.ckpt").symlink_to(folder / "elsewhere.ckpt")
    return inside


def mindspore_strategy(content: bytes) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        shutil.copytree(FIXTURES / "mindspore_ckpt/open/checkpoint/ms_2cards", folder, dirs_exist_ok=True)
        for file in (folder / "strategy").iterdir():
            file.chmod(0o600)
            file.write_bytes(content)
        return folder

    return make


def _deep_strategy() -> bytes:
    content = b""
    for _ in range(20_000):
        content = message(3, content)
    return content


def _sat_config(**fields: Any) -> str:
    config = json.loads((FIXTURES / "cogvlm_sat/open/checkpoint/model_config.json").read_text())
    return json.dumps(config | fields)


CASES: dict[str, tuple[Maker, str]] = {
    **{f"{layout}: {attack}": with_pickle(layout, attack) for layout in WITH_PICKLES for attack in PICKLES},
    **{f"hf: {bomb}": with_bomb("hf", bomb) for bomb in BOMBS},
    **{f"deepspeed: {bomb}": with_bomb("deepspeed", bomb) for bomb in ("a dict in itself", "tuples that double")},
    **{f"sat: {bomb}": with_bomb("sat", bomb) for bomb in ("a dict in itself", "tuples in tuples")},
    "hf: a pickle of old": (raw_pickle, "not a torch zip file"),
    # zip files
    "zip: a directory of 400,000 names": (_zip(_many_entries), ""),
    "zip: a storage above the archive": (_zip(_member("archive/../../data/0")), "holds no data/0"),
    "zip: a storage of an absolute name": (_zip(_member("/archive/data/0")), "holds no data/0"),
    "zip: a storage in another folder": (_zip(_member("other/data.pkl")), ""),
    "zip: a pickle as weights": (_zip(_pickle_in_a_member), "should be 16 plain bytes"),
    "zip: a compressed pickle": (_zip(_compressed), "compressed"),
    "zip: no pickle": (_zip(lambda file, marker: torch_zip(file, b"", prefix="a/b/")), "no data.pkl"),
    "zip: a directory outside of the file": (
        _zip(_patched(lambda data: _at(data, b"PK\x05\x06", 16, struct.pack("<L", 0xFFFFFF00)))),
        "",
    ),
    "zip: a directory of 4 GB": (_zip(_patched(lambda data: _at(data, b"PK\x05\x06", 12, b"\xf0\xff\xff\xff"))), ""),
    "zip: a record outside of the file": (
        _zip(_patched(lambda data: _at(data, b"PK\x01\x02", 42, struct.pack("<L", 0xFFFFFFF0)))),
        "",
    ),
    "zip: a name of 65,535 bytes": (
        _zip(_patched(lambda data: _at(data, b"PK\x03\x04", 26, b"\xff\xff", last=False))),
        "",
    ),
    "zip: encrypted": (_zip(_patched(lambda data: _at(data, b"PK\x01\x02", 8, b"\x01\x00"))), ""),
    # safetensors
    "safetensors: overlapping": (
        safetensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"\0" * 24),
        "overlaps",
    ),
    "safetensors: out of range": (safetensors({"a": entry([1 << 20], 0, 4 << 20)}, b"\0" * 16), "truncated"),
    "safetensors: a shape that overflows": (
        safetensors({"a": entry([1 << 62, 1 << 62, 4], 0, 16)}, b"\0" * 16),
        "",
    ),
    "safetensors: negative offsets": (safetensors({"a": entry([4], -16, 0)}, b"\0" * 16), "cannot be"),
    "safetensors: a hole": (safetensors({"a": entry([4], 16, 32)}, b"\0" * 32), "belong to no tensor"),
    "safetensors: a header of 2**63 bytes": (safetensors(b"{}", header_bytes=(1 << 63) - 1), "header claims"),
    "safetensors: a header of 4 GB": (safetensors(b"{}", header_bytes=4 << 30), "header claims"),
    "safetensors: a name twice": (
        safetensors(
            b'{"a":' + json.dumps(entry([0], 0, 0)).encode() + b',"a":' + json.dumps(entry([0], 0, 0)).encode() + b"}"
        ),
        "twice",
    ),
    "safetensors: an unknown dtype": (safetensors({"a": entry([4], 0, 16, "F31")}, b"\0" * 16), "dtype"),
    "safetensors: deep JSON": (safetensors(b"[" * 1_000_000), "not JSON"),
    "safetensors: 60 MB of lists": (safetensors(b'{"a":[' + b"[]," * 20_000_000 + b"[]]}"), ""),
    "safetensors: a number of 100,000 digits": (safetensors(b'{"a":' + b"9" * 100_000 + b"}"), "not JSON"),
    "safetensors: empty": (safetensors(b"", header_bytes=0), ""),
    # indices, links, configs
    "index: above the folder": (index_names("../outside.safetensors"), "outside"),
    "index: an absolute name": (index_names("OUTSIDE"), "outside"),
    "index: a device": (index_names("/dev/zero"), ""),
    "index: its own folder": (index_names("."), ""),
    "index: no text": (
        changed_text(hf_sharded, "model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'),
        "weight_map",
    ),
    "index: 90 MB of lists": (
        changed_text(hf_sharded, "model.safetensors.index.json", b'{"weight_map":[' + b"[]," * 30_000_000 + b"[]]}"),
        "",
    ),
    "config: deep JSON": (changed_text(hf_sharded, "config.json", "[" * 1_000_000), "JSON"),
    "config: 90 MB of lists": (
        changed_text(hf_sharded, "config.json", b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"),
        "",
    ),
    "config: no text": (changed_text(hf_sharded, "config.json", b"\xff\xfe{}"), "JSON"),
    "config: 10**12 layers": (config_with(num_hidden_layers=10**12), ""),
    "config: a width of 2**62": (config_with(hidden_size=2**62), ""),
    "config: a vocabulary of 10**15": (config_with(vocab_size=10**15), ""),
    "config: a picture of 10**9": (config_with(vision_config={"image_size": 10**9}), ""),
    "config: a width of -8": (config_with(hidden_size=-8), ""),
    "config: a tower of 10**9 layers": (config_with(vision_config={"num_hidden_layers": 10**9}), ""),
    "config: code beside it": (code_in_the_folder, ""),
    "link: hf": (linked(_hf), ""),
    "link: sat": (linked(_sat), ""),
    "link: deepspeed": (linked(_deepspeed), ""),
    "link: projector": (linked(_projector), ""),
    "link: a rank of mindspore": (mindspore_linked_rank, ""),
    "sat: latest above the folder": (sat_latest("../elsewhere"), "latest"),
    "sat: latest of 10 MB": (sat_latest("1" * 10_000_000), "latest"),
    "sat: latest with a zero byte": (sat_latest("1\x00/../.."), "latest"),
    "sat: a linked iteration": (sat_linked_iteration, ""),
    "sat: sizes that are none": (
        changed_text(_sat, "model_config.json", '{"num_layers": 1e400, "model_parallel_size": -1}'),
        "",
    ),
    "sat: 10**9 ranks": (changed_text(_sat, "model_config.json", _sat_config(model_parallel_size=10**9)), ""),
    "deepspeed: latest above the folder": (deepspeed_latest, "latest"),
    "deepspeed: shapes that hold themselves": (deepspeed_recursion, ""),
    # MindSpore
    "mindspore: a tag of 4 GB": (mindspore(message(1, message(1, b"x", 4 << 30))), ""),
    "mindspore: content of 4 GB": (mindspore(tensor_value(content_length=4 << 30)), ""),
    "mindspore: a message of 2**64 bytes": (mindspore(b"\x0a" + b"\xff" * 9 + b"\x01" + b"x" * 16), ""),
    "mindspore: a number of 11 bytes": (mindspore(b"\x0a" + b"\xff" * 11 + b"\x01"), ""),
    "mindspore: a shape that overflows": (mindspore(tensor_value(dims=(1 << 62, 1 << 62))), ""),
    "mindspore: a negative size": (mindspore(tensor_value(dims=(-4,))), ""),
    "mindspore: too many bytes": (mindspore(tensor_value(dims=(2,))), ""),
    "mindspore: an unknown dtype": (mindspore(tensor_value(kind="Float31")), ""),
    "mindspore: 4 million fields": (mindspore(lambda: b"\x0a\x00" * 4_000_000), ""),
    "mindspore: 3 million sizes": (mindspore(lambda: tensor_value(dims=(1,) * 3_000_000)), ""),
    "mindspore: a name twice, apart": (
        mindspore(tensor_value("a") + tensor_value("b") + tensor_value("a")),
        "",
    ),
    "mindspore: a CRC that is wrong": (mindspore(tensor_value() + b"crc_num" + b"\0" * 10), "CRC"),
    "mindspore: encrypted": (mindspore(b"\xd8\x5e\x3a\x7f" + b"\0" * 64), "encrypted"),
    "mindspore: a strategy in itself": (mindspore_strategy(_deep_strategy()), ""),
    "mindspore: a strategy that lies": (mindspore_strategy(message(3, b"x", 4 << 30)), ""),
    "mindspore: no strategy": (mindspore_strategy(b""), ""),
}
