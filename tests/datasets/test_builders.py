"""Configs of the zoo and what a builder does with them: checked whole before anything is fetched, by one process."""

import hashlib
import http.server
import importlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo_files
from omegaconf import OmegaConf
from test_formats import closed

from lavish.checkpoints.download import is_url
from lavish.common.config import PACKAGE, Config, load_yaml
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.builders import dataset_zoo, load_dataset, load_dataset_config
from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder, cache_root
from lavish.datasets.datasets.base_dataset import BaseDataset

CLASSIC = {
    *(
        "coco_caption",
        "coco_retrieval",
        "flickr30k",
        "aok_vqa",
        "snli_ve",
        "nlvr",
        "coco_vqa",
        "gqa",
        "ok_vqa",
        "nocaps",
    ),
    *("vg_caption", "vg_vqa", "sbu_caption", "conceptual_caption_3m", "conceptual_caption_12m", "imagenet"),
    *("laion2B_multi", "msrvtt_caption", "msvd_caption", "vatex_caption", "msrvtt_retrieval", "didemo_retrieval"),
    *("msrvtt_qa", "msvd_qa", "avsd_dialogue", "nocaps"),
}
INSTRUCTIONS = {
    *("minigpt4_instruction", "llava_instruction", "llava_pretrain", "llava_instruct_100k", "llava_instruct_156k"),
    "videochatgpt_100k",
}
SPLITS = {
    "nocaps": ["val", "test"],
    "ok_vqa": ["train", "test"],
    "imagenet": ["val"],
}
TRAINED_ONLY = {
    *("vg_caption", "vg_vqa", "sbu_caption", "conceptual_caption_3m", "conceptual_caption_12m", "laion2B_multi"),
    *INSTRUCTIONS,
}


CLASSES = {
    "aok_vqa_datasets": ("AOKVQADataset", "AOKVQAEvalDataset"),
    "avsd_dialogue_datasets": ("AVSDDialDataset", "AVSDDialEvalDataset"),
    "base_dataset": ("BaseDataset", "ConcatDataset"),
    "caption_datasets": ("CaptionDataset", "CaptionEvalDataset"),
    "coco_caption_datasets": ("COCOCapDataset", "COCOCapEvalDataset", "NoCapsEvalDataset"),
    "coco_vqa_datasets": ("COCOVQADataset", "COCOVQAEvalDataset"),
    "dialogue_datasets": ("DialogueDataset", "DialogueEvalDataset"),
    "gqa_datasets": ("GQADataset", "GQAEvalDataset"),
    "image_text_pair_datasets": ("ImageTextPairDataset",),
    "imagefolder_dataset": ("ImageFolderDataset",),
    "laion_dataset": ("LaionDataset",),
    "multimodal_classification_datasets": ("MultimodalClassificationDataset",),
    "nlvr_datasets": ("NLVRDataset", "NLVREvalDataset"),
    "retrieval_datasets": ("RetrievalDataset", "RetrievalEvalDataset", "VideoRetrievalDataset"),
    "snli_ve_datasets": ("SNLIVisualEntialmentDataset",),
    "vg_vqa_datasets": ("VGVQADataset",),
    "video_caption_datasets": ("VideoCaptionDataset", "VideoCaptionEvalDataset"),
    "video_vqa_datasets": ("VideoQADataset",),
    "vqa_datasets": ("VQADataset", "VQAEvalDataset"),
}
"""Where a LAVIS project imports the classes that it subclasses, by module."""


class Server(http.server.BaseHTTPRequestHandler):
    """Serves annotation files by their name."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        type(self).asked.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.files[name])))
        self.end_headers()
        self.wfile.write(self.files[name])

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("LAVISH_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Server.asked, Server.files = [], {"train.json": json.dumps(zoo_files.captions()).encode(), "val.json": b"[]"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def section(server: str, **more: Any) -> dict[str, Any]:
    """A section of coco_caption whose training file lies on the server."""
    md5 = hashlib.md5(Server.files["train.json"]).hexdigest()
    train = {"url": f"{server}/train.json", "storage": "coco/train.json", "md5": md5}
    return {
        "data_type": "images",
        "build_info": {"annotations": {"train": train}, "images": {"storage": "coco/images"}},
        **more,
    }


def builder(name: str = "coco_caption", cfg: Any = None) -> Any:
    return registry.get_builder_class(name)(cfg)


def test_the_names_of_the_zoo() -> None:
    assert set(dataset_zoo.get_names()) >= CLASSIC | INSTRUCTIONS
    assert (len(CLASSIC), len(INSTRUCTIONS)) == (25, 6)
    assert dataset_zoo.get_names() == sorted(dataset_zoo.get_names())
    assert len(dataset_zoo) == len(list(dataset_zoo))
    with pytest.raises(KeyError):
        dataset_zoo["coco"]


@pytest.mark.parametrize("module", CLASSES)
def test_classes_stand_where_lavis_has_them(module: str) -> None:
    found = importlib.import_module(f"lavish.datasets.datasets.{module}")
    for name in CLASSES[module]:
        assert isinstance(getattr(found, name), type)


@pytest.mark.parametrize("name", sorted(CLASSIC | INSTRUCTIONS))
def test_every_config_is_whole(name: str) -> None:
    for kind, file in registry.get_builder_class(name).DATASET_CONFIG_DICT.items():
        path = PACKAGE / file
        assert list(load_yaml(path).datasets) == [name], "the section has the name of the dataset"
        made = builder(name, path)
        card = PACKAGE / made.config.dataset_card
        assert card.is_file(), f"{card} is missing"
        usual = ["train"] if name in TRAINED_ONLY else SPLITS.get(name, ["train", "val", "test"])
        assert made.splits() == (["val"] if kind == "eval" else usual)
        for found in made.annotation_files():
            assert found.url is None or is_url(found.url), "no path of somebody's machine"
            assert not Path(found.path).is_absolute() or str(found.path).startswith(str(cache_root()))
        text = path.read_text(encoding="utf-8")
        if "url:" in text and "md5:" not in text:
            assert "No md5 is known" in text
        root = made.visual_root()
        assert root is not None
        assert root.is_relative_to(cache_root())
        Config({"datasets": {name: {"type": kind}}})


def test_annotations_are_fetched_once_and_their_md5_is_compared(server: str, cache: Path, tmp_path: Path) -> None:
    cfg = section(server)
    datasets = builder(cfg=cfg).build_datasets()
    assert (len(datasets["train"]), Server.asked) == (3, ["train.json"])
    assert (cache / "coco/train.json").is_file()
    builder(cfg=cfg).build_datasets()
    assert Server.asked == ["train.json"]
    (cache / "coco/train.json").unlink()
    cfg["build_info"]["annotations"]["train"]["md5"] = "0" * 32
    with pytest.raises(DataError, match=r"train\.json: came with the md5"):
        builder(cfg=cfg).build_datasets()
    assert not (cache / "coco/train.json").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vis_processor", {"train": {"name": "blip_image_trian"}}, "No processor is named 'blip_image_trian'. Did you"),
        ("vis_processor", {"train": {"name": "blip_image_train", "imagesize": 3}}, "no setting 'imagesize'"),
        ("vis_processor", {"trian": {"name": "blip_image_train"}}, r"vis_processor\.trian: unknown key. Did you mean"),
        ("text_processor", {"eval": {"max_words": 3}}, "needs the 'name' of one"),
        ("text_processor", {"eval": "blip_caption"}, "needs the 'name' of one"),
        ("text_processor", {"eval": {"name": ["blip_caption"]}}, "needs the 'name' of one"),
        ("text_processor", "blip_caption", r"coco_caption\.text_processor is 'blip_caption'; keys and values"),
        ("kw_processor", 3, r"kw_processor is 3; keys and values"),
        ("kw_processor", {"extra": {"name": "nothing"}}, "No processor is named 'nothing'"),
        ("vis_procesor", {}, r"datasets\.coco_caption\.vis_procesor: unknown key. Did you mean 'vis_processor'"),
        ("data_type", "image", "data_type is 'image'.*Did you mean 'images'"),
        ("max_broken", 3, "max_broken is 3"),
        ("max_broken", True, "max_broken is True"),
        ("build_info", None, "build_info is None"),
        ("max_broken", float("nan"), "max_broken is nan"),
    ],
)
def test_the_whole_config_is_checked_before_anything_is_fetched(
    key: str, value: Any, message: str, server: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        builder(cfg=section(server, **{key: value})).build_datasets()
    assert Server.asked == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotation": {}}, r"build_info\.annotation: unknown key. Did you mean 'annotations'"),
        ({"annotations": {"train": {"url": ["a", "b"], "storage": "c"}}}, "1 storage paths and 2 of url; they pair up"),
        ({"annotations": {"train": {"storage": ["a", "b"], "md5": "c"}}}, "2 storage paths and 1 of md5.*md5: null"),
        ({"annotations": {"train": {"storge": "a"}}}, r"annotations\.train\.storge: unknown key. Did you mean"),
        ({"annotations": {"train": {}}}, "names no file"),
        ({"annotations": {"train": "a.json"}}, "train is 'a.json'; it holds url, md5, storage"),
        ({"annotations": {"train": {"storage": 3}}}, "storage is 3; a text or a list of texts"),
        ({"annotations": {"train": {"storage": [None], "url": ["a"]}}}, "has an empty path"),
        ({"annotations": {"train": {"storage": ""}}}, "has an empty path"),
        ({"annotations": {"train": {"storage": "a" * 5000}}}, "can be no path: file name too long"),
        ({"annotations": {"train": {"storage": "a\0"}}}, "can be no path"),
        ({"annotations": {"train": {"storage": "~nobodys-folder/a"}}}, "no such home folder"),
        ({"annotations": {"train": {"storage": "a", "md5": "abc"}}}, r"train\.md5 is 'abc'; 32 digits"),
        ({"annotations": {"train": {"url": "https://x/"}}}, r"url is 'https://x/', which names no file; give storage"),
        ({"annotations": {"train": {"url": "https://[x"}}}, "which is no URL"),
        ({"annotations": {"train": {"url": "file://[x", "storage": "a"}}}, "which is no URL"),
        ({"annotations": {"train": {"url": "ftp://x/a.json", "storage": "a"}}}, "only https is fetched"),
        ({"annotations": {"tran": {"storage": "a"}}}, r"annotations\.tran: unknown key\. Did you mean 'train'"),
        ({"annotations": {"dev": {"storage": "a"}}}, r"annotations\.dev: unknown key\. Known: train, val, test"),
        ({"annotations": ["a"]}, r"build_info\.annotations is \['a'\]"),
        ({"images": {"storge": "a"}}, r"build_info\.images\.storge: unknown key\. Did you mean 'storage'"),
        ({"images": {"storage": "~nobodys-folder"}}, "no such home folder"),
        ({"images": {"storage": __file__}}, "storage of the images is a file; name the folder"),
        ({"images": {"storage": ["a", "b"]}}, r"build_info\.images\.storage is \['a', 'b'\]; the path of a folder"),
    ],
)
def test_wrong_build_info(change: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        builder(cfg={"data_type": "images", "build_info": change}).check()


def test_a_split_may_be_left_out(cache: Path) -> None:
    zoo_files.coco_caption(cache)
    config = Config({"datasets": {"coco_caption": {"build_info": {"annotations": {"val": None, "test": None}}}}})
    assert list(builder(cfg=config.datasets_cfg.coco_caption).build_datasets()) == ["train"]


def test_a_split_without_a_class(cache: Path) -> None:
    cfg = {"data_type": "images", "build_info": {"annotations": {"train": {"storage": "a.json"}}}}
    with pytest.raises(ConfigError, match="NoCapsBuilder has no dataset class for the split 'train'"):
        builder("nocaps", cfg).check()


def test_offline_says_where_to_put_the_files(cache: Path) -> None:
    with pytest.raises(DataError) as told:
        load_dataset("coco_caption")
    assert str(told.value) == (
        f"{cache}/coco/annotations/coco_karpathy_train.json: the annotations 'train' of coco_caption are not here and "
        "LAVISH_OFFLINE is set. Fetch https://storage.googleapis.com/sfr-vision-language-research/datasets/"
        "coco_karpathy_train.json elsewhere and put it there."
    )


def test_files_that_no_url_is_known_for(cache: Path) -> None:
    with pytest.raises(DataError, match=r"ve_train\.json: the annotations 'train' of snli_ve .* no public URL"):
        load_dataset("snli_ve")


def test_storage_that_may_not_be_looked_at(cache: Path) -> None:
    zoo_files.coco_caption(cache)
    made = builder()
    with closed(cache), pytest.raises(DataError, match=r"cannot be looked at \(Permission denied\)"):
        made.check()


def test_a_folder_of_pictures_that_can_be_none(cache: Path) -> None:
    zoo_files.coco_caption(cache)
    with pytest.raises(ConfigError, match="vis_path='~nobodys-folder': no such home folder"):
        load_dataset("coco_caption", vis_path="~nobodys-folder")


def test_storage_that_is_a_folder(cache: Path) -> None:
    (cache / "coco/annotations/coco_karpathy_train.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        load_dataset("coco_caption")


def test_absent_pictures_are_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo_files.coco_caption(cache)
    with caplog.at_level(logging.WARNING):
        coco = load_dataset("coco_caption")
    assert f"{cache}/coco/images: the images of coco_caption are not here" in caplog.text
    assert coco["train"].annotation[0]["caption"] == "A red square.", "annotations can be looked at"
    with pytest.raises(DataError, match=r"train\.json, row 1: .*\. 1 of 3 samples are broken and 1\.0% may"):
        coco["train"][0]


def test_unknown_names(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"No builder is named 'coco_captions'\. Did you mean 'coco_caption'"):
        load_dataset("coco_captions")
    with pytest.raises(ConfigError, match=r"no config of the type 'evl'\. Did you mean 'eval'"):
        registry.get_builder_class("coco_vqa").default_config_path("evl")


def test_a_fault_of_a_builder_shows_itself(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Trap: LAVIS reads every TypeError of a builder as a name that is not found, and exits."""

    class Faulty(BaseDatasetBuilder):
        DATASET_CONFIG_DICT = {"default": "configs/datasets/coco/defaults_cap.yaml"}

        def build_datasets(self) -> dict[str, Any]:
            raise TypeError("a fault in here")

    monkeypatch.setitem(registry._kinds["builder"].entries, "faulty", Faulty)
    with pytest.raises(TypeError, match="a fault in here"):
        load_dataset("faulty")


def test_configs_of_files(tmp_path: Path, cache: Path) -> None:
    zoo_files.write(tmp_path / "mine.json", zoo_files.captions())
    one = {"data_type": "images", "build_info": {"annotations": {"train": {"storage": str(tmp_path / "mine.json")}}}}
    path = tmp_path / "coco.yaml"
    OmegaConf.save({"datasets": {"my_coco": one}}, path)
    assert load_dataset_config(path).data_type == "images"
    assert len(load_dataset("coco_caption", cfg_path=path, vis_path=tmp_path)["train"]) == 3
    OmegaConf.save({"datasets": {"a": one, "coco_caption": one}}, path)
    assert len(load_dataset("coco_caption", cfg_path=path)["train"]) == 3
    with pytest.raises(ConfigError, match="holds several datasets, a, coco_caption; name one"):
        load_dataset_config(path)
    with pytest.raises(ConfigError, match=r"has no dataset 'coco_captio'\. Did you mean 'coco_caption'"):
        load_dataset_config(path, "coco_captio")
    OmegaConf.save({"model": {}}, path)
    with pytest.raises(ConfigError, match="has no section `datasets`"):
        load_dataset_config(path)
    for odd in (3, "~nobodys-folder/coco.yaml"):
        with pytest.raises(ConfigError, match="cfg_path"):
            load_dataset_config(odd)  # type: ignore[arg-type]
    OmegaConf.save({"datasets": {"a": 3}}, path)
    with pytest.raises(ConfigError, match="holds keys and values, found 3"):
        load_dataset_config(path)


def test_a_url_that_is_a_path_is_read_in_its_place(tmp_path: Path, cache: Path) -> None:
    zoo_files.write(tmp_path / "mine.json", zoo_files.captions())
    train = {"url": str(tmp_path / "mine.json"), "storage": "coco/annotations/never.json"}
    for url in (train["url"], (tmp_path / "mine.json").as_uri()):
        annotations = {"train": {**train, "url": url}}
        made = builder(cfg={"data_type": "images", "build_info": {"annotations": annotations}})
        assert len(made.build_datasets()["train"]) == 3
    assert not (cache / "coco/annotations/never.json").exists()


def test_another_data_type(tmp_path: Path, cache: Path) -> None:
    zoo_files.coco_caption(cache)
    coco = load_dataset("coco_caption", vis_path=tmp_path, data_type="features")
    assert coco["train"].vis_root == str(tmp_path)


def test_a_cache_that_a_program_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._paths, "cache_root", str(tmp_path / "lavis"))
    assert BaseDatasetBuilder.storage_path("coco/images") == tmp_path / "lavis" / "coco" / "images"
    assert BaseDatasetBuilder.storage_path("/data/coco") == Path("/data/coco")


def test_a_builder_of_ones_own(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LAVIS's tutorial has it, the YAML beside the user's module; keys of one's own are nobody's business."""
    (tmp_path / "own_data").mkdir()
    (tmp_path / "own_data" / "__init__.py").write_text(
        "from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder\n"
        "from lavish.datasets.datasets.base_dataset import BaseDataset\n"
        "class Words(BaseDataset):\n"
        "    def __getitem__(self, index):\n"
        "        return {'word': self.text_processor(self.annotation[index]['word'])}\n"
        "class WordsBuilder(BaseDatasetBuilder):\n"
        "    train_dataset_cls = eval_dataset_cls = Words\n"
        "    DATASET_CONFIG_DICT = {'default': 'configs/words.yaml'}\n"
    )
    (tmp_path / "own_data/configs").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"word": "Red."}\n{"word": "Blue"}\n')
    info = {"annotations": {"train": {"storage": str(rows)}, "val": {"storage": str(rows)}}, "shuffle_words": True}
    OmegaConf.save(
        {"datasets": {"words": {"data_type": "images", "build_info": info, "colour": "red"}}},
        tmp_path / "own_data/configs/words.yaml",
    )
    monkeypatch.syspath_prepend(tmp_path)
    from own_data import WordsBuilder  # type: ignore[import-not-found]

    monkeypatch.setitem(registry._kinds["builder"].entries, "words", WordsBuilder)
    assert Config({"datasets": {"words": {}}}).datasets_cfg.words.colour == "red", "a recipe finds it too"
    datasets = load_dataset("words")
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 2, "val": 2}
    assert isinstance(datasets["train"], BaseDataset)
    assert datasets["train"][0] == {"word": "Red."}
    text = {"train": {"name": "blip_caption"}, "eval": {"name": "blip_question"}}
    made = WordsBuilder({**load_dataset_config(WordsBuilder.default_config_path()), "text_processor": text})
    assert made.build_datasets()["train"][0] == {"word": "red"}
    with pytest.raises(ConfigError, match=r"datasets\.words\.text_procesor: unknown key. Did you mean"):
        WordsBuilder({"data_type": "images", "text_procesor": {}, "build_info": {}}).check()


def test_processors_beside_pictures_and_texts(cache: Path) -> None:
    zoo_files.coco_caption(cache)
    config = Config({"datasets": {"coco_caption": {"kw_processor": {"title": {"name": "blip_question"}}}}})
    made = builder(cfg=config.datasets_cfg.coco_caption)
    made.build_datasets()
    assert made.kw_processors["title"]("What?!") == "what?"
    assert made._build_proc_from_cfg(None) is None
