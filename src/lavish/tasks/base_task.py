"""What every task offers: model and data that a recipe names, the steps of training and validation, the score.

Names and signatures are those of LAVIS, so that a task written for it runs here with the import's first word replaced.
Source: salesforce/LAVIS, lavis/tasks/base_task.py. Unlike there, results are merged exactly once at any number of
processes, losses may be lower-is-better, and nothing needs CUDA.

The order in which a runner calls a task:

    task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
    datasets = task.build_datasets(cfg)                     # {dataset name: {split: dataset}}
    model = task.build_model(cfg)
    task.before_training(model=model, dataset=datasets)
    losses = read_losses(task.train_step(model, samples))   # every step
    task.before_evaluation(model=model, dataset=dataset)    # every split; all processes make these three calls
    results = task.evaluation(model, data_loader)           # of this process
    metrics = task.after_evaluation(val_result=results, split_name="val", epoch=3)      # of all, equal in all
    metrics["agg_metrics"]                                  # what the best checkpoint is chosen by
    task.higher_is_better                                   # in which direction
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.tasks.results import save_result

ANSWERS = ("answer", "caption", "prediction", "choice")
"""Keys of a result that hold what the model said."""


class TrainingData(Protocol):
    """What a runner trains on: a map-style dataset that also knows how its samples become a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def collater(self, samples: list[Any], /) -> dict[str, Any]:
        """Stack samples into one batch; the tensors among its values are moved to the device."""
        ...


class BaseTask:
    """Base of the tasks; a subclass overrides what it does differently."""

    higher_is_better: ClassVar[bool] = True
    """Whether more of `agg_metrics` is better; a task that reports a loss says False."""
    run_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the recipe's `run` that this task alone knows."""
    scores_loaded_models: ClassVar[bool] = False
    """True where `evaluation` takes a model of `lavish.load` and not batches, as that of the task `scenes` does."""

    def __init__(self, **kwargs: Any) -> None:
        self.inst_id_key = "instance_id"

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> BaseTask:
        """Build the task from a merged recipe; wrong settings raise here, before anything heavy starts.

        Args:
            cfg: the `lavish.common.config.Config` of a LAVIS recipe; for tasks of recipes with stages the merged
                `DictConfig`.
            kwargs: nothing; a task of one's own may take more.
        """
        return cls()

    def check_training(self) -> None:
        """Check what only training needs of the recipe; nothing, unless a task knows more. Builds nothing heavy."""

    def build_model(self, cfg: Any) -> nn.Module:
        """Build the model that `cfg.model_cfg` names, weights included where it names some."""
        section = cfg.model_cfg
        return registry.get_model_class(section.arch).from_config(section)

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """Build the datasets that `cfg.datasets_cfg` names: {dataset name: {split: dataset}}."""
        return {
            str(name): registry.get_builder_class(str(name))(section).build_datasets()
            for name, section in cfg.datasets_cfg.items()
        }

    # -- steps

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> Any:
        """Compute the losses of one batch: the one that is minimised, and all that are logged, by name.

        What a task of one's own returns may also be the loss alone or a mapping with `loss`; `read_losses` takes all.
        """
        output = model(samples)
        return output["loss"], {name: value for name, value in output.items() if "loss" in name}

    def train_epoch(
        self,
        epoch: int,
        model: nn.Module,
        data_loader: Any,
        optimizer: Any,
        lr_scheduler: Any,
        scaler: Any = None,
        cuda_enabled: bool = False,
        log_freq: int = 50,
        accum_grad_iters: int = 1,
    ) -> dict[str, str]:
        """Train on one epoch of batches; give the means of the rate and of each loss, as LAVIS's texts.

        A runner calls it where a task overrides it; else it makes the steps itself, which can go on at any of them.

        Args:
            data_loader: batches, with a length.
            lr_scheduler: with `step(cur_epoch, cur_step)`.
            scaler: a GradScaler; with one the forward pass runs under autocast, in float16 where it is enabled.
            cuda_enabled: LAVIS's; batches go where the model is.
            log_freq: LAVIS's; a runner has a log of its own.
        """
        return self._train_inner_loop(
            epoch,
            len(data_loader),
            model,
            data_loader,
            optimizer,
            lr_scheduler,
            scaler,
            accum_grad_iters=accum_grad_iters,
        )

    def train_iters(
        self,
        epoch: int,
        start_iters: int,
        iters_per_inner_epoch: int,
        model: nn.Module,
        data_loader: Any,
        optimizer: Any,
        lr_scheduler: Any,
        scaler: Any = None,
        cuda_enabled: bool = False,
        log_freq: int = 50,
        accum_grad_iters: int = 1,
    ) -> dict[str, str]:
        """Train on `iters_per_inner_epoch` batches of a loader that may be endless; the rest as `train_epoch`."""
        return self._train_inner_loop(
            epoch,
            iters_per_inner_epoch,
            model,
            data_loader,
            optimizer,
            lr_scheduler,
            scaler,
            start_iters=start_iters,
            accum_grad_iters=accum_grad_iters,
        )

    def _train_inner_loop(
        self,
        epoch: int,
        iters_per_epoch: int,
        model: nn.Module,
        data_loader: Any,
        optimizer: Any,
        lr_scheduler: Any,
        scaler: Any = None,
        start_iters: int | None = None,
        log_freq: int = 50,
        cuda_enabled: bool = False,
        accum_grad_iters: int = 1,
    ) -> dict[str, str]:
        """Make forward passes and steps. Unlike LAVIS's, the passes left at the end make a step, and what is told is
        the model's own loss."""
        inner_epoch = epoch if start_iters is None else start_iters // iters_per_epoch
        device = next(model.parameters()).device
        dtype = torch.float16 if scaler is not None and scaler.is_enabled() else torch.bfloat16
        batches, sums = iter(data_loader), {"lr": 0.0}
        for at in range(iters_per_epoch):
            samples = to_device(next(batches), device)
            samples |= {"epoch": inner_epoch, "num_iters_per_epoch": iters_per_epoch, "iters": at}
            lr_scheduler.step(cur_epoch=inner_epoch, cur_step=at)
            with torch.autocast(device.type, dtype, enabled=scaler is not None):
                losses = read_losses(self.train_step(model=model, samples=samples))
            first = at - at % accum_grad_iters
            loss = losses["loss"] / min(accum_grad_iters, iters_per_epoch - first)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (at + 1) % accum_grad_iters == 0 or at + 1 == iters_per_epoch:
                _step(optimizer, scaler)
            sums["lr"] += optimizer.param_groups[0]["lr"]
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        return {name: f"{value / iters_per_epoch:.6g}" for name, value in sums.items()}

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Give the results of one batch, one for each sample: dicts that hold the sample's id."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it validates; override valid_step().")

    def answer_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Answer each sample of a batch, for whoever watches a training (`run.sample_generations`).

        Raises:
            ConfigError: what `valid_step` gives holds no answers; override this.
        """
        results = self.valid_step(model=model, samples=samples)
        names = [next((name for name in ANSWERS if name in result), None) for result in map(_mapping, results)]
        if None in names:
            raise ConfigError(
                f"run.sample_generations: {type(self).__name__} gives no answers ({', '.join(ANSWERS)}) to look at; "
                "override answer_step(), or leave the key out."
            )
        return [result[name] for name, result in zip(names, results, strict=True)]

    def inference_step(self) -> Any:
        """Answer without a score; no task of lavish does."""
        raise NotImplementedError(f"{type(self).__name__} has no inference step; override inference_step().")

    def before_training(self, model: nn.Module, dataset: Any, **kwargs: Any) -> None:
        """Tell the model of its training, where it has a method for that."""
        prepare = getattr(model, "before_training", None)  # LAVIS's models may have one; ours need none
        if prepare is not None:
            prepare(dataset=dataset, task_type=type(self))

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: Any) -> None:
        """Tell the model what it is evaluated on, where it has a method for that."""
        prepare = getattr(model, "before_evaluation", None)  # as above
        if prepare is not None:
            prepare(dataset=dataset, task_type=type(self))

    # -- evaluation

    @torch.no_grad()
    def evaluation(self, model: nn.Module, data_loader: Iterable[Any], cuda_enabled: bool | None = None) -> list[Any]:
        """Give the results of this process: `valid_step` of each batch, joined.

        Args:
            model: in eval mode.
            data_loader: the batches of this process; each sample in one process only.
            cuda_enabled: LAVIS's; batches go where the model is, whatever it says.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        results: list[Any] = []
        for samples in data_loader:
            results.extend(self.valid_step(model=model, samples=to_device(samples, device)))
        return results

    def after_evaluation(
        self, val_result: Any = None, split_name: str = "", epoch: Any = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Merge the results of all processes and give the metrics, `agg_metrics` among them; equal in all processes.

        Every process calls it with its own results. None where the task measures nothing.
        """
        return None

    @staticmethod
    def save_result(result: list[Any], result_dir: str | Path, filename: str, remove_duplicate: str = "") -> str:
        """Write the results of all processes into `<result_dir>/<filename>.json`; see `results.save_result`."""
        return save_result(result, result_dir, filename, remove_duplicate)

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Write what a finished run leaves besides its checkpoints; nothing, unless a task has more to give."""


def _step(optimizer: Any, scaler: Any) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def read_losses(output: Any) -> dict[str, torch.Tensor]:
    """Give what a train step returned as losses by name; `loss` is the one to minimise, the others are logged.

    A step returns (loss, losses by name) as LAVIS's do, a mapping with `loss`, or the loss alone.
    """
    if isinstance(output, torch.Tensor):
        return {"loss": output}
    if isinstance(output, Mapping):
        return dict(output)
    loss, parts = output
    return {**parts, "loss": loss}


def _mapping(result: Any) -> Mapping[str, Any]:
    return result if isinstance(result, Mapping) else {}


def to_device(samples: Any, device: torch.device | str) -> Any:
    """Move the tensors of a batch, also those within its lists and mappings."""
    if isinstance(samples, torch.Tensor):
        return samples.to(device, non_blocking=True)
    if isinstance(samples, dict):
        return {name: to_device(value, device) for name, value in samples.items()}
    if isinstance(samples, list):
        return [to_device(value, device) for value in samples]
    return samples
