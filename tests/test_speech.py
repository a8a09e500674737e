"""Rewards on what is said: CTC's likelihood against its definition, error rates against counts by hand, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_networks import spread
from torch import Tensor

from diffalign.composing import compose
from diffalign.contract import CheckedReward
from diffalign.data import SpokenPrompt
from diffalign.errors import InputError
from diffalign.inputs import check_read
from diffalign.registry import find
from diffalign.rewards import hearing, tiny
from diffalign.rewards.hearing import Ear, Letters
from diffalign.rewards.sound import Loudness
from diffalign.rewards.speech import CTC, ErrorRate, edits, normal
from diffalign.rewards.weights import quiet
from diffalign.types import Prompts, SoundReward

KINDS = ("Wav2Vec2", "Hubert", "WavLM")
THREE = Prompts(("one", "two", "three"))


def sounds(count: int, samples: int, seed: int = 0) -> Tensor:
    return torch.rand(count, samples, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def recogniser(folder: Path, kind: str = "Wav2Vec2", letters: str = "abcdefghijklmnopqrstuvwxyz'", **fields: Any) -> Path:
    """One whose weights are large enough for a mistake to show."""
    from transformers import AutoModelForCTC

    tiny.save_recogniser(folder, kind, letters, **fields)
    spread(AutoModelForCTC.from_pretrained(folder), 0.3).save_pretrained(folder)
    return folder


def save_whisper(folder: Path, languages: tuple[str, ...] = ("en", "de")) -> Path:
    """A WhisperForConditionalGeneration of 30 s at 16 kHz with its tokenizer of bytes and feature extractor, saved into `folder`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(f"<|{x}|>" for x in languages),
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    vocabulary = {word: i for i, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    marks: dict[str, Any] = dict(pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start)
    config = WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_target_positions=40, suppress_tokens=None,
        begin_suppress_tokens=None, **marks,
    )  # fmt: skip
    model: Any = tiny.seeded(lambda: WhisperForConditionalGeneration(config)).eval()
    model.generation_config = GenerationConfig(
        is_multilingual=bool(languages), no_timestamps_token_id=vocabulary["<|notimestamps|>"], max_length=40,
        lang_to_id={f"<|{x}|>": vocabulary[f"<|{x}|>"] for x in languages},
        task_to_id={x: vocabulary[f"<|{x}|>"] for x in ("translate", "transcribe")}, **marks,
    )  # fmt: skip
    with quiet():
        model.save_pretrained(folder)
        tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
        tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
        tokenizer.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return folder


def by_definition(log_probs: Tensor, wanted: list[int]) -> Tensor:
    """log p of (frames, alphabet): the sum over all paths that say `wanted` once repetitions, then blanks (0), are gone."""
    paths = itertools.product(range(log_probs.shape[1]), repeat=len(log_probs))
    good = [path for path in paths if [k for k, _ in itertools.groupby(path) if k] == wanted]
    return torch.stack([torch.stack([log_probs[t, k] for t, k in enumerate(path)]).sum() for path in good]).logsumexp(0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_and_its_gradient_are_those_of_the_definition(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    folder = recogniser(tmp_path, kind, "ab")
    ours, theirs = sounds(2, 600).requires_grad_(), sounds(2, 600).requires_grad_()  # 3 frames
    network: Any = AutoModelForCTC.from_pretrained(folder).eval()
    heard = torch.stack([(x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt() for x in theirs])
    by_processor = AutoProcessor.from_pretrained(folder)(
        list(theirs.detach().numpy()), sampling_rate=16000, return_tensors="pt"
    ).input_values
    assert torch.allclose(heard, by_processor, atol=1e-5)
    log_probs = network(heard).logits.log_softmax(-1)
    assert log_probs.shape == (2, 3, 7)
    a, b = (network.config.vocab_size - 2, network.config.vocab_size - 1)
    wanted = torch.stack([by_definition(log_probs[0], [a, b]) / 2, by_definition(log_probs[1], [b, b]) / 2])
    found = CTC(checkpoint=folder)(ours, Prompts(("ab", "bb")))
    assert wanted.std() > 1e-2
    assert torch.allclose(found, wanted, atol=1e-5)
    slope, right = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((found, ours), (wanted, theirs)))
    assert right.abs().max() > 1e-3
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_batch_is_its_sounds_one_by_one(kind: str, norm: str, tmp_path: Path) -> None:
    """Also with group norm, whose statistics run over the time: sounds of a batch are of one length, and nothing is padded."""
    folder = recogniser(tmp_path, kind, feat_extract_norm=norm)
    media = sounds(3, 4000)
    media[1] *= 0.01
    reward = CTC(checkpoint=folder, batch_size=3)
    whole = reward(media, THREE)
    single = torch.cat([reward(media[i : i + 1], THREE[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, single, atol=1e-5)
    grad, parts = (media.clone().requires_grad_() for _ in range(2))
    slope = torch.autograd.grad(reward(grad, THREE).sum(), grad)[0]
    right = torch.autograd.grad(replace(reward, batch_size=2)(parts, THREE).sum(), parts)[0]
    assert torch.allclose(slope, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    half = replace(reward, precision="bf16")(media, THREE)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert torch.allclose(half, whole, rtol=0.1)


def test_going_up_the_gradient_makes_the_words_likelier(tmp_path: Path) -> None:
    reward, media = CTC(checkpoint=recogniser(tmp_path)), sounds(1, 4000)
    start = reward(media, Prompts(("one",)))
    for _ in range(5):
        media = media.detach().requires_grad_()
        slope = torch.autograd.grad(reward(media, Prompts(("one",))).sum(), media)[0]
        media = (media + 0.01 * slope / slope.abs().max()).clamp(-1, 1)
    assert reward(media.detach(), Prompts(("one",))) > start + 0.05


def test_the_transcript_counts_and_not_the_text(tmp_path: Path) -> None:
    reward, media = CTC(checkpoint=recogniser(tmp_path)), sounds(1, 4000)
    spoken = reward(media, Prompts(("a calm voice",), transcript=("one",)))
    assert torch.equal(spoken, reward(media, Prompts(("one",))))
    assert not torch.equal(spoken, reward(media, Prompts(("a calm voice",))))
    assert torch.equal(spoken, reward(media, Prompts(("ONE.",))))


def test_silence_has_a_score_and_a_gradient_that_are_finite(tmp_path: Path) -> None:
    media = torch.zeros(1, 4000, requires_grad=True)
    scores = CTC(checkpoint=recogniser(tmp_path))(media, Prompts(("one",)))
    assert scores.isfinite().all()
    assert (scores < 0).all()
    assert torch.autograd.grad(scores.sum(), media)[0].isfinite().all()


def test_frozen_and_without_a_graph_where_none_is_asked_for(tmp_path: Path) -> None:
    reward = CTC().tiny(tmp_path)
    assert not reward(sounds(1, 4000), Prompts(("one",))).requires_grad
    with torch.no_grad():
        assert not reward(sounds(1, 4000).requires_grad_(), Prompts(("one",))).requires_grad
    assert not any(p.requires_grad for p in reward.recogniser.network.parameters())
    assert not reward.recogniser.network.training


@pytest.mark.parametrize("make", [CTC, ErrorRate])
def test_sounds_that_are_none_are_refused(make: Any, tmp_path: Path) -> None:
    reward, good = make(model="digits").tiny(tmp_path), sounds(2, 4000)
    nan = good.clone()
    nan[1, 7] = float("nan")
    two = THREE[:2]
    for media, says in (
        (nan, r"takes numbers in \[-1, 1\]"),
        (good * 32768, r"to 2\.62.e\+04: this reward takes numbers in \[-1, 1\]"),
        (good[0], r"Sounds of shape \(4000,\)"),
        (good[:, None], r"Sounds of shape \(2, 1, 4000\)"),
        ((good * 100).to(torch.int16), "torch.int16"),
        (good[:, :0], r"shape \(2, 0\)"),
        (good[:1], "1 sounds and 2 prompts"),
        (good[:, :100], "too short, 100 samples at 16000 Hz"),
    ):
        with pytest.raises(InputError, match=says):
            reward(media, two)


def test_a_transcript_of_more_characters_than_frames_is_refused(tmp_path: Path) -> None:
    reward = CTC().tiny(tmp_path)
    assert reward(sounds(1, 600), Prompts(("abc",))).isfinite().all()  # 3 frames
    for text, least in (("abcd", 4), ("abb", 4), ("a b c", 5)):
        with pytest.raises(
            InputError, match=f"'{text}' takes {least} frames at least, and a sound of 0.04 s has 3: make the sounds longer"
        ):
            reward(sounds(1, 600), Prompts((text,)))


def letters(known: str, delimiter: bool = True) -> Letters:
    return Letters({c: i for i, c in enumerate(known, 2)}, 0, 1 if delimiter else None)


def test_how_texts_are_spelt() -> None:
    upper = letters("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    read = {i: c for c, i in upper.known.items()} | {1: "|"}

    def spelt(text: str) -> str:
        return "".join(read[i] for i in upper.spell(text))

    assert spelt("  It\u2019s  one,\ttwo! ") == "IT'S|ONE|TWO"
    assert spelt("well-known\u2014\u201cA\u201d") == "WELL|KNOWN|A"
    assert spelt("one - two") == "ONE|TWO"
    assert letters("cafe\u0301"[:3] + "\u00e9").spell("cafe\u0301") == [2, 3, 4, 5]  # composed before it is looked up
    assert letters("ab", delimiter=False).spell("a b") == [2, 3]
    assert upper.lacking("7 + 8%, \u00df") == "7+8%\u00df"
    with pytest.raises(InputError, match="does not know 7 8 in '7 and 8': write it in the letters"):
        upper.spell("7 and 8")
    for nothing in ("", " ", "...", "\u2014"):
        with pytest.raises(InputError, match="There is nothing to be said"):
            upper.spell(nothing)


def test_what_a_path_says() -> None:
    known = letters("abl")
    for path, says in (([0, 2, 2, 0, 3], "ab"), ([4, 4, 0, 4, 4], "ll"), ([1, 2, 1, 0, 1, 3, 1], "a b"), ([0, 0], ""), ([9, 2], "a")):
        assert known.read(torch.tensor(path)) == says


def test_a_recogniser_that_does_not_fit_is_named(tmp_path: Path) -> None:
    import json

    def wrong(name: str, change: Any, file: str = "config.json") -> Path:
        folder = tiny.save_recogniser(tmp_path / name)
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))
        return folder

    words = tiny.save_recogniser(tmp_path / "words")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "|", "AA", "BB"))}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    for folder, says in (
        (wrong("type", lambda c: c.update(model_type="bert")), "is of the type 'bert': this reward takes wav2vec2, hubert, wavlm"),
        (wrong("blank", lambda c: c.update(pad_token_id=3)), "different blanks"),
        (wrong("adapter", lambda c: c.update(adapter_attn_dim=16)), "an adapter for each language"),
        (words, "no single characters"),
        (tmp_path / "none", "There is no folder"),
    ):
        with pytest.raises(InputError, match=says):
            CTC(checkpoint=folder).open()
    (tmp_path / "blank" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"The feature extractor in .* does not load"):
        CTC(checkpoint=tmp_path / "blank").open()


def test_a_checkpoint_without_the_mask_of_training_loads_and_one_without_its_head_does_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, media = recogniser(tmp_path), sounds(1, 4000)
    before = CTC(checkpoint=folder)(media, Prompts(("one",)))
    weights = load_file(folder / "model.safetensors")
    assert weights.pop("wav2vec2.masked_spec_embed") is not None
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(CTC(checkpoint=folder)(media, Prompts(("one",))), before)
    del weights["lm_head.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights: lm_head\.bias"):
        CTC(checkpoint=folder).open()


def test_waveforms_are_as_the_feature_extractor_says(tmp_path: Path) -> None:
    media = sounds(2, 500)
    assert torch.equal(Ear(16000, False)(media), media)
    assert torch.equal(Ear(16000, True)(torch.zeros(1, 50)), torch.zeros(1, 50))
    tiny.save_ear(tmp_path, tiny.wav2vec2(), 12000, normalises=False)
    assert Ear.of(tmp_path, 12000) == Ear(12000, False)
    with pytest.raises(InputError, match=r"hears 12000 Hz, and sample_rate is 16000: --reward\.sample-rate 12000"):
        Ear.of(tmp_path, 16000)


def test_edits_against_counts_by_hand() -> None:
    for found, wanted, count in (
        ("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("sunday", "saturday", 3),
        ("ab", "ba", 2),
    ):  # fmt: skip
        assert edits(found, wanted) == count
    assert edits(["the", "cat", "sat"], ["the", "bad", "cat"]) == 2


def test_what_is_compared() -> None:
    for text, plain in (
        ("Hello,  World!", "hello world"),
        ("It\u2019s 'quoted'", "it's quoted"),
        ("twenty-one \u2014 $5", "twenty one 5"),
        ("\u00bfQu\u00e9?", "qu\u00e9"),
        ("\uff21\uff22", "ab"),
        ("' - '", ""),
    ):
        assert normal(text) == plain


def test_error_rates_against_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = ["One too three.", "", "one two three four five six seven", "four"]
    prompts = Prompts(("one two three", "one two", "ONE, TWO!", "five"))
    monkeypatch.setattr(ErrorRate, "transcribe", lambda self, media: heard)
    monkeypatch.setattr(ErrorRate, "_alphabet", None)
    assert ErrorRate()(sounds(4, 100), prompts).tolist() == pytest.approx([-1 / 3, -1, -5 / 2, -1])
    # "one too three" to "one two three": one letter of 13; "four" to "five": three of four
    assert ErrorRate(unit="character")(sounds(4, 100), prompts).tolist() == pytest.approx([-1 / 13, -1, -26 / 7, -3 / 4])
    with pytest.raises(InputError, match=r"There is nothing to be said in '\.\.\.'"):
        ErrorRate()(sounds(1, 100), Prompts(("...",)))


def test_a_ctc_networks_transcript_is_its_best_path(tmp_path: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    folder, media = recogniser(tmp_path), sounds(2, 4000)
    processor: Any = AutoProcessor.from_pretrained(folder)
    network: Any = AutoModelForCTC.from_pretrained(folder).eval()
    inputs = processor(list(media.numpy()), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        wanted = processor.batch_decode(network(inputs).logits.argmax(-1))
    wanted = [" ".join(text.replace("<s>", "").replace("</s>", "").replace("<unk>", "").split()) for text in wanted]
    reward = ErrorRate(checkpoint=folder, batch_size=1)
    assert reward.transcribe(media) == wanted
    assert len(wanted[0]) > 3
    assert wanted[0] != wanted[1]
    assert reward(media, Prompts(tuple(wanted))).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("said", "lacks"), [("7", "7"), ("man: seven", "m a"), ("siete \u00f1", "\u00f1"), ("se\u200bven", r"U\+200B"), ("Five, SIX!", None)]
)
def test_what_a_ctc_recogniser_never_writes_is_named(said: str, lacks: str | None, tmp_path: Path) -> None:
    reward = ErrorRate(model="digits", sample_rate=8000)
    if lacks is None:
        reward.check_prompts(Prompts((said,)), 1.0)
    else:
        with pytest.raises(InputError, match=f"does not know {lacks} in '{said}': write it in the letters efghino"):
            reward.check_prompts(Prompts((said,)), 1.0)
        with pytest.raises(InputError, match=f"does not know {lacks} in"):
            reward(sounds(1, 8000), Prompts((said,)))
    reward.tiny(tmp_path).check_prompts(Prompts((said,)), 1.0)  # which is another network than the one that will hear


def test_prompts_of_which_some_have_no_transcript_are_refused_where_a_reward_hears_for_them() -> None:
    class Voice:
        path = module = property(lambda self: None)
        modality, takes, sample_rate, samples = "audio", (), 8000, 8000

        def unspeakable(self, transcript: str) -> str | None:
            return None

        encode = prior = predict = decode = embed = reference = save = unspeakable

    hears, mixed = CheckedReward(ErrorRate(model="digits", sample_rate=8000), "wer"), [SpokenPrompt("man: six", "six"), "five"]  # pyright: ignore[reportArgumentType]
    voice: Any = Voice()
    with pytest.raises(InputError, match="The prompt 'five' has no transcript, and others have one"):
        check_read([hears], mixed, voice)
    check_read([hears], mixed[:1], voice)
    check_read([hears], mixed[1:], voice)
    check_read([CheckedReward(Loudness(), "loudness")], mixed, voice)  # pyright: ignore[reportArgumentType]


def test_a_whispers_transcript_is_transformers_own(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    save_whisper(tmp_path)
    network: Any = spread(WhisperForConditionalGeneration.from_pretrained(tmp_path), 0.5)
    network.save_pretrained(tmp_path)
    processor: Any = WhisperProcessor.from_pretrained(tmp_path)
    media = sounds(2, 16000)
    features = processor(list(media.numpy()), sampling_rate=16000, return_tensors="pt").input_features
    ids = network.generate(features, language="de", task="transcribe", num_beams=1, do_sample=False, max_new_tokens=32)
    wanted = processor.batch_decode(ids, skip_special_tokens=True)
    reward: Any = ErrorRate(checkpoint=tmp_path, language="de", batch_size=1)
    assert reward.transcribe(media) == wanted
    assert any(wanted)
    scores = CheckedReward(replace(reward, unit="character", language=None), "cer")(media, replace(THREE[:2], sample_rate=16000))
    assert (scores <= 0).all()
    with pytest.raises(InputError, match=r"language is fr: the Whisper in .* is told one of de en"):
        replace(reward, language="fr").open()
    with pytest.raises(InputError, match=r"Whisper hears 30 s at once, and the sounds are 31\.0 s long"):
        reward(sounds(1, 31 * 16000), THREE[:1])
    english = save_whisper(tmp_path / "english", languages=())
    assert len(ErrorRate(checkpoint=english).transcribe(media)) == 2


@pytest.mark.parametrize("name", ["ctc", "wer", "cer", "digits-ctc", "digits-wer"])
def test_every_row_has_a_twin_of_its_class_that_scores(name: str, tmp_path: Path) -> None:
    made, preset = find("rewards", name)
    reward = made(**preset, batch_size=1)
    assert all(isinstance(thing, SoundReward) for thing in [reward])  # which reads the rate: no weights are loaded for that
    assert not {"recogniser", "_heard"} & set(vars(reward))
    twin = reward.tiny(tmp_path)
    checked = CheckedReward(twin, name)
    checked.open()
    media = sounds(2, 2 * twin.sample_rate).requires_grad_()
    scores = checked(media, Prompts(("a", "b"), transcript=("one", "two"), sample_rate=twin.sample_rate))
    assert (scores <= 0).all()
    assert twin.modality == "audio"
    assert scores.requires_grad == twin.differentiable
    assert scores[0] != scores[1]  # policy gradients need samples that differ
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6e6


@pytest.mark.parametrize("make", [CTC, ErrorRate])
def test_fields_that_cannot_be_are_refused(make: Any, tmp_path: Path) -> None:
    for fields, says in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "fp16"}, "precision is fp16"),
        ({"model": "digit"}, "model is digit: give digits, a Hub id user/model, or a folder with --reward.checkpoint"),
        ({"model": str(tmp_path)}, "--reward.checkpoint FOLDER"),
    ):
        with pytest.raises(InputError, match=says):
            make(**fields)
    with pytest.raises(InputError, match="unit is phoneme: give word or character"):
        ErrorRate(unit="phoneme")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="language is de: only a Whisper"):
        replace(ErrorRate(model="digits").tiny(tmp_path), language="de").open()


def test_the_embedded_recogniser_is_where_the_package_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hearing.RECOGNISER.parts[-4:] == ("diffalign", "assets", "digits", "recogniser")
    monkeypatch.setattr(hearing, "RECOGNISER", tiny.save_recogniser(tmp_path, sample_rate=8000))
    made, preset = find("rewards", "digits-ctc")
    reward = made(**preset)
    assert reward.sample_rate == 8000
    reward.check_prompts(Prompts(("seven",)), 1.0)
    several: Any = compose([{"reward": reward, "when": word, "label": word} for word in "ab"])
    several.check_prompts(Prompts(("a seven",)), 1.0)
    for asked in (reward, several):
        with pytest.raises(InputError, match="does not know 7"):
            asked.check_prompts(Prompts(("a", "b 7")), 1.0)
        with pytest.raises(InputError, match=r"'b sevens' takes 8 frames at least, and a sound of 0\.05 s has"):
            asked.check_prompts(Prompts(("a", "b sevens")), 0.05)
