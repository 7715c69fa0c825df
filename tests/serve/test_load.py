"""Many clients at once, a full queue, impatient and vanished clients, keys: what the server does under pressure."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import select
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import pytest
from loops import run_apart
from openai import AsyncOpenAI, AuthenticationError
from PIL import Image
from serve_clients import JSON, Hold, assert_same, b64, client, get, head, held, metric, post, until
from tiny_pipeline import PROMPT, edges, tiny_pipeline

from scaleweaver.controls import Canny
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.request import read_schedule
from scaleweaver.serve.batching import Batcher
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.orders import Drawn, Event, Failed, Picture, Settings
from scaleweaver.serve.server import running

CLIENTS = 50
WORDS = ["red", "green", "small"]


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline("canny")


def test_fifty_clients_each_get_their_own_picture(pipe: VARControlPipeline) -> None:
    maps = [edges(number) for number in range(3)]

    def request(number: int) -> dict[str, object]:
        """Of five kinds that cannot share a batch."""
        kinds: list[dict[str, object]] = [
            {},
            {"controls": [{"kind": "canny", "image_b64": b64(maps[number % 3])}]},
            {"temperature": 0.8},
            {"negative_prompt": "a tree"},
            {},
        ]
        return {"seed": number, **kinds[number % 5]}

    def expected(number: int) -> Image.Image:
        fields = request(number)
        control = {"canny": maps[number % 3]} if "controls" in fields else None
        rest = {name: value for name, value in fields.items() if name != "controls"}
        made: Image.Image = pipe(prompt(number), control=control, **rest).images[0]
        return made

    def prompt(number: int) -> str:
        return f"a {WORDS[number % 3]} cube on grass" if number % 2 else f"{WORDS[number % 3]} tree"

    async def all_at_once(url: str, clients: int) -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as api:

            async def one(number: int) -> str | None:
                answer = await api.images.generate(prompt=prompt(number), extra_body=request(number))
                assert answer.data is not None and len(answer.data) == 1
                return answer.data[0].b64_json

            return await asyncio.gather(*(one(number) for number in range(clients)))

    wanted = [expected(number) for number in range(CLIENTS)]
    with running(pipe, ServeOptions(batch_wait=0.05)) as url:
        run_apart(all_at_once(url, 20))  # memory that stays is taken now
        before = metric(url, "process_resident_memory_bytes")
        answers = run_apart(all_at_once(url, CLIENTS))
        grown = metric(url, "process_resident_memory_bytes") - before
        calls = metric(url, "scaleweaver_batch_images_count")
        assert metric(url, "scaleweaver_images_total") == 20 + CLIENTS
        assert metric(url, "scaleweaver_queue_images") == 0
    for number in range(CLIENTS):
        assert_same(answers[number], wanted[number])
    assert calls < 0.7 * (20 + CLIENTS)  # pictures did share batches
    assert grown < 64 * 2**20


def test_a_full_queue_is_told_before_the_body_is_read(pipe: VARControlPipeline) -> None:
    body = {"prompt": PROMPT}
    with held(pipe) as hold, running(pipe, ServeOptions(queue=4, max_images=3, max_batch=1)) as url:
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(post, url, body)
            assert hold.begun.wait(10)
            waiting = [pool.submit(post, url, {**body, "n": 2})]
            until(lambda: metric(url, "scaleweaver_queue_images") == 2)
            status, answer, headers = post(url, {**body, "n": 2})
            assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "2")
            waiting.append(pool.submit(post, url, body))
            until(lambda: metric(url, "scaleweaver_queue_images") == 3)
            assert post(url, b"no JSON at all")[0] == 429  # it was not even looked at
            assert metric(url, "scaleweaver_held_images") == 4
            hold.go.set()
            assert [answer.result()[0] for answer in (first, *waiting)] == [200] * 3
        assert post(url, body)[0] == 200


def test_a_late_answer_is_a_timeout_and_its_work_is_dropped(pipe: VARControlPipeline) -> None:
    with held(pipe) as hold, running(pipe, ServeOptions(timeout=1.0, max_batch=1)) as url:
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(post, url, {"prompt": PROMPT, "n": 2}) for _ in range(2)]
            for answer in answers:
                status, told, headers = answer.result()
                assert (status, told["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
        assert metric(url, "scaleweaver_images_cancelled_total") == 4
        assert metric(url, "scaleweaver_queue_images") == 0
        hold.go.set()
        until(lambda: post(url, {"prompt": PROMPT})[0] == 200)
        assert metric(url, "scaleweaver_images_total") < 4  # what had not begun was never drawn


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_leaves_the_queue(pipe: VARControlPipeline, stream: bool) -> None:
    body = json.dumps({"prompt": PROMPT, "n": 3, "stream": stream})
    with held(pipe) as hold, running(pipe, ServeOptions(max_batch=1)) as url:
        connection = http.client.HTTPConnection(urlparse(url).netloc)
        connection.request("POST", "/v1/images/generations", body, JSON)
        until(lambda: metric(url, "scaleweaver_queue_images") == 2)
        connection.close()
        until(lambda: metric(url, "scaleweaver_images_cancelled_total") == 3)
        assert metric(url, "scaleweaver_queue_images") == 0
        hold.go.set()
        until(lambda: post(url, {"prompt": PROMPT})[0] == 200)
        assert metric(url, "scaleweaver_images_total") == 1  # the one under way was given up between two scales


def test_large_bodies_are_refused_with_and_without_a_length(pipe: VARControlPipeline) -> None:
    with running(pipe, ServeOptions(max_body=1000)) as url:
        status, answer, _ = post(url, b"x" * 5000)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        connection = http.client.HTTPConnection(urlparse(url).netloc)
        parts = (b"x" * 400 for _ in range(5))
        headers = JSON | {"Transfer-Encoding": "chunked"}
        connection.request("POST", "/v1/images/generations", parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert post(url, {"prompt": PROMPT})[0] == 200


def test_many_large_bodies_at_once_are_told_apart_from_a_full_queue(pipe: VARControlPipeline) -> None:
    with running(pipe, ServeOptions(max_body=1000)) as url:
        place = urlparse(url)
        # eight are held, though none is whole; one is too many
        clients = [socket.create_connection((place.hostname, place.port)) for _ in range(9)]
        for one in clients:
            one.sendall(head(1000) + b" " * 900)
        (refused,) = select.select(clients, [], [], 10)[0]
        answer = http.client.HTTPResponse(refused)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["code"]) == (429, "bodies_full")
        for one in clients:
            one.close()
        until(lambda: metric(url, "scaleweaver_active_requests") == 0)
        assert post(url, {"prompt": PROMPT})[0] == 200


def test_photos_that_take_long_hold_up_no_other_picture(
    pipe: VARControlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, detect = Hold(), Canny.detect
    monkeypatch.setattr(Canny, "detect", lambda self, pixels: slow.wait() or detect(self, pixels))
    photo = {"prompt": PROMPT, "controls": [{"kind": "canny", "image_b64": b64(edges()), "preprocess": True}]}
    with held(pipe) as hold, running(pipe, ServeOptions(timeout=2.0)) as url:
        with ThreadPoolExecutor(3) as pool:
            picture = pool.submit(post, url, {"prompt": PROMPT})
            assert hold.begun.wait(10)
            photos = [pool.submit(post, url, photo) for _ in range(2)]
            assert slow.begun.wait(10)
            until(lambda: metric(url, "scaleweaver_active_requests") == 3)
            hold.go.set()
            assert picture.result()[0] == 200
            # the time of a request runs while it is read, too
            assert [answer.result()[1]["error"]["code"] for answer in photos] == ["timeout"] * 2
        slow.go.set()


def test_encoded_controls_are_let_go_when_nothing_is_left_to_draw(
    pipe: VARControlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleweaver.serve.batching.IDLE", 0.05)
    made: list[weakref.ref[Any]] = []
    encode = pipe.encode_control

    def remember(*arguments: Any, **options: Any) -> Any:
        encoded = encode(*arguments, **options)
        made.append(weakref.ref(encoded))
        return encoded

    monkeypatch.setattr(pipe, "encode_control", remember)
    with running(pipe) as url:
        body = {"prompt": PROMPT, "n": 3, "controls": [{"kind": "canny", "image_b64": b64(edges())}]}
        assert post(url, body)[0] == 200
        assert len(made) == 1
        until(lambda: gc.collect() >= 0 and made[0]() is None)


def test_a_key_opens_what_draws_and_lists(pipe: VARControlPipeline) -> None:
    with running(pipe, ServeOptions(name="tiny", api_key="s3cret")) as url:
        assert client(url, "s3cret").models.list().data[0].id == "tiny"
        assert client(url, "s3cret").images.generate(prompt=PROMPT).data
        for key in ("wrong", "s3cre", "S3CRET"):
            with pytest.raises(AuthenticationError, match="Authorization: Bearer"):
                client(url, key).images.generate(prompt=PROMPT)
            with pytest.raises(AuthenticationError):
                client(url, key).models.list()
        assert post(url, b"x" * 10)[0] == 401  # before the body
        assert get(f"{url}/health")[0] == get(f"{url}/metrics")[0] == 200


def pictures(pipe: VARControlPipeline, count: int, sent: list[Event], **settings: object) -> list[Picture]:
    plan = read_schedule(None, pipe.config["schedule"], None, None)
    shared = Settings(plan, **settings)  # type: ignore[arg-type]
    return [Picture(i, f"{i}", i, None, shared, [], [], send=sent.append) for i in range(count)]


def test_batches_take_the_oldest_picture_and_those_like_it(pipe: VARControlPipeline) -> None:
    batches: list[list[Any]] = []
    hot, cold = pictures(pipe, 5, [], temperature=2.0), pictures(pipe, 3, [], temperature=0.5)
    batcher = Batcher(
        lambda batch: batches.append([(picture.index, picture.settings.temperature) for picture in batch]),
        Metrics(), most=3, capacity=10, wait=0.0,
    )  # fmt: skip
    for one in (hot[0], cold[0], hot[1], cold[1], hot[2], hot[3], cold[2], hot[4]):
        batcher.submit([one])
    batcher.release([cold[1]])
    batcher.start()
    batcher.close()
    assert batches == [[(0, 2.0), (1, 2.0), (2, 2.0)], [(0, 0.5), (2, 0.5)], [(3, 2.0), (4, 2.0)]]


def test_one_bad_picture_does_not_fail_its_batch(pipe: VARControlPipeline) -> None:
    sent: list[Event] = []

    def draw(batch: list[Picture]) -> None:
        for picture in batch:
            if picture.prompt == "1":
                raise RuntimeError("out of memory")
        for picture in batch:
            picture.finish(Drawn(picture.index, Image.new("RGB", (1, 1)), 0))

    batcher = Batcher(draw, Metrics(), most=4, capacity=10, wait=0.0)  # type: ignore[arg-type]
    batcher.submit(pictures(pipe, 3, sent))
    batcher.start()
    batcher.close()
    assert {event.index: type(event) for event in sent} == {0: Drawn, 1: Failed, 2: Drawn}
