"""float8 e4m3 in whole numbers and as the emulator's instruction has it, against torch's."""

from __future__ import annotations

from ctypes import c_int

import torch
from torch import Tensor

from cuda_ops.cuda import compiler
from cuda_ops.cuda.launcher import LaunchShape, Variant
from tests.support.emulated_kernels import EmulatedLauncher, require_compiler

LARGEST = 448.0


def convert(values: Tensor) -> tuple[Tensor, Tensor]:
    """`[num_values, 2]` codes by either way, and the numbers of all 256 codes."""
    require_compiler()
    narrowed = torch.zeros(len(values), 2, dtype=torch.uint8)
    widened = torch.zeros(256)
    variant = Variant.of("float8_codes", "convert")
    EmulatedLauncher().launch(
        variant, LaunchShape((1, 1, 1), 32), (narrowed, widened, values, c_int(len(values)))
    )
    return narrowed, widened


def codes_of(values: Tensor) -> Tensor:
    """torch's, which has no number for what is too large."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def test_every_code_stands_for_torchs_number_and_comes_back() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

    narrowed, widened = convert(numbers)

    assert torch.equal(widened.nan_to_num(1e9), numbers.nan_to_num(1e9))
    assert widened.isnan().nonzero()[:, 0].tolist() == [0x7F, 0xFF]
    is_number = ~numbers.isnan()
    assert torch.equal(torch.signbit(widened)[is_number], torch.signbit(numbers)[is_number])
    for way in (0, 1):
        assert narrowed[is_number, way].tolist() == [code for code in range(256) if code & 0x7F != 0x7F]


def test_numbers_round_as_torchs_do_around_every_middle_and_stay_within_the_largest() -> None:
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 1e9)])
    large = torch.tensor([448.1, 463.9, 464.0, 480.0, 1e6, 3e38, torch.inf])
    small = torch.tensor([2.0**-10, 2.0**-11, 1e-30, 1e-45, 0.0])
    random = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 100
    positive = torch.cat((numbers, middles, beside, large, small, random))
    values = torch.cat((positive, -positive))

    narrowed, _ = convert(values)

    for way in (0, 1):
        assert torch.equal(narrowed[:, way], codes_of(values))


def test_a_nan_stays_one() -> None:
    narrowed, _ = convert(torch.tensor([torch.nan, -torch.nan]))

    assert (narrowed & 0x7F == 0x7F).all()


def test_devices_without_the_instruction_are_compiled_without_it() -> None:
    """sm_80 has none: a source that named it there would not compile."""
    variant = Variant.of(
        "norm", "normalise",
        ELEMENT="BFloat16", OUTPUT="Float8", COUNT=8, THREADS=96, RUNS=1, ADDS_RESIDUAL=0, CENTRES=0,
    )  # fmt: skip

    for arch in ("sm_80", "sm_86", "sm_89"):
        assert compiler.Compiler(arch, None).compile(variant).code.startswith(b"\x7fELF")
