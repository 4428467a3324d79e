"""Starts a Chromium that is already on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hv_batch.protocol import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "HV_BATCH_CHROMIUM"


def find_chromium() -> str | None:
    """The path of a Chromium: that of the variable HV_BATCH_CHROMIUM, or one on the PATH. None if there is none."""
    return os.environ.get(VARIABLE) or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium as playwright's Browser. Raises UserError if there is no playwright or no Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("The package playwright is missing. Install it with: pip install playwright") from None
    path = find_chromium()
    if path is None:
        raise UserError(
            f"There is no Chromium: none of {', '.join(NAMES)} is on the PATH. Install one, or set {VARIABLE}."
        )
    # Chromium refuses its sandbox to root, as in most containers.
    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            browser.close()
