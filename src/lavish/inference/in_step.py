"""One process asks and the others compute along: what `lavish chat` and `lavish predict` do on several processes.

The first process alone reads, draws tokens and writes. It tells the others every pass through the network as plain data
(JSON and the bytes of tensors), and they run it on their shares of the weights; between two passes they wait. So a
request may end after any token, and whatever happens beside the passes cannot bring the processes out of step.
Not here: the shares themselves (parallel.py), and starting the processes (torchrun, or `lavish.cli.processes`).
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast
from weakref import WeakKeyDictionary, finalize

import torch
from torch import distributed

from lavish.checkpoints.placement import resolve_device
from lavish.common import dist
from lavish.common.errors import ConfigError, LavishError
from lavish.inference.cache import SliceCache
from lavish.inference.steps import Prompt
from lavish.inference.vlm import VLM

PATIENCE = timedelta(days=365)
"""How long the others wait for the next pass: a person may think."""
LOAD, LEAVE = "load", "leave"
_FAILED_FIRST, _TOLD = "lavish/failed_first", "lavish/told"


class OutOfStep(Exception):
    """A pass, or loading, failed in this process: the others wait inside it, and nobody can go on. Its cause is why."""


class Channel:
    """How the first process tells the others what to do.

    Raises:
        ConfigError: no such device, or the processes do not find each other.
    """

    def __init__(self, device: str | torch.device):
        try:
            dist.start(resolve_device(device).type)
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:  # torch's errors of the network and of its store are of this kind
            raise ConfigError(
                f"The {dist.world_size()} processes of this run did not find each other: {error}"
            ) from error
        self._group = cast(distributed.ProcessGroup, group)  # a number only where a process stays outside
        self._store = distributed.distributed_c10d._get_default_store()
        self.is_in_step = True
        """False from the start of what all do together until it has succeeded."""

    @torch.inference_mode()
    def tell(self, what: str, tensors: Sequence[torch.Tensor] = (), **plain: Any) -> None:
        """Tell the others what comes next; they are in `hear`."""
        kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        text = json.dumps({"what": what, "tensors": kinds, **plain}).encode()
        self._broadcast(torch.tensor([len(text)]))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for tensor in tensors:
            self._broadcast(tensor.cpu().contiguous().flatten().view(torch.uint8))

    @torch.inference_mode()
    def hear(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Wait for what the first process tells."""
        length = self._broadcast(torch.zeros(1, dtype=torch.int64))
        text = self._broadcast(torch.empty(int(length), dtype=torch.uint8))
        message = json.loads(bytes(text.tolist()))
        tensors = []
        for name, shape in message["tensors"]:
            dtype = getattr(torch, name)
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(self._broadcast(torch.empty(num_bytes, dtype=torch.uint8)).view(dtype).view(shape))
        return message, tensors

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do in the block what all processes do at the same time. Ctrl-C comes when it has ended.

        Raises:
            OutOfStep: it failed here.
        """
        self.is_in_step = False
        with undisturbed():
            try:
                yield
            except (LavishError, RuntimeError) as error:  # RuntimeError: memory, a device, or another process is gone
                raise OutOfStep from error
            self.is_in_step = True

    def dismiss(self) -> None:
        """Let the others leave; where they are out of step they cannot hear it, and whoever started them ends them."""
        if self.is_in_step:
            self.tell(LEAVE)
            distributed.destroy_process_group()

    def is_first_to_fail(self, error: BaseException | None) -> bool:
        """Say whether this process has to tell the person what went wrong: one does, and `has_told` afterwards.

        What is neither lavish's error nor memory may come from another process's end: that one is given time to speak.
        """
        if not isinstance(error, LavishError | torch.OutOfMemoryError) and self._wait_for_word(timedelta(seconds=3)):
            return False
        me = str(dist.rank())
        try:
            is_first = self._store.compare_set(_FAILED_FIRST, "", me) == me.encode()
        except RuntimeError:  # the store went with the process that held it: that one has told
            return False
        return is_first or not self._wait_for_word(timedelta(seconds=10))

    def has_told(self) -> None:
        """Note that the person was told, so that the others may end."""
        self._store.set(_TOLD, "")

    def _wait_for_word(self, timeout: timedelta) -> bool:
        try:
            self._store.wait([_TOLD], timeout)
        except RuntimeError:  # nothing came, or the store is gone
            return False
        return True

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        distributed.broadcast(tensor, src=0, group=self._group)
        return tensor


class LeadingSteps:
    """The steps of the first process: what it computes, the others are told to compute too.

    `is_interrupted` is asked after each pass; True ends the answer as Ctrl-C does.
    """

    def __init__(self, steps: Any, channel: Channel, is_interrupted: Callable[[], bool]):
        self._steps, self._channel, self._is_interrupted = steps, channel, is_interrupted
        self.network, self.config = steps.network, steps.config
        self.num_layers, self.context_tokens = steps.num_layers, steps.context_tokens
        self.images_per_pass, self.request_state = steps.images_per_pass, steps.request_state
        self._numbers: WeakKeyDictionary[SliceCache, int] = WeakKeyDictionary()
        self._next_number = 0
        self._dropped: list[int] = []
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self._steps.device

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As the steps'."""
        with self._pass("image_features", [pixel_values]):
            return self._steps.image_features(pixel_values)

    def prefill(
        self, prompts: Sequence[Prompt], features: torch.Tensor | None, cache: SliceCache, num_cached: int = 0
    ) -> tuple[torch.Tensor, Any]:
        """As the steps'."""
        rows = [[prompt.token_ids, prompt.token_type_ids] for prompt in prompts]
        given = [] if features is None else [features]
        with self._pass("prefill", given, cache, prompts=rows, num_cached=num_cached):
            return self._steps.prefill(prompts, features, cache, num_cached)

    def decode(self, token_ids: Sequence[int], state: Any, cache: SliceCache) -> torch.Tensor:
        """As the steps'."""
        with self._pass("decode", (), cache, token_ids=list(token_ids)):
            return self._steps.decode(token_ids, state, cache)

    def select_rows(self, rows: Sequence[int], state: Any, cache: SliceCache) -> None:
        """As the steps'."""
        with self._pass("select_rows", (), cache, rows=list(rows)):
            self._steps.select_rows(rows, state, cache)

    @contextmanager
    def _pass(
        self, what: str, tensors: Sequence[torch.Tensor], cache: SliceCache | None = None, **plain: Any
    ) -> Iterator[None]:
        with self._lock, self._channel.together():
            if cache is not None:
                plain |= {"cache": self._number(cache), "length": int(cache.get_seq_length())}
            dropped, self._dropped = self._dropped, []
            self._channel.tell(what, tensors, dropped=dropped, **plain)
            yield
        if self._is_interrupted():
            raise KeyboardInterrupt

    def _number(self, cache: SliceCache) -> int:
        """Give the number under which the others have their caches of the same tokens."""
        if cache not in self._numbers:
            self._numbers[cache] = self._next_number
            finalize(cache, self._drop, self._next_number)
            self._next_number += 1
        return self._numbers[cache]

    def _drop(self, number: int) -> None:
        self._dropped.append(number)


def lead(vlm: VLM, channel: Channel, is_interrupted: Callable[[], bool] = lambda: False) -> None:
    """Make every pass of this model one of all processes."""
    vlm._steps = LeadingSteps(vlm._steps, channel, is_interrupted)  # pyright: ignore[reportAttributeAccessIssue]


def follow(vlm: VLM, channel: Channel) -> None:
    """Run what the first process tells, until it leaves."""
    steps: Any = vlm._steps
    caches: dict[int, SliceCache] = {}
    states: dict[int, Any] = {}
    while True:
        message, tensors = channel.hear()
        what = message["what"]
        if what == LEAVE:
            distributed.destroy_process_group()
            return
        for number in message["dropped"]:
            caches.pop(number, None)
            states.pop(number, None)
        if what == "image_features":
            steps.image_features(tensors[0])
            continue
        number = message["cache"]
        cache = caches.setdefault(number, SliceCache(steps.num_layers))
        cache.truncate(message["length"])  # the first process may have cut its own
        if what == "prefill":
            prompts = [Prompt(token_ids, token_type_ids) for token_ids, token_type_ids in message["prompts"]]
            features = tensors[0].to(steps.device) if tensors else None
            states[number] = steps.prefill(prompts, features, cache, message["num_cached"])[1]
        elif what == "decode":
            steps.decode(message["token_ids"], states[number], cache)
        else:
            steps.select_rows(message["rows"], states[number], cache)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block. Only the main thread gets it, so others need nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt
