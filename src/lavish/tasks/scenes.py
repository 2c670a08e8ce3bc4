"""Train and score the pocket model on drawn scenes.

Training goes in stages, each a run of its own recipe section. `tower`: the vision tower alone, on dense labels of the
drawing. `decoder`: merge, projector and decoder alone, on text, with a code of the true labels in the tower's place.
`text`: the same parts, with the tower's own output. `joint`: everything, on text, with the dense labels kept as an
auxiliary loss. Scoring asks held-out questions through the same `lavish.load` and `vlm.batch` that users call.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import nn

from lavish.common import config as configs
from lavish.common.errors import ConfigError, MissingKeys, ShapeMismatch, UnexpectedKeys, did_you_mean
from lavish.datasets.scenes.dataset import SceneDataset
from lavish.datasets.scenes.questions import TASK_WEIGHTS, Question, ask
from lavish.datasets.scenes.score import score, summarise
from lavish.datasets.scenes.tokenizer import (
    BOS_TOKEN_ID,
    COORDINATE_BASE,
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    build_tokenizer,
    save_tokenizer,
)
from lavish.datasets.scenes.world import GRID, draw, sample_scene
from lavish.inference.load import POCKET
from lavish.inference.vlm import VLM
from lavish.models import family
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.tasks.base_task import BaseTask, TrainingData
from lavish.tasks.scenes_learner import SceneLearner, check_shape, initialise

BUNDLED = "bundled"
"""What stages call the model that comes with lavish, the network alone: dense heads, where a stage has any, are new."""
LEARNER_FILE, MODEL_FOLDER, ANSWERS_FILE = "learner.safetensors", "model", "answers.jsonl"
NETWORK = "network."
TOWER_PARTS = ("heads.", "network.model.vision.patch_embedding.", "network.model.vision.transformer.")
"""What the tower stage trains; the decoder stage trains the rest."""
TOKEN_IDS = {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID}
MAX_PICTURE_SIZE = 4096  # pixels a side; a picture is drawn in memory
MAX_ANSWER_TOKENS = 200  # the longest caption with boxes has about 130


@dataclass
class SceneTaskConfig:
    """The `task:` section of a scenes recipe."""

    stage: Literal["tower", "decoder", "text", "joint"] = "joint"
    """What is trained, and on which losses."""
    dense_weight: float = 0.1
    """Weight of the dense losses in the joint stage."""
    coordinate_spread: float = 0.0
    """Text loss: a coordinate's target is a bell of this standard deviation, in thousandths; 0: the one right token."""
    code_noise: float = 0.3
    """Standard deviation of the noise on the code, decoder stage."""
    attn_implementation: Literal["eager", "sdpa"] = "eager"
    """How training attends; at these sizes eager is the faster one in bfloat16 on CPU."""
    tower_from: str = ""
    """Stage whose tower and dense heads to start from; none: new ones. `bundled`: the tower of the bundled model."""
    decoder_from: str = ""
    """Stage whose merge, projector and decoder to start from, or `bundled`; none: new ones."""


@dataclass
class SceneConfig:
    """The `datasets.scenes.scene:` section: what a drawn scene may hold."""

    max_items: int = 4
    """Most shapes of a scene."""
    number_probability: float = 0.35
    """Share of scenes that also show a number, 0..1."""

    def __post_init__(self) -> None:
        if self.max_items < 1:
            raise ConfigError(f"max_items is {self.max_items}; it must be at least 1.")
        if not 0 <= self.number_probability <= 1:
            raise ConfigError(f"number_probability is {self.number_probability}; it must be from 0 to 1.")


@dataclass
class SceneDataConfig:
    """The `datasets.scenes:` section of a recipe."""

    num_samples: int = 1_000_000
    """Pictures of one training epoch."""
    seed: int = 1
    """Seed of the scenes; an evaluation takes another than training."""
    num_conversations: int = 12
    """Most questions packed behind one picture."""
    max_text_tokens: int = 240
    """Tokens of all questions and answers behind one picture."""
    follow_up_share: float = 0.12
    """Training: share of questions that the next one continues, as a turn of the same conversation."""
    max_turns: int = 3
    """Training: questions of the longest conversation."""
    picture_sizes: list[int] = field(default_factory=list)
    """Sides to draw at before the resize to the network's, in pixels; empty: the network's own (evaluation: 112)."""
    length_penalty: float = 0.0
    """Training: an answer's tokens weigh its length to the power of -length_penalty."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Training: how often each task is asked; empty: as `ask` has it. Evaluations always ask as `ask` has it."""
    num_questions: int = 2000
    """Held-out questions of an evaluation."""
    questions_per_picture: int = 5
    """Questions about one held-out picture."""
    scene: SceneConfig = field(default_factory=SceneConfig)
    """What a scene may hold."""

    def __post_init__(self) -> None:
        counts = ("num_samples", "num_conversations", "max_text_tokens", "max_turns", "num_questions")
        for name in (*counts, "questions_per_picture"):
            if vars(self)[name] < 1:
                raise ConfigError(f"{name} is {vars(self)[name]}; it must be at least 1.")
        if not 0 <= self.follow_up_share < 1:
            raise ConfigError(f"follow_up_share is {self.follow_up_share}; it must be at least 0 and below 1.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0.")
        if wrong := [size for size in self.picture_sizes if not 1 <= size <= MAX_PICTURE_SIZE]:
            raise ConfigError(f"picture_sizes holds {wrong[0]}; sides are from 1 to {MAX_PICTURE_SIZE} pixels.")
        for name, weight in self.task_weights.items():
            if name not in TASK_WEIGHTS:
                tasks = ", ".join(TASK_WEIGHTS)
                raise ConfigError(f"task_weights.{name} is no task.{did_you_mean(name, TASK_WEIGHTS)} Tasks: {tasks}.")
            if not 0 <= weight < math.inf:
                raise ConfigError(f"task_weights.{name} is {weight}; it must be a number, at least 0.")
        if self.task_weights and not any(self.task_weights.values()):
            raise ConfigError("task_weights are all 0; one task at least must be asked.")


@dataclass
class SceneSections:
    """The `datasets:` section of a recipe: one data set."""

    scenes: SceneDataConfig = field(default_factory=SceneDataConfig)
    """The drawn scenes."""


class ScenesTask(BaseTask):
    """The pocket model's task: training in stages, and the score of any model on held-out scenes."""

    scores_loaded_models = True

    def __init__(self, config: DictConfig):
        self.task = configs.check(config.get("task") or {}, SceneTaskConfig, "task")
        self.data = configs.check(config.get("datasets") or {}, SceneSections, "datasets").scenes
        self.seed = int(config.run.seed)
        self.stage_folder = Path(config.run.output_dir)
        self.config = config

    @classmethod
    def setup_task(cls, cfg: DictConfig) -> "ScenesTask":
        """Build the task from a merged recipe.

        Raises:
            ConfigError: unknown keys or wrong values in `task:` or `datasets.scenes:`.
        """
        return cls(cfg)

    # -- training

    def check_training(self) -> None:
        """Check `model:`.

        Raises:
            ConfigError: no network that the stages can train.
        """
        self._network_config()

    def _network_config(self) -> CogVLMConfig:
        model = self.config.get("model") or {}
        if model.get("arch") != "cogvlm" or not model.get("config"):
            raise ConfigError(
                "The scenes task trains a CogVLM from nothing: it needs model.arch 'cogvlm' and the network's fields "
                f"in model.config; found arch {model.get('arch')!r}, keys {', '.join(map(str, model)) or 'none'}."
            )
        for name in model:
            if name not in ("arch", "config"):
                raise ConfigError(
                    f"model.{name} has no meaning where a network is trained from nothing; the scenes task reads arch "
                    f"and config.{did_you_mean(str(name), ('arch', 'config'))}"
                )
        fields = cast(dict[str, Any], OmegaConf.to_container(model["config"], resolve=True))
        fields["vocab_size"] = build_tokenizer().get_vocab_size()
        # Given as overrides too, so that a name that is no field is an error; config.json files of others may have any.
        config = family("cogvlm").read_config(fields, "model.config", **fields)
        for name, token_id in TOKEN_IDS.items():
            if vars(config)[name] != token_id:
                raise ConfigError(f"model.config.{name} is {vars(config)[name]}; the tokenizer's is {token_id}.")
        check_shape(config)
        config._attn_implementation = self.task.attn_implementation
        return config

    def build_model(self, cfg: Any = None) -> SceneLearner:
        """Build the network with its starting weights, and take over the parts that earlier stages trained.

        Raises:
            ConfigError: an earlier stage has not finished.
            CheckpointError: an earlier stage trained another network.
        """
        torch.manual_seed(self.seed)
        network = CogVLMForCausalLM(self._network_config())
        initialise(network, COORDINATE_BASE)
        learner = SceneLearner(
            network, self.task.stage, self.task.dense_weight, self.task.code_noise, self.task.coordinate_spread
        )
        for stage, is_tower in ((self.task.tower_from, True), (self.task.decoder_from, False)):
            if stage:
                self._take_over(learner, stage, is_tower)
        return learner

    def _take_over(self, learner: SceneLearner, stage: str, is_tower: bool) -> None:
        path, stored = self._stored(stage)
        found = {name: tensor for name, tensor in stored.items() if name.startswith(TOWER_PARTS) == is_tower}
        wanted = {name for name in learner.state_dict() if name.startswith(TOWER_PARTS) == is_tower}
        advice = f"Stage {stage!r} trained another network than the recipe describes: delete its folder, run it anew."
        if stage == BUNDLED:
            wanted = {name for name in wanted if name.startswith(NETWORK)}
            advice = "The recipe describes another network than the bundled one; give model.config its sizes."
        if absent := sorted(wanted - set(found)):
            raise MissingKeys(f"{path}: {len(absent)} tensors are absent, first {absent[0]!r}. {advice}")
        if unexpected := sorted(set(found) - wanted):
            raise UnexpectedKeys(f"{path}: {len(unexpected)} tensors have no place, first {unexpected[0]!r}. {advice}")
        try:
            learner.load_state_dict(found, strict=False)
        except RuntimeError as error:
            raise ShapeMismatch(f"{path}: {error}. {advice}") from error

    def _stored(self, stage: str) -> tuple[Path, dict[str, torch.Tensor]]:
        """Read what a stage has learnt: the file, and its tensors by the learner's names."""
        if stage == BUNDLED:
            path = POCKET / "model.safetensors"
            return path, {f"{NETWORK}{name}": tensor.float() for name, tensor in load_file(path).items()}
        path = self.stage_folder.parent / stage / LEARNER_FILE
        if not path.is_file():
            raise ConfigError(
                f"{path}: stage {self.task.stage!r} starts from stage {stage!r}, which has not finished; run it first."
            )
        return path, load_file(path)

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """Compute the losses of one batch, and the share of right tokens, which is logged beside them."""
        return model(samples)

    def build_datasets(self, cfg: Any = None) -> dict[str, TrainingData]:
        """Give the endless training scenes as `train`."""
        config = self._network_config()
        vision = config.tower
        data = SceneDataset(
            num_samples=self.data.num_samples,
            seed=self.data.seed,
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            num_image_tokens=config.num_image_tokens,
            num_conversations=self.data.num_conversations,
            max_text_tokens=self.data.max_text_tokens,
            follow_up_share=self.data.follow_up_share,
            max_turns=self.data.max_turns,
            **TOKEN_IDS,
            scene=vars(self.data.scene),
            picture_sizes=self.data.picture_sizes,
            length_penalty=self.data.length_penalty,
            task_weights=self.data.task_weights,
            with_picture=self.task.stage != "decoder",
            with_text=self.task.stage != "tower",
        )
        return {"train": data}

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Write what a run of the stage trained.

        `learner.safetensors` is all of it, for later stages; `model/` is the network as a folder that `lavish.load`
        opens.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        partial = folder / f"{LEARNER_FILE}.partial"
        save_file(state, partial)
        partial.replace(folder / LEARNER_FILE)
        export(cast(SceneLearner, model).network, folder / MODEL_FOLDER)

    # -- evaluation

    def evaluation(  # pyright: ignore[reportIncompatibleMethodOverride] - scores a model of `lavish.load`
        self, vlm: VLM, folder: Path, batch_size: int, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Ask every held-out question, write each answer to `answers.jsonl` and give the scores (`score.summarise`)."""
        questions = list(self.held_out())
        results: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{ANSWERS_FILE}.partial"
        progress(0, len(questions))
        with partial.open("w", encoding="utf-8") as file:
            for start in range(0, len(questions), batch_size):
                for result in _answer(vlm, questions[start : start + batch_size]):
                    results.append(result)
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                progress(len(results), len(questions))
        partial.replace(folder / ANSWERS_FILE)
        return summarise(results)

    def held_out(self) -> Iterator[tuple[Image, Question]]:
        """Draw the pictures and questions of the evaluation, from a seed that training does not use."""
        data = self.data
        sizes = data.picture_sizes or [GRID]
        for index in range(-(-data.num_questions // data.questions_per_picture)):
            rng = np.random.default_rng([data.seed, index])
            scene = sample_scene(rng, **vars(data.scene))
            picture = draw(scene, sizes[index % len(sizes)])
            left = data.num_questions - index * data.questions_per_picture
            for question in ask(scene, rng, data.questions_per_picture)[:left]:
                yield picture, question


def _answer(vlm: VLM, questions: list[tuple[Image, Question]]) -> Iterator[dict[str, Any]]:
    """Answer questions at once; rows of one template go together, because a batch has one."""
    answers: dict[int, str] = {}
    for template in sorted({question.template for _, question in questions}):
        rows = [row for row, (_, question) in enumerate(questions) if question.template == template]
        conversations = [_conversation(*questions[row]) for row in rows]
        replies = vlm.batch(
            conversations, batch_size=len(rows), chat_template=template, max_new_tokens=MAX_ANSWER_TOKENS
        )
        answers.update(zip(rows, (reply.text for reply in replies), strict=True))
    for row, (_, question) in enumerate(questions):
        yield {
            "task": question.task,
            "language": question.language,
            "template": question.template,
            "question": question.question,
            "answer": question.answer,
            "prediction": answers[row],
            "score": score(question.task, answers[row], question.answer),
        }


def _conversation(picture: Image, question: Question) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.question}]
    return [{"role": "user", "content": content}]


def export(network: CogVLMForCausalLM, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write network and tokenizer as a folder that `lavish.load` opens, whole or not at all.

    Its config asks for the float32 rotary table, which the network was trained with (in bfloat16 neighbouring positions
    become one), and says that answers hold boxes.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    stored: Any = copy.deepcopy(network).to("cpu", dtype)  # pyright: ignore (transformers hides the signature of `to`)
    stored.config.rope = "float32"
    stored.config.grounding = True
    stored.save_pretrained(partial)
    save_tokenizer(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
