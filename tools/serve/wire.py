"""OpenAI's chat completions as values: what a request may say, and what answers look like.

Owns fields, bounds and shapes. What the model cannot do is refused by name, never ignored; fields that nobody knows are
ignored, since clients add them often. Source: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import random
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from eval.decoding import Decoding
from tools.serve.errors import invalid
from tools.serve.settings import RequestLimits

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0, False),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "structured_outputs": (),
    "echo": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
}
"""Fields of OpenAI, vLLM and transformers that would change the answer, and the values with which they do not."""


class Wire(BaseModel):
    """A part of a request: types as JSON has them, nothing converted."""

    model_config = ConfigDict(frozen=True, strict=True)


class TextPart(Wire):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """A picture: `data:image/…;base64,…`, or an address where the server fetches."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Ignored: a model reads pictures in one size."""


class ImagePart(Wire):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(Wire):
    """A video of a message, as other servers take it; it is refused by name."""

    type: Literal["video", "video_url"]


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(Wire):
    """A turn of the chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class StreamOptions(Wire):
    """What a stream brings beside text."""

    include_usage: bool | None = None


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ChatRequest(Wire):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def check(self, served: str) -> None:
        """Refuse what cannot be done.

        Raises:
            ApiError: 400, or 404 for a model that is not here.
        """
        check_model(self.model, served)
        for name, neutral in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise invalid(f"{name} is not supported: leave it out", name, "unsupported_parameter")
        if self.tools and self.tool_choice != "none":
            raise invalid("tools are not supported: leave them out, or set tool_choice to none", "tools", "unsupported")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options are there only with stream", "stream_options")
        for message in self.messages:
            if message.tool_calls or message.function_call:
                raise invalid("messages with tool calls are not supported", "messages", "unsupported")

    def decoding(self, limits: RequestLimits) -> Decoding:
        """How it wants to be decoded; greedy where it does not say."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        asked = self.max_completion_tokens or self.max_tokens or limits.default_tokens
        return Decoding(
            max_new_tokens=min(asked, limits.max_tokens),
            temperature=float(self.temperature or 0.0),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            seed=random.getrandbits(63) if self.seed is None else self.seed,
            stop=stop,
        )


def check_model(model: str | None, served: str) -> None:
    """Raise ApiError (404) for a model that is not the one that is served."""
    if model is not None and model != served:
        error = invalid(f"there is no model {model[:100]!r} here, only {served!r}", "model", "model_not_found")
        error.status = 404
        raise error


class Completion:
    """The answer to one request, in parts or whole."""

    def __init__(self, name: str, model: str, *, with_usage: bool = False) -> None:
        self._common = {
            "id": name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._with_usage = with_usage

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """An answer without stream."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        found = {**self._common, "object": "chat.completion.chunk", "choices": [choice]}
        return {**found, "usage": None} if self._with_usage else found

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, for those who ask for it."""
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """What an answer took."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def model_card(model: str, created: int) -> dict[str, Any]:
    """The served model in the list of models."""
    return {"id": model, "object": "model", "created": created, "owned_by": "sightline"}
