"""What the launcher's tests share: data rows, a tiny real tokenizer, a hub on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ftplan.launcher.data.rows import Message, Row

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL_TOKENS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def chat(*turns: str, system: str = "", line: int = 1) -> Row:
    """`chat("question", "answer", ...)`: a conversation."""
    messages = [Message("system", system)] if system else []
    messages += [
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)
    ]
    return Row(number=line, messages=tuple(messages))


def tiny_tokenizer(chat_template: str | None = None, **changes: Any) -> Any:
    """A byte-level BPE tokenizer with a few merges, as transformers wraps it.

    Any text survives encoding and decoding, and ` answer` is one token, `answ` and `er` are not.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["The question is here, and the answer is there.\n\n"] * 9, trainer)
    tokens: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", **changes}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def save_tiny_llama(folder: Path) -> None:
    """A Llama of 100,000 parameters with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        # The usual 0.02 bounds a frozen head of this width to logits of about 1: nothing to learn.
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Answer:
    """What a fake hub sends; `raw` replaces the whole response, status line included."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None


@dataclass
class FakeHub:
    """An HTTP server on this machine that remembers what it was asked."""

    endpoint: str
    port: int
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]


@contextmanager
def fake_hub(answer: Callable[[str], Answer]) -> Iterator[FakeHub]:
    """`answer` is called with the path of every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path, dict(self.headers)))
            reply = answer(self.path)
            if reply.raw is not None:
                self.wfile.write(reply.raw)
                return
            self.send_response(reply.status)
            headers = {"Content-Length": str(len(reply.body)), **reply.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_address[1]
    hub = FakeHub(endpoint=f"http://127.0.0.1:{port}", port=port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cache_snapshot(hub_cache: Path, hub_id: str, revision: str, files: Mapping[str, str]) -> Path:
    """A model in a Hugging Face cache: `snapshots/REVISION` with links into `blobs`."""
    model = hub_cache / ("models--" + hub_id.replace("/", "--"))
    folder = model / "snapshots" / revision
    (model / "blobs").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        blob = model / "blobs" / f"{revision}-{name}"
        blob.write_text(text, encoding="utf-8")
        (folder / name).symlink_to(blob)
    return folder
