"""`scaleweaver serve`: what it refuses before weights are loaded, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serve_clients import client, get, post
from tiny_pipeline import PROMPT, tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.serve.options import ServeOptions


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
    options = ["--model", str(tmp_path / "tiny"), "--name", "tiny", "--port", "0", "--max-batch", "1", "--log", "json"]
    code = "from scaleweaver.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *options], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        url = next(re.findall(r'"url": "(.*?)"', line)[0] for line in process.stderr if '"listening"' in line)
        api = client(url)

        def waiting(seed: int) -> list[int]:
            answer = api.images.generate(prompt=PROMPT, n=8, extra_body={"seed": seed})
            return [one.seed for one in answer.data or []]  # type: ignore[attr-defined]

        with ThreadPoolExecutor(4) as pool:
            stream = api.images.generate(prompt=PROMPT, n=10, stream=True)
            assert next(iter(stream)).type == "image_generation.completed"
            accepted = [pool.submit(waiting, 100 * number) for number in range(3)]
            while json.loads(get(f"{url}/health")[1])["waiting"] < 24:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            while get(f"{url}/health")[0] == 200:
                continue
            assert json.loads(get(f"{url}/health")[1])["status"] == "stopping"
            status, answer, _ = post(url, {"prompt": PROMPT})
            assert (status, answer["error"]["code"]) == (503, "shutting_down")
            assert len(list(stream)) == 9
            for number, seeds in enumerate(accepted):
                assert seeds.result() == [100 * number + i for i in range(8)]
        assert process.wait(timeout=20) == 0
        lines = [json.loads(line) for line in process.stderr]
        assert lines[-1]["message"] == "stopped"
        finished = [line for line in lines if line["message"] == "request" and line["status"] == 200]
        assert len(finished) == 4 and all(line["seconds"] > 0 for line in finished)
    finally:
        process.kill()
        process.wait()
