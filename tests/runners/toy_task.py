"""A task of a few numbers for the runners' tests: a regression with a mean loss, and noise from torch's generator.

Run as a program it trains in a folder, so that a test can kill it:
`python toy_task.py FOLDER NUM_STEPS [KILL_AT_STEP]`.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavish.common import dist
from lavish.runners.runner_base import RunnerBase
from lavish.runners.runner_iter import RunnerIter
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask


class Numbers:
    """`num_samples` points of a plane with their targets; remembers which were asked for."""

    def __init__(self, num_samples: int = 10):
        generator = torch.Generator().manual_seed(3)
        self.points = torch.randn(num_samples, 2, generator=generator)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.seen.append(index)
        return self.points[index]

    def collater(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        return {"points": torch.stack(samples), "num": len(samples)}


class Net(nn.Module):
    """Has one parameter of each kind: matrix, bias, norm, embedding, head; and with `depth` a list of layers."""

    def __init__(self, depth: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.inner = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(4)
        self.rows = nn.Embedding(3, 4)
        self.lm_head = nn.Linear(4, 2, bias=False)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            points = points + layer(points).tanh()
        return self.lm_head(self.norm(self.inner(points).tanh() + self.rows.weight.sum(0)))


class ToyTask(BaseTask):
    """Points to their swapped coordinates; with `noise` the input is blurred by torch's generator."""

    def __init__(self, noise: float = 0.0, depth: int = 0):
        super().__init__()
        self.noise, self.depth = noise, depth
        self.batch_sizes: list[int] = []

    def build_model(self, cfg: Any = None) -> nn.Module:
        torch.manual_seed(5)
        return Net(self.depth)

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        points = samples["points"]
        self.batch_sizes.append(samples["num"])
        noisy = points + self.noise * torch.randn_like(points)
        error = (model(noisy) - points.flip(1)).square().mean(dim=1)
        return {"loss": error.mean(), "loss_first": error.detach().mean(), "right_sign": (points > 0).float().mean()}


def config(folder: Path, **changes: Any) -> RunConfig:
    run = RunConfig(
        max_iters=7,
        batch_size_train=4,
        init_lr=0.05,
        muon_lr=0.05,
        warmup_steps=2,
        optimizer="muon",
        log_freq=3,
        save_freq=2,
        seed=11,
        device="cpu",
        output_dir=str(folder),
    )
    return replace(run, **changes)


def runner(
    run: RunConfig, *, noise: float = 0.0, num_samples: int = 10, epochs: bool = False, depth: int = 0
) -> RunnerBase:
    task = ToyTask(noise, depth)
    kind = RunnerBase if epochs else RunnerIter
    return kind(run, task, task.build_model(), {"train": Numbers(num_samples)})


def weights(folder: Path) -> dict[str, list]:
    """The newest checkpoint's weights as exact text."""
    from safetensors.torch import load_file

    newest = max(folder.glob("checkpoint_*"), key=lambda path: int(path.name.split("_")[1]))
    return {name: tensor.view(torch.uint8).tolist() for name, tensor in load_file(newest / "model.safetensors").items()}


def own_bytes(toy: RunnerBase) -> dict[str, int]:
    """What this process itself holds of weights and of the optimizer's state."""

    def local(tensor: Any) -> Any:
        if hasattr(tensor, "ds_tensor"):  # a weight of ZeRO-3: empty, with its share beside it
            return torch.cat([tensor.flatten(), tensor.ds_tensor])
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def size(tensors: Iterable[Any]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in map(local, tensors))

    states = [state for one in toy.optimizer.optimizers for state in one.state.values()]
    return {
        "weights": size(toy.model.parameters()),
        "optimizer": size(state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, num_steps, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    changes = json.loads((sys.argv[4:] or ["{}"])[0])
    noise, epochs, depth = changes.pop("noise", 0.5), changes.pop("epochs", False), changes.pop("depth", 0)
    toy = runner(config(folder, max_iters=num_steps, **changes), noise=noise, epochs=epochs, depth=depth)

    def kill(step: int, *_: Any) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    toy.progress = kill
    toy.train()
    seen = toy.dataset.seen  # type: ignore[attr-defined]
    if dist.world_size() > 1:
        held = own_bytes(toy)
        toy.engine.make_whole(toy.model)
        told = json.dumps({"rank": dist.rank(), "seen": seen, "own_bytes": held})
        os.write(1, f"{told}\n".encode())  # in one piece: both processes write to one pipe
    else:
        print(json.dumps({"step": toy.step, "samples": toy.num_samples}))


if __name__ == "__main__":
    main()
