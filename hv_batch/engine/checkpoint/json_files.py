"""Read the JSON files of a checkpoint, which are untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hv_batch.protocol import UserError

COPY_AGAIN = "Compare its size and checksum with the release and copy it again."
MAX_JSON_BYTES = 64 * 2**20  # the largest of the release, the tokenizer of Llama 3, has 17 MB


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most MAX_JSON_BYTES.

    Raises UserError if the file is missing, is too large, cannot be read, or contains anything else.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are allowed. {COPY_AGAIN}")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Copy the missing file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error
    except RecursionError:
        raise UserError(f"{path} is not readable JSON (it is nested too deeply). {COPY_AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object but contains a {type(value).__name__}. {COPY_AGAIN}")
    return value
