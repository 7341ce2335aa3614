"""Model names: from `organisation/name` to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from engine.errors import ModelLoadError

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ANSWER_SECONDS: Final = 10.0
_DESCRIPTION: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
_SAFETENSORS: Final = ("model*.safetensors", "model.safetensors.index.json")
_PICKLED: Final = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def find_folder(name_or_path: str) -> Path:
    """Return the model's folder, after downloading it where a hub name was given.

    What was downloaded before is used without the hub when that cannot be reached.

    Raises:
        ModelLoadError: there is no such folder, and the hub does not give it. Answers within seconds: a hub
            that cannot be reached is not tried again.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelLoadError(name_or_path, "is a file; give the folder that holds config.json")
    if not _NAME.fullmatch(name_or_path):
        raise ModelLoadError(
            name_or_path, "there is no such folder, nor is it a hub name like facebook/opt-125m"
        )
    downloaded = _download(name_or_path, (*_DESCRIPTION, *_SAFETENSORS))
    if not any(downloaded.glob("*.safetensors")):
        downloaded = _download(name_or_path, (*_DESCRIPTION, *_PICKLED))
    return downloaded


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    # Only a name needs the hub's client, which takes half a second to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=_ANSWER_SECONDS))
    except GatedRepoError as error:
        raise ModelLoadError(name, "the hub asks for a login: accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(name, "there is no such folder here and no such model on the hub") from error
    except LocalEntryNotFoundError as error:
        problem = str(error).partition("\n")[0]
        raise ModelLoadError(
            name,
            f"there is no such folder, and the Hugging Face hub cannot be reached ({problem});"
            " give the path of a folder that holds the model",
        ) from error
    except OSError as error:
        raise ModelLoadError(name, f"cannot be downloaded: {str(error).partition(chr(10))[0]}") from error
