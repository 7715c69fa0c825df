"""The page on a real server on loopback, with the built-in model; it starts once for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import find_chromium, running_chromium

from scaleweaver.pipeline import VARControlPipeline

# without the extra "demo" there is no page
collect_ignore_glob = [] if importlib.util.find_spec("gradio") else ["test_*.py"]


@pytest.fixture(scope="session")
def toybox() -> VARControlPipeline:
    pipe = VARControlPipeline.from_pretrained("toybox")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def studio(toybox: VARControlPipeline) -> Any:
    from scaleweaver.demo.studio import Studio

    return Studio(toybox)


@pytest.fixture(scope="session")
def address(studio: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is."""
    from scaleweaver.demo.page import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = launch(studio, prevent_thread_lock=True, quiet=True)
        yield page.local_url
        page.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright")
    if find_chromium() is None:
        pytest.skip("there is no Chromium here")
    with running_chromium() as started:
        yield started
