"""A recorded function gives, on other numbers in the same memory, what it gives when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.dense import PackedWeight, pack_weight, quantise_weight
from cuda_ops.errors import NotRecordableError, RecordedCallError
from cuda_ops.native import has_native_kernels
from cuda_ops.recording import Arena, record
from tests.support.kernels import REFERENCE, built_levels


@pytest.fixture(autouse=True)
def inference(kernels: str) -> Iterator[None]:
    if kernels == REFERENCE:
        built_levels()  # the library is needed all the same
    with torch.inference_mode():
        yield


def check_replays(run: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor]) -> None:
    """Replays after the inputs have changed give what calling gives, in the recording's own result."""
    recording = record(run, Arena())
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in inputs:
            tensor.copy_(torch.randn(tensor.shape))
        expected = [tensor.clone() for tensor in run()]
        recording.replay()
        assert all(torch.equal(own, other) for own, other in zip(recording.result, expected, strict=True))


def _layer(num_inputs: int, *, is_int8: bool) -> tuple[PackedWeight, Tensor]:
    weight = torch.randn(48, num_inputs)
    if is_int8:
        return quantise_weight(weight), torch.randn(48, dtype=torch.bfloat16)
    return pack_weight(weight.bfloat16()), torch.randn(48, dtype=torch.bfloat16)


# 31 inputs do not fill the last word: that op copies its rows first, which no kernel call tells of.
@pytest.mark.parametrize("num_inputs", [32, 31])
@pytest.mark.parametrize("is_int8", [False, True])
def test_recording_repeats_products_and_norms_on_other_rows(num_inputs: int, is_int8: bool) -> None:
    x = torch.randn(5, num_inputs, dtype=torch.bfloat16)
    weight, bias = _layer(num_inputs, is_int8=is_int8)

    def run() -> tuple[Tensor, ...]:
        product = cuda_ops.linear(x, weight, bias, has_relu=True)
        gated = cuda_ops.silu_and_mul(product[:, :24])
        return product, gated, cuda_ops.layer_norm(gated, None, None, 1e-5)

    check_replays(run, [x])


def test_recording_repeats_torchs_own_ops_between_ours() -> None:
    x, y = torch.randn(4, 32), torch.randn(4, 32)
    weight = torch.randn(32)

    def run() -> tuple[Tensor, ...]:
        left, right = (x + y).chunk(2, dim=1)
        normed = cuda_ops.rms_norm(torch.cat((right, left), dim=1) * 3, weight, 1e-6)
        made = torch.empty(4, 32)
        made.copy_(normed)
        made[1:].mul_(2)
        cuda_ops.add(made, y)
        return made, torch.nn.functional.gelu(made).view(2, 64)

    check_replays(run, [x, y])


def test_recording_of_ops_that_run_no_kernel_repeats_them() -> None:
    x = torch.randn(4, 6, 8, 3)

    check_replays(lambda: (cuda_ops.layer_norm(x, None, None, 1e-5), cuda_ops.argmax(x[0, 0])), [x])


def test_recordings_of_one_arena_use_its_memory_again() -> None:
    arena, x = Arena(), torch.randn(64, 256)
    weight = torch.randn(256)

    def run() -> tuple[Tensor, ...]:
        for _ in range(10):
            normed = cuda_ops.rms_norm(x, weight, 1e-6)
        return (normed,)

    addresses = {record(run, arena).result[0].data_ptr() for _ in range(5)}

    assert len(addresses) <= 2


def test_result_stays_readable_when_only_the_recording_is_left() -> None:
    x = torch.ones(3, 16)
    recording = record(lambda: (x * 2,), Arena())

    recording.replay()

    assert torch.equal(recording.result[0], torch.full((3, 16), 2.0))


def test_function_that_decides_by_a_number_is_refused() -> None:
    x = torch.ones(3)

    with pytest.raises(NotRecordableError, match="aten::item"):
        record(lambda: (x * 2 if x.sum().item() > 0 else x,), Arena())


def test_slot_or_row_that_is_not_there_is_told_at_replay_and_nothing_is_written(kernels: str) -> None:
    if kernels == REFERENCE:
        pytest.skip("plain torch tells of it in its own way")
    keys, values = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    token, slots, rows = torch.ones(1, 1, 8), torch.tensor([3]), torch.tensor([1])
    x, table = torch.zeros(1, 8), torch.ones(2, 8)

    def run() -> tuple[Tensor, ...]:
        cuda_ops.add_rows(x, table, rows)
        cuda_ops.write_kv(token, token, keys, values, slots)
        return (x,)

    recording = record(run, Arena())
    for wrong, place in ((slots, 8), (rows, 2)):
        right = int(wrong[0])
        wrong[0] = place
        before = keys.clone()
        with pytest.raises(RecordedCallError, match="not there"):
            recording.replay()
        assert torch.equal(keys, before)
        wrong[0] = right
    recording.replay()


def test_native_kernels_are_told_from_the_reference(kernels: str) -> None:
    assert has_native_kernels() == (kernels != REFERENCE)


def test_recording_repeats_a_product_whose_weight_is_in_onednns_own_layout() -> None:
    x = torch.randn(5, 64)
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(48, 64))

    check_replays(lambda: (torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),), [x])
