"""Every kernel compiles for every architecture, and takes what the table says."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cuda_ops.cuda import compiler
from cuda_ops.cuda.compiler import Compiler, cache_folder
from cuda_ops.cuda.launcher import Variant
from cuda_ops.errors import KernelCompileError
from tests.support.kernel_resources import (
    ARCHITECTURES,
    HOPPER,
    compile_everywhere,
    nvrtc_version,
    read_table,
    variants_of_models,
)

# Bytes stored and loaded again that are tolerated, a few words of a thread.
SPILLED = 64
SMALL = Variant.of("activation", "activate_and_mul", ELEMENT="BFloat16", COUNT=8, THREADS=128, IS_GELU=0)


@pytest.mark.timeout(400)
def test_every_kernel_compiles_for_every_architecture_and_takes_what_the_table_says() -> None:
    used, table = compile_everywhere(variants_of_models()), read_table()

    spilling = {
        name for name, by_arch in used.items() if any(one["spilled"] > SPILLED for one in by_arch.values())
    }
    assert not spilling
    for name, by_arch in used.items():
        assert set(by_arch) == ({HOPPER} if "_hopper " in name else set(ARCHITECTURES))
    assert set(used) == set(table["kernels"]), "python -m tests.support.kernel_resources writes it anew"
    # Registers are the compiler's business: another version may take more or fewer.
    if nvrtc_version() == table["nvrtc"]:
        assert used == table["kernels"], "python -m tests.support.kernel_resources writes it anew"


def test_compiler_keeps_what_it_compiled_and_compiles_again_when_a_header_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, cache = tmp_path / "kernels", tmp_path / "cache"
    sources.mkdir()
    for path in compiler.KERNEL_FOLDER.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compiler, "KERNEL_FOLDER", sources)
    first = Compiler("sm_80", cache).compile(SMALL)
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    again = Compiler("sm_80", cache).compile(SMALL)

    assert again == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert {path.suffix for path in kept} == {".cubin", ".log"}

    header = sources / "element.cuh"
    header.write_text(header.read_text() + "// another\n")
    Compiler("sm_80", cache).compile(SMALL)
    Compiler("sm_90a", cache).compile(SMALL)

    assert len(list(cache.glob("*.cubin"))) == 3


def test_compiler_does_without_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("no folder")

    assert Compiler("sm_80", in_the_way).compile(SMALL).code.startswith(b"\x7fELF")


def test_compile_error_names_the_kernel_and_carries_the_log() -> None:
    broken = Variant.of("activation", "activate_and_mul", ELEMENT="Float64", COUNT=8, THREADS=128, IS_GELU=0)

    with pytest.raises(KernelCompileError) as caught:
        Compiler("sm_80", None).compile(broken)

    assert "activate_and_mul COUNT=8 ELEMENT=Float64" in str(caught.value)
    assert "Float64" in caught.value.log
    assert pickle.loads(pickle.dumps(caught.value)).log == caught.value.log


def test_cache_folder_is_the_named_one_or_the_users_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"THROUGHLINE_KERNEL_CACHE": "/x", "XDG_CACHE_HOME": "/y"}) == Path("/x")
    assert cache_folder({"XDG_CACHE_HOME": "/y"}) == Path("/y/throughline/kernels")
    assert cache_folder({}) == Path.home() / ".cache/throughline/kernels"

    def has_no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", has_no_home)
    assert cache_folder({}) is None
