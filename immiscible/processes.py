"""What the processes of a run do together: a failure that one meets is raised on every one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from immiscible.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def on_every_process(accelerator: Accelerator, work: Callable[[], None], place: Path | str = "the output folder") -> None:
    """Does ``work``, in which no process waits for another; a user's mistake or a failing disk that one meets is raised on every one.

    Args:
        accelerator: of the run.
        work: what is done.
        place: the file or folder that it writes, for errors that name none.

    Raises:
        UserError: what ``work`` raised, or its `OSError` as one line; of several the first rank's.
    """
    from accelerate.utils import gather_object

    failure: tuple[str, int] | None = None
    try:
        work()
    except UserError as error:
        failure = (str(error), error.exit_code)
    except OSError as error:
        failure = (f"cannot write {error.filename or place}: {error.strerror or error}", 1)
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, SafetensorError):  # its own error, of a full disk too
            raise
        failure = (f"cannot write {place}: {error}", 1)
    met = [each for each in gather_object([failure]) if each]
    if met:
        raise UserError(met[0][0], exit_code=met[0][1])


def on_main_process(accelerator: Accelerator, work: Callable[[], None], place: Path | str = "the output folder") -> None:
    """Does ``work`` on rank 0 while the others wait; raises as `on_every_process`."""
    on_every_process(accelerator, work if accelerator.is_main_process else lambda: None, place)


def from_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` returns on rank 0, on every rank; raises as `on_every_process`."""
    from accelerate.utils import broadcast_object_list

    shared: list[Any] = [None]

    def compute() -> None:
        shared[0] = work()

    on_main_process(accelerator, compute)
    return broadcast_object_list(shared)[0]
