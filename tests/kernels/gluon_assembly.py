"""A small interpreter of inline assembly (PTX), which refuses instructions that it does not know.

A register holds one 32-bit element of every group of `pack`, or a bit: all threads run at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from gluon_memory import named_barrier
from gluon_schedule import BoundsError, UnsupportedError, error, pause
from gluon_values import Pointer, Tensor, as_tensor, torch_dtype


def _lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of the table is its value."""
    result = torch.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _two_halves(dtype: torch.dtype) -> Callable:
    def convert(high, low):
        halves = [x.view(torch.float32).to(dtype).view(torch.int16).int() for x in (high, low)]
        return halves[0] << 16 | halves[1] & 0xFFFF

    return convert


def _shuffle(a, lane, clamp, members):
    if (a != a.flatten()[0]).any():
        raise error(UnsupportedError, "shfl of values that differ between threads is not emulated")
    return a


INSTRUCTIONS: dict[str, Callable] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": torch.bitwise_and,
    "or.b32": torch.bitwise_or,
    "xor.b32": torch.bitwise_xor,
    "shl.b32": lambda a, bits: torch.where((bits >= 0) & (bits < 32), a << (bits & 31), 0),
    "lop3.b32": _lop3,
    "setp.eq.u32": torch.eq,
    "shfl.sync.idx.b32": _shuffle,
    "cvt.rn.bf16x2.f32": _two_halves(torch.bfloat16),
    "cvt.rn.f16x2.f32": _two_halves(torch.float16),
}
ADDITION = re.compile(r"red(\.relaxed)?(\.gpu)?\.global\.add(\.v[24])?\.f32")


class _Registers(dict):
    """Registers by name; numbers stand for themselves."""

    def __missing__(self, name: str) -> torch.Tensor:
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", name):
            raise error(UnsupportedError, f"operand {name!r} of inline assembly is not emulated")
        number = int(name, 0) & 0xFFFFFFFF
        return torch.tensor(number - (number >> 31 << 32), dtype=torch.int32)


def _execute(statement: str, registers: _Registers) -> None:
    if statement.startswith("@"):
        predicate, instruction = statement[1:].split(None, 1)
        if registers[predicate].any():
            text = f"inline assembly: {instruction!r} under a predicate that holds is not emulated"
            raise error(UnsupportedError, text)
        return
    opcode, _, rest = statement.partition(" ")
    target, *names = re.findall(r"[$\w-]+", rest) or [""]
    if opcode in INSTRUCTIONS:
        registers[target] = INSTRUCTIONS[opcode](*(registers[name] for name in names))
    elif opcode in ("bar.sync", "bar.arrive"):
        named_barrier(int(target), int(names[0]), is_waiting=opcode == "bar.sync")
    elif ADDITION.fullmatch(opcode):
        pause()
        address = registers[target]
        if (address.offsets % len(names)).any():
            raise error(BoundsError, f"{opcode} to no multiple of {4 * len(names)} bytes")
        for i, name in enumerate(names):
            offsets, _ = (address + i).accessed()
            values = registers[name].view(torch.float32).expand(offsets.shape)
            address.memory.data.index_put_((offsets,), values, accumulate=True)
    else:
        raise error(UnsupportedError, f"inline assembly: {statement!r} is not emulated")


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack) -> Tensor:
    args = [x if isinstance(x, Pointer) else as_tensor(x) for x in args]
    sizes = [x.offsets.shape if isinstance(x, Pointer) else x.data.shape for x in args]
    shape = torch.broadcast_shapes(*sizes)
    counts = constraints.count("="), len(constraints.split(","))
    if counts != (pack, pack * (1 + len(args))) or shape.numel() % pack:
        text = f"constraints {constraints} for {len(args)} arguments {list(shape)}, pack {pack}"
        raise error(UnsupportedError, f"inline assembly: {text}")
    registers = _Registers()
    for i, x in enumerate(args, 1):
        if isinstance(x, Pointer):
            registers[f"${i * pack}"] = Pointer(x.memory, x.offsets.expand(shape).reshape(-1))
        elif x.data.dtype.itemsize != 4:
            raise error(UnsupportedError, f"inline assembly: arguments of {x.dtype}")
        else:
            groups = x.data.view(torch.int32).expand(shape).reshape(-1, pack)
            registers.update((f"${i * pack + j}", groups[:, j]) for j in range(pack))
    for statement in asm.strip().strip("{}").split(";"):
        statement = statement.strip()
        if statement and not statement.startswith(".reg"):
            _execute(statement, registers)
    results = [registers[f"${j}"].expand(shape.numel() // pack) for j in range(pack)]
    return Tensor(torch.stack(results, 1).view(torch_dtype(dtype)).reshape(shape))
