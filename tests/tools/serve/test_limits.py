"""What the load may do: pictures, shares, the queue, times; and clients who leave."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from data_pipeline.images import open_image
from eval.predictor import Decoding, Predictor, Query, Turn
from tests.support.patience import GUARD_S, wait_until
from tests.support.raw_http import COMPLETIONS, connected, head
from tests.support.servers import Running, asking, file_of, picture_part, running_server, slow_steps, stuck_after
from tools.dev.bench.serving import large_picture
from tools.serve.question import read_base64

LONG = {"max_tokens": 400, "temperature": 2.0, "seed": 3}
"""Hot, so that no end token comes soon."""


def send(server: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + COMPLETIONS, json=body, timeout=GUARD_S)


def test_a_client_has_its_share_and_no_more(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor, per_client=2) as server, slow_steps(server, 0.02):
        with ThreadPoolExecutor(2) as pool, httpx.Client(timeout=GUARD_S) as client:
            busy = [pool.submit(client.post, server.url + COMPLETIONS, json=asking("What?", **LONG)) for _ in range(2)]
            wait_until("both run", lambda: server.engine.stats().running == 2)
            refused = httpx.post(server.url + COMPLETIONS, json=asking("What?"), timeout=GUARD_S)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert httpx.get(server.url + "/health", timeout=GUARD_S).status_code == 200
            assert [each.result().status_code for each in busy] == [200, 200]
        assert httpx.post(server.url + COMPLETIONS, json=asking("What?"), timeout=GUARD_S).status_code == 200
        assert (
            'sightline_rejected_total{reason="share"} 1.0' in httpx.get(server.url + "/metrics", timeout=GUARD_S).text
        )


def test_a_full_queue_is_a_429_which_clients_send_again(tiny_predictor: Predictor) -> None:
    with (
        running_server(tiny_predictor, rows=1, waiting=1) as server,
        slow_steps(server, 0.02),
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(send, server, asking("What?", max_tokens=60, temperature=2, seed=3))
        wait_until("the first runs", lambda: server.engine.stats().running == 1)
        second = pool.submit(send, server, asking("What?", max_tokens=5))
        wait_until("the second waits", lambda: server.engine.stats().waiting == 1)
        refused = send(server, asking("What?"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        patient = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=9, timeout=GUARD_S)
        assert patient.chat.completions.create(**asking("What?", max_tokens=3)).choices
        assert [first.result().status_code, second.result().status_code] == [200, 200]


def test_who_waits_too_long_is_told_before_a_200(tiny_predictor: Predictor) -> None:
    with (
        running_server(tiny_predictor, rows=1, queue_s=0.3) as server,
        stuck_after(server, steps=3) as goes_on,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(send, server, asking("What?", **LONG))
        wait_until("the first runs", lambda: server.engine.stats().running == 1)
        refused = send(server, asking("What?", stream=True))
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        goes_on.set()
        wait_until("it waits no more", lambda: server.engine.stats().waiting == 0)
        assert first.result().status_code in (200, 503), "a busy machine may not have begun it in time"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_an_answer_that_takes_too_long_ends_as_an_error(tiny_predictor: Predictor, streamed: bool) -> None:
    with running_server(tiny_predictor, answer_s=3.0) as server, stuck_after(server, steps=20) as goes_on:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=2, timeout=GUARD_S)
        with pytest.raises(openai.APIError, match="took longer than"):
            list(client.chat.completions.create(**asking("What?", stream=streamed, **LONG)))
        goes_on.set()
        server.until_idle()
        assert server.engine.stats().finished["cancelled"] == 1, "clients must not send it again"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_client_who_leaves_takes_his_row_with_him(tiny_predictor: Predictor, streamed: bool) -> None:
    with running_server(tiny_predictor) as server, slow_steps(server, 0.05):
        body = json.dumps(asking("What?", stream=streamed, **LONG)).encode()
        with connected(server) as connection:
            connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
            wait_until("it runs", lambda: server.engine.stats().running == 1)
        wait_until("its row is gone", lambda: server.engine.stats().running == 0)
        assert server.engine.stats().finished["cancelled"] == 1
        assert server.engine.stats().tokens < 100
        wait_until("its share is given back", lambda: not server.service.shares._under_way)
        assert "sightline_cancelled_total 1.0" in httpx.get(server.url + "/metrics", timeout=GUARD_S).text


def test_who_leaves_while_he_waits_is_never_read(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor, rows=1) as server, slow_steps(server, 0.02):
        with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=GUARD_S) as client:
            first = pool.submit(
                client.post, server.url + COMPLETIONS, json=asking("What?", max_tokens=60, temperature=2, seed=3)
            )
            wait_until("the first runs", lambda: server.engine.stats().running == 1)
            body = json.dumps(asking("And this?")).encode()
            with connected(server) as connection:
                connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
                wait_until("it waits", lambda: server.engine.stats().waiting == 1)
            wait_until("it is gone", lambda: server.engine.stats().waiting == 0)
            first.result()
        assert server.engine.stats().finished["cancelled"] == 1


def test_pictures_share_one_budget(tiny_predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pictures of which one fits at a time: all are answered, and never more than the budget is promised."""
    large = [file_of(Image.new("RGB", (1000, 1000), color), "JPEG") for color in ("red", "green", "blue")]
    with running_server(tiny_predictor, picture_bytes=20_000_000, max_body_bytes=1_000_000) as server:
        most, before = [0], server.service.pictures._grant

        def watched() -> None:
            before()
            most.append(server.service.pictures.num_taken)

        monkeypatch.setattr(server.service.pictures, "_grant", watched)
        bodies = [asking(picture_part(file, "jpeg"), "What?", max_tokens=2) for file in large]
        with ThreadPoolExecutor(3) as pool, httpx.Client(timeout=GUARD_S) as client:
            done = list(pool.map(lambda body: client.post(server.url + COMPLETIONS, json=body).status_code, bodies))
        assert done == [200, 200, 200]
        assert max(most) == 16_000_000
        assert server.service.pictures.num_taken == 0
        huge = asking(picture_part(file_of(Image.new("1", (1200, 1200)))), "What?")
        refused = httpx.post(server.url + COMPLETIONS, json=huge, timeout=GUARD_S)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "image_too_large")


def test_a_picture_that_was_asked_about_needs_no_memory_to_be_decoded(tiny_predictor: Predictor) -> None:
    """A client sends it again with every turn: the turn is answered while others decode with all that there is."""
    photo = file_of(Image.linear_gradient("L").resize((700, 900)), "JPEG")
    first = asking(picture_part(photo, "jpeg"), "What?")
    with running_server(tiny_predictor, picture_bytes=20_000_000, max_body_bytes=1_000_000) as server:
        answer = send(server, first).json()["choices"][0]["message"]["content"] or "-"
        turns = [*first["messages"], {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
        with server.service.pictures.taken_by_thread(20_000_000, GUARD_S):
            known = send(server, {**first, "messages": turns}).json()
        metrics = httpx.get(server.url + "/metrics", timeout=GUARD_S).text
    asked = (Turn("user", "What?"), Turn("assistant", answer), Turn("user", "And?"))
    expected = tiny_predictor.answer([Query((open_image(photo),), asked)], Decoding(max_new_tokens=12))
    assert [known["choices"][0]["message"]["content"]] == expected
    assert "sightline_pixel_cache_queries_total 2.0" in metrics
    assert "sightline_pixel_cache_hits_total 1.0" in metrics


def test_health_and_metrics_tell_what_goes_on(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor, rows=1) as server, stuck_after(server, steps=5) as goes_on:
        with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=GUARD_S) as client:
            busy = pool.submit(client.post, server.url + COMPLETIONS, json=asking("What?", max_tokens=20))
            wait_until("it runs", lambda: server.engine.stats().running == 1)
            health = httpx.get(server.url + "/health", timeout=GUARD_S).json()
            assert health == {"status": "serving", "model": "tiny", "running": 1, "waiting": 0}
            assert "sightline_num_requests_running 1.0" in httpx.get(server.url + "/metrics", timeout=GUARD_S).text
            goes_on.set()
            answer = busy.result().json()
        text = httpx.get(server.url + "/metrics", timeout=GUARD_S).text
        reason = answer["choices"][0]["finish_reason"]
        for expected in (
            f'sightline_request_success_total{{finished_reason="{reason}"}} 1.0',
            f"sightline_generation_tokens_total {answer['usage']['completion_tokens']}.0",
            "sightline_time_to_first_token_seconds_count 1.0",
            "sightline_inter_token_latency_seconds_count 1.0",
            "sightline_e2e_request_latency_seconds_count 1.0",
            "sightline_request_queue_time_seconds_count 1.0",
            'sightline_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        ):
            assert expected in text
        engine, server.service.engine = server.engine, None
        loading = httpx.get(server.url + "/health", timeout=GUARD_S)
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        assert httpx.post(server.url + COMPLETIONS, json=asking("What?"), timeout=GUARD_S).status_code == 503
        server.service.engine = engine
        engine.drain(0.0)
        draining = httpx.post(server.url + COMPLETIONS, json=asking("What?"), timeout=GUARD_S)
        assert (draining.status_code, draining.json()["error"]["code"]) == (503, "draining")
        assert int(draining.headers["retry-after"]) > 0
        engine.close()
        assert httpx.get(server.url + "/health", timeout=GUARD_S).json()["status"] == "dead"


def test_a_whole_answer_wakes_the_event_loop_at_its_beginning_and_its_end_alone(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor) as server:
        bridge = server.service._bridge
        assert bridge is not None
        posted: list[object] = []
        before = bridge.post
        bridge.post = lambda outbox, event: (posted.append(event), before(outbox, event))[1]  # type: ignore[method-assign]
        whole = send(server, asking("What?", **LONG)).json()
        num_whole = len(posted)
        streamed = send(server, asking("What?", stream=True, **LONG)).text
    assert whole["usage"]["completion_tokens"] > 10
    assert num_whole <= 3 < len(posted) - num_whole
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def test_the_same_question_is_answered_again_without_the_engine(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor, answers=4) as server:
        for more in ({}, {"temperature": 1.5, "seed": 5}):
            body = {**asking("What?"), **more}
            first, second = send(server, body).json(), send(server, body).json()
            assert second["choices"] == first["choices"]
            assert second["usage"] == first["usage"]
        written = server.engine.stats().tokens
        streamed = send(server, {**asking("What?"), "stream": True}).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert server.engine.stats().tokens == written
        assert send(server, asking("Where?")).status_code == 200
        assert server.engine.stats().tokens > written
        assert "sightline_answers_given_again_total 3.0" in httpx.get(server.url + "/metrics", timeout=GUARD_S).text


@pytest.mark.slow
def test_decoding_a_large_picture_leaves_the_interpreter_to_others() -> None:
    """While one thread decodes, another gets turns: it never waits for more than a part of the CPU time that takes."""
    data = large_picture(9000, 6000)
    shares = (_longest_hold(lambda: open_image(data).resize((336, 336))) for _ in range(10))
    assert any(share < 0.3 for share in shares)


@pytest.mark.slow
def test_reading_a_large_body_s_base64_leaves_the_interpreter_to_others() -> None:
    text = base64.b64encode(random.Random(0).randbytes(30_000_000)).decode()
    assert any(_longest_hold(lambda: read_base64(text)) < 0.3 for _ in range(10))


def _longest_hold(work: Callable[[], object]) -> float:
    """The most CPU time that `work` took between two turns of this thread, by all that it took."""
    begun, may_go = threading.Event(), threading.Event()
    done: list[float] = []

    def run() -> None:
        begun.set()
        may_go.wait()
        work()
        done.append(time.thread_time())

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    assert thread.ident is not None
    clock, longest_s = time.pthread_getcpuclockid(thread.ident), 0.0
    last_s = time.clock_gettime(clock)
    may_go.set()
    while not done:
        time.sleep(0.0005)
        with suppress(OSError):  # the thread has ended
            now_s = time.clock_gettime(clock)
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
    thread.join()
    return longest_s / done[0]


def test_many_clients_at_once_get_what_each_would_alone(server: Running, tiny_predictor: Predictor) -> None:
    from data_pipeline.record import Turn
    from eval.predictor import Decoding, Query

    questions = [f"How many {word} are there?" for word in ("shapes", "circles", "stars", "squares")] * 4
    expected = tiny_predictor.answer(
        [Query((), (Turn("user", text),)) for text in questions], Decoding(max_new_tokens=12)
    )
    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=GUARD_S) as client:
        answers = list(
            pool.map(lambda text: client.post(server.url + COMPLETIONS, json=asking(text)).json(), questions)
        )
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    assert threading.active_count() < 200
