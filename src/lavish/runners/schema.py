"""The typed `run:` section of a recipe. Key names are those of LAVIS; what a key means stands in its help text."""

from dataclasses import dataclass, field
from typing import Any


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RunConfig:
    """How a run trains. Unknown keys are errors (`lavish.common.config.check`)."""

    task: str = _key("", "Registered task that owns the training step.")
    runner: str = _key("runner_iter", "`runner_iter` counts steps, `runner_base` counts epochs.")
    max_epoch: int = _key(1, "Epochs of a `runner_base` run.")
    max_iters: int = _key(1000, "Optimizer steps of a `runner_iter` run.")
    batch_size_train: int = _key(32, "Samples of one forward pass.")
    batch_size_eval: int = _key(32, "Samples answered at once by an evaluation.")
    accum_grad_iters: int = _key(1, "Forward passes of one optimizer step.")
    optimizer: str = _key("adamw", "`adamw`, or `muon` for matrices with AdamW for all else.")
    init_lr: float = _key(1e-4, "Peak learning rate of AdamW.")
    muon_lr: float = _key(0.02, "Peak learning rate of Muon, when `optimizer: muon`.")
    min_lr: float = _key(0.0, "AdamW's learning rate at the last step; Muon's falls by the same share.")
    warmup_steps: int = _key(0, "Steps of linear warm-up from zero.")
    lr_sched: str = _key(
        "linear_warmup_cosine_lr", "`linear_warmup_cosine_lr`, `linear_warmup_linear_lr`, `constant_lr`."
    )
    weight_decay: float = _key(0.05, "AdamW and Muon weight decay on matrices; none on norms, biases and embeddings.")
    beta2: float = _key(0.999, "Second AdamW moment.")
    max_grad_norm: float = _key(1.0, "Gradients are clipped to this norm; 0 turns clipping off.")
    amp: bool = _key(False, "Run the forward pass under bfloat16 autocast.")
    compile: bool = _key(False, "Compile the training module with torch.compile.")
    num_workers: int = _key(0, "Loader processes; 0 loads in the training process.")
    num_threads: int = _key(0, "CPU threads of torch; 0 leaves torch's own choice.")
    seed: int = _key(42, "Seed of weights, data order and dropout.")
    device: str = _key("auto", "`auto` (cuda, mps, cpu in that order) or a torch device.")
    log_freq: int = _key(50, "Steps between two lines of `log.jsonl`.")
    save_freq: int = _key(500, "Steps (`runner_iter`) or epochs (`runner_base`) between two checkpoints.")
    output_dir: str = _key("output", "Folder of the run.")
