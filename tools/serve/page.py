"""The page itself: its components and event handlers.

    image (drop, paste, address, example) --\\
    question, decoding ------------------------> ask / again --> chat, answer growing; speed; notice

Owns only the Gradio part. A visitor's chat is stored on the server (`gr.State`), so no history comes from the client.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from eval.predictor import Decoding, Predictor
from models.common.errors import InputError
from tools.serve import images, panel
from tools.serve.chat import Asker, Cancel, Chat, Update, describe_error, reply, time_limit
from tools.serve.fetch import fetch
from tools.serve.running import Running
from tools.serve.waiting import WaitingRoom

ANSWER_S = 300.0
"""How long one answer may take."""
_EMPTIED = "() => [[], '', '']"
"""Another image empties the chat window in the browser at once: the server's word could come after the first answer,
and take it away. The chat itself is a new one as soon as it is asked about another image (`Chat.asked`). An answer that
was about the image before empties the window once more, as its last word (`Running.drop`)."""
SUGGESTIONS = ("What is in the image?", "Describe the image in detail.", "How many things are there?")


class Page:
    """Builds the page. `blocks` is what Gradio serves.

    Args:
        predictor: whose facts are shown.
        folder: for what visitors send.
        examples: images that are offered.
        asker: answers.
        rows: how many answers are written at once.
    """

    def __init__(
        self, predictor: Predictor, folder: Path, examples: Sequence[Path] = (), *, asker: Asker, rows: int = 1
    ) -> None:
        self._predictor, self._folder, self._asker, self._rows = predictor, folder, asker, rows
        self._speeds: deque[float] = deque(maxlen=50)
        self._running = Running()
        with gr.Blocks(title="Sightline", analytics_enabled=False) as self.blocks:
            self._chat = gr.State(Chat())
            gr.HTML(panel.header(predictor), padding=False)
            with gr.Row(elem_id="page"):
                with gr.Column(elem_id="image-column"):
                    self._build_image(examples)
                with gr.Column(elem_id="chat-column"):
                    self._build_chat()
                with gr.Column(elem_id="side-column"):
                    self._build_side()
            self._connect()
        self.blocks.queue(default_concurrency_limit=4)
        self.waiting = self.blocks._queue = WaitingRoom.instead_of(self.blocks._queue)
        self.waiting.when_left = self._running.stop

    def _build_image(self, examples: Sequence[Path]) -> None:
        self._image = gr.Image(
            label="Image",
            sources=["upload", "clipboard"],
            type="filepath",
            buttons=["fullscreen"],
            placeholder="Drop, paste or choose an image",
            elem_id="image",
        )
        _take_files_as_they_are(self._image)
        self._address = gr.Textbox(
            placeholder="… or the address of an image",
            show_label=False,
            container=False,
            submit_btn="Fetch",
            max_lines=1,
            elem_id="address",
        )
        self._image_notice = gr.HTML(padding=False, elem_id="image-notice")
        if examples:
            gr.Examples([str(path) for path in examples], self._image, label="Examples", cache_examples=False)

    def _build_chat(self) -> None:
        self._chatbot = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            buttons=["copy"],
            feedback_options=None,
            render_markdown=False,  # show the text as written
            layout="bubble",
            placeholder="### Ask about any image\nDrop one, paste one, or give its address.",
            examples=[{"text": text} for text in SUGGESTIONS],
        )
        self._question = gr.Textbox(
            placeholder="Ask about the image",
            show_label=False,
            container=False,
            submit_btn=True,
            lines=1,
            max_lines=6,
            autofocus=True,
            elem_id="question",
        )
        self._notice = gr.HTML(padding=False, elem_id="notice")
        self._status = gr.HTML(padding=False, elem_id="speed")

    def _build_side(self) -> None:
        with gr.Accordion("Decoding", open=False, elem_id="decoding"):
            self._temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy")
            self._top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            self._length = gr.Slider(1, 1024, 256, step=1, label="Longest answer, in tokens")
            self._beams = gr.Slider(1, 8, 1, step=1, label="Beams", info="More than one: greedy, and not streamed")
        with gr.Accordion("This model", open=True, elem_id="model"):
            self._facts = gr.HTML(panel.facts(self._predictor), padding=False)

    def _connect(self) -> None:
        decoding = [self._temperature, self._top_p, self._length, self._beams]
        shown = [self._chat, self._chatbot, self._question, self._notice, self._status, self._facts]
        together: dict[str, Any] = {
            "concurrency_limit": self._rows,
            "concurrency_id": "model",
            "show_progress": "hidden",
            "trigger_mode": "multiple",  # by default a browser says nothing of what is asked before it knows of an end
        }
        beside: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        asked = [self._chat, self._image, self._question, *decoding]
        self._question.submit(self._ask, asked, shown, api_name="ask", **together)
        self._chatbot.retry(self._again, [self._chat, *decoding], shown, api_name="again", **together)
        self._question.stop(self._stop, None, None, **beside)
        chosen = self._chatbot.example_select(_chosen, None, self._question, **beside)
        chosen.then(self._ask, asked, shown, api_visibility="private", **together)
        fresh = [self._chat, self._chatbot, self._notice, self._status]
        self._chatbot.clear(self._fresh, None, fresh, queue=False, api_name="clear")
        self._image.upload(self._uploaded, self._image, [self._image, self._image_notice], api_visibility="private")
        self._image.clear(lambda: "", None, self._image_notice, queue=False, api_visibility="private")
        emptied = [self._chatbot, self._notice, self._status]
        self._image.change(None, None, emptied, js=_EMPTIED, api_visibility="private")
        self._image.change(self._left, self._image, None, **beside)
        self._address.submit(
            self._fetched, self._address, [self._image, self._address, self._image_notice], api_name="fetch"
        )

    def _ask(
        self, request: gr.Request, chat: Chat, image: str | None, question: str, *decoding: float
    ) -> Iterator[tuple[Any, ...]]:
        try:
            if image:
                images.check_image(Path(image))
            asked, settings = chat.asked(image, question), _decoding(*decoding)
        except InputError as error:
            yield self._rejected(error)
            return
        yield from self._show(_session(request), asked, settings)

    def _again(self, request: gr.Request, chat: Chat, *decoding: float) -> Iterator[tuple[Any, ...]]:
        try:
            before, settings = chat.again(), _decoding(*decoding)
        except InputError as error:
            yield self._rejected(error)
            return
        yield from self._show(_session(request), before, settings)

    def _show(self, session: str, chat: Chat, decoding: Decoding) -> Iterator[tuple[Any, ...]]:
        question = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        update, cancel = Update(chat), Cancel()
        try:
            with self._running.written(session, chat.image, cancel), time_limit(cancel, ANSWER_S):
                for update in reply(self._asker, chat, decoding, cancel):
                    if cancel.is_dropped:
                        break
                    yield self._shown(update, question)
                    question = gr.skip()
        except InputError as error:
            yield self._rejected(error)
            return
        if update.tokens_per_s is not None:
            self._speeds.append(update.tokens_per_s)
        yield self._shown(Update(Chat()) if cancel.is_dropped else update, _idle())

    def _rejected(self, error: InputError) -> tuple[Any, ...]:
        return gr.skip(), gr.skip(), gr.skip(), panel.notice(str(error)), gr.skip(), gr.skip()

    def _shown(self, update: Update, question: Any) -> tuple[Any, ...]:
        return (
            update.chat,
            _messages(update.chat),
            question,
            panel.notice(update.error),
            panel.status(update.speed),
            panel.facts(self._predictor, self._speeds),
        )

    def _stop(self, request: gr.Request) -> None:
        self._running.stop(_session(request))

    def _left(self, request: gr.Request, image: str | None) -> None:
        """Nobody waits for what is being said of another image."""
        self._running.drop(_session(request), but_about=image)

    def _fresh(self, request: gr.Request) -> tuple[Chat, list[Any], str, str]:
        self._running.drop(_session(request))
        return Chat(), [], "", ""

    def _uploaded(self, image: str | None) -> tuple[Any, str]:
        """Check an upload immediately, not at the first question."""
        if not image:
            return None, ""
        path = Path(image)
        try:
            images.check_image(path)
            shown = images.showable(path, self._folder)
        except Exception as error:
            return None, panel.notice(describe_error(error))
        return (gr.skip() if shown == path else str(shown)), ""

    def _fetched(self, address: str) -> tuple[Any, Any, str]:
        try:
            path = images.keep(fetch(address), self._folder)
            return str(images.showable(path, self._folder)), "", ""
        except Exception as error:
            return gr.skip(), gr.skip(), panel.notice(describe_error(error))


def _take_files_as_they_are(image: gr.Image) -> None:
    """Pass uploads on unopened, since our decoder opens them, and do not fetch addresses, which Gradio would.

    Set on the one object: Gradio writes a .pyi file beside every subclass of its components.
    """
    move = image.async_move_resource_to_block_cache

    async def move_files_only(resource: Any) -> Any:
        if str(resource).lower().startswith(("http:", "https:")):
            raise gr.Error("upload the image as a file; an address goes through /fetch")
        return await move(resource)

    image.async_move_resource_to_block_cache = move_files_only
    image.preprocess = lambda payload: payload.path if payload else None


def _decoding(temperature: float, top_p: float, length: float, beams: float) -> Decoding:
    return Decoding(
        max_new_tokens=int(length),
        temperature=0.0 if int(beams) > 1 else float(temperature),
        top_p=float(top_p),
        num_beams=int(beams),
    )


def _messages(chat: Chat) -> list[dict[str, str]]:
    """The turns as written: the chat window interprets tags as HTML even without Markdown."""
    return [{"role": turn.role, "content": escape(turn.text, quote=False)} for turn in chat.turns]


def _idle() -> Any:
    return gr.Textbox(submit_btn=True, stop_btn=False)


def _chosen(event: gr.SelectData) -> str:
    return str(event.value["text"])


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
