"""Tiny twins for tests and dry runs: servers, and networks of some thousand random weights, as the real ones lie on disk."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.notices import quiet
from diffalign.rewards.weights import Source

T = TypeVar("T")
LETTERS = string.ascii_lowercase + string.digits


def seeded(make: Callable[[], T]) -> T:
    """What `make` gives with torch's global generator at seed 0; the generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def server(answer: Callable[[str, Any], Any]) -> str:
    """The address of an HTTP server in this process, as long as it lives: `answer(path, body)` of JSON, the body None where it is a GET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(answer(self.path, None))

        def do_POST(self) -> None:
            self.reply(answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, said: Any) -> None:
            data = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: standard error is the run's."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listening.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{listening.server_port}"


def clip_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer that spells, 74 tokens, saved into `folder`; start and end are the last two, as in CLIP's own."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with quiet():
        tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_tokenizer(folder: Path) -> Any:
    """A BertTokenizer that spells, 77 tokens, saved into `folder`."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    with quiet():
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip(activation: str = "gelu", head: int = 64) -> Any:
    """A CLIPModel of 1.0 M weights for pictures of 224 pixels and `clip_tokenizer`; vision heads are `head` wide, text heads 64."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary = 2 * len(LETTERS) + 2
    text = dict(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, hidden_act=activation,
        max_position_embeddings=77, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=0, projection_dim=32,
    )  # fmt: skip
    vision = dict(
        hidden_size=2 * head, intermediate_size=4 * head, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=32,
        hidden_act=activation, projection_dim=32,
    )  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return seeded(lambda: CLIPModel(config))


def save_clip(folder: Path, model: Any) -> Path:
    """A folder as transformers' CLIP repositories have it: network, tokenizer, picture processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with quiet():
        model.save_pretrained(folder)
        clip_tokenizer(folder)
        CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def unconverted(state: dict[str, Tensor], source_of: Callable[[str], Source]) -> dict[str, Tensor]:
    """The checkpoint out of which `weights.convert` makes this state dict."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        source = source_of(name)
        parts.setdefault(source.key, {})[source.part or 0] = tensor.T if source.transposed else tensor
    return {key: torch.cat([found[i] for i in sorted(found)]) if len(found) > 1 else found[0].contiguous() for key, found in parts.items()}
