"""The typed `run:` section of a recipe. Key names are those of LAVIS; what a key means stands under it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lavish.common import config as configs
from lavish.common.errors import ConfigError

LAVIS_DEFAULTS: dict[str, Any] = {
    "runner": "runner_base",
    "batch_per_process": True,
    "max_grad_norm": 0.0,
    "save_freq": 5,
}
"""Where a recipe of LAVIS means something else than a recipe with stages by a key that it leaves out."""

_AT_LEAST_ONE = (
    "max_epoch",
    "max_iters",
    "batch_size_train",
    "batch_size_eval",
    "accum_grad_iters",
    "log_freq",
    "save_freq",
    "val_freq",
)
_NOT_NEGATIVE = (
    *("min_lr", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "num_workers", "num_threads", "seed"),
    *("iters_per_inner_epoch", "ema_decay", "save_steps", "sample_generations", "shuffle_buffer"),
)
_POSITIVE = ("init_lr", "muon_lr", "lr_decay_rate", "lr_layer_decay")


@dataclass
class RunConfig:
    """How a run trains. Unknown keys are errors (`lavish.common.config.check`).

    Raises: ConfigError for a number that no run can have.
    """

    task: str = ""
    """Registered task that owns the training step."""
    runner: str = "runner_iter"
    """`runner_iter` counts steps, `runner_base` counts epochs."""
    max_epoch: int = 1
    """Epochs of a `runner_base` run."""
    max_iters: int = 1000
    """Optimizer steps of a `runner_iter` run."""
    iters_per_inner_epoch: int = 0
    """Optimizer steps between two validations of a `runner_iter` run; 0: as many as the training data fills, and with a
    stream all."""
    batch_size_train: int = 32
    """Samples of one forward pass."""
    batch_size_eval: int = 32
    """Samples answered at once by an evaluation."""
    accum_grad_iters: int = 1
    """Forward passes of one optimizer step."""
    batch_per_process: bool = False
    """Several processes: true, each makes all `accum_grad_iters` passes, so a step has more samples (as in LAVIS);
    false, they share the passes, and the result is that of one process."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices and AdamW for the rest."""
    init_lr: float = 1e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, when `optimizer: muon`."""
    min_lr: float = 0.0
    """AdamW's learning rate at the last step; Muon's falls by the same share."""
    warmup_lr: float | None = None
    """Learning rate at the first step of the warm-up; below 0: init_lr; null: the first of `warmup_steps` equal rises
    from 0."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of one epoch's steps, in place of `warmup_steps`."""
    lr_sched: str = "linear_warmup_cosine_lr"
    """How the learning rate falls after the warm-up: a registered schedule."""
    lr_decay_rate: float = 1.0
    """What `linear_warmup_step_lr` multiplies the learning rate with at each epoch."""
    lr_layer_decay: float = 1.0
    """The learning rate of a vision layer is this times that of the layer above it."""
    compat: Literal["", "lavis", "mpp"] = ""
    """Give the numbers of a release, LAVIS (schedules by epochs, `lr_scale` ignored, decay by names) or MPP-LLaVA."""
    weight_decay: float = 0.05
    """Weight decay of matrices, under either optimizer; norms, biases and embeddings have none."""
    beta2: float = 0.999
    """Second moment of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    grad_norm_clip: float | None = None
    """MPP-LLaVA's name of `max_grad_norm`, and before it."""
    amp: bool = False
    """Run the forward pass under autocast, in `amp_dtype`."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of `amp`; float16 is for GPUs without bfloat16 (T4, V100), and scales the loss so that small gradients stay."""
    ema_decay: float = 0.0
    """Keep a running mean of the trained weights with this decay, for validation and the last weights; 0: none."""
    compile: bool = False
    """Compile the training module with torch.compile."""
    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """How several processes train: each a copy of the model (ddp, also auto), or shares of it."""
    deepspeed_config: str | dict[str, Any] | None = None
    """DeepSpeed's settings, or a JSON file of them, when `engine: deepspeed`."""
    fsdp: bool | None = None
    """MPP-LLaVA's way to ask for `engine: fsdp2`."""
    activation_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass, which takes less memory and more time."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    seed: int = 42
    """Seed of weights, data order and noise."""
    device: str = "auto"
    """`auto` (cuda, mps, cpu in that order) or a torch device."""
    log_freq: int = 50
    """Optimizer steps between two lines of `log.jsonl`."""
    save_freq: int = 500
    """Steps (`runner_iter`) or epochs (`runner_base`) between two checkpoints."""
    save_steps: int = 500
    """Optimizer steps between two checkpoints to go on from, besides those of `save_freq`; 0: none."""
    save_last: bool = True
    """Write `checkpoint_last.pth` at the end."""
    val_freq: int = 1
    """Epochs between two validations."""
    output_dir: str = "output"
    """Folder of the run; each stage of a recipe has one below it."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to train on."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to score during training; `val` among them picks the best checkpoint."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to score at the end, with the best weights if there is validation."""
    sample_generations: int = 0
    """How many samples of the validation split are answered before training and at every validation, for you to look
    at: in `samples.jsonl`, `report.html` and tensorboard."""
    train_dataset_ratios: dict[str, float] | None = None
    """`runner_iter` with several data sets: how often each is drawn; every set is named."""
    shuffle_buffer: int = 1000
    """Of a stream: rows of each reader that one is drawn from; 0 keeps their order."""
    group_by_length: bool = False
    """Put samples of like length into one batch, where the data set tells lengths."""
    evaluate: bool = False
    """Score the splits, and train nothing."""
    resume_ckpt_path: str | None = None
    """A checkpoint to go on from: a `checkpoint_*.pth` or a checkpoint folder of lavish. The newest of the run's own
    folder comes first."""
    resume_ckpt_load_dir: str | None = None
    """MPP-LLaVA's folder of DeepSpeed's own checkpoints, which are not read; see `resume_ckpt_path`."""
    resume_ckpt_tag: str | None = None
    """As `resume_ckpt_load_dir`."""
    use_dist_eval_sampler: bool = True
    """Several processes share the samples of an evaluation; false: each scores all."""
    world_size: int | None = None
    """Number of processes; torchrun decides it, so another number than that is refused where `distributed` is true."""
    dist_url: str = "env://"
    """How processes meet: as torchrun says, nothing else."""
    distributed: bool | None = None
    """False: refuse to run in several processes. torchrun decides otherwise."""
    max_len: int | None = None
    """Most tokens of an answer."""
    min_len: int | None = None
    """Fewest tokens of an answer."""
    max_new_tokens: int | None = None
    """MPP-LLaVA's name of `max_len`."""
    min_new_tokens: int | None = None
    """MPP-LLaVA's name of `min_len`."""
    num_beams: int | None = None
    """Beams of an answer."""
    use_nucleus_sampling: bool | None = None
    """Draw answers."""
    top_p: float | None = None
    """Share of the nucleus, when answers are drawn."""
    temperature: float | None = None
    """Below 1 likelier, above 1 more varied answers, when they are drawn."""
    repetition_penalty: float | None = None
    """Above 1: fewer repetitions in answers."""
    length_penalty: float | None = None
    """Exponent of a beam's length."""
    num_ans_candidates: int | None = None
    """Answers that are ranked at once, when `inference_method: rank`."""
    inference_method: Literal["", "generate", "rank"] = ""
    """VQA: write the answer, or rank a list of answers."""
    prompt: str | None = None
    """Text around a question, or before a caption."""
    report_metric: bool | None = None
    """Captioning: compute the metrics, not only the captions."""
    annotation_file: str | dict[str, str] | None = None
    """Ground truth of an evaluation, where it is not that of the data set; one file, or one a split."""
    k_test: int | None = None
    """Retrieval: how many candidates are ranked with the full network."""

    def __post_init__(self) -> None:
        values = vars(self)
        for name in _AT_LEAST_ONE:
            if values[name] < 1:
                raise ConfigError(f"{name} is {values[name]}; it must be at least 1.")
        for name in _NOT_NEGATIVE:
            if values[name] < 0:
                raise ConfigError(f"{name} is {values[name]}; it must not be negative.")
        for name in _POSITIVE:
            if not values[name] > 0:
                raise ConfigError(f"{name} is {values[name]}; it must be above 0.")
        if self.min_lr > self.init_lr:
            raise ConfigError(f"min_lr is {self.min_lr}, above init_lr {self.init_lr}; the learning rate only falls.")
        if not 0 <= self.beta2 < 1:
            raise ConfigError(f"beta2 is {self.beta2}; it lies in 0 <= beta2 < 1.")
        if self.ema_decay >= 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it lies in 0 <= ema_decay < 1.")
        if self.dist_url != "env://":
            raise ConfigError(f"dist_url is {self.dist_url!r}; torchrun tells processes how they meet: env://.")
        if self.resume_ckpt_load_dir or self.resume_ckpt_tag:
            raise ConfigError(
                "resume_ckpt_load_dir and resume_ckpt_tag name DeepSpeed's own checkpoints, which a run does not go on "
                "from; load their weights as model.finetuned, or give a checkpoint of lavish as resume_ckpt_path."
            )
        if self.grad_norm_clip is not None:
            self.max_grad_norm = self.grad_norm_clip
        if self.fsdp:
            self.engine = "fsdp2"


def lavis_run_config(cfg: Any, task_class: type) -> RunConfig:
    """Give the typed `run:` section of a LAVIS recipe, all of whose keys are known here or to the task.

    Args:
        cfg: the merged `lavish.common.config.Config`.
        task_class: a task of one's own may name more keys in `run_keys`.

    Raises:
        ConfigError: an unknown key or a wrong value; says which layer it is from.
    """
    section = cfg.run_cfg
    own = getattr(task_class, "run_keys", ())  # a task written for LAVIS has none
    known = {key: _whole(key, value) for key, value in section.items() if key not in own}
    layers = [configs.label(LAVIS_DEFAULTS, "LAVIS's defaults"), configs.label(known, "the recipe")]
    merged = configs.merge(*layers)
    if isinstance(known.get("deepspeed_config"), Mapping):
        merged = configs.merge(_from_deepspeed(merged), merged)
    return configs.check(merged, RunConfig, "run")


def _whole(key: str, value: Any) -> Any:
    """Give a whole number for `2e4`, which recipes of LAVIS write and YAML reads as a fraction."""
    is_count = RunConfig.__annotations__.get(key) is int
    return int(value) if is_count and isinstance(value, float) and value.is_integer() else value


def _from_deepspeed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Give the keys of `run:` that DeepSpeed's settings inside a recipe of MPP-LLaVA say; its own keys count more."""
    settings = run["deepspeed_config"]
    params = (settings.get("optimizer") or {}).get("params") or {}
    said = {
        "accum_grad_iters": settings.get("gradient_accumulation_steps"),
        "batch_size_train": settings.get("train_micro_batch_size_per_gpu"),
        "grad_norm_clip": settings.get("gradient_clipping"),
        "amp": (settings.get("bf16") or {}).get("enabled"),
        "weight_decay": params.get("weight_decay"),
        "beta2": (params.get("betas") or (None, None))[1],
    }
    return {key: value for key, value in said.items() if value is not None}
