"""Image features on disk: the losses of a run without them, bit by bit, and no tower from the second epoch on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chat_learner import TINY, losses, recipe
from tolerance import BIGGER_BATCH

from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.runners.dry_run import plan
from lavish.runners.feature_folder import FeatureFolder, digest
from lavish.runners.recipe import check, train

pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def learner(name: str, folder: Path, **settings: Any) -> Any:
    section = {**TINY[name], "train": ["projector"], **settings}
    return registry.get_model_class("chat").from_config({**section, "feature_cache": str(folder)})


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.features"))


def pixels_of(network: Any, count: int = 3) -> torch.Tensor:
    vision = getattr(network.config, "vision", None) or getattr(network.config, "tower", None)
    size = getattr(network.config, "image_size", None) or vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TINY)
def test_every_family_gives_the_features_of_the_network(tmp_path: Path, name: str) -> None:
    """All steps but the projector are kept; each family's rows equal those of `get_image_features`."""
    model = learner(name, tmp_path).eval()
    network = model.vlm.model.get_base_model() if hasattr(model.vlm.model, "get_base_model") else model.vlm.model
    pixels = pixels_of(network)
    names = [digest(one) for one in pixels]
    with torch.no_grad():
        first, again = (model.features.image_features(pixels, names) for _ in range(2))
        expected = network.get_image_features(pixels)
    assert model.features.steps == {"minigpt4_qwen": ["tower", "qformer"]}.get(name, ["tower"])
    assert model.features.num_computed == len(files(tmp_path)) == 3
    assert torch.equal(first, again)
    assert torch.equal(first, expected), "on the CPU a picture alone gives what it gives in a batch"


def test_a_frozen_projector_is_kept_too(tmp_path: Path) -> None:
    """Its product over one picture may round otherwise than over a batch, so losses are then equal but for that."""
    model = learner("glm4v_9b", tmp_path, train=["lm_head"]).eval()
    pixels = pixels_of(model.vlm.model)
    with torch.no_grad():
        found = model.features.image_features(pixels, [digest(one) for one in pixels])
        torch.testing.assert_close(found, model.vlm.model.get_image_features(pixels), **BIGGER_BATCH)
    assert model.features.steps == ["tower", "merge", "projector"]


def test_a_run_has_the_losses_of_one_without_and_computes_each_picture_once(tmp_path: Path) -> None:
    section, cache = {**TINY["glm4v_9b"], "train": ["projector"]}, tmp_path / "features"
    found = {}
    for name in ("without", "cold", "warm"):
        (tmp_path / name).mkdir()
        kept = files(cache)
        stamps = [path.stat().st_mtime_ns for path in kept]
        if name == "warm":
            kept[0].write_bytes(kept[0].read_bytes()[:-4] + b"spoi")
            kept[1].write_bytes(b"")
        cached = {} if name == "without" else {"feature_cache": str(cache)}
        train(recipe(tmp_path / name, {**section, **cached}, num_workers=int(name == "cold")))
        found[name] = losses(tmp_path / name)
    assert found["cold"] == found["warm"] == found["without"]
    assert len(kept) == 4, "one a picture, of three epochs"
    same = [path.stat().st_mtime_ns == stamp for path, stamp in zip(kept, stamps, strict=True)]
    assert same == [False, False, True, True]


def test_damage_is_told_and_a_half_written_file_is_never_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = learner("glm4v_9b", tmp_path).eval()
    pixels = pixels_of(model.vlm.model, 1)
    names = [digest(pixels[0])]
    with torch.no_grad():
        whole = model.features.image_features(pixels, names)
        (path,) = files(tmp_path)
        for content in (b"", b"{}", path.read_bytes()[:-1], b'{"dtype": "no", "shape": [1], "crc32": 0}\n'):
            caplog.clear()
            path.write_bytes(content)
            assert torch.equal(model.features.image_features(pixels, names), whole)
            assert "is damaged" in caplog.text
    assert not list(tmp_path.rglob("*.partial"))
    assert files(tmp_path) == [path]


def test_other_weights_precision_and_pixels_are_other_files(tmp_path: Path) -> None:
    model = learner("glm4v_9b", tmp_path).eval()
    pixels = pixels_of(model.vlm.model, 1)
    names = [digest(pixels[0])]
    with torch.no_grad():
        model.features.image_features(pixels, names)
        with torch.autocast("cpu", torch.bfloat16):
            model.features.image_features(pixels, names)
        assert len(files(tmp_path)) == 2
        model.vlm.model.transformer.vision.patch_embedding.proj.bias.add_(1)
        FeatureFolder(tmp_path, model.vlm.model).image_features(pixels, names)
    assert len(files(tmp_path)) == 3
    assert digest(pixels[0]) != digest(pixels[0].flip(2)) != digest(pixels[0].half())


def test_a_tower_that_learns_is_refused(tmp_path: Path) -> None:
    for settings in ({"train": ["all"]}, {"train": [], "lora": {"target_modules": ["dense", "query_key_value"]}}):
        with pytest.raises(ConfigError, match=r"the tower learns .*model\.freeze: \[tower\]"):
            learner("cogvlm", tmp_path, **settings)


def test_shared_weights_are_refused(tmp_path: Path) -> None:
    """A process that reads a picture off the disk would not take part where the others gather the tower's weights."""
    model = learner("glm4v_9b", tmp_path)
    weight: Any = next(model.vlm.model.transformer.vision.patch_embedding.parameters())
    weight.ds_id = 0  # of ZeRO-3
    pixels = pixels_of(model.vlm.model, 1)
    with pytest.raises(ConfigError, match=r"share the tower's weights.*run\.engine ddp"):
        model.features.image_features(pixels, [digest(pixels[0])])


def test_the_disk_that_it_takes_is_told_and_not_taken(tmp_path: Path) -> None:
    cache = tmp_path / "features"
    config = recipe(tmp_path, {**TINY["glm4v_9b"], "train": ["projector"], "feature_cache": str(cache)})
    ((name, checked),) = check(config)
    (note,) = plan(checked, name).notes
    assert "for 4 pictures of " in note
    assert not cache.exists()
    train(config)
    took = sum(path.stat().st_size for path in files(cache)) / 2**10
    assert f" {took:.3g} KiB of disk at most" in note
    head = json.loads(files(cache)[0].read_bytes().partition(b"\n")[0])
    assert set(head) == {"dtype", "shape", "crc32"}
