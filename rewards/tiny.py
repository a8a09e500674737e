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


def wav2vec2(kind: str = "Wav2Vec2", head: str = "Model", **fields: Any) -> Any:
    """transformers' `kind` + `head` (Wav2Vec2Model, HubertForCTC, ...) of some thousand weights; a frame every 160 samples, from 320 on."""
    import transformers

    config: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[16, 16], conv_kernel=[32, 10],
        conv_stride=[16, 10], num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=32,
        tdnn_dim=[16, 16, 16, 16, 32], tdnn_kernel=[5, 3, 3, 1, 1], tdnn_dilation=[1, 2, 3, 1, 1], xvector_output_dim=16,
    )  # fmt: skip
    found: Any = getattr(transformers, f"{kind}Config")(**{**config, **fields})
    return seeded(lambda: getattr(transformers, kind + head)(found)).eval()


def save_ear(folder: Path, model: Any, sample_rate: int = 16000, normalises: bool = True) -> Path:
    """A folder as transformers' repositories of wav2vec 2.0 have it: network and feature extractor."""
    from transformers import Wav2Vec2FeatureExtractor

    with quiet():
        model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(sampling_rate=sample_rate, do_normalize=normalises).save_pretrained(folder)
    return folder


def save_recogniser(
    folder: Path, kind: str = "Wav2Vec2", letters: str = string.ascii_lowercase + "'", sample_rate: int = 16000, **fields: Any
) -> Path:
    """A CTC network that spells, with its tokenizer and feature extractor, saved into `folder`."""
    from transformers import Wav2Vec2CTCTokenizer

    words = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    save_ear(folder, wav2vec2(kind, "ForCTC", **{"vocab_size": len(words), "pad_token_id": 0, **fields}), sample_rate=sample_rate)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    with quiet():
        Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


def save_clap(folder: Path, **extractor: Any) -> Path:
    """A ClapModel without fusion for sounds of 1 s at 48 kHz, with its tokenizer and feature extractor, saved into `folder`."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaTokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", *LETTERS]
    text: dict[str, Any] = dict(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=80, bos_token_id=0, pad_token_id=1, eos_token_id=2, projection_dim=16,
    )  # fmt: skip
    ears = dict(
        spec_size=32, num_mel_bins=8, patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2],
        num_hidden_layers=2, window_size=2, num_classes=2, projection_dim=16,
    )  # fmt: skip
    model: Any = seeded(lambda: ClapModel(ClapConfig(text_config=text, audio_config=ears, projection_dim=16)))
    said: dict[str, Any] = dict(feature_size=8, max_length_s=1, truncation="rand_trunc", padding="repeatpad")
    with quiet():
        model.save_pretrained(folder)
        RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77).save_pretrained(folder)
        ClapFeatureExtractor(**{**said, **extractor}).save_pretrained(folder)
    return folder
