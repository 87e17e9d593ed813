"""An annotator behind an OpenAI-compatible endpoint, such as a vLLM server with Qwen3-VL.

An annotator is any callable (messages, schema) -> str. Messages are a chat whose parts are {"type": "text", "text": x},
{"type": "image", "image": x} or {"type": "video", "video": x}, where x is any value that media reads.
"""

import base64
import io
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .media import PIXELS, MediaBudget, load_image, load_video
from .records import Rejected

LONGEST_WAIT = 60.0  # seconds between two tries
JPEG_QUALITY = 90


class NoAnswer(RuntimeError):
    """An endpoint that gave no answer in as many tries as it had."""


class OpenAIAnnotator:
    """A chat model at `base_url`/chat/completions, held to a JSON schema (response_format), from any thread.

    Pictures go as JPEG in data URLs, made smaller to the budget; a video as pictures, one of each pair of its sampled
    frames, after its time, which every such endpoint takes. A time-out, a broken connection, 429 and 5xx are tried
    again, each time after twice as long a wait, or as long as the server asks (Retry-After).

    Args:
        base_url: e.g. "http://localhost:8000/v1". model: as the server calls it. api_key: None is what
            OPENAI_API_KEY says, if anything.
        timeout: seconds without a sign of life. tries: of one request. wait: seconds before the second one.
        budget: None is 1280 tokens a picture, and a picture a second of a video, 32 at most.

    Calling it raises:
        NoAnswer: after the last try. Rejected: the server refuses this request (400, 413, 422) or sends no text.
        ConnectionError: it refuses every request (401, 403, 404 and the like).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
        temperature: float = 0.7,
        max_tokens: int = 2048,
        budget: MediaBudget | None = None,
    ):
        try:
            import httpx
        except ImportError as error:
            raise ImportError("an endpoint needs httpx: pip install q3vl-mini[synthesis]") from error
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"{base_url!r} is no address of an endpoint; give e.g. http://localhost:8000/v1")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=None))
        self.url, self.model, self.tries, self.wait = f"{base_url.rstrip('/')}/chat/completions", model, tries, wait
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self.budget = budget or MediaBudget(image_max_tokens=1280, video_max_tokens=9000, fps=2.0)

    def __call__(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> str:
        """The answer's text; whether it follows the schema is for the caller to check."""
        named = {"name": schema["title"], "schema": schema, "strict": True}
        body = {"model": self.model, "messages": [encoded(m, self.budget) for m in messages], **self.sampling}
        return self._post(body | {"response_format": {"type": "json_schema", "json_schema": named}})

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def _post(self, body: Mapping[str, Any]) -> str:
        import httpx

        wait, fault = self.wait, ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT) * random.uniform(1, 1.5))  # so that threads do not come together
                wait *= 2
            try:
                response = self.client.post(self.url, json=body)
            except httpx.TransportError as error:
                fault = f"{type(error).__name__} {error}"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                fault = f"HTTP {response.status_code} {response.text[:200]}"
                asked = response.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else wait
                continue
            return self._text(response)
        raise NoAnswer(f"{self.url}: {self.tries} tries, the last one: {fault}")

    def _text(self, response: Any) -> str:
        status = response.status_code
        if status in (400, 413, 422):
            raise Rejected("refused by the endpoint", f"HTTP {status} {response.text[:300]}")
        if status >= 300:
            raise ConnectionError(f"{self.url}: HTTP {status} {response.text[:300]}; check address, model and API key")
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise Rejected("no text from the endpoint", response.text[:300]) from error
        if not isinstance(text, str):
            raise Rejected("no text from the endpoint", response.text[:300])
        return text.encode(errors="replace").decode()


def encoded(message: Mapping[str, Any], budget: MediaBudget) -> dict[str, Any]:
    """A message with its pictures and videos as the chat API takes them."""
    if isinstance(message["content"], str):
        return dict(message)
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if part["type"] == "image":
            parts.append(_picture(load_image(part["image"]), budget.image_max_tokens))
        elif part["type"] == "video":
            frames, pairs = load_video(part["video"], budget)
            most = max(1, budget.video_max_tokens // len(pairs))
            for frame, seconds in zip(frames[::2], pairs, strict=True):
                parts += [{"type": "text", "text": f"At {seconds:.1f} seconds:"}, _picture(frame, most)]
        else:
            parts.append(dict(part))
    return {**message, "content": parts}


def _picture(array: np.ndarray, max_tokens: int) -> dict[str, Any]:
    image = Image.fromarray(array)
    scale = (max_tokens * PIXELS / (image.width * image.height)) ** 0.5
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
