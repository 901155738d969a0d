"""The cost of pairing image i with noise j, up to constants of rows and columns, which change no assignment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from immiscible.errors import UserError

METRICS = ("l2", "squared_l2", "l1")
COST_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "float8")

EXACT_BELOW = 128  # where scipy takes less than a millisecond
ROWS_PER_PRODUCT = 2048  # of a matrix product whose result is kept beside the cost
FLOAT8 = "float8_e4m3fn"  # three bits after the leading one, largest value 448; some torch versions lack it
FLOAT8_TILE = 16  # what the sides of a product of 8-bit floats must be multiples of
INT8_DIMENSIONS = range(2, 2**31 // 127**2)  # D whose inner products cannot leave 32 bits; torch misreads operands of one column


def cost_matrix(
    x0: Tensor,
    noise: Tensor,
    *,
    metric: str = "l2",
    dtype: str = "float32",
    rows_per_product: int | None = None,
    whole: bool = False,
) -> Tensor:
    """The cost of pairing image i with noise j, up to row and column constants: fp32 [N, M] on the inputs' device.

    All but ``l1`` (`torch.cdist`) are one matrix product, since ``d^2 = |x - n|^2 = |x|^2 + |n|^2 - 2 x.n``. ``squared_l2`` is ``-2 x.n``,
    which alone differs within a row and within a column. ``l2`` is ``d - |n|``, less ``|x|`` too in rows of images longer than the noises
    are on average, so that images of any scale keep the digits that the difference of two large lengths loses. A column's constant depends
    on its noise alone, so rows may be computed apart.

        d - |n| = (|x|^2 - 2 x.n) / (d + |n|),    d - |x| = (|n|^2 - 2 x.n) / (d + |x|).

    Args:
        x0: [N, ...], finite.
        noise: [M, ...], finite, of the same elements and device.
        metric: as in `assign`.
        dtype: as in `assign`; ``auto`` as for the auction.
        rows_per_product: multiply this many images at a time (the last ones filled up with zeros), so that a row comes out bit-equal
            whatever stands beside it; by default `ROWS_PER_PRODUCT`, as they come.
        whole: add the constants, so that these are the distances themselves (or their squares): for the stable matching.

    Raises:
        UserError: an unknown name, or int8 where there is no such product.
    """
    check_names(metric, dtype)
    images, noises = x0.detach().flatten(1), noise.detach().flatten(1)  # [N,D], [M,D]
    return _costs(images, noises, (_norms(images), _norms(noises)), metric, dtype, rows_per_product, whole)


@cache
def fast_dtype(device: torch.device, dimension: int = 3072) -> str:
    """The dtype in which this device multiplies matrices of rows of ``dimension`` numbers fastest without losing the assignment."""
    if device.type == "cuda":
        return "bfloat16"
    known: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch that will do
    capabilities = known() if device.type == "cpu" else {}
    if any(map(capabilities.get, ("avx512_vnni", "avx_vnni", "amx_int8"))) and dimension in INT8_DIMENSIONS and _multiplies_int8():
        return "int8"
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def costs_on_device(products: Tensor, image_norm: Tensor, noise_norm: Tensor, far: Tensor, metric: str) -> Tensor:
    """As `immiscible.assignment.auction.costs_from_products`, in torch: fp32 [N, M] from ``x.n``, fp32 [N, M], which is overwritten."""
    if metric == "squared_l2":
        return products.mul_(-2)
    image_norm, far = image_norm[:, None], far[:, None]
    excess = products.mul_(-2).add_(torch.where(far, noise_norm, image_norm).square())
    length = torch.where(far, image_norm, noise_norm + 1e-30)
    cost = excess / length.square().add_(excess).clamp_(min=0).sqrt_().add_(length)
    return cost.sub_(torch.where(far, noise_norm, 0))


def _costs(
    images: Tensor,
    noises: Tensor,
    norms: tuple[Tensor, Tensor],
    metric: str,
    dtype: str,
    rows_per_product: int | None = None,
    whole: bool = False,
) -> Tensor:
    """See `cost_matrix`; [N, D] and [M, D] with their `_norms`."""
    if dtype == "auto":
        dtype = "float32" if metric == "l1" else fast_dtype(images.device, images.shape[1])
    image_norm, noise_norm = norms
    if metric == "l1":
        ratio = float(image_norm.mean() / noise_norm.mean())
        wide = torch.float32 if 1e-2 < ratio < 1e2 else torch.float64  # what pairs differ by must not drown in the larger one's digits
        images, noises = (operand.to(wide) * scale[:, None] for operand, scale in (_operand(images, dtype), _operand(noises, dtype)))
        cost = torch.cdist(images, noises, p=1)
        if whole:
            return cost.float()
        cost.sub_(noises.abs().sum(1))
        return cost.sub_(cost.mean(1, keepdim=True)).float()
    columns, noise_scale = _operand(noises, dtype)  # [M,D], [M]
    far = image_norm > noise_norm.mean()
    cost = torch.empty(len(images), len(noises), device=images.device)
    if dtype == "int8":
        rows_per_product = None  # sums of integers are alike in any company
    height = rows_per_product or ROWS_PER_PRODUCT
    for start in range(0, len(images), height):
        rows = slice(start, start + height)
        operand, image_scale = _operand(images[rows], dtype)  # [R,D], [R]
        if rows_per_product is not None:
            operand = torch.nn.functional.pad(operand, (0, 0, 0, height - len(operand)))
        products = _products(operand, columns)[: len(image_scale)]  # [R,M]
        if cost.device.type == "cpu" and (dtype == "int8" or len(noises) >= EXACT_BELOW):  # few need no compiler, which fills 100 MiB
            from immiscible.assignment.auction import costs_from_products

            costs_from_products(
                products.numpy(),
                image_scale.numpy(),
                noise_scale.numpy(),
                image_norm[rows].numpy(),
                noise_norm.numpy(),
                far[rows].numpy(),
                metric == "squared_l2",
                cost[rows].numpy(),
            )
        else:
            if dtype == "float8":
                products *= image_scale[:, None] * noise_scale
            cost[rows] = costs_on_device(products, image_norm[rows], noise_norm, far[rows], metric)
    if whole and metric == "squared_l2":
        cost.add_(image_norm.square()[:, None]).add_(noise_norm.square())
    elif whole:
        cost.add_(torch.where(far, image_norm, 0)[:, None]).add_(noise_norm)
    return cost


def _operand(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Rows [N, D] in the precision of a matrix product, and the factor fp32 [N] that is missing from each."""
    if dtype == "float8":
        scale = rows.abs().amax(1).float().clamp(min=1e-30) / torch.finfo(getattr(torch, FLOAT8)).max
        return (rows.float() / scale[:, None]).to(getattr(torch, FLOAT8)), scale
    if dtype != "int8":
        return rows.to(getattr(torch, dtype)), torch.ones(len(rows), device=rows.device)
    from immiscible.assignment.auction import quantize

    if rows.device.type != "cpu" or rows.shape[1] not in INT8_DIMENSIONS or not _multiplies_int8():
        raise UserError(
            f"`dtype` int8 needs a CPU on which torch multiplies int8, and {INT8_DIMENSIONS.start} to {INT8_DIMENSIONS.stop - 1} "
            f"numbers in an image, not {rows.shape[1]} on {rows.device}; give float32"
        )
    scaled, scale = torch.empty(rows.shape, dtype=torch.int8, device="cpu"), torch.empty(len(rows), device="cpu")
    quantize(rows.float().contiguous().numpy(), scaled.numpy(), scale.numpy())
    return scaled, scale


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """All inner products of two sets of operands, [R, D] and [M, D]: [R, M], int32 of int8 and fp32 of all others.

    8-bit floats are multiplied as such where the device has that product, and summed in fp32. Elsewhere they become fp32, which holds
    them exactly: the same numbers, at the price of float32.
    """
    if rows.dtype == torch.int8:
        return torch._int_mm(rows, columns.T)
    if rows.dtype == getattr(torch, FLOAT8, None):
        if _multiplies_float8(rows.device):
            return _float8_products(rows, columns)
        rows, columns = rows.float(), columns.float()
    return (rows @ columns.T).float()


def _float8_products(rows: Tensor, columns: Tensor) -> Tensor:
    """As `_products`, of 8-bit floats as they are, with zeros (whose bits are zero) where a side is no multiple of `FLOAT8_TILE`."""
    padded = [
        torch.nn.functional.pad(each.view(torch.uint8), (0, -each.shape[1] % FLOAT8_TILE, 0, -len(each) % FLOAT8_TILE)).view(each.dtype)
        for each in (rows, columns)
    ]
    one = torch.ones((), device=rows.device)
    products = torch._scaled_mm(padded[0], padded[1].T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return products[: len(rows), : len(columns)].contiguous()


@cache
def _multiplies_float8(device: torch.device) -> bool:
    """Whether this is a GPU with products of 8-bit floats (compute capability 8.9 and above), as its torch has them: they are tried."""
    if device.type != "cuda":
        return False
    rows, columns = (torch.arange(-8, 9, device=device).repeat(count, 2).to(getattr(torch, FLOAT8)) for count in (5, 7))
    try:
        return torch.equal(_float8_products(rows, columns), rows.float() @ columns.float().T)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


@cache
def _multiplies_int8() -> bool:
    """Whether torch has the product, which is not part of its public interface, and this processor sums it without saturation."""
    rows = torch.full((33, 65), 127, dtype=torch.int8, device="cpu")
    steps = torch.arange(65, device="cpu")
    columns = (8 * steps[:17, None] + steps).sub(100).clamp(-127, 127).to(torch.int8)
    try:
        return torch.equal(torch._int_mm(rows, columns.T), (rows.double() @ columns.double().T).int())
    except (AttributeError, RuntimeError):
        return False


def _norms(rows: Tensor) -> Tensor:
    """Euclidean lengths, fp32 [N]: NaN or infinite where a row holds such a value or one too large to square."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).float()


def check_names(metric: str, dtype: str) -> None:
    """Raises `UserError` for a metric or a dtype that is unknown, and for one that does not go with the other."""
    for argument, name, known in (("metric", metric, METRICS), ("dtype", dtype, COST_DTYPES)):
        if name not in known:
            raise UserError(f"`{argument}` {name!r} is unknown; known: {', '.join(known)}")
    if dtype == "float8" and not hasattr(torch, FLOAT8):
        raise UserError(f"`dtype` float8 needs a torch with {FLOAT8}, which {torch.__version__} lacks; give bfloat16")
    if metric == "l1" and dtype == "int8":
        raise UserError("`metric` l1 is no inner product, which alone has an int8 form; give `dtype` float32")
