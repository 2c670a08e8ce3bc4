"""The rest of the zoo from small local files: retrieval, classes, videos, pairs, streams, dialogues, instructions."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import video_clip
import zoo_files
from PIL import Image

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.datasets.imagefolder_dataset import ImageFolderDataset
from lavish.datasets.datasets.instruction_datasets import InstructionDataset
from lavish.datasets.datasets.laion_dataset import LaionDataset
from lavish.datasets.datasets.multimodal_classification_datasets import MultimodalClassificationDataset
from lavish.datasets.datasets.nlvr_datasets import NLVRDataset
from lavish.datasets.datasets.retrieval_datasets import RetrievalEvalDataset
from lavish.datasets.datasets.tar_shards import expand, read_shard

EVAL = {"name": "blip_image_eval", "image_size": 8}
PROCESSORS = {"vis_processor": {"train": EVAL, "eval": EVAL}}
FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "gpt_dialogue" / "open"


def build(name: str, root: Path | None, **section: Any) -> dict[str, Any]:
    """Build a dataset as a recipe does; `root` is where its visual data are."""
    builder = registry.get_builder_class(name)
    config = Config({"datasets": {name: {**PROCESSORS, **section}}})
    if root is not None:
        config.datasets_cfg[name].build_info[config.datasets_cfg[name].data_type] = {"storage": str(root)}
    return builder(config.datasets_cfg[name]).build_datasets()


def clip(path: Path, num_frames: int) -> None:
    """Write a video that goes from black to white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video_clip.clip(num_frames, size=32))


def shard(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpeg(color: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (10, 8), color).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["coco_retrieval", "flickr30k"])
def test_retrieval(name: str, cache: Path, tmp_path: Path) -> None:
    zoo_files.coco_caption(cache)
    for split in ("train", "val", "test"):
        source = cache / f"coco/annotations/coco_karpathy_{split}.json"
        zoo_files.write(cache / f"flickr30k/annotations/{split}.json", json.loads(source.read_text()))
    datasets = build(name, zoo_files.pictures(tmp_path))
    train, val = datasets["train"], datasets["val"]
    assert set(train[1]) == {"image", "text_input", "image_id", "instance_id"}
    assert [train[index]["image_id"] for index in range(3)] == [0, 0, 1]
    batch = val.collater([val[0], val[1]])
    assert (set(batch), batch["index"]) == ({"image", "index"}, [0, 1])
    assert val.text == ["a", "b", "a", "b"]
    assert val.txt2img == {0: 0, 1: 0, 2: 1, 3: 1}
    assert val.img2txt == {0: [0, 1], 1: [2, 3]}
    assert val.image == list(zoo_files.NAMES[2:])


def test_retrieval_rows_that_are_wrong(tmp_path: Path) -> None:
    for row, message in (({"image": "a", "caption": []}, "caption is"), ({"caption": "x"}, "image is None")):
        zoo_files.write(tmp_path / "rows.json", [row])
        with pytest.raises(DataError, match=rf"rows\.json, row 1: {message}"):
            RetrievalEvalDataset(ann_paths=[tmp_path / "rows.json"])


def test_snli_ve(cache: Path, tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = [{"image": "1000", "sentence": "A square.", "label": "entailment"}]
        zoo_files.write(cache / f"snli/annotations/ve_{split}.json", rows)
    train = build("snli_ve", zoo_files.pictures(tmp_path, ("1000.jpg",)))["train"]
    sample = train.collater([train[0]])
    assert set(sample) == {"image", "text_input", "label", "image_id", "instance_id"}
    assert (sample["label"], sample["image_id"]) == ([2], ["1000"])
    with pytest.raises(DataError, match=r"label 'entailmnt' is no class\. Did you mean 'entailment'"):
        train.label({"label": "entailmnt"})
    with pytest.raises(DataError, match=r"label \[\] is no class"):
        train.label({"label": []})
    assert MultimodalClassificationDataset.class_labels is None


def test_nlvr(cache: Path, tmp_path: Path) -> None:
    rows = [{"images": list(zoo_files.NAMES[:2]), "sentence": "The left one is right.", "label": "True"}]
    for name in ("train", "dev"):
        zoo_files.write(cache / f"nlvr/annotations/{name}.json", rows)
    datasets = build("nlvr", zoo_files.pictures(tmp_path))
    fixed = datasets["val"][0]
    assert set(fixed) == {"image0", "image1", "text_input", "label", "instance_id"}
    assert (fixed["label"], fixed["text_input"]) == (1, "The left one is right.")
    seen = {}
    for _ in range(20):
        sample = datasets["train"][0]
        is_flipped = torch.equal(sample["image0"], fixed["image1"])
        assert is_flipped != torch.equal(sample["image0"], fixed["image0"])
        seen[is_flipped] = sample["text_input"]
    assert seen == {False: "The left one is right.", True: "The right one is left."}
    zoo_files.write(tmp_path / "rows.json", [rows[0] | {"images": ["a"]}])
    with pytest.raises(DataError, match="two names of files"):
        NLVRDataset(ann_paths=[tmp_path / "rows.json"])[0]


def test_imagenet(tmp_path: Path) -> None:
    zoo_files.pictures(tmp_path / "val", ("n02/a.jpg", "n01/b.JPEG", "n02/sub/c.png"))
    (tmp_path / "val/n01/readme.txt").write_text("x")
    val = build("imagenet", tmp_path)["val"]
    assert [(row["image"], row["label"]) for row in val.annotation] == [
        ("n01/b.JPEG", 0),
        ("n02/a.jpg", 1),
        ("n02/sub/c.png", 1),
    ]
    assert val.classnames == ["n01", "n02"]
    batch = val.collater([val[0], val[1]])
    assert set(batch) == {"image", "label", "image_id", "instance_id"}
    names = zoo_files.write(tmp_path / "names.json", ["tench", "shark"])
    info = {"classnames": str(names)}
    assert build("imagenet", tmp_path, build_info=info)["val"].classnames == ["tench", "shark"]
    zoo_files.write(names, ["tench"])
    with pytest.raises(DataError, match="2 folders, and 1 names of classes"):
        build("imagenet", tmp_path, build_info=info)
    with pytest.raises(DataError, match="train: no such folder"):
        build("imagenet", tmp_path, build_info={"splits": ["train"]})
    with pytest.raises(ConfigError, match=r"build_info\.classnames is 3"):
        build("imagenet", tmp_path, build_info={"classnames": 3})
    with pytest.raises(ConfigError, match=r"build_info\.annotations: imagenet has none"):
        build("imagenet", tmp_path, build_info={"annotations": {"val": {"storage": str(names)}}})
    with pytest.raises(ConfigError, match="a list of train and val"):
        build("imagenet", tmp_path, build_info={"splits": ["test"]})
    (tmp_path / "empty/a").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no pictures"):
        ImageFolderDataset(vis_root=tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "folder", "test"),
    [("msrvtt_caption", "msrvtt", "cap"), ("msvd_caption", "msvd", "cap"), ("vatex_caption", "vatex", "cap")],
)
def test_videos_with_captions(name: str, folder: str, test: str, cache: Path, tmp_path: Path) -> None:
    clip(tmp_path / "v1.mp4", 6)
    rows = [{"video": "v1.mp4", "caption": "It gets brighter.", "image_id": "v1"}]
    for split in ("train", "val", "test"):
        zoo_files.write(cache / f"{folder}/annotations/{test}_{split}.json", rows)
    datasets = build(name, tmp_path, build_info={"num_frames": 4})
    sample = datasets["train"][0]
    assert set(sample) == {"video", "text_input", "image_id"}
    assert sample["video"].shape == (3, 4, 8, 8), "colours, frames, height, width"
    brightness = sample["video"].mean(dim=(0, 2, 3))
    assert torch.equal(brightness, brightness.sort().values)
    assert set(datasets["val"][0]) == {"video", "image_id", "instance_id"}
    assert datasets["test"][0]["image_id"] == "v1"


def test_a_short_clip_repeats_its_last_frame(cache: Path, tmp_path: Path) -> None:
    clip(tmp_path / "v1.mp4", 3)
    for split in ("train", "val", "test"):
        rows = [{"video": "v1.mp4", "caption": "x", "image_id": 1}]
        zoo_files.write(cache / f"msvd/annotations/cap_{split}.json", rows)
    processor = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 8}}}
    video = build("msvd_caption", tmp_path, build_info={"num_frames": 5}, **processor)["train"][0]["video"]
    assert video.shape == (3, 5, 8, 8)
    assert torch.equal(video[:, 2], video[:, 4]), "one random crop for all frames of a clip"
    with pytest.raises(ConfigError, match="num_frames is 0"):
        build("msvd_caption", tmp_path, build_info={"num_frames": 0})


@pytest.mark.parametrize("name", ["msrvtt", "didemo"])
def test_retrieval_of_videos(name: str, cache: Path, tmp_path: Path) -> None:
    clip(tmp_path / "v1.mp4", 4)
    for split in ("train", "val", "test"):
        captions: Any = "one" if split == "train" else ["one", "two"]
        rows = [{"video": "v1.mp4", "caption": captions}] * 2
        zoo_files.write(cache / f"{name}/annotations/retrieval_{split}.json", rows)
    datasets = build(f"{name}_retrieval", tmp_path, build_info={"num_frames": 2})
    assert set(datasets["train"][0]) == {"video", "text_input", "image_id", "instance_id"}
    assert datasets["train"][1]["image_id"] == 0
    assert set(datasets["val"][1]) == {"video", "index"}
    assert datasets["val"].img2txt == {0: [0, 1], 1: [2, 3]}


@pytest.mark.parametrize("name", ["msrvtt", "msvd"])
def test_questions_about_videos(name: str, cache: Path, tmp_path: Path) -> None:
    folder = cache / name / "annotations"
    rows = [{"video": "v1.mp4", "question": "Where?", "answer": answer, "question_id": 7} for answer in ("here", "?")]
    for split in ("train", "val", "test"):
        zoo_files.write(folder / f"qa_{split}.json", rows)
    zoo_files.write(folder / "qa_ans2label.json", {"there": 0, "here": 1})
    datasets = build(f"{name}_qa", tmp_path, vis_processor=None)
    assert list(datasets) == ["train", "val", "test"], "ans2label is no split"
    sample = datasets["val"][0]
    assert set(sample) == {"video", "text_input", "answers", "question_id", "instance_id"}
    assert sample["video"] == str(tmp_path / "v1.mp4"), "without a processor the path"
    assert [datasets["val"][index]["answers"] for index in range(2)] == [1, 2]
    datasets["val"].annotation[0]["answer"] = ["here"]
    with pytest.raises(DataError, match=r"the field 'answer' is \['here'\]"):
        datasets["val"][0]
    zoo_files.write(folder / "qa_ans2label.json", ["here"])
    with pytest.raises(DataError, match=r"qa_ans2label\.json: holds \['here'\]"):
        build(f"{name}_qa", tmp_path)
    with pytest.raises(ConfigError, match="ans2label is missing"):
        build(f"{name}_qa", tmp_path, build_info={"annotations": {"ans2label": None}})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vg_caption", "vg/annotations/vg_caption.json"),
        ("sbu_caption", "sbu_captions/annotations/sbu.json"),
        ("conceptual_caption_3m", "conceptual_caption/annotations/cc3m.json"),
        ("conceptual_caption_12m", "conceptual_caption/annotations/cc12m.json"),
    ],
)
def test_pairs(name: str, file: str, cache: Path, tmp_path: Path) -> None:
    zoo_files.write(cache / file, zoo_files.captions())
    datasets = build(name, zoo_files.pictures(tmp_path))
    assert list(datasets) == ["train"]
    assert set(datasets["train"][0]) == {"image", "text_input"}


def test_laion(tmp_path: Path) -> None:
    good = {"a.jpg": jpeg(), "a.json": b'{"caption": "one"}', "b.JPG": jpeg(), "b.txt": "zwei ü".encode()}
    shard(tmp_path / "00.tar", good)
    shard(tmp_path / "01.tar", {"c.jpg": b"no picture", "c.txt": b"x", "d.txt": b"y", "e.jpg": jpeg()})
    (tmp_path / "02.tar").write_bytes(b"no tar")
    stream = build("laion2B_multi", None, build_info={"storage": str(tmp_path / "{00..02}.tar")})["train"]
    assert stream.inner_dataset is stream
    samples = [sample for sample, _ in zip(stream, range(5), strict=False)]
    assert {sample["text_input"] for sample in samples} == {"one", "zwei ü"}
    assert stream.num_broken >= 4, "a picture, a text, one without, a shard; each is told and passed over"
    batch = stream.collater(samples)
    assert (set(batch), batch["image"].shape) == ({"image", "text_input"}, (5, 3, 8, 8))
    with pytest.raises(DataError, match="None of the 1 shards has a sample"):
        list(LaionDataset(location=str(tmp_path / "02.tar")))
    odd = shard(tmp_path / "04.tar", {"a.jpg": jpeg(), "a.txt": b"x", "b.jpg": jpeg(), "b.json": b"[" * 100_000})
    assert [sample["text_input"] for sample in LaionDataset(location=str(odd), is_endless=False)] == ["x"]
    with pytest.raises(ConfigError, match=r"build_info\.annotations: laion2B_multi has none"):
        build("laion2B_multi", None, build_info={"storage": str(odd), "annotations": {"train": {"storage": str(odd)}}})
    with pytest.raises(ConfigError, match=r"laion2B_multi\.max_broken: .* a stream"):
        build("laion2B_multi", None, max_broken=0.1, build_info={"storage": str(odd)})
    with pytest.raises(DataError, match="needs a location"):
        LaionDataset()
    with pytest.raises(DataError, match=r"03\.tar: the shards of laion2B_multi are not here"):
        build("laion2B_multi", None, build_info={"storage": str(tmp_path / "{03..04}.tar")})


def test_readers_of_a_stream_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(4):
        shard(tmp_path / f"{at}.tar", {"a.jpg": jpeg(), "a.txt": b"%d" % at})

    def read(rank: int, seed: int = 0) -> list[str]:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        stream = LaionDataset(location=str(tmp_path / "{0..3}.tar"), seed=seed, is_endless=False)
        return [sample["text_input"] for sample in stream]

    assert sorted(read(0) + read(1)) == ["0", "1", "2", "3"]
    assert len(read(0)) == 2
    assert read(0) == read(0)
    assert any(read(0, seed) != read(0) for seed in range(1, 5))


def test_paths_of_shards() -> None:
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert expand("a.tar") == ["a.tar"]
    with pytest.raises(ConfigError, match="runs backwards"):
        expand("{3..2}.tar")
    with pytest.raises(ConfigError, match="over 1,000,000"):
        expand("{0..9999999}.tar")


def test_shards(tmp_path: Path) -> None:
    files = {"x/1.a.b": b"1", "x/1.json": b"2", "x/2.json": b"3", "noext": b"4", ".hidden": b"5"}
    path = shard(tmp_path / "s.tar", files)
    assert list(read_shard(path)) == [
        {"__key__": b"x/1", "a.b": b"1", "json": b"2"},
        {"__key__": b"x/2", "json": b"3"},
    ]
    with pytest.raises(DataError, match="no such shard"):
        list(read_shard(tmp_path / "t.tar"))
    odd = tarfile.TarInfo("\udce9.json")
    with tarfile.open(tmp_path / "latin.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(odd)
    assert list(read_shard(tmp_path / "latin.tar")) == [{"__key__": b"\xe9", "json": b""}], "no UTF-8"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="no tar file, or is cut off"):
        list(read_shard(path))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(DataError, match=r"two files \.json"):
        list(read_shard(tmp_path / "twice.tar"))
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(read_shard(tmp_path / "link.tar")) == []


def avsd(cache: Path, **vision: Any) -> dict[str, Any]:
    """Build avsd_dialogue of the fixture's annotations and features."""
    for split in ("train", "val", "test"):
        zoo_files.write(
            cache / f"avsd/annotations/{split}.json", json.loads((FIXTURE / "inputs/annotations.json").read_text())
        )
    tokenizer = str(FIXTURE / "checkpoint/gpt2")
    seen = {"name": "gpt_video_ft", "visual_ft": ["i3d_flow", "i3d_rgb"], "audio_ft": ["vggish"], **vision}
    said = {"name": "gpt_dialogue", "max_turns": 3, "use_caption": True}
    return build(
        "avsd_dialogue",
        FIXTURE / "inputs/features",
        vis_processor={mode: {**seen, "tokenizer": tokenizer} for mode in ("train", "eval")},
        text_processor={mode: {**said, "tokenizer": tokenizer} for mode in ("train", "eval")},
    )


def test_avsd_is_that_of_the_fixture(cache: Path) -> None:
    from safetensors.torch import load_file

    expected = load_file(FIXTURE / "expected.safetensors")
    datasets = avsd(cache)
    assert [len(split) for split in datasets.values()] == [7, 2, 2], "one sample a turn, one a dialogue"
    for split, count in (("train", 7), ("val", 2)):
        prefix = "train" if split == "train" else "eval"
        for index in range(count):
            sample = datasets[split][index]
            for name in ("input_ids", "token_type_ids", "labels", "video_fts", "video_token_type_ids"):
                assert torch.equal(sample[name], expected[f"{prefix}.{index}.{name}"]), (split, index, name)
            assert sample["instance_id"] == str(index)
    train = datasets["train"]
    batch = train.collater([train[index] for index in (0, 3, 5)])
    assert set(batch) == {"input_ids", "token_type_ids", "labels", "video_fts", "attn_mask"}
    pad = int(expected["train_batch.input_ids"][0, -1])
    for name in ("input_ids", "token_type_ids", "video_fts", "attn_mask"):
        assert torch.equal(batch[name].float(), expected[f"train_batch.{name}"].float()), name
    released = expected["train_batch.labels"]
    assert torch.equal(batch["labels"], released.masked_fill(released == pad, -1)), "no padding is learnt"


def test_avsd_needs_its_processors(cache: Path) -> None:
    avsd(cache)
    train = build("avsd_dialogue", FIXTURE / "inputs/features", vis_processor=None)["train"]
    with pytest.raises(ConfigError, match="needs the processors gpt_video_ft and gpt_dialogue"):
        train.collater([{}])


def test_lavis_recipe_names_no_tokenizer(cache: Path) -> None:
    """Its config is checked, and nothing is fetched for that: not the tokenizer either."""
    avsd(cache)
    names = {"vis_processor": "gpt_video_ft", "text_processor": "gpt_dialogue"}
    sections = {kind: {mode: {"name": name} for mode in ("train", "eval")} for kind, name in names.items()}
    datasets = build("avsd_dialogue", FIXTURE / "inputs/features", **sections)
    assert len(datasets["train"]) == 7


def test_features_of_different_widths(cache: Path) -> None:
    train = avsd(cache)["train"]
    one, two = train[0], train[1]
    two["video_fts"] = two["video_fts"][:, :-1]
    with pytest.raises(DataError, match=r"are \[15, 16\] wide"):
        train.collater([one, two])
    train.annotation[0]["image_id"] = 3.5
    with pytest.raises(DataError, match=r"image_id 3\.5 is no plain file name"):
        train[0]


@pytest.mark.parametrize("content", [[], {"dialogs": 3}, {"dialogs": [{"dialog": []}]}, {"dialogs": [{"dialog": [3]}]}])
def test_dialogues_that_are_wrong(content: Any, cache: Path) -> None:
    avsd(cache)
    zoo_files.write(cache / "avsd/annotations/train.json", content)
    with pytest.raises(DataError, match=r"train\.json"):
        build("avsd_dialogue", FIXTURE / "inputs/features")


INSTRUCTIONS = {
    "minigpt4_instruction": "dataset/minigpt4/minigpt4_minigpt4qwen_format.json",
    "llava_instruction": "dataset/llava/llava_minigpt4qwen_format.json",
    "llava_pretrain": "dataset/llava_pretrain/blip_laion_cc_sbu_558k/llava_pretrain_minigpt4qwen_format.json",
    "llava_instruct_100k": "dataset/llava_instruct/llava_instruction_100k.json",
    "llava_instruct_156k": "dataset/llava_instruct/llava_instruction_156k.json",
}
PICTURE = "<Img><ImageHere></Img>"


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name: str, cache: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "instruction": f"{PICTURE} What?", "output": "That."},
        {"image": ["a.jpg", "b.jpg"], "instruction": [f"{PICTURE}{PICTURE} Same?", "Sure?"], "output": ["No.", "Yes."]},
        {"instruction": "Hello.", "output": "Hi."},
    ]
    zoo_files.write(cache / INSTRUCTIONS[name], rows)
    text = {"train": {"name": "base_instruction", "max_words": 100}}
    train = build(name, zoo_files.pictures(tmp_path, ("a.jpg", "b.jpg")), text_processor=text)["train"]
    assert train[0]["conversations"] == [
        {"from": "user", "value": f"{PICTURE} What?"},
        {"from": "assistant", "value": "That."},
    ]
    assert [None if train[at]["image"] is None else tuple(train[at]["image"].shape) for at in range(3)] == [
        (3, 8, 8),
        (2, 3, 8, 8),
        None,
    ]
    batch = train.collater([train[index] for index in range(3)])
    assert (set(batch), batch["image"].shape) == ({"image", "conversations"}, (3, 3, 8, 8))
    assert len(batch["conversations"][1]) == 4
    assert train.collater([train[2]])["image"] is None


def test_instructions_about_videos(cache: Path, tmp_path: Path) -> None:
    clip(tmp_path / "v.mp4", 5)
    rows = [{"video": "v.mp4", "instruction": f"{PICTURE} What?", "output": "Light."}]
    zoo_files.write(cache / "dataset/videochatgpt/videochatgpt_instruction_100k.json", rows)
    train = build("videochatgpt_100k", tmp_path, build_info={"max_frames": 3})["train"]
    sample = train[0]
    assert sample["image"].shape == (3, 3, 8, 8), "frames, colours, height, width"
    assert sample["conversations"][0]["value"] == "<Img><ImageHere><ImageHere><ImageHere></Img> What?"
    with pytest.raises(ConfigError, match="max_frames is 0"):
        build("videochatgpt_100k", tmp_path, build_info={"max_frames": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.jpg", "instruction": "What?", "output": "x"}, "1 pictures or videos, and 0 of <ImageHere>"),
        ({"instruction": f"{PICTURE}", "output": "x"}, "0 pictures or videos, and 1 of"),
        ({"instruction": ["a", "b"], "output": ["c"]}, "2 instructions and 1 outputs"),
        ({"instruction": 3, "output": "c"}, "'instruction' is 3"),
        ({"instruction": "a"}, "the field 'output' is missing"),
    ],
)
def test_instructions_that_are_wrong(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    zoo_files.pictures(tmp_path, ("a.jpg",))
    zoo_files.write(tmp_path / "rows.json", [row])
    with pytest.raises(DataError, match=rf"rows\.json, row 1: .*{message}"):
        InstructionDataset(vis_root=tmp_path, ann_paths=[tmp_path / "rows.json"])[0]
