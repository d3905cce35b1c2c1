"""The demo in a real Chromium: what a visitor does, on a desk and on a telephone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from eval.predictor import Predictor
from tests.support.bundles import image, make_bundle
from tests.support.pages import page_server, running_page
from tests.support.patience import GUARD_S, wait_until
from tests.support.proxies import proxy
from tests.support.servers import Running, asking, picture_part, running_server, slow_steps, stuck_after

CHROMIUM = os.environ.get("SIGHTLINE_CHROMIUM", shutil.which("chromium") or shutil.which("chromium-browser") or "")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
]
playwright_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
expect = playwright_api.expect
expect.set_options(timeout=1000 * GUARD_S)  # a busy machine is no fault of the page

DESK, TELEPHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
LAST_ANSWER = "#chat .message.bot >> nth=-1"
TEMPERATURE, LONGEST = 0, 2
"""Places of two sliders below "Decoding"."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_page(tmp_path_factory.mktemp("page"), with_examples=True) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    opened = browser.new_page(viewport=DESK)
    opened.set_default_timeout(1000 * GUARD_S)
    opened.goto(address)
    yield opened
    opened.close()


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#image input[type=file]", str(path))


def ask(page: Any, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def choose(page: Any, place: int, value: str) -> None:
    """Type a value of decoding, and again where Gradio, still setting up what was folded, has put its own back."""
    number = page.locator("#decoding input[type=number]").nth(place)
    slider = page.locator("#decoding input[type=range]").nth(place)

    def is_taken() -> bool:
        number.fill(value)
        number.press("Tab")
        page.wait_for_timeout(100)
        return bool(number.input_value() == value == slider.input_value())

    wait_until(f"slider {place} stands at {value}", is_taken)


def wait_for_the_end(page: Any, num_answers: int) -> None:
    expect(page.locator("#chat .message.bot")).to_have_count(num_answers)
    expect(page.locator("#speed .status")).to_contain_text("token")


def photo(folder: Path, kind: str = "circle") -> Path:
    path = folder / f"{kind}.png"
    image(kind).save(path)
    return path


def test_a_visitor_uploads_asks_and_asks_again(page: Any, tmp_path: Path) -> None:
    upload(page, photo(tmp_path))
    expect(page.locator("#image img")).to_be_visible()
    watch_lengths(page)
    ask(page, "What is in the image?")
    wait_for_the_end(page, 1)
    lengths = page.evaluate("window.lengths")
    assert len(lengths) >= 3, "the answer must be seen to grow"
    assert lengths == sorted(lengths)
    first = page.inner_text(LAST_ANSWER)
    ask(page, "Which colour is it?")
    wait_for_the_end(page, 2)
    expect(page.locator("#chat .message.user")).to_have_count(2)
    assert page.locator("#chat .message.bot").first.inner_text() == first
    expect(page.locator("#model")).to_contain_text("tokens/s (median of")
    expect(page.locator("#notice .notice")).to_have_count(0)


def watch_lengths(page: Any) -> None:
    """Note every new length of the answer while it is written, in the page itself."""
    page.evaluate(
        """() => { window.lengths = [];
        new MutationObserver(() => {
            const bot = [...document.querySelectorAll('#chat .message.bot')].pop();
            const length = bot ? bot.innerText.length : 0;
            if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
        }).observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true}); }"""
    )


def settled(page: Any) -> str:
    """The last answer once it has stood still for half a second: words under way when it was stopped still come in."""
    before, now = None, page.inner_text(LAST_ANSWER)
    while now != before:
        page.wait_for_timeout(500)
        before, now = now, page.inner_text(LAST_ANSWER)
    return str(now)


def test_stop_ends_an_answer_and_the_next_question_goes_on(page: Any, tmp_path: Path) -> None:
    with page_server(tmp_path) as server, stuck_after(server, steps=20) as goes_on:  # so that it cannot end by itself
        page.goto(server.url)
        upload(page, photo(tmp_path))
        expect(page.locator("#image img")).to_be_visible()
        page.click("#decoding button")
        choose(page, LONGEST, "400")
        choose(page, TEMPERATURE, "2")  # hot, so that no end token comes soon
        ask(page, "What is in the image?")
        playwright_api.expect(page.locator(LAST_ANSWER)).not_to_be_empty()  # else there is nothing to keep
        page.click("#question .stop-button")
        goes_on.set()
        expect(page.locator("#question .submit-button")).to_be_visible()
        assert len(settled(page)) < 400, "it must have ended ahead of its 400 tokens, of a character or more each"
        choose(page, LONGEST, "20")
        ask(page, "Which colour is it?")
        wait_for_the_end(page, 2)


def test_retry_answers_anew(page: Any, tmp_path: Path) -> None:
    page.click("#decoding button")
    choose(page, TEMPERATURE, "1")
    ask(page, "What is it?")
    wait_for_the_end(page, 1)
    first = page.inner_text(LAST_ANSWER)
    page.click("#chat button[aria-label='Retry'], #chat button[title='Retry']")
    playwright_api.expect(page.locator(LAST_ANSWER)).not_to_have_text(first)
    wait_for_the_end(page, 1)


def test_an_example_and_a_suggestion_take_two_clicks(page: Any) -> None:
    page.locator("#examples button, .gallery-item").first.click()
    expect(page.locator("#image img")).to_be_visible()
    page.locator("#chat .example").first.click()
    wait_for_the_end(page, 1)
    expect(page.locator("#chat .message.user")).to_have_text("What is in the image?")


def test_another_image_clears_the_chat(page: Any, tmp_path: Path) -> None:
    upload(page, photo(tmp_path))
    expect(page.locator("#image img")).to_be_visible()
    ask(page, "What is it?")
    wait_for_the_end(page, 1)
    page.locator(".gallery-item").nth(1).click()
    expect(page.locator("#chat .message")).to_have_count(0)


def test_a_bad_file_is_told_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"this is no image")
    upload(page, tmp_path / "text.png")
    expect(page.locator("#image-notice .notice")).to_contain_text("no image that can be read")
    upload(page, photo(tmp_path))
    expect(page.locator("#image img")).to_be_visible()
    expect(page.locator("#image-notice .notice")).to_have_count(0)
    ask(page, "What is it?")
    wait_for_the_end(page, 1)


def test_too_large_a_file_is_told_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(bytes(51_000_000))
    upload(page, tmp_path / "huge.png")
    expect(page.locator(".toast-body")).to_contain_text("size")
    upload(page, photo(tmp_path))
    expect(page.locator("#image img")).to_be_visible()
    ask(page, "What is it?")
    wait_for_the_end(page, 1)


def test_an_address_that_is_not_public_is_told(page: Any) -> None:
    page.fill("#address input", "http://169.254.169.254/latest/meta-data")
    page.press("#address input", "Enter")
    expect(page.locator("#image-notice .notice")).to_contain_text("not a public address")


def test_markup_in_a_question_is_text(page: Any) -> None:
    question = "<b>bold</b> <image> & <script>document.title='owned'</script>"
    ask(page, question)
    wait_for_the_end(page, 1)
    expect(page.locator("#chat .message.user")).to_have_text(question)
    assert page.title() == "Sightline"


def test_nothing_is_loaded_from_elsewhere(browser: Any, address: str) -> None:
    page, hosts = browser.new_page(viewport=DESK), set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else "inline"))
    page.goto(address)
    expect(page.locator("#question textarea")).to_be_visible()
    page.wait_for_timeout(500)
    page.close()
    assert hosts <= {address.split("/")[2], "inline"}


def test_it_fits_a_telephone(browser: Any, address: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport=TELEPHONE, has_touch=True, is_mobile=True)
    page.set_default_timeout(1000 * GUARD_S)
    page.goto(address)
    upload(page, photo(tmp_path))
    expect(page.locator("#image img")).to_be_visible()
    ask(page, "What is in the image?")
    wait_for_the_end(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= TELEPHONE["width"], "it must not scroll sideways"
    order = [page.locator(f"#{name}-column").bounding_box()["y"] for name in ("image", "chat", "side")]
    assert order == sorted(order)
    page.close()


def test_below_a_path_of_a_proxy_it_loads_and_answers(browser: Any, tmp_path: Path) -> None:
    """Nothing is asked for beside the path, and what is asked for comes: config, theme, uploads, images, answers."""
    with (
        running_page(tmp_path / "page", with_examples=True, root_path="/sub/demo") as inside,
        proxy(inside, "/sub/demo") as outside,
    ):
        page, answers = browser.new_page(viewport=DESK), {}
        page.on("response", lambda response: answers.__setitem__(response.url, response.status))
        page.set_default_timeout(1000 * GUARD_S)
        page.goto(outside)
        upload(page, photo(tmp_path))
        expect(page.locator("#image img")).to_be_visible()
        assert page.evaluate("document.querySelector('#image img').naturalWidth") > 0
        ask(page, "What is in the image?")
        wait_for_the_end(page, 1)
        if picture := os.environ.get("SIGHTLINE_SCREENSHOT"):
            page.screenshot(path=picture)
        page.close()
    ours = {url: status for url, status in answers.items() if url.startswith("http")}
    assert all(url.startswith(outside.rstrip("/")) for url in ours), sorted(ours)
    assert any("theme.css" in url for url in ours)
    assert {url: status for url, status in ours.items() if status >= 400} == {}


def test_two_pages_and_api_clients_are_answered_by_one_engine_at_once(browser: Any, tmp_path: Path) -> None:
    """Nobody waits for another's end: all are seen running together, and each gets the answer that he gets alone."""
    (tmp_path / "kept").mkdir()
    predictor = Predictor.open(make_bundle(tmp_path / "tiny"), device="cpu")
    files = [photo(tmp_path, kind) for kind in ("circle", "square")]
    with running_server(predictor, page=tmp_path / "kept") as server:
        alone = [ask_api(server, f"What is {number}?") for number in range(4)]
        pages = []
        for file in files:
            pages.append(opened := browser.new_page(viewport=DESK))
            opened.set_default_timeout(1000 * GUARD_S)
            opened.goto(f"{server.url}/")
            upload(opened, file)
            expect(opened.locator("#image img")).to_be_visible()
        with slow_steps(server, 0.1), ThreadPoolExecutor(4) as pool:
            for opened in pages:
                opened.bring_to_front()  # Chromium draws nothing in a page behind another
                ask(opened, "What is in the image?")
            clients = [pool.submit(ask_api, server, f"What is {number}?") for number in range(4)]
            most, deadline_s = 0, time.monotonic() + GUARD_S
            while not all(client.done() for client in clients) and time.monotonic() < deadline_s:
                most = max(most, server.engine.stats().running)
                time.sleep(0.02)
            assert [client.result() for client in clients] == alone
            assert most >= 4
        for opened in pages:
            opened.bring_to_front()
            wait_for_the_end(opened, 1)
        texts = [str(opened.inner_text(LAST_ANSWER)) for opened in pages]
        assert texts[0] != texts[1], "each about its own image"
        assert httpx.get(f"{server.url}/v2/nothing").status_code == 404
        assert httpx.get(f"{server.url}/v1/nothing").json()["error"]
        assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
        for opened in pages:
            opened.close()


def ask_api(server: Running, question: str) -> str:
    body = asking(picture_part(), question, max_tokens=60)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=GUARD_S)
    return str(answer.json()["choices"][0]["message"]["content"])
