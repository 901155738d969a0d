"""The network of FID: Inception v3 as Google released it on 2015-12-05, with what its graph does otherwise than the paper says.

The weights are one file under two names, pytorch-fid's and torch-fidelity's; the names of its tensors are those of this module.
**Untested: parity of activations with the published graph**, for want of the file. Tested, with random weights: names and shapes of all
tensors, the arithmetic against the same layers written out, and, where torch-fidelity is installed, against its network.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from immiscible.errors import UserError, first_line
from immiscible.evaluation.forward import PretrainedFeatures
from immiscible.evaluation.resize import RESIZES
from immiscible.files import cache_folder, file_facts

WEIGHTS = {  # file names, which end in what the file hashes to, and where they are published
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0",
}
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7  # of the map that sFID compares

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, Kernel]  # output channels and kernel; with two kernels, both of the same input, joined
Branches = dict[str, list[Step]]


class InceptionFeatures(PretrainedFeatures):
    """2,048 averages of Inception v3's last maps (pool_3), for FID, KID, precision and recall, and what sFID and IS need.

    `outputs` has ``features`` [N, 2048], ``spatial`` [N, 2023] and ``probabilities`` [N, 1008], the softmax of logits without bias, see
    `InceptionOutputs`.

    Images come to 299x299 by ``resize``, and by the arithmetic of the code that resizes so: ``torch-bilinear`` to x / 127.5 - 1 as in
    pytorch-fid, every other to (x - 128) / 128 as in the graph.

    Args:
        weights: the file, or a folder that holds it; None for the cache folders, see `find_weights`.
        device: where the network computes.
        resize: one of `RESIZES`.

    Raises:
        UserError: there is no such resize; (exit code 1) the weights are missing or damaged.
    """

    num_features = 2048
    weights_sha256 = WEIGHTS_SHA256
    side = SIDE

    def __init__(self, weights: Path | None = None, device: torch.device | None = None, resize: str = "tf-bilinear") -> None:
        if resize not in RESIZES:
            raise UserError(f"images cannot be resized by {resize!r}; known: {', '.join(RESIZES)}")
        self.resize = resize
        self.name = "FID" if resize == "tf-bilinear" else f"FID-{resize}"
        self._device = device or torch.device("cpu")
        network: nn.Module = load_inception(find_weights(weights))
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        x = RESIZES[self.resize](images, self.side)
        x = x / 127.5 - 1 if self.resize == "torch-bilinear" else (x - 128) / 128
        found: InceptionOutputs = self._network(x.contiguous(memory_format=torch.channels_last))
        return {"features": found.pool, "spatial": found.spatial, "probabilities": found.logits.double().softmax(1)}


class InceptionOutputs(NamedTuple):
    """What the published metrics read.

    ``pool`` [N, 2048] is pool_3. ``spatial`` [N, 2023] is the first 7 channels of mixed_6/conv, flattened row by row with the channels
    last, as ADM's evaluator does for sFID: 17 x 17 x 7. ``logits`` [N, 1008] are pool times the last matrix *without its bias*, of which
    the Inception score is taken (by the code of its authors, ADM and torch-fidelity); of the 1,008 a thousand are classes.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionV3(nn.Module):
    """Szegedy et al. 2016 in the version of the FID graph: averages leave padding out, the last block takes maxima, 1,008 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padded=False)  # [N,32,149,149]
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)  # [N,32,147,147]
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)  # [N,80,73,73], after a maximum
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)  # [N,192,71,71]
        self.Mixed_5b = Mixed(192, _small_kernels(32))  # [N,256,35,35], after a maximum
        self.Mixed_5c = Mixed(256, _small_kernels(64))
        self.Mixed_5d = Mixed(288, _small_kernels(64))
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, halves=True)  # [N,768,17,17]
        self.Mixed_6b = Mixed(768, _long_kernels(128))
        self.Mixed_6c = Mixed(768, _long_kernels(160))
        self.Mixed_6d = Mixed(768, _long_kernels(160))
        self.Mixed_6e = Mixed(768, _long_kernels(192))
        reduction: Branches = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
        self.Mixed_7a = Mixed(768, reduction, halves=True)  # [N,1280,8,8]
        self.Mixed_7b = Mixed(1280, _forked_kernels())  # [N,2048,8,8]
        self.Mixed_7c = Mixed(2048, _forked_kernels(), maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> InceptionOutputs:
        """Of images in the network's own range, float [N, 3, 299, 299]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)  # mixed_6/conv of the graph, which counts its blocks from `mixed`, 5b
        x = self.Mixed_6e(self.Mixed_6d(x))
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return InceptionOutputs(pool, spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T)


class Convolution(nn.Module):
    """Convolution without bias, normalization by kept averages, ReLU."""

    def __init__(self, channels: int, made: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(channels, made, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(made, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, made, ...] of [N, channels, ...]."""
        return relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions side by side, their channels joined.

    Args:
        channels: of the input.
        branches: convolution i of several in a branch is called ``branch_i``, two of the same input ``branch_ia`` and ``branch_ib``, a
            single one as its branch; ``branch_pool`` sees the input pooled by 3x3.
        halves: every branch ends with a stride of 2 and no padding, and the input's maxima join.
        maximum: ``branch_pool`` pools by maxima. The paper averages; the released graph does so in its last block, and FID inherits it.
    """

    def __init__(self, channels: int, branches: Branches, *, halves: bool = False, maximum: bool = False) -> None:
        super().__init__()
        self.halves, self.maximum = halves, maximum
        self.branches: dict[str, list[list[str]]] = {}
        for branch, steps in branches.items():
            inside, self.branches[branch] = channels, []
            for number, (made, *kernels) in enumerate(steps, 1):
                last = halves and number == len(steps)
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                names = [name] if len(kernels) == 1 else [f"{name}{letter}" for letter in "ab"]
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, Convolution(inside, made, kernel, stride=2 if last else 1, padded=not last))
                self.branches[branch].append(names)
                inside = made * len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' channels, in the order in which they were given."""
        joined = []
        for branch, steps in self.branches.items():
            y = x
            if branch == "branch_pool":
                y = max_pool2d(x, 3, 1, padding=1) if self.maximum else avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            joined.append(y)
        return torch.cat([*joined, max_pool2d(x, 3, stride=2)] if self.halves else joined, 1)


def _small_kernels(pooled: int) -> Branches:
    double: list[Step] = [(64, 1), (96, 3), (96, 3)]
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": double, "branch_pool": [(pooled, 1)]}


def _long_kernels(inside: int) -> Branches:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(inside, 1), (inside, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(inside, 1), (inside, (7, 1)), (inside, (1, 7)), (inside, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    }


def _forked_kernels() -> Branches:
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
        "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
        "branch_pool": [(192, 1)],
    }


def weights_folders() -> list[Path]:
    """Where the file is looked for: our cache folder, and torch's, where pytorch-fid and torch-fidelity put it."""
    return [cache_folder() / "networks", Path(torch.hub.get_dir()) / "checkpoints"]


def find_weights(given: Path | None = None) -> Path:
    """The file of Inception's weights.

    Args:
        given: the file, or a folder that holds it under one of its names; None for `weights_folders`.

    Raises:
        UserError: (exit code 1) it is not there; the line says what to fetch, from where and to which folder.
    """
    if given is not None and given.is_file():
        return given
    for folder in weights_folders() if given is None else [given]:
        for name in WEIGHTS:
            if (folder / name).is_file():
                return folder / name
    name, origin = next(iter(WEIGHTS.items()))
    where = f"in none of {', '.join(map(str, weights_folders()))}" if given is None else f"not at {given}"
    raise UserError(
        f"the weights of Inception v3 are {where}, and nothing is downloaded unasked: get {origin}/{name} (or torch-fidelity's "
        f"weights-inception file, which is the same) and put it into {weights_folders()[0]}, or give its path by --feature_weights",
        exit_code=1,
    )


def load_inception(path: Path) -> InceptionV3:
    """The network with the weights of a file, on the CPU, in evaluation mode.

    Raises:
        UserError: (exit code 1) the file cannot be read, is not the published one, or holds other tensors.
    """
    try:
        found = file_facts(path)["sha256"]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", exit_code=1) from error
    if found != WEIGHTS_SHA256:
        raise UserError(
            f"{path} is damaged, or not Inception's weights of 2015-12-05: its sha256 begins with {found[:8]}, not {WEIGHTS_SHA256[:8]}; "
            "fetch it again",
            exit_code=1,
        )
    with torch.device("meta"):  # where no weights are drawn
        network = InceptionV3()
    try:
        # Files may lack `num_batches_tracked`, which counts training steps: torch adds it.
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except Exception as error:  # of pickle, zipfile or torch
        raise UserError(f"{path} does not hold Inception's weights ({first_line(error)})", exit_code=1) from error
    return network.eval().requires_grad_(False)
