"""All processes of a run sample its images together: those of a single process, to the bit.

The main process alone decides what is made, finds what a cache has, and gets the images. It hands out batches, and the
others hand back images, through the key-value store at which the group met: no collective operation, so nobody waits
in one, no time-out of the group runs, and a signal ends whoever waits. Neither a shared folder nor a pickle is needed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from tqdm.auto import tqdm

from barrier_diffusers.models.generation import ImageOrder, SamplingConfig, generate, side_of
from barrier_diffusers.protection.statistics import is_distributed
from barrier_diffusers.utils.failures import one_line

PART = 2**20  # bytes of a value of the store, which takes 8 MiB at most
LOOKS = (0.005, 0.25)  # seconds between two looks into the store: at first, and after long waiting


class Mailbox:
    """Messages of any size between the processes of a group.

    Args:
        name: of the conversation, the same in all processes and of no other one.
    """

    def __init__(self, name: str):
        self.store = dist.PrefixStore(f"barrier_diffusers/{name}", _get_default_store())

    def put(self, key: str, facts: dict[str, Any], content: bytes = b"") -> None:
        """Leave plain values and bytes; whoever sees them sees all."""
        parts = -(-len(content) // PART)
        for index in range(parts):
            part: Any = content[index * PART : (index + 1) * PART]  # the stubs of torch know of texts alone
            self.store.set(f"{key}/{index}", part)
        self.store.set(key, json.dumps({**facts, "parts": parts}))

    def has(self, key: str) -> bool:
        """Whether the message is there."""
        return self.store.check([key])

    def wait(self, key: str) -> dict[str, Any]:
        """The plain values of a message, once it is there."""
        pause, longest = LOOKS
        while not self.has(key):
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return json.loads(self.store.get(key))

    def content(self, key: str, parts: int) -> bytes:
        """The bytes of a message, which are then deleted."""
        names = [f"{key}/{index}" for index in range(parts)]
        content = b"".join(self.store.get(name) for name in names)
        for name in names:
            self.store.delete_key(name)
        return content


@dataclass
class Helpers:
    """The other processes of a group, which wait for orders of the main process; their pipelines are the same."""

    pipeline: Any
    mailbox: Mailbox
    orders: int = 0  # given so far

    def tell(self, facts: dict[str, Any]) -> None:
        """Give the next order, or say that the work has ended."""
        self.mailbox.put(f"order-{self.orders}", facts)
        self.orders += 1

    def sample(self, order: ImageOrder, desc: str) -> np.ndarray:
        """The images of an order, this process's share among them.

        Raises:
            ChildProcessError: sampling failed in another process.
        """
        self.tell({"prompts": order.prompts, "sampling": asdict(order.sampling)})
        number, count, images = self.orders - 1, dist.get_world_size(), []
        for batch, start in enumerate(tqdm(order.starts, desc=desc, leave=False)):
            own = batch % count == 0
            images.append(order.batch(self.pipeline, start) if own else self._receive(f"batch-{number}-{batch}"))
        return np.concatenate(images)

    def _receive(self, key: str) -> np.ndarray:
        facts = self.mailbox.wait(key)
        if "error" in facts:
            raise ChildProcessError(f"generating images failed in process {facts['process']}: {facts['error']}")
        return np.frombuffer(self.mailbox.content(key, facts["parts"]), np.uint8).reshape(facts["shape"])


_HELPERS: ContextVar[Helpers | None] = ContextVar("helpers", default=None)
_conversations = itertools.count()

ResultT = TypeVar("ResultT")


def with_helpers(pipeline: Any, work: Callable[[], ResultT]) -> ResultT | None:
    """What `work` gives in the main process, and None in the other processes of its group; until it has ended, they
    sample their share of the images that it asks `generate_together` for.

    All processes have to call it, as many times as each other, with pipelines of the same weights. Without a group,
    `work()`.

    Raises:
        ChildProcessError: the work failed in another process; its error is in the message.
    """
    if not is_distributed():
        return work()
    mailbox = Mailbox(f"images-{next(_conversations)}")
    if dist.get_rank() > 0:
        help_main_process(pipeline, mailbox)
        return None
    helpers = Helpers(pipeline, mailbox)
    token = _HELPERS.set(helpers)
    try:
        result = work()
    except BaseException as error:
        with suppress(RuntimeError):  # of a store that is gone: the error itself matters more
            helpers.tell({"error": one_line(error)})
        raise
    finally:
        _HELPERS.reset(token)
    helpers.tell({"end": True})
    return result


def help_main_process(pipeline: Any, mailbox: Mailbox) -> None:
    """Sample this process's share of all that the main process orders, until it says that it has ended.

    Raises:
        ChildProcessError: it has failed.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    for number in itertools.count():
        facts = mailbox.wait(f"order-{number}")
        if "error" in facts:
            raise ChildProcessError(f"the main process failed: {facts['error']}")
        if "end" in facts:
            return
        order = ImageOrder(facts["prompts"], SamplingConfig(**facts["sampling"]))
        for batch, start in itertools.islice(enumerate(order.starts), rank, None, count):
            if mailbox.has(f"order-{number + 1}"):  # it has given this one up
                break
            key = f"batch-{number}-{batch}"
            try:
                images = order.batch(pipeline, start)
            except BaseException as error:
                mailbox.put(key, {"process": rank, "error": one_line(error)})
                raise
            mailbox.put(key, {"shape": images.shape}, images.tobytes())


def generate_together(
    pipeline: Any, prompts: Sequence[str], sampling: SamplingConfig, desc: str = "generating"
) -> np.ndarray:
    """`generate`, whose batches the other processes help with if this is within `with_helpers` of the same pipeline.

    Only for a pipeline that is the same in all of them: what an attack has changed is the main process's alone.

    Raises:
        ChildProcessError: sampling failed in another process.
        FloatingPointError: non-finite pixels, or a batch of nothing but black ones.
    """
    helpers = _HELPERS.get()
    if helpers is None or helpers.pipeline is not pipeline:
        return generate(pipeline, prompts, sampling, desc=desc)
    return helpers.sample(ImageOrder(list(prompts), sampling.sized(side_of(pipeline, sampling))), desc)
