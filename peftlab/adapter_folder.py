"""An adapter's folder on disk: two files that are written, and read, as one.

A save is a transaction. Wherever it stops, `read` finds the old adapter or the new one,
whole, and the next save finishes or cleans up what it finds:

| step of a save | where the new files are | `read` finds |
|---|---|---|
| both are written | `.adapter_draft/` | the old adapter |
| the draft is renamed | `.adapter_new/` | the new adapter, from here on |
| the old config goes, both move | there or in place | the new adapter |

While they move peft finds no config, so that it never mixes two adapters. The weights'
metadata holds a digest of the config, by which `read` knows files of two adapters.

One save or load at a time: the folder itself is locked. (The library `filelock` wants a
file, which would stay behind.) On Windows only the threads of one process wait.
"""

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import safetensors
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DRAFT = ".adapter_draft"
NEW = ".adapter_new"
LARGEST_CONFIG = 10_000_000  # characters
ONE_AT_A_TIME = threading.Lock()  # where a folder cannot be locked


def write(folder, config, tensors, digest):
    """Write both files, or neither.

    Args:
        folder: made if it is not there.
        config: what goes into the JSON.
        tensors: {name: tensor}, none of which share memory.
        digest: a function of the config; `read` wants the same.

    Raises:
        ValueError: nothing written, for a folder without a name, and for something in
            it that is no plain file and has the name of one of the two.
        OSError: `read` finds the old adapter or the new one, whole.
    """
    folder = _path(folder)
    metadata = {"format": "pt", "settings": digest(config)}
    text = json.dumps(config, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no plain file: it stays")

    with _alone_in(folder):
        _move_into_place(folder)  # what a save that was killed has left
        draft = folder / DRAFT
        try:
            draft.mkdir()
            save_file(tensors, draft / WEIGHTS, metadata)
            _order_metadata(draft / WEIGHTS, metadata)
            (draft / CONFIG).write_text(text, encoding="utf8")
            for name in (WEIGHTS, CONFIG):
                _sync(draft / name)
            os.replace(draft, folder / NEW)  # from here on the new adapter counts
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _move_into_place(folder)


def read(folder, digest):
    """Read both files, of one and the same save.

    Args:
        folder: the adapter's.
        digest: the function of the config that `write` had.

    Returns:
        The config as it is in the JSON, and {name: tensor}.

    Raises:
        ValueError: for a file that is missing, truncated or no plain file, for the
            files of two adapters, and what `digest` refuses.
    """
    folder = _path(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no adapter folder: there is no such folder")
    with _alone_in(folder):
        return _read(folder, digest)


def _path(folder):
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"the folder must be a path, not {folder!r:.160}")
    if not str(folder).strip():
        raise ValueError("name a folder for the adapter: this name is empty")
    return Path(folder)


def _read(folder, digest):
    """What `read` returns. No save may run: safetensors opens a file twice by name."""
    path = _newest(folder, CONFIG)
    try:
        with open(path, encoding="utf8") as file:
            config = json.loads(file.read(LARGEST_CONFIG))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON of at most 10 MB") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None

    path = _newest(folder, WEIGHTS)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        reason = repr(str(error))[:160]
        raise ValueError(f"{path} is truncated or damaged: {reason}") from None

    if metadata.get("settings") not in (None, digest(config)):
        raise ValueError(
            f"{folder} holds one adapter's weights and another's config, or one that"
            " was changed afterwards: save it again"
        )
    return config, tensors


def _newest(folder, name):
    """The path of one of the two files: of a save that is moving, or in place."""
    path = folder / NEW / name
    if not os.path.exists(path):
        path = folder / name

    if not os.path.exists(path):
        pickle = os.path.exists(folder / "adapter_model.bin")
        note = ", only a pickle" if pickle else ""
        raise ValueError(f"{folder} is no adapter folder: no {name}{note}")
    if not os.path.isfile(path):  # to open a FIFO would be to wait for ever
        raise ValueError(f"{path} is no plain file")
    return path


def _move_into_place(folder):
    """Finish a save whose new adapter counts, and remove what else lies about."""
    new = folder / NEW
    if (new / CONFIG).exists():
        (folder / CONFIG).unlink(missing_ok=True)
        if (new / WEIGHTS).exists():
            os.replace(new / WEIGHTS, folder / WEIGHTS)
        os.replace(new / CONFIG, folder / CONFIG)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(folder / DRAFT, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(folder):
    """Wait for the folder, and have it alone. A killed process gives its lock back."""
    if fcntl is None:
        with ONE_AT_A_TIME:
            yield
        return

    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _order_metadata(path, metadata):
    """Give the metadata one order, for equal bytes: safetensors writes any."""
    items = [f'"{key}":"{value}"'.encode() for key, value in metadata.items()]
    with open(path, "r+b") as file:
        start = file.read(1000)
        file.seek(0)
        file.write(start.replace(b",".join(items[::-1]), b",".join(items), 1))


def _sync(path):
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
