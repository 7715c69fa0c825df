"""`scaleweaver serve`: what it refuses before weights are loaded, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serve_clients import client, get, metric, picture, post, until
from tiny_pipeline import PROMPT, tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.metadata import read_settings
from scaleweaver.serve.options import ServeOptions

# the network waits with its first step until the file is there
HELD = """
import sys, time
from pathlib import Path
from torch.nn.modules.module import register_module_forward_pre_hook
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.cli import main

gate = Path(sys.argv.pop(1))


def wait(module, arguments):
    while isinstance(module, InfinityTransformer) and not gate.exists():
        time.sleep(0.01)


register_module_forward_pre_hook(wait)
main()
"""


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", "--model", "no/such-model", *arguments])
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


def test_a_taken_port_is_told_before_the_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"error: cannot listen on 127.0.0.1:{port} (Address already in use)" in refused("--port", str(port))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--timeout", "0"), "timeout is 0"),
        (("--queue", "4"), "max_images is 10 but the queue holds 4"),
        (("--api-key", ""), "API key is empty"),
        (("--rounding", "0"), "rounding is 0.0; pass what benchmarks/serve.py measures"),
        (("--rounding", "1e-4", "--no-exact"), "exact is off; pass one of the two"),
        (("--host", "not a host"), "pass another --host"),
        (("--max-batch", "0"), "max-batch"),
    ],
)
def test_bad_options_are_told_before_the_model_is_looked_for(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


@pytest.mark.parametrize("field", [{"max_batch": 0}, {"batch_wait": -1.0}, {"timeout": float("nan")}, {"queue": 2.5}])
def test_options_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        ServeOptions(**field)


def test_a_key_is_not_shown() -> None:
    assert "s3cret" not in repr(ServeOptions(api_key="s3cret"))


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    gate = tmp_path / "go"
    options = ["--model", str(tmp_path / "tiny"), "--port", "0", "--log", "json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, str(gate), "serve", *options], stderr=subprocess.PIPE, text=True, env=environment
    )
    watchdog = threading.Timer(120, process.kill)  # whatever is waited for then ends
    watchdog.start()
    try:
        assert process.stderr is not None
        url = next(re.findall(r'"url": "(.*?)"', line)[0] for line in process.stderr if '"listening"' in line)
        api = client(url)

        def waiting(seed: int) -> list[Any]:
            answer = api.images.generate(prompt=PROMPT, n=8, extra_body={"seed": seed})
            return answer.data or []

        with ThreadPoolExecutor(3) as pool:
            stream = api.images.generate(prompt=PROMPT, n=10, stream=True)
            accepted = [pool.submit(waiting, 100 * number) for number in range(3)]
            until(lambda: metric(url, "scaleweaver_held_images") == 34)
            process.send_signal(signal.SIGTERM)
            until(lambda: get(f"{url}/health")[0] == 503)
            assert json.loads(get(f"{url}/health")[1])["status"] == "stopping"
            status, answer, _ = post(url, {"prompt": PROMPT})
            assert (status, answer["error"]["code"]) == (503, "shutting_down")
            gate.touch()
            assert len(list(stream)) == 10
            for number, images in enumerate(accepted):
                assert [one.seed for one in images.result()] == [100 * number + i for i in range(8)]
        assert read_settings(picture(accepted[0].result()[0].b64_json))["model"] == "tiny"
        assert process.wait(timeout=20) == 0
        lines = [json.loads(line) for line in process.stderr]
        assert lines[-1]["message"] == "stopped"
        finished = [line for line in lines if line["message"] == "request" and line["status"] == 200]
        assert len(finished) == 4 and all(line["seconds"] > 0 for line in finished)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
