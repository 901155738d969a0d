"""What ends a run early: signals, and failures that one rank meets. All ranks learn of it at the next step and save what they have."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from immiscible.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
ONE_DELIVERY = 1.0  # seconds within which a launcher may pass a signal on that reached this process too


class Interrupted(Exception):
    """Ends a measurement or a grid between two steps of its sampler."""


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGHUP into a wish that all ranks agree on at a step boundary; a second one of a kind ends at once.

    ``reason`` says what stopped the run, ``error`` is set if that is a failure.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.error = ""

    def __enter__(self) -> StopRequest:
        self._previous: dict[int, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Written to by the interpreter's C code, also while the main thread waits in a library for a rank that does not answer.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(self._reader,), daemon=True, name="signals").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    @property
    def exit_code(self) -> int:
        """By which a shell and a scheduler know that a signal ended the run before its end: 128 and the signal's number."""
        number = signal.Signals[self.reason].value if self.reason in signal.Signals.__members__ else signal.SIGTERM.value
        return 128 + number

    def fail(self, error: UserError) -> None:
        """A rank met a user's mistake outside any collective call, such as an image that cannot be read."""
        self.reason = self.error = str(error)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank wants to stop: one reduced number. Every rank learns the reason."""
        wishes = accelerator.reduce(torch.tensor(float(bool(self.reason)), device=accelerator.device), reduction="sum")
        if not wishes.item():
            return False
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            told = gather_object([(self.error, self.reason)])
            self.error, self.reason = max(told, key=lambda pair: (bool(pair[0]), bool(pair[1])))
        return True

    @contextmanager
    def interrupts(self, network: nn.Module, what: str) -> Iterator[None]:
        """Inside the block a wish to stop ends ``what`` before the next call of ``network``; it is made up for when the run is resumed."""

        def look(module: nn.Module, inputs: Any) -> None:
            if self.reason:
                raise Interrupted

        hook = network.register_forward_pre_hook(look)
        try:
            yield
        except Interrupted:
            logger.warning("%s: %s is left out now, and made when the run is resumed", self.reason, what)
        finally:
            hook.remove()


def _end_at_the_second(reader: socket.socket) -> None:
    """Ends the process when a signal comes again that has come before; returns when the other end is closed."""
    first: dict[int, float] = {}
    while numbers := reader.recv(64):
        for number in filter(SIGNALS.__contains__, numbers):
            if time.monotonic() - first.setdefault(number, time.monotonic()) > ONE_DELIVERY:
                sys.stderr.write(
                    f"\nended at once by a second {signal.Signals(number).name}; nothing was saved after the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(128 + number)
    reader.close()
