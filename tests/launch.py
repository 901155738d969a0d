"""Runs the scripts as a user would, without eight seconds of imports per run.

`Scripts` starts one server (this file as a program), which imports everything once and forks a child for each run. The child has its own
session, argv, environment, working folder and output files, runs the script's real entry and ends as an interpreter ends. What further
scripts import is imported when the first of them is asked for.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_unconditional.py"
# What scripts import once they have parsed their flags; here it is there before, so that a fork is ready at once.
LIFE = ("immiscible.training.run", "immiscible.training.session")
STABLE_DIFFUSION = ("immiscible.tasks.text_to_image", "immiscible.sampling.folder", "immiscible.encoding.cache_writing")
IMPORTED_LATE = {
    SCRIPT.name: (*LIFE, "immiscible.tasks.pixels", "immiscible.tasks.latents"),
    "train_text_to_image.py": (*LIFE, *STABLE_DIFFUSION),
    "finetune_sd.py": (*LIFE, *STABLE_DIFFUSION),
    "scripts/precompute_latents.py": (*LIFE, *STABLE_DIFFUSION),
    "scripts/sample.py": (*STABLE_DIFFUSION, "immiscible.tasks.from_run"),
    "scripts/evaluate.py": ("immiscible.training.session", "immiscible.tasks.from_run", "immiscible.evaluation.real_images"),
}

# One thread, so that forked children and several ranks on few cores compute as they should; the CPU also where there is a GPU.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
LAUNCH_TWO = [
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    "--main_process_port",
]


def flags(values: Mapping[str, Any]) -> list[str]:
    """``{"a": 1, "b": True, "c": None}`` as ``--a 1 --b``; lists become several words."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return words


def tiny(output_dir: Path | str, **changes: Any) -> list[str]:
    """The flags of a run of a second: digits, the smallest network, four steps; ``name=None`` takes a flag out."""
    values = {
        "bundled_data": None if {"train_data_dir", "dataset_name"} & changes.keys() else "digits",
        "resolution": 8,
        "model_preset": "unet-tiny",
        "train_batch_size": 16,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "logger": "none",
        "logging_steps": 1,
        "ddpm_num_inference_steps": 2,
        "save_images_epochs": 0,
        "save_model_epochs": 0,
        "eval_batch_size": 2,
        "seed": 0,
        "output_dir": output_dir,
        **changes,
    }
    return flags(values)


@dataclass(frozen=True)
class Result:
    """A finished run; ``code`` as the shell sees it."""

    code: int
    stdout: str
    stderr: str
    program: str = SCRIPT.name

    @property
    def error(self) -> str:
        """The one error line, without the script's name."""
        before = f"{Path(self.program).name}: error: "
        lines = [line for line in self.stderr.splitlines() if line.startswith(before)]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        return lines[0].removeprefix(before)


@dataclass
class Running:
    """A run that was started and not waited for."""

    pid: int
    server: Scripts
    folder: Path
    program: str = SCRIPT.name
    code: int | None = field(default=None)

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def send_group(self, number: int) -> None:
        os.killpg(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL for the process and its loader workers."""
        self.send_group(signal.SIGKILL)
        self.wait()

    def wait_until(self, happened: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.poll() is None, f"ended before it happened: {self.result()}"
            assert time.monotonic() < deadline, f"did not happen in {timeout} s: {self.result()}"
            time.sleep(0.002)

    def wait(self, timeout: float = 120) -> Result:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGUSR1)  # where does it hang?
                time.sleep(0.5)
                self.send_group(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s: {self.result()}")
            time.sleep(0.01)
        return self.result()

    def result(self) -> Result:
        stdout, stderr = ((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Result(-1 if self.code is None else self.code, stdout, stderr, self.program)


class Scripts:
    """Starts runs of a script, each a fresh fork of a warm interpreter.

    The script is ``train_unconditional.py``, or the ``program`` of a call: a path from the repository's root.

    Args:
        folder: for what the runs print.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, argv: Iterable[Any], **options: Any) -> Result:
        """Runs the script to its end; ``timeout`` in seconds."""
        timeout = options.pop("timeout", 120)
        return self.start(argv, **options).wait(timeout)

    def start(
        self, argv: Iterable[Any], *, program: str = SCRIPT.name, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Running:
        self._count += 1
        folder = self._folder / f"run-{self._count}"
        folder.mkdir()
        words = [str(word) for word in argv]
        request = {"program": program, "argv": words, "cwd": str(cwd or folder), "env": dict(env or {}), "folder": str(folder)}
        return Running(self.ask(request), self, folder, program)

    def start_ranks(
        self, argv: Sequence[Any], count: int = 2, *, program: str = SCRIPT.name, env: Mapping[str, str] | None = None
    ) -> list[Running]:
        """What a launcher does: one process per rank, joined by the environment; ``env`` is what its settings add to it."""
        port = free_port()
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= env or {}
        envs = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(argv, program=program, env=env) for env in envs]

    def ask(self, request: Mapping[str, Any]) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ENVIRONMENT},
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait(30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_command(command: Sequence[Any], *, timeout: float = 180, **env: str) -> Result:
    """A command in an interpreter of its own, in the repository's root."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **env}, capture_output=True, text=True, errors="replace", timeout=timeout
    )
    return Result(done.returncode, done.stdout, done.stderr)


def accelerate_launch(*words: Any, program: str = SCRIPT.name) -> list[str]:
    """The command line of ``accelerate launch ... train_unconditional.py``, up to the script."""
    return [sys.executable, "-m", "accelerate.commands.launch", *[str(word) for word in words], str(ROOT / program)]


def entry(program: str) -> Callable[[Sequence[str]], None]:
    """The ``main`` of a script, imported with what it needs while it runs."""
    path = ROOT / program
    needed = IMPORTED_LATE.get(program, ())
    for module in needed:
        importlib.import_module(module)
    if set(STABLE_DIFFUSION) <= set(needed):
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from peft import LoraConfig  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    main: Callable[[Sequence[str]], None] = importlib.import_module(path.stem).main
    return main


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch

    torch.set_num_threads(1)
    import torch._dynamo
    from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel  # noqa: F401
    from diffusers.optimization import get_scheduler  # noqa: F401
    from diffusers.training_utils import EMAModel  # noqa: F401

    from immiscible.data.bundled import PhotoCrops, load_digits
    from immiscible.errors import run_script

    entry(SCRIPT.name)
    load_digits(), PhotoCrops(8)
    frozen = 0

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            print(json.dumps(128 - code if code is not None and code < 0 else code), file=answers, flush=True)
            continue
        main = entry(request["program"])
        if len(sys.modules) > frozen:  # a child's collections then neither look at what is imported nor copy it
            gc.collect()
            gc.freeze()
            frozen = len(sys.modules)
        child = os.fork()
        if child:
            print(child, file=answers, flush=True)
            continue
        os.setsid()
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdout = sys.__stdout__
        faulthandler.register(signal.SIGUSR1)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = [Path(request["program"]).name, *request["argv"]]
        leave(partial(run_script, main))


def leave(main: Callable[[], int]) -> None:
    """``sys.exit(main())`` without half a second for taking down the imported modules one by one."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
