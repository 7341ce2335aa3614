from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import ModelLoadError
from engine.hub import find_folder


def test_folder_is_found_as_it_is(tmp_path: Path) -> None:
    assert find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such/folder", "/no/such", "a/b/c", ""])
def test_path_that_is_no_hub_name_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no such folder, nor is it a hub name"):
        find_folder(name or "no folder")


def test_file_is_refused_when_given_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()

    with pytest.raises(ModelLoadError, match="is a file"):
        find_folder(str(tmp_path / "weights.bin"))


def test_hub_that_cannot_be_reached_is_said_within_seconds(tmp_path: Path) -> None:
    """In a process of its own, for the hub's client reads its address once. Port 9 of this machine is
    closed.
    """
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    program = (
        "from engine.hub import find_folder\n"
        "from engine.errors import ModelLoadError\n"
        "try:\n    find_folder('facebook/opt-125m')\n"
        "except ModelLoadError as error:\n    print(error)\n"
    )
    started = time.monotonic()

    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert (
        "facebook/opt-125m: there is no such folder, and the Hugging Face hub cannot be reached"
        in done.stdout
    )
    assert "give the path of a folder" in done.stdout
    assert done.stdout.count("\n") == 1
    assert time.monotonic() - started < 20
