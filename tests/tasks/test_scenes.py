"""The scenes task: what each stage trains, how the stages meet, what a run leaves, and its score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_recipe import recipe
from tolerance import FEATURES_BY_TWO_WAYS, PIXELS, ROUNDING

from lavish.common import config as configs
from lavish.common.errors import ConfigError, MissingKeys, ShapeMismatch, UnexpectedKeys
from lavish.datasets.scenes.tokenizer import COORDINATE_BASE
from lavish.datasets.scenes.world import dense_labels, sample_scene
from lavish.inference.load import POCKET, load
from lavish.runners.recipe import load_recipe, setup_task, stage_configs
from lavish.tasks.scenes import LEARNER_FILE, ScenesTask, export
from lavish.tasks.scenes_learner import (
    CODE_SIZE,
    DenseHeads,
    SceneLearner,
    label_code,
    normalise,
    spread_cross_entropy,
)

GO_ON = Path(__file__).resolve().parents[2] / "projects/pocket/go_on.yaml"
TOWER = ("heads.", "network.model.vision.patch_embedding.", "network.model.vision.transformer.")


def stage(folder: Path, name: str, *overrides: str) -> DictConfig:
    return dict(stage_configs(recipe(folder, *overrides)))[name]


def task(folder: Path, name: str, *overrides: str) -> ScenesTask:
    found = setup_task(stage(folder, name, *overrides))
    assert isinstance(found, ScenesTask)
    return found


def alone(folder: Path, name: str, *overrides: str) -> ScenesTask:
    """The task of a stage that starts from nothing."""
    return task(folder, name, *overrides, "stages.2.task.tower_from=''", "stages.2.task.decoder_from=''")


def batch(scenes: ScenesTask, size: int = 2) -> dict:
    data = scenes.build_datasets()["train"]
    return data.collater([data[index] for index in range(size)])


@pytest.mark.parametrize("name", ["tower", "decoder", "text", "joint"])
def test_each_stage_trains_its_part(tmp_path: Path, name: str) -> None:
    scenes = alone(tmp_path, "joint", "stages.2.task.stage=text") if name == "text" else alone(tmp_path, name)
    learner = scenes.build_model()
    before = {key: value.clone() for key, value in learner.named_parameters()}
    optimizer = torch.optim.SGD([value for value in learner.parameters() if value.requires_grad], lr=0.1)
    learner(batch(scenes))["loss"].backward()
    optimizer.step()
    wanted = {key for key in before if name == "joint" or key.startswith(TOWER) == (name == "tower")}
    assert {key for key, value in learner.named_parameters() if value.requires_grad} == wanted
    changed = {key for key, value in learner.named_parameters() if not torch.equal(value, before[key])}
    assert changed <= wanted
    assert len(changed) > 0.8 * len(wanted)  # no answer reads the last layer's image expert


def test_losses_of_the_stages(tmp_path: Path) -> None:
    losses = {name: alone(tmp_path, name).build_model()(batch(alone(tmp_path, name))) for name in ("tower", "decoder")}
    assert "loss_text" not in losses["tower"]
    assert set(losses["decoder"]) == {"loss", "loss_text", "right_text"}
    scenes = alone(tmp_path, "joint", "task.dense_weight=0.25")
    joint = scenes.build_model()(batch(scenes))
    dense = sum(value for key, value in joint.items() if key.startswith("loss_") and key != "loss_text")
    torch.testing.assert_close(joint["loss"], joint["loss_text"] + 0.25 * dense)
    tower = sum(value for key, value in losses["tower"].items() if key.startswith("loss_"))
    torch.testing.assert_close(losses["tower"]["loss"], tower)


def test_the_text_stage_reads_the_tower_and_leaves_it_alone(tmp_path: Path) -> None:
    joint, text = alone(tmp_path, "joint"), alone(tmp_path, "joint", "stages.2.task.stage=text")
    losses = [scenes.build_model()(batch(scenes)) for scenes in (joint, text)]
    torch.testing.assert_close(losses[0]["loss_text"], losses[1]["loss_text"])
    assert set(losses[1]) == {"loss", "loss_text", "right_text"}
    assert losses[1]["loss"] == losses[1]["loss_text"]


def test_near_coordinates_cost_less() -> None:
    vocab = COORDINATE_BASE + 1000
    logits = torch.full((4, vocab), -20.0)
    values = [500, 518, 893, 7 - COORDINATE_BASE]  # three answers to 500, and a word
    for row, value in enumerate(values):
        logits[row, COORDINATE_BASE + value] = 20.0
    targets = torch.tensor([COORDINATE_BASE + 500] * 3 + [7])
    exact = spread_cross_entropy(logits, targets, 0.0)
    spread = spread_cross_entropy(logits * 0.1, targets, 9.0)
    torch.testing.assert_close(exact, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert exact[1] == exact[2]
    assert spread[0] < spread[1] < spread[2]
    plain = torch.nn.functional.cross_entropy(logits * 0.1, targets, reduction="none")
    torch.testing.assert_close(spread[3], plain[3])


def test_the_learner_encodes_pictures_as_the_network_does(tmp_path: Path) -> None:
    scenes = alone(tmp_path, "joint")
    learner = scenes.build_model().eval()
    pictures = batch(scenes)["pictures"]
    with torch.no_grad():
        ours = learner._project(learner._tower(normalise(pictures)))
        export(learner.network, tmp_path / "model", torch.float32)
        vlm = load(tmp_path / "model", device="cpu")
        pixels = [vlm.processor.pixel_values(Image.fromarray(np.asarray(picture))) for picture in pictures]
        torch.testing.assert_close(normalise(pictures), torch.stack(pixels), **PIXELS)
        torch.testing.assert_close(ours, vlm.model.get_image_features(torch.stack(pixels)), **FEATURES_BY_TWO_WAYS)


def test_the_recipe_says_how_long_conversations_are(tmp_path: Path) -> None:
    settings = ("datasets.scenes.max_turns=5", "datasets.scenes.follow_up_share=0.25")
    data = alone(tmp_path, "joint", *settings).build_datasets()["train"]
    assert (data.max_turns, data.follow_up_share) == (5, 0.25)


def test_the_text_loss_is_that_of_the_network_on_one_conversation(tmp_path: Path) -> None:
    scenes = alone(tmp_path, "joint", "datasets.scenes.num_conversations=1")
    learner, samples = scenes.build_model(), batch(scenes, 1)
    prefix = 1 + learner.network.config.num_image_tokens
    labels = torch.full((1, samples["targets"].shape[1] + 1), -100)
    labels[:, 1:] = samples["targets"]  # the network shifts by itself
    ids = torch.cat((samples["input_ids"], torch.tensor([[1]])), dim=1)
    types = torch.cat((samples["token_type_ids"], torch.zeros(1, 1, dtype=torch.long)), dim=1)
    assert (samples["segment_ids"][0, prefix:] == 1).all()
    expected = learner.network(
        input_ids=ids, token_type_ids=types, pixel_values=normalise(samples["pictures"]), labels=labels
    ).loss
    torch.testing.assert_close(learner(samples)["loss_text"], expected, **ROUNDING)


def test_longer_answers_weigh_less_if_asked(tmp_path: Path) -> None:
    scenes = alone(tmp_path, "decoder", "stages.1.datasets.scenes.length_penalty=1.0")
    samples = batch(scenes)
    for row in range(2):
        learnt = samples["targets"][row] != -100
        for number in samples["segment_ids"][row].unique().tolist():
            chosen = learnt & (samples["segment_ids"][row] == number)
            if number > 0:
                assert samples["target_weights"][row][chosen].sum() == pytest.approx(1.0)


def test_the_code_tells_all_labels_apart() -> None:
    rng = np.random.default_rng(2)
    labels = {}
    for _ in range(20):
        scene = sample_scene(rng, number_probability=1.0)
        if len(scene.items) > 1:
            found = dense_labels(scene, 14)
            for name, value in found.items():
                labels[name] = torch.from_numpy(value).flatten(0, 1)[None]
            break
    labels = {name: value.float() if "box" in name else value for name, value in labels.items()}
    code = label_code(labels)
    assert code.shape == (1, 196, CODE_SIZE)
    empty = labels["box"].abs().sum(-1) == 0
    box_part = code[..., 44 : 44 + 32]
    assert (box_part[empty] == 0).all()
    assert (box_part[~empty].abs().sum(-1) > 0).all()
    assert torch.equal(code[..., :7].argmax(-1), labels["shape"])


def test_the_noisy_code_drops_patches_and_blurs_the_rest(tmp_path: Path) -> None:
    learner = alone(tmp_path, "decoder", "task.code_noise=0.01").build_model()
    code = torch.ones(8, 500, CODE_SIZE)
    noisy = learner._noisy_code(code)
    clean = code @ learner.code_basis
    is_dropped = noisy.abs().amax(-1) < 0.1
    assert 0.03 < is_dropped.float().mean() < 0.07
    assert (noisy - clean)[~is_dropped].std() == pytest.approx(0.01, rel=0.05)


def test_shares_of_right_classes_count_labelled_patches_only() -> None:
    heads = DenseHeads(CODE_SIZE)
    labels = {name: torch.zeros(1, 4, dtype=torch.long) for name in heads.classes}
    labels |= {name: torch.zeros(1, 4, 4) for name in heads.boxes}
    labels["shape"] = torch.tensor([[0, 0, 2, 3]])
    with torch.no_grad():
        for head in heads.classes.values():
            head.weight.zero_()  # type: ignore[union-attr]
            head.bias.zero_()  # type: ignore[union-attr]
        heads.classes["shape"].bias[2] = 1.0  # type: ignore[index, union-attr]
    losses = heads(torch.randn(1, 4, CODE_SIZE), labels)
    assert losses["right_shape"] == 0.5
    assert losses["right_colour"] == 0.0
    assert losses["loss_box"] == 0.0


def finish(folder: Path, name: str, *overrides: str) -> SceneLearner:
    scenes = task(folder, name, *overrides)
    learner = scenes.build_model()
    scenes.stage_folder.mkdir(parents=True, exist_ok=True)
    scenes.finish(learner, scenes.stage_folder)
    return learner


def test_the_joint_stage_starts_from_both_others(tmp_path: Path) -> None:
    states = {
        name: finish(tmp_path, name, f"run.seed={seed}").state_dict() for seed, name in ((5, "tower"), (6, "decoder"))
    }
    joint = task(tmp_path, "joint", "run.seed=7").build_model().state_dict()
    for name, tensor in joint.items():
        origin = "tower" if name.startswith(TOWER) else "decoder"
        assert torch.equal(tensor, states[origin][name]), name


def test_a_stage_that_has_not_finished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 'joint' starts from stage 'tower', which has not finished; run it"):
        task(tmp_path, "joint").build_model()


def test_a_stage_starts_from_the_bundled_model(tmp_path: Path) -> None:
    options = [f"run.output_dir={tmp_path}", "model.config.vision_config.num_hidden_layers=5"]
    ((_, merged),) = stage_configs(load_recipe(GO_ON, options[:1]))
    learner = setup_task(merged).build_model(None)
    stored = load_file(POCKET / "model.safetensors")
    state = learner.state_dict()
    assert {name.removeprefix("network.") for name in state if name.startswith("network.")} == set(stored)
    assert all(torch.equal(state[f"network.{name}"], tensor.float()) for name, tensor in stored.items())
    ((_, other),) = stage_configs(load_recipe(GO_ON, options))
    with pytest.raises(UnexpectedKeys, match="another network than the bundled one"):
        setup_task(other).build_model(None)


def test_a_stage_of_another_network_is_refused(tmp_path: Path) -> None:
    finish(tmp_path, "tower")
    finish(tmp_path, "decoder")
    path = tmp_path / "out" / "tower" / LEARNER_FILE
    good = load_file(path)
    with pytest.raises(ShapeMismatch, match="delete its folder"):
        task(tmp_path, "joint", "model.config.vision_config.intermediate_size=40").build_model()
    with pytest.raises(MissingKeys, match=r"transformer\.layers\.1"):
        task(tmp_path, "joint", "model.config.vision_config.num_hidden_layers=2").build_model()
    save_file({**good, "heads.more": torch.zeros(1)}, path)
    with pytest.raises(UnexpectedKeys, match=r"'heads\.more'"):
        task(tmp_path, "joint").build_model()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.stage=towr", "Did you mean 'tower'"),
        ("task.dense_wieght=1", "Did you mean 'dense_weight'"),
        ("datasets.scenes.num_sample=1", "datasets.scenes.num_sample.*Did you mean 'num_samples'"),
        ("datasets.scenes.num_samples=many", "datasets.scenes.num_samples.*many"),
        ("datasets.scenes.num_conversations=0", "at least 1"),
        ("datasets.scene.num_samples=3", r"datasets.scene: .*Did you mean 'scenes'"),
        ("datasets.scenes.scene.max_item=3", r"scene.max_item: .*Did you mean 'max_items'"),
        ("datasets.scenes.scene.max_items=0", "max_items is 0"),
        ("datasets.scenes.scene.number_probability=7", "number_probability is 7"),
        ("datasets.scenes.seed=-1", "seed is -1"),
        ("datasets.scenes.picture_sizes=[112,0]", "picture_sizes holds 0"),
        ("datasets.scenes.task_weights.colr=3", "task_weights.colr is no task.*Did you mean 'colour'"),
        ("datasets.scenes.task_weights.colour=-3", "task_weights.colour is -3"),
        ("datasets.scenes.task_weights.colour=0", "task_weights are all 0"),
        ("datasets.scenes.max_turns=0", "max_turns is 0.*at least 1"),
        ("datasets.scenes.follow_up_share=1", "follow_up_share is 1.*below 1"),
    ],
)
def test_wrong_settings_are_found_in_setup(tmp_path: Path, override: str, message: str) -> None:
    config = configs.merge(stage(tmp_path, "joint"), configs.parse_overrides([override]))
    with pytest.raises(ConfigError, match=message):
        setup_task(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.arch=blip", "found arch 'blip'"),
        ("model.pth=x", "model.pth has no meaning"),
        ("model.config.hidden_size=33", "hidden_size % num_attention_heads"),
        ("model.config.hidden_siz=64", r"'hidden_siz' is no field .*Did you mean 'hidden_size'"),
        ("model.config.vision_config.num_head=4", r"'vision_config.num_head' is no field.*Did you mean 'num_heads'"),
        ("model.config.num_multi_query_heads=null", "no num_multi_query_heads"),
        ("model.config.vision_config.hidden_size=64", f"is 64; the code .* at least {CODE_SIZE}"),
        ("model.config.eos_token_id=5", "eos_token_id is 5; the tokenizer's is 1"),
    ],
)
def test_networks_that_cannot_be_trained(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(tmp_path, "tower", override).check_training()


def test_what_a_run_leaves_is_a_model_that_talks(tmp_path: Path) -> None:
    learner = finish(tmp_path, "tower")
    folder = tmp_path / "out" / "tower"
    assert set(load_file(folder / LEARNER_FILE)) == set(learner.state_dict())
    vlm = load(folder / "model", device="cpu")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["rope"], config["grounding"], config["dtype"]) == ("float32", True, "bfloat16")
    assert vlm.model.config.rope == "float32"
    assert vlm.grounding
    assert next(vlm.model.parameters()).dtype == torch.bfloat16
    picture = {"type": "image", "image": Image.new("RGB", (30, 20))}
    message = {"role": "user", "content": [picture, {"type": "text", "text": "What do you see?"}]}
    assert len(vlm.chat([message], max_new_tokens=3).token_ids) <= 3


def test_held_out_questions(tmp_path: Path) -> None:
    settings = ("datasets.scenes.num_questions=8", "datasets.scenes.questions_per_picture=3")
    scenes = alone(tmp_path, "joint", *settings, "datasets.scenes.picture_sizes=[112,56]")
    found = list(scenes.held_out())
    assert len(found) == 8
    assert [picture.size for picture, _ in found] == [(112, 112)] * 3 + [(56, 56)] * 3 + [(112, 112)] * 2
    assert [question for _, question in found] == [question for _, question in scenes.held_out()]
    other = alone(tmp_path, "joint", *settings, "datasets.scenes.seed=2").held_out()
    assert [question for _, question in found] != [question for _, question in other]


def test_an_evaluation_asks_everything_once_whatever_the_batch(tmp_path: Path) -> None:
    finish(tmp_path, "tower")
    vlm = load(tmp_path / "out" / "tower" / "model", device="cpu", dtype="float32")
    scenes, told = task(tmp_path, "tower"), []
    summaries = [
        scenes.evaluation(vlm, tmp_path / str(size), size, lambda done, total: told.append((done, total)))
        for size in (3, 7)
    ]
    assert summaries[0] == summaries[1]
    assert sum(summaries[0]["counts"].values()) == 7
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7), (0, 7), (7, 7)]
    lines = [(tmp_path / size / "answers.jsonl").read_text() for size in ("3", "7")]
    assert lines[0] == lines[1]
    records = [json.loads(line) for line in lines[0].splitlines()]
    assert [record["question"] for record in records] == [question.question for _, question in scenes.held_out()]
    assert all(0 <= record["score"] <= 1 for record in records)
