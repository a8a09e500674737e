"""Train the embedded speech model `digits`, its recogniser and its judge of quality, on speech that espeak-ng makes.

    apt install espeak-ng
    python scripts/train_digits.py --threads 1            # stages: speech vae recogniser quality flow evaluate

The model hears three voices; the recogniser and the judge hear others, at other speeds. One seed, the same files at every run on one
machine with the same number of threads and the same espeak-ng.
"""

# diffusers' annotations are wrong in these places
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from train_shapes import start, tidy, train_parts

from diffalign import digits
from diffalign.data import read_prompts
from diffalign.digits import RATE, SAMPLES, VOICES, WORDS
from diffalign.evaluate import sample, score
from diffalign.inputs import named_rewards
from diffalign.models import load_pipeline
from diffalign.pipelines.longcat_audio import LongCatAudio

STAGES = ("speech", "vae", "recogniser", "quality", "flow", "evaluate")
ESPEAK = {"man": ("en-us+m3", 40), "woman": ("en-us+f2", 50), "child": ("en-us+f5", 85)}  # espeak-ng's voice, and its pitch
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-us-nyc")
SPEAKERS = (
    "m1", "m2", "m4", "m5", "m6", "m7", "m8", "f1", "f3", "f4", "Andy", "Annie", "Alicia", "belinda", "caleb", "Denis", "Diogo", "Gene",
    "Lee", "linda", "max", "Michael", "pablo", "steph", "zac", "grandpa",
)  # fmt: skip
TAKES, OTHERS = 8, 12_000  # recordings of each prompt by the model's voices, and of the others in all
LEVEL = 0.08  # root mean square of a recording
STEPS = {"vae": 2000, "recogniser": 2500, "quality": 600, "flow": 3200}
LEARNING_RATE = {"vae": 2e-3, "recogniser": 1.5e-3, "quality": 1e-3, "flow": 1.5e-3}
CROP, WINDOWS, KL = 2048, (64, 128, 256, 512, 1024), 1e-2
LATENT, WIDTH, DEPTH, HEADS, TEXT = 16, 128, 4, 4, 64
DROPPED = 0.1  # empty conditions
NOISY, NOISE = 0.3, (0.2, 0.5)  # share of the model's recordings with noise, as found ones are; its level over the speech's


class Speech(NamedTuple):
    """Recordings (N, 8192), and of each the voice that it is of and what is said."""

    waves: Tensor
    voices: list[str]
    said: list[str]

    @staticmethod
    def load(path: Path) -> Speech:
        held = torch.load(path, weights_only=True)
        return Speech(held["waves"].float() / 32767, held["voices"], held["said"])

    def save(self, path: Path) -> None:
        torch.save({"waves": (self.waves * 32767).round().to(torch.int16), "voices": self.voices, "said": self.said}, path)


def say(text: str, voice: str, speed: int, pitch: int) -> Tensor:
    """What espeak-ng says, at 8 kHz, from its beginning to its end."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    loud = torch.tensor(np.frombuffer(wav[44:], dtype=np.int16).astype(np.float32) / 32768)  # 22,050 Hz
    spectrum, n = torch.fft.rfft(loud.double()), round(len(loud) * RATE / 22_050)
    wave = torch.fft.irfft(spectrum[: n // 2 + 1], n=n).float() * (n / len(loud))
    sounding = (wave.abs() > 0.01).nonzero()
    return wave[max(0, int(sounding[0]) - 80) : int(sounding[-1]) + 160]


def record(wanted: Sequence[tuple[str, str, str, int, int]], rng: Generator) -> Speech:
    """Recordings of (voice, words, espeak-ng's voice, speed, pitch), one level, after a short silence; without those that are too long."""
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(lambda take: say(take[1], *take[2:]), wanted))
    waves, kept = list[Tensor](), list[tuple[str, str]]()
    for wave, (voice, words, *_) in zip(spoken, wanted, strict=True):
        if len(wave) > SAMPLES:
            continue
        lead = int(torch.randint(min(400, SAMPLES - len(wave)) + 1, (), generator=rng))
        level = (wave * (LEVEL / wave.square().mean().sqrt())).clamp(-0.99, 0.99)
        waves.append(F.pad(level, (lead, SAMPLES - lead - len(wave))))
        kept.append((voice, words))
    return Speech(torch.stack(waves), *map(list, zip(*kept, strict=True)))


def make_speech(work: Path, seed: int) -> None:
    rng = start(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    train, _ = digits.split()
    own = [
        (voice, words, ESPEAK[voice][0], between(185, 230), ESPEAK[voice][1] + between(-6, 6))
        for voice, words in train
        for _ in range(TAKES)
    ]
    every = digits.transcripts()

    def other() -> tuple[str, str, str, int, int]:
        words = every[between(0, len(every) - 1)] if between(1, 4) > 1 else WORDS[between(0, len(WORDS) - 1)]
        voice = f"{ACCENTS[between(0, len(ACCENTS) - 1)]}+{SPEAKERS[between(0, len(SPEAKERS) - 1)]}"
        return voice, words, voice, between(160, 300), between(15, 90)

    work.mkdir(parents=True, exist_ok=True)
    record(own, rng).save(work / "own.pt")
    record([other() for _ in range(OTHERS)], rng).save(work / "others.pt")


def spectral(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far two batches of waves (B, N) are apart: magnitudes and their logarithms at several resolutions, and the waves themselves."""
    total = 5 * (ours - theirs).abs().mean()
    for n in WINDOWS:
        window = torch.hann_window(n)
        s, t = (torch.stft(x, n, n // 4, window=window, return_complex=True).abs().clamp(min=1e-5) for x in (ours, theirs))
        floor = 3e-3 * n**0.5
        far = (s - t).abs().mean() / t.mean().clamp(min=1e-3) + ((s + floor).log() - (t + floor).log()).abs().mean()
        total = total + far / len(WINDOWS)
    return total


def train_vae(work: Path, output: Path, seed: int) -> None:
    """A VAE of waves at 62.5 latents a second, on all the voices."""
    from diffusers import LongCatAudioDiTVae

    rng = start(seed)
    own, others = (Speech.load(work / f"{name}.pt").waves for name in ("own", "others"))
    waves = torch.cat([own.repeat(2, 1), others])
    vae = LongCatAudioDiTVae(
        channels=16, c_mults=[2, 4, 8], strides=[4, 4, 8], latent_dim=LATENT, encoder_latent_dim=2 * LATENT, act_fn="snake",
        downsampling_ratio=128, sample_rate=RATE, scale=1.0,
    )  # fmt: skip

    def loss() -> Tensor:
        at = torch.randint(len(waves), (16,), generator=rng)
        begin = torch.randint(SAMPLES - CROP, (16,), generator=rng)
        x = torch.stack([waves[i, b : b + CROP] for i, b in zip(at, begin, strict=True)])
        mean, spread = vae.encoder(x[:, None]).chunk(2, 1)
        std = F.softplus(spread) + 1e-4
        y = vae.decoder(mean + std * torch.randn(mean.shape, generator=rng))[:, 0]
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return spectral(y, x) + KL * kl

    train_parts("vae", STEPS["vae"], LEARNING_RATE["vae"], {"vae": vae}, work, loss)


def letters() -> list[str]:
    """The recogniser's characters: padding, which is CTC's blank too, the gap between words, and the letters of the words."""
    return ["<pad>", "|", *sorted(set("".join(WORDS)))]


def altered(waves: Tensor, rng: Generator) -> Tensor:
    """Recordings (B, N) made quieter or louder, shifted, coloured and noisy, each in its own way; of mean 0 and deviation 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    n = len(waves)
    shifts = torch.randint(-400, 400, (n,), generator=rng).tolist()
    waves = torch.stack([wave.roll(shift) for wave, shift in zip(waves, shifts, strict=True)])
    spectrum = torch.fft.rfft(waves)
    f, tilt = torch.linspace(0, 1, spectrum.shape[1]), 0.5 * normal(n, 3, 1)
    gain = torch.exp(tilt[:, 0] * (2 * f - 1) + tilt[:, 1] * torch.cos(2 * torch.pi * f) + tilt[:, 2] * torch.cos(4 * torch.pi * f))
    noise = LEVEL * torch.exp(4 * torch.rand(n, 1, generator=rng) - 6)
    waves = torch.fft.irfft(spectrum * gain, n=SAMPLES) + noise * normal(n, SAMPLES)
    return standardised(waves)


def standardised(waves: Tensor) -> Tensor:
    """As Wav2Vec2FeatureExtractor has it."""
    return (waves - waves.mean(1, keepdim=True)) / (waves.var(1, keepdim=True, correction=0) + 1e-7).sqrt()


def hearing(**more: Any) -> Any:
    """The configuration of a tiny wav2vec 2.0: 50 frames a second."""
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, conv_dim=(48, 64, 96, 96),
        conv_kernel=(10, 8, 4, 4), conv_stride=(5, 4, 4, 2), num_feat_extract_layers=4, feat_extract_norm="layer", conv_bias=True,
        do_stable_layer_norm=True, num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4, feat_proj_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False, pad_token_id=0, **more,
    )  # fmt: skip


def listener(folder: Path) -> None:
    """What the networks that hear are told beside their weights: the rate, and the characters."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters())}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), unk_token="<pad>", bos_token=None, eos_token=None, do_lower_case=True).save_pretrained(
        folder
    )
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=False).save_pretrained(folder)


def train_recogniser(work: Path, output: Path, seed: int) -> None:
    """CTC on letters, of voices that the model does not have."""
    from transformers import Wav2Vec2ForCTC

    rng, speech = start(seed + 1), Speech.load(work / "others.pt")
    number = {letter: i for i, letter in enumerate(letters())}
    spelled = [torch.tensor([number[c] for c in words.replace(" ", "|")]) for words in speech.said]
    network = Wav2Vec2ForCTC(hearing(vocab_size=len(number), ctc_loss_reduction="mean", ctc_zero_infinity=False))

    def loss() -> Tensor:
        at = torch.randint(len(spelled), (32,), generator=rng).tolist()
        scores = network(altered(speech.waves[at], rng)).logits.log_softmax(-1).transpose(0, 1)
        texts = [spelled[i] for i in at]
        lengths = torch.tensor([len(text) for text in texts])
        return F.ctc_loss(scores, torch.cat(texts), torch.full((len(at),), len(scores)), lengths)

    train_parts("recogniser", STEPS["recogniser"], LEARNING_RATE["recogniser"], {"recogniser": network}, output, loss)
    listener(output / "recogniser")


def degraded(waves: Tensor, vae: Any, rng: Generator) -> tuple[Tensor, Tensor]:
    """Recordings (B, N) worsened by noise, in the wave and in the latents, each to its own degree; and that degree (B,) from 0 to 1."""
    n = len(waves)
    degree = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) > 0.15)
    share = torch.rand(n, generator=rng)  # of the worsening, the latents'
    with torch.no_grad():
        latents = vae.encode(waves[:, None], sample_posterior=False).latents
        spread = (2.0 * degree * share)[:, None, None] * latents.std()
        waves = vae.decode(latents + spread * torch.randn(latents.shape, generator=rng)).sample[:, 0]
    return waves + (LEVEL * degree * (1 - share))[:, None] * torch.randn(waves.shape, generator=rng), degree


def train_quality(work: Path, output: Path, seed: int) -> None:
    """How clean speech is, from 1 to 5, of voices that the model does not have: what listening tests call a mean opinion."""
    from diffusers import LongCatAudioDiTVae
    from transformers import Wav2Vec2ForSequenceClassification

    rng, speech = start(seed + 2), Speech.load(work / "others.pt")
    vae = LongCatAudioDiTVae.from_pretrained(work / "vae", dtype=torch.float32).eval()
    network = Wav2Vec2ForSequenceClassification(hearing(num_labels=1, classifier_proj_size=64))

    def loss() -> Tensor:
        waves, degree = degraded(speech.waves[torch.randint(len(speech.waves), (16,), generator=rng)], vae, rng)
        return F.mse_loss(network(standardised(waves)).logits[:, 0], 5 - 4 * degree)

    train_parts("quality", STEPS["quality"], LEARNING_RATE["quality"], {"quality": network}, output, loss)
    listener(output / "quality")


def make_tokenizer() -> Any:
    """A word is a token, and so is every letter, for words that the model has never heard."""
    from transformers import T5Tokenizer

    known = [*WORDS, *(f"{voice}:" for voice in VOICES)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0), *((f"▁{word}", -2.0) for word in known)]
    tokenizer = T5Tokenizer(vocab=[*vocab, *((c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz:")], extra_ids=0)
    tokenizer.model_max_length = 16
    assert tokenizer.tokenize(digits.prompt("man", "seven go")) == ["▁man:", "▁seven", "▁go"]
    return tokenizer


def as_found(waves: Tensor, rng: Generator) -> Tensor:
    """Recordings (N, 8192), a share of them with noise: what there is to be learned is to leave it out."""
    level = LEVEL * torch.empty(len(waves), 1).uniform_(*NOISE, generator=rng) * (torch.rand(len(waves), 1, generator=rng) < NOISY)
    return (waves + level * torch.randn(waves.shape, generator=rng)).clamp(-0.99, 0.99)


def train_flow(work: Path, output: Path, seed: int) -> None:
    """The transformer and its text encoder, on the recordings of the three voices; then the whole pipeline's folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatAudioDiTPipeline, LongCatAudioDiTTransformer, LongCatAudioDiTVae
    from transformers import UMT5Config, UMT5EncoderModel

    rng, speech = start(seed), Speech.load(work / "own.pt")
    vae = LongCatAudioDiTVae.from_pretrained(work / "vae", dtype=torch.float32).eval()
    vae.register_to_config(scale=1.0)
    with torch.no_grad():
        parts = [vae.encode(part[:, None], sample_posterior=False).latents for part in as_found(speech.waves, rng).split(64)]
    latents = torch.cat(parts).transpose(1, 2)
    vae.register_to_config(scale=round(latents.std().item(), 4))
    latents = latents / vae.config.scale

    tokenizer = make_tokenizer()
    asked = [digits.prompt(*pair) for pair in zip(speech.voices, speech.said, strict=True)]
    words = tokenizer(asked, padding="longest", return_tensors="pt")
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0, is_encoder_decoder=False,
        )
    )  # fmt: skip
    network = LongCatAudioDiTTransformer(
        dit_dim=WIDTH, dit_depth=DEPTH, dit_heads=HEADS, dit_text_dim=TEXT, latent_dim=LATENT, use_latent_condition=False
    )

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        """As the pipeline does it, with a graph."""
        found = text(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        deep, shallow = (F.layer_norm(x, (TEXT,), eps=1e-6) for x in (found.last_hidden_state, found.hidden_states[0]))
        return deep + shallow

    def loss() -> Tensor:
        at = torch.randint(len(latents), (32,), generator=rng)
        longer = int(torch.randint(3, (), generator=rng))  # padding reaches the network's convolutions over the text: it is to know some
        ids, mask = (F.pad(x[at], (0, longer)) for x in (words.input_ids, words.attention_mask))
        heard = torch.rand(32, 1, 1, generator=rng) > DROPPED
        noise = torch.randn(latents[at].shape, generator=rng)
        t = torch.sigmoid(torch.randn(32, 1, 1, generator=rng))
        predicted = network(
            hidden_states=(1 - t) * latents[at] + t * noise,
            encoder_hidden_states=encode(ids, mask) * heard,
            encoder_attention_mask=mask.bool(),
            timestep=1 - t[:, 0, 0],  # the network is told how much of x_0 there is, and predicts the way there
            attention_mask=torch.ones(latents[at].shape[:2], dtype=torch.bool),
        ).sample
        return (predicted - (latents[at] - noise)).square().mean()

    train_parts("flow", STEPS["flow"], LEARNING_RATE["flow"], {"transformer": network, "text_encoder": text}, output, loss)
    pipeline = LongCatAudioDiTPipeline(
        vae.half(),
        UMT5EncoderModel.from_pretrained(output / "text_encoder", dtype=torch.float16),
        tokenizer,
        LongCatAudioDiTTransformer.from_pretrained(output / "transformer", dtype=torch.float16),
        FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )
    pipeline.save_pretrained(output)
    tidy(output)
    (output / "prompts").mkdir(exist_ok=True)
    for name, pairs in zip(("train", "heldout"), digits.split(), strict=True):
        lines = [json.dumps({"prompt": digits.prompt(*pair), "transcript": pair[1]}) for pair in pairs]
        (output / "prompts" / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))


def measure(output: Path) -> None:
    """Every number that `docs/digits.md` states of the model, printed and written to `docs/digits-metrics.json`."""
    rng = start(100)
    held, rewards = read_prompts(str(output / "prompts" / "heldout.jsonl")), named_rewards(["digits-wer", "digits-ctc", "digits-quality"])
    wanted = [(voice, words, ESPEAK[voice][0], 205, ESPEAK[voice][1]) for voice, words in digits.split()[1]]
    recorded, pipe = record(wanted, rng).waves, load_pipeline(str(output))
    policy = LongCatAudio.of(pipe, guidance_scale=1.0, audio_seconds=SAMPLES / RATE, max_sequence_length=16)

    def judged(waves: Tensor) -> dict[str, float]:
        return {reward.name: float(score(reward, waves, held, policy, batch_size=36).mean()) for reward in rewards}

    with torch.no_grad():
        through = policy.decode(policy.embed(recorded))
        worsened = recorded + LEVEL * torch.randn(recorded.shape, generator=rng)
    metrics: dict[str, Any] = {"recordings": judged(recorded), "through the VAE": judged(through), "with noise as loud": judged(worsened)}
    for guidance in (1.0, 2.0, 4.0):
        policy = LongCatAudio.of(pipe, guidance_scale=guidance, audio_seconds=SAMPLES / RATE, max_sequence_length=16)
        draws = [judged(sample(policy, held, steps=10, seed=seed, batch_size=36)) for seed in range(4)]
        metrics[f"guidance {guidance:g}"] = {name: [draw[name] for draw in draws] for name in draws[0]}
    metrics["MB"] = round(sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) / 1e6, 2)
    text = json.dumps(metrics, indent=1)
    print(text, flush=True)
    Path("docs/digits-metrics.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="recordings, and what is trained but not shipped")
    parser.add_argument("--output", type=Path, default=Path("diffalign/assets/digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "speech" in args.stage and shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed: apt install espeak-ng.")
    for stage in args.stage:
        match stage:
            case "speech":
                make_speech(args.work, args.seed)
            case "vae":
                train_vae(args.work, args.output, args.seed)
            case "recogniser":
                train_recogniser(args.work, args.output, args.seed)
            case "quality":
                train_quality(args.work, args.output, args.seed)
            case "flow":
                train_flow(args.work, args.output, args.seed)
            case _:
                measure(args.output)


if __name__ == "__main__":
    main()
