"""The layout is a promise: packages are ours, layers hold, heavy imports stay where they belong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("api", "cli", "cuda_ops", "engine", "jobs", "telemetry", "workers")
FOLDERS_WITH_README = (*PACKAGES, "benchmarks", "docs", "examples", "infra", "tests")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_inside_the_repository(package: str) -> None:
    spec = importlib.util.find_spec(package)

    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)


def test_no_other_distribution_claims_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()

    foreign = {name: owners[name] for name in PACKAGES if set(owners.get(name, [])) - {"throughline"}}

    assert not foreign


@pytest.mark.parametrize("folder", FOLDERS_WITH_README)
def test_folder_has_a_readme_under_two_screens(folder: str) -> None:
    lines = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()

    assert 5 <= len(lines) <= 130


def _modules_after(code: str) -> set[str]:
    """Top-level names of what a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_worker_parent_loads_no_torch() -> None:
    """The engine's process does; the parent that holds the leases stays small and never blocks on it."""
    loaded = _modules_after(
        "import workers.service, workers.attempts.attempt, workers.engines.runtime, workers.pool"
    )

    assert not loaded & {"torch", "transformers", "cuda_ops"}


def test_job_contract_and_telemetry_load_no_side_of_the_queue() -> None:
    loaded = _modules_after(
        "import jobs.redis_store, jobs.queue, jobs.ledger, telemetry.setup, telemetry.celery"
    )

    assert not loaded & {"torch", "api", "workers", "engine", "cuda_ops"}


def test_nothing_committed_names_a_machine_or_a_registry() -> None:
    forbidden = ("/root/", "files.pythonhosted" + ".org", "pypi" + ".org/simple", "--index" + "-url")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [
        f"{name}: {word}"
        for name in names.splitlines()
        if (ROOT / name).is_file() and (ROOT / name).suffix not in {".safetensors", ".png"}
        for word in forbidden
        if word in (ROOT / name).read_text(encoding="utf-8", errors="replace")
        and name != "tests/architecture/test_layout.py"
    ]

    assert not found
