"""The typed `run:` section of a recipe. Key names are those of LAVIS; what a key means stands under it."""

from dataclasses import dataclass
from typing import Literal

from lavish.common.errors import ConfigError

_AT_LEAST_ONE = (
    "max_epoch",
    "max_iters",
    "batch_size_train",
    "batch_size_eval",
    "accum_grad_iters",
    "log_freq",
    "save_freq",
)
_NOT_NEGATIVE = ("min_lr", "warmup_steps", "weight_decay", "max_grad_norm", "num_workers", "num_threads", "seed")
_POSITIVE = ("init_lr", "muon_lr")


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
    batch_size_train: int = 32
    """Samples of one forward pass."""
    batch_size_eval: int = 32
    """Samples answered at once by an evaluation."""
    accum_grad_iters: int = 1
    """Forward passes of one optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices and AdamW for the rest."""
    init_lr: float = 1e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, when `optimizer: muon`."""
    min_lr: float = 0.0
    """AdamW's learning rate at the last step; Muon's falls by the same share."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from zero."""
    lr_sched: Literal["linear_warmup_cosine_lr", "linear_warmup_linear_lr", "constant_lr"] = "linear_warmup_cosine_lr"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = 0.05
    """Weight decay of matrices, under either optimizer; norms, biases and embeddings have none."""
    beta2: float = 0.999
    """Second moment of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    amp: bool = False
    """Run the forward pass under bfloat16 autocast."""
    compile: bool = False
    """Compile the training module with torch.compile."""
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
    output_dir: str = "output"
    """Folder of the run; each stage of a recipe has one below it."""

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
                raise ConfigError(f"{name} is {values[name]}; a learning rate is above 0.")
        if self.min_lr > self.init_lr:
            raise ConfigError(f"min_lr is {self.min_lr}, above init_lr {self.init_lr}; the learning rate only falls.")
        if not 0 <= self.beta2 < 1:
            raise ConfigError(f"beta2 is {self.beta2}; it lies in 0 <= beta2 < 1.")
