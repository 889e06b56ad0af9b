"""Host side of every launch: interpreter switch, architecture, index width, tensor layout."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import TileConfig, block_width, overriding_config
from .families import chosen_family
from .primitives import INTERPRETED
from .visibility import visibility_sizes

if TYPE_CHECKING:
    from .attention import Call

_INT32_MAX = 2**31 - 1


def is_interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (`TRITON_INTERPRET=1` at import)."""
    return INTERPRETED.value


@functools.lru_cache
def _cuda_architecture(device_index: int) -> int | str:
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return 10 * properties.major + properties.minor


@functools.lru_cache
def _cuda_multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many the tensor's GPU has; without one as many as an H100."""
    return _cuda_multiprocessors(tensor.device.index) if tensor.is_cuda else 132


_assumed_architecture: ContextVar[int | str | None] = ContextVar("architecture", default=None)


@contextmanager
def assume_architecture(arch: int | str) -> Iterator[None]:
    """Choose configurations as on `arch`, whatever device the tensors are on."""
    token = _assumed_architecture.set(arch)
    try:
        yield
    finally:
        _assumed_architecture.reset(token)


def architecture(tensor: torch.Tensor) -> int | str:
    """Key of the configuration tables: 90 for sm_90, "gfx942", or "interpreter"."""
    assumed = _assumed_architecture.get()
    if assumed is not None:
        return assumed
    if is_interpreted():
        return "interpreter"
    return _cuda_architecture(tensor.device.index)


def dot_precision(dtype: torch.dtype, arch: int | str, head_dim: int, value_dim: int) -> str:
    """Matrix product precision: float32 operands never fall to plain TF32.

    "tf32x3" emulates float32 on NVIDIA's tensor cores. Its split operands do not fit the register
    file for the widest heads, and other back ends lack it: those take "ieee". For 16-bit operands
    the value has no effect.
    """
    has_room = max(head_dim, value_dim) <= 128
    return "tf32x3" if dtype == torch.float32 and isinstance(arch, int) and has_room else "ieee"


def row_sums(config: TileConfig, dtype: torch.dtype, arch: int | str) -> str:
    """How the forward sums rounded weights: ROW_SUMS of its kernel."""
    has_assembly = isinstance(arch, int) and not is_interpreted()
    if dtype == torch.float32 or (config.row_sums == "packed" and not has_assembly):
        return "cast"
    return config.row_sums


def needs_wide_index(config: TileConfig, *tensors: torch.Tensor | None) -> bool:
    """Whether an offset inside one tile may pass 2**31 - 1 elements.

    Tile origins are always computed in int64; only offsets inside a tile may stay int32.
    """
    rows = max(config.block_t, config.block_s, config.sum_block)
    return any(
        rows * abs(tensor.stride(-2)) + max(rows, 256) * abs(tensor.stride(-1)) > _INT32_MAX
        for tensor in tensors
        if tensor is not None
    )


def fits_tma(tensor: torch.Tensor) -> bool:
    """Whether tiles of a tensor can come by TMA.

    The hardware takes 16-bit elements here, 16-byte alignment, a last stride of 1 and other
    strides that are multiples of 16 bytes.
    """
    *strides, last = tensor.stride()
    return (
        tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and last == 1
        and all(stride > 0 and stride % 8 == 0 for stride in strides)
    )


class Descriptors:
    """Makes the tensor descriptors of tensors of one signature, None for those without one.

    tiles: a tensor (B, H, rows, columns) and the rows of one tile, for each.
    """

    def __init__(
        self, config: TileConfig, arch: int | str, *tiles: tuple[torch.Tensor, int]
    ) -> None:
        has_hardware = arch == "interpreter" or (isinstance(arch, int) and 90 <= arch < 120)
        self.blocks = [
            [1, 1, rows, block_width(tensor.shape[3])]
            if has_hardware and config.use_descriptors and fits_tma(tensor)
            else None
            for tensor, rows in tiles
        ]

    def __call__(self, *tensors: torch.Tensor) -> tuple[TensorDescriptor | None, ...]:
        return tuple(
            None if block is None else TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in zip(tensors, self.blocks, strict=True)
        )


class Launch:
    """One kernel and all that the signature of a call fixes; calling it launches the kernel.

    The first launch goes through Triton, which compiles. Later ones go to the compiled kernel
    itself and spare the host Triton's search for it, which costs more than all else here. A kernel
    takes what varies between calls of one signature first, then `fixed`, and its constants last.
    """

    def __init__(
        self, kernel: Any, programs: int, fixed: tuple, config: TileConfig, **constants: Any
    ) -> None:
        self.kernel, self.grid, self.fixed = kernel, (programs, 1, 1), fixed
        self.constants = constants
        # FP fusion is pinned because its default changes between releases.
        self.options = {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        }
        if config.max_registers is not None:
            self.options["maxnreg"] = config.max_registers
        self.compiled = None

    @classmethod
    def for_call(
        cls,
        call: Call,
        kernel: Any,
        programs: int,
        config: TileConfig,
        *tensors: torch.Tensor | None,
        **constants: Any,
    ) -> Launch:
        """Launch of a kernel that reads `tensors` of a call and takes their strides.

        Of the constants here and of `constants` it gets those that are among its parameters.
        """
        q, _, v, _, gains, visibility, prior, _ = call
        H, T, D = q.shape[1:]
        HKV, S, DV = v.shape[1:]
        gain_strides, gain_is_tensor = gain_arguments(gains)
        tensor_strides = tuple(itertools.chain.from_iterable(map(strides, tensors)))
        constants |= {
            "GROUP": H // HKV,
            "D": D,
            "DV": DV,
            "BLOCK_T": config.block_t,
            "BLOCK_S": config.block_s,
            "SUM_BLOCK": config.sum_block,
            "MASKED_STAGES": config.masked_stages,
            "ROW_SUMS": row_sums(config, q.dtype, architecture(q)),
            "HAS_IDENTITY": call.has_identity,
            "CENTERED": call.is_centered,
            "GAIN_IS_TENSOR": gain_is_tensor,
            "ADD_LOG2_PRIOR": prior.add_log2,
            "TIMES_PRIOR": prior.times,
            "ACCUMULATE_PRIOR": prior.accumulate,
            "UNIFORM_PRIOR": prior.is_uniform,
            "WIDE": needs_wide_index(config, *tensors, visibility.attn_mask),
            "DOT_PRECISION": dot_precision(q.dtype, architecture(q), D, DV),
        }
        return cls(
            kernel,
            programs,
            (gain_strides, tensor_strides, H, T, S, *visibility_sizes(visibility, T, S)),
            config,
            **{name: constants[name] for name in kernel.arg_names if name in constants},
        )

    def __call__(self, *varying: Any) -> None:
        arguments = (*varying, *self.fixed)
        compiled = self.compiled
        if compiled is None:
            # None again in the interpreter.
            compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
            if compiled is not None:
                names = self.kernel.arg_names[len(arguments) :]
                self.constant_values = tuple(self.constants[name] for name in names)
                self.compiled = compiled
            return
        arguments += self.constant_values
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        run = compiled.run  # loads the binary, which `function` needs
        run(
            *self.grid,
            stream,
            compiled.function,
            compiled.packed_metadata,
            compiled.launch_metadata(self.grid, stream, *arguments),
            knobs.runtime.launch_enter_hook,
            knobs.runtime.launch_exit_hook,
            *arguments,
        )


def signature(x: Any) -> Any:
    """What Triton may compile for: of a tensor dtype, sizes, strides and alignment, not values."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return tuple(signature(element) for element in x)
    return x


_MOST_PLANS = 4096
_plans: dict[tuple, Any] = {}
_Plan = TypeVar("_Plan")


def plan_of(build: Callable[..., _Plan], call: Call, used: tuple, *others: Any) -> _Plan:
    """Return ``build(call, *used)``, or what it returned where all arguments had this signature."""
    key = (
        build,
        call.q.device,
        architecture(call.q),
        overriding_config(),
        chosen_family(),
        signature(call[:4]),
        # Of a number only whether its term takes part.
        tuple(gain == 0.0 if type(gain) is float else signature(gain) for gain in call.gains),
        signature(tuple(call.visibility)),
        call.prior,
        signature(call.prior_parameters),
        signature((used, others)),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()  # lengths that never come again
        plan = _plans[key] = build(call, *used)
    return plan


def forget_plans() -> None:
    """Let the next call of each signature go through Triton again."""
    _plans.clear()


def gain_arguments(
    gains: tuple[float | torch.Tensor, ...],
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the strides of gains from head to head, and which of them are tensors."""
    is_tensor = tuple(isinstance(gain, torch.Tensor) for gain in gains)
    strides = tuple(
        gain.stride(0) if isinstance(gain, torch.Tensor) and gain.ndim == 1 else 0 for gain in gains
    )
    return strides, is_tensor


def strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a four-dimensional tensor, zeros for one that is absent."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


_NOTHING = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one for the launches inside."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)
