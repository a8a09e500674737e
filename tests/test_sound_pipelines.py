"""Pipelines of sound as policies: diffusers' own waveforms, a decoder with a gradient, latents of sounds, LoRA files through peft alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from parity import perturb, policy_of, run, trainable
from peft import PeftModel
from torch import Generator, Tensor

from diffalign import registry
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.models import adapter_of
from diffalign.pipelines.tiny_sound import audioldm2, longcat_audio
from diffalign.sampling import noisy, transition, without_some_text
from diffalign.types import Condition, PicturePolicy, Policy, Prompts, SoundPolicy

PIPELINES: dict[str, Callable[[], Any]] = {
    "AudioLDM2": audioldm2,
    "AudioLDM2, speech": lambda: audioldm2(speech=True),
    "LongCat": longcat_audio,
}
DIFFUSION = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "DDIM, v": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    "Euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "DPM-Solver 1": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "solver_order": 1}),
}
FLOW = {"its own": {}, "shifted": {"shift": 3.0}, "from noise to data": {"invert_sigmas": False}}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TEXTS = ("a red fox", "two cats in the rain")
BRANCHES = [(1.0, "bad noise"), (5.0, None), (5.0, "bad noise")]  # guidance and negative prompt: without guidance there is none


@pytest.fixture(params=sorted(PIPELINES))
def make(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]


@functools.cache
def of(name: str) -> Any:
    """The plain policy of a twin, for tests that change nothing in it."""
    return policy_of(PIPELINES[name]())


@pytest.fixture(params=sorted(PIPELINES))
def policy(request: pytest.FixtureRequest) -> Any:
    return of(request.param)


def prompts_for(policy: Any, texts: tuple[str, ...] = TEXTS, said: tuple[str, ...] = ("one two", "six")) -> Prompts:
    return Prompts(texts, transcript=said if "transcript" in policy.takes else None)


@torch.no_grad()
def sounds(policy: Any, prompts: Prompts | None = None, **options: Any) -> Tensor:
    return policy.decode(run(policy, prompts_for(policy) if prompts is None else prompts, **options).final)


@torch.no_grad()
def own_sounds(policy: Any, prompts: Prompts | None = None, steps: int = 4, pipe: Any = None) -> Tensor:
    """What `pipe`, by default the policy's own, makes of each prompt by itself."""
    pipe, prompts = pipe or policy.pipe, prompts_for(policy) if prompts is None else prompts
    noise, rows = policy.prior(policy.encode(prompts), Generator().manual_seed(0)), list[Tensor]()
    for i, text in enumerate(prompts.text):
        given: dict[str, Any] = {"latents": noise[i : i + 1], "guidance_scale": policy.guidance_scale}
        given |= {"negative_prompt": [policy.negative_prompt]} if policy.negative_prompt is not None else {}
        given |= {} if prompts.transcript is None else {"transcription": [prompts.transcript[i]]}
        given |= {"audio_length_in_s": policy.samples / policy.sample_rate} if "vocoder" in pipe.components else {}
        found = pipe([text], num_inference_steps=steps, output_type="pt", **given).audios
        rows.append(found.flatten(1).clamp(-1, 1))
    return torch.cat(rows)


def test_every_pipeline_of_sound_of_the_registry_is_tested_here():
    named = {name for name in registry.PIPELINES if getattr(adapter_of(name), "modality", "image") == "audio"}
    assert named == {type(make()).__name__ for make in PIPELINES.values()}


@pytest.mark.parametrize(("guidance", "negative"), BRANCHES)
@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("speech", [False, True])
def test_sounds_of_audioldm2_are_those_of_its_own_call(speech: bool, name: str, guidance: float, negative: str | None):
    pipe, (scheduler, config) = audioldm2(speech=speech), DIFFUSION[name]
    pipe.scheduler = scheduler(**BETAS, **config)
    policy = policy_of(pipe, guidance_scale=guidance, negative_prompt=negative)
    theirs = own_sounds(policy)
    assert type(pipe.scheduler) is scheduler, "the pipeline keeps its own"
    torch.testing.assert_close(sounds(policy), theirs, rtol=0, atol=1e-4)
    assert theirs.shape == (2, 5120)
    assert theirs.std(1).min() > 0.01, "the sounds hold something to compare"


@pytest.mark.parametrize(("guidance", "negative"), BRANCHES)
@pytest.mark.parametrize("name", FLOW)
def test_sounds_of_longcat_are_those_of_its_own_call(name: str, guidance: float, negative: str | None):
    policy = policy_of(longcat_audio(**FLOW[name]), guidance_scale=guidance, negative_prompt=negative, audio_seconds=1)
    theirs = own_sounds(policy)
    torch.testing.assert_close(sounds(policy), theirs, rtol=0, atol=1e-4)
    assert theirs.shape == (2, 2000)
    assert theirs.std(1).min() > 0.01
    assert (theirs.abs() < 1).float().mean() > 0.9, "not for the most part clipped"


def test_a_scheduler_without_a_kernel_is_replaced_which_is_said():
    pipe = audioldm2()
    pipe.scheduler = diffusers.PNDMScheduler(**BETAS, timestep_spacing="leading")
    assert any("PNDMScheduler" in note and "DDIM" in note for note in policy_of(pipe).notes)
    assert not policy_of(audioldm2()).notes
    longcat = longcat_audio()
    longcat.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler, not DDIMScheduler"):
        policy_of(longcat)


@pytest.mark.parametrize("seconds", [0.1, 0.105])
def test_a_length_of_ones_own(seconds: float):
    policy = policy_of(audioldm2(), audio_seconds=seconds)
    assert policy.samples == math.floor(100 * seconds) * 160, "whole frames"
    torch.testing.assert_close(sounds(policy), own_sounds(policy), rtol=0, atol=1e-4)
    assert sounds(policy).shape == (2, policy.samples)


def test_what_is_no_length():
    with pytest.raises(InputError, match=r"shortest sound has 0\.02"):
        policy_of(audioldm2(), audio_seconds=0.01)
    with pytest.raises(InputError, match=r"makes sounds of 0\.1 to 30 s"):
        policy_of(longcat_audio(), audio_seconds=31)
    for pipe in (audioldm2(), longcat_audio()):
        with pytest.raises(InputError, match="height and width are of pictures"):
            policy_of(pipe, height=64)
        with pytest.raises(InputError, match="audio_seconds is -1"):
            policy_of(pipe, audio_seconds=-1)


def test_what_is_asked_for_matters(policy: Any):
    prompts = prompts_for(policy)
    others = [prompts_for(policy, texts=("a red cow", "two hens"))]
    others += [prompts_for(policy, said=("nine", "seven"))] if policy.takes else []
    for other in others:
        assert (sounds(policy, other) - sounds(policy, prompts)).abs().amax(1).min() > 1e-4


def test_a_row_does_not_depend_on_its_batch(policy: Any):
    three = prompts_for(policy, (*TEXTS, "a"), ("one two", "six", "forty"))
    condition = policy.encode(three)
    x_t, at = policy.prior(condition, Generator().manual_seed(0)), policy.path.schedule(4).now[1]
    together = policy.predict(x_t, at, condition)
    for i in range(3):
        torch.testing.assert_close(policy.predict(x_t[[i]], at, policy.encode(three[[i]])), together[[i]], rtol=0, atol=2e-5)
    torch.testing.assert_close(policy.predict(x_t[[2, 0]], at, Condition.join([condition[[2]], condition[[0]]])), together[[2, 0]])
    assert next(iter(condition.tensors)) == "encoder_hidden_states", "which a value network reads"


def test_decode_is_differentiable_and_embed_goes_back(policy: Any):
    shape = policy.prior(policy.encode(prompts_for(policy))).shape
    latents = (0.5 * torch.randn(shape)).requires_grad_()
    waveforms = policy.decode(latents)
    assert waveforms.shape == (2, policy.samples)
    assert torch.equal(waveforms, waveforms.clamp(-1, 1))
    gradient = torch.autograd.grad(waveforms.square().sum(), latents)[0]
    assert gradient.isfinite().all()
    assert (gradient.flatten(1) != 0).any(1).all()
    short = waveforms.detach()[:, : policy.samples - 7].requires_grad_()
    found = policy.embed(short)
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found.square().sum(), short)[0].isfinite().all()
    assert (policy.embed(waveforms) - policy.embed(-0.3 * waveforms.flip(1))).abs().max() > 1e-3


def test_it_is_a_policy_that_says_what_it_takes(policy: Any):
    assert isinstance(policy, Policy)
    assert isinstance(policy, SoundPolicy)
    assert isinstance(policy, PicturePolicy), "the fields are there, and the modality tells"
    assert policy.modality == "audio"
    speaks = policy is of("AudioLDM2, speech")
    assert policy.takes == (("transcript",) if speaks else ())
    lacking, said = Prompts(("a voice",)), Prompts(("a voice",), transcript=("one",))
    with pytest.raises(InputError, match="the prompts have none" if speaks else "says the text itself"):
        policy.encode(lacking if speaks else said)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("one, two!", None),
        ("One Two", None),
        ("café", "lacks 'é'"),
        ("5 €", "lacks '€'"),
        ("a" * 24, "it has 24 tokens, and the model says 23"),
    ],
)
def test_what_cannot_be_said(said: str, why: str | None):
    found = of("AudioLDM2, speech").unspeakable(said)
    assert found is None if why is None else found is not None and why in found


def test_words_that_longcats_tokenizer_lacks_are_named():
    said = of("LongCat").unspeakable
    assert said("Two cats") is said('"two" & cats!') is None, "as the pipeline brings texts to lower case"
    assert said("Two CAFÉS at 7, cafés") == "its tokenizer lacks 'cafés', '7,'"
    assert said("two… cats\u200b") == r"its tokenizer lacks 'two…', 'cats\u200b'", "its token for what is unknown is heard"
    assert said("a " * 600) == "it has 1201 tokens, and the model says 512 at most"
    assert of("AudioLDM2").unspeakable("cafés") is None, "sounds of a text, which is not said"


def test_a_prompt_that_is_too_long_is_named():
    for pipe in (audioldm2(), longcat_audio()):
        policy = policy_of(pipe, max_sequence_length=12)
        policy.encode(Prompts(("a red fox",)))
        with pytest.raises(
            InputError, match=r"'a very long prompt of sound' has \d+ tokens, and 12 are kept of each: --max-sequence-length"
        ):
            policy.encode(Prompts(("a very long prompt of sound",)))


def test_longcats_texts_are_counted_before_they_are_cut_and_its_negative_prompt_is_read_too():
    short = longcat_audio()
    short.tokenizer.model_max_length = 12
    with pytest.raises(InputError, match=r"'a very long prompt of sound' has \d\d tokens, and the model reads 12 at most: write a shorter"):
        policy_of(short).encode(Prompts(("a very long prompt of sound",)))
    with pytest.raises(InputError, match=r"negative prompt 'a very long one' cannot be used: it has \d\d tokens, and the model says 12 at"):
        policy_of(short, negative_prompt="a very long one")
    with pytest.raises(InputError, match=r"negative prompt 'BAD' cannot be used: its tokenizer lacks 'BAD'. It is read as it stands"):
        policy_of(longcat_audio(), negative_prompt="BAD")
    with pytest.raises(InputError, match=r"'a bad and noisy one' has \d\d tokens, and 12 are kept of each"):
        policy_of(longcat_audio(), negative_prompt="a bad and noisy one", max_sequence_length=12).encode(Prompts(("a fox",)))


def test_dropped_text_is_the_unconditional_branch(policy: Any):
    prompts = prompts_for(policy)
    dropped, whole = without_some_text(policy, prompts, 1.0, Generator().manual_seed(0)), policy.encode(prompts)
    assert whole.null is not None
    x_t, at = policy.prior(whole, Generator().manual_seed(0)), policy.path.schedule(4).now[1]
    unconditional = policy.predict(x_t, at, Condition(whole.null))
    if policy is not of("AudioLDM2"):  # whose branch is padded to the prompt, which that of no text is not
        torch.testing.assert_close(policy.predict(x_t, at, dropped), unconditional)
    assert (policy.predict(x_t, at, dropped) - policy.predict(x_t, at, Condition(whole.tensors))).abs().max() > 1e-3


def test_the_lengths_that_the_network_reads_stay_on_the_cpu():
    """Read from a GPU they would hold up every call of the network."""
    assert of("LongCat").texts.on_cpu == ("lengths", "null.lengths")
    assert policy_of(longcat_audio(), guidance_scale=1.0).texts.on_cpu == ("lengths",)
    assert of("AudioLDM2").texts.on_cpu == ()


def test_text_is_encoded_once_and_another_negative_prompt_is_another(make: Any, tmp_path: Path):
    calls, found = list[str](), list[Condition]()
    for negative in (None, None, "bad"):
        policy = policy_of(make(), negative_prompt=negative)
        policy.shelve(tmp_path)
        encode = policy.texts.encode
        policy.texts.encode = lambda texts, encode=encode: (calls.append(texts[0]), encode(texts))[1]
        found.append(policy.encode(prompts_for(policy)))
    assert len(calls) == 2, "the first time, and for the negative prompt"
    for name, value in (found[0].null or {}).items():
        assert torch.equal(value, (found[1].null or {})[name])
    assert any(not torch.equal(value, (found[2].null or {})[name]) for name, value in (found[0].null or {}).items())


def test_a_replayed_step_has_the_same_log_probability(make: Any):
    policy = policy_of(make())
    policy.adapt(LoRA(rank=2))
    perturb(policy)
    with torch.no_grad():
        taken = run(policy, prompts_for(policy), eta=1.0)
    for i in range(len(taken.log_probs)):
        action = transition(
            policy, taken.states[i], taken.schedule.now[i], taken.schedule.then[i], taken.condition, noisy(policy.path, 1.0)
        )
        log_prob = action.log_prob(taken.states[i + 1])
        assert torch.equal(log_prob, taken.log_probs[i])
        assert log_prob.requires_grad == bool(taken.actions[i])
    assert taken.actions.sum() >= 3


def test_the_saved_lora_loads_through_peft_into_the_plain_pipeline(make: Any, tmp_path: Path):
    policy = policy_of(make())
    policy.adapt(LoRA(rank=2, alpha=5))
    base = sounds(policy_of(make()))
    assert torch.equal(sounds(policy), base), "a new LoRA changes nothing"
    perturb(policy)
    with policy.reference():
        assert torch.equal(sounds(policy), base)
    ours = sounds(policy)
    assert (ours - base).abs().max() > 0.003
    policy.save(tmp_path / "one")
    policy.save(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pipe = make()
    network = PeftModel.from_pretrained(getattr(pipe, policy.component), tmp_path / "one")
    setattr(pipe, policy.component, network)
    torch.testing.assert_close(own_sounds(policy, pipe=pipe), ours, rtol=0, atol=1e-4)
    setattr(pipe, policy.component, network.merge_and_unload())
    torch.testing.assert_close(own_sounds(policy, pipe=pipe), ours, rtol=0, atol=1e-4)
    again = policy_of(make())
    again.adapt(LoRA(init=str(tmp_path / "one")))
    assert torch.equal(sounds(again), ours)
    assert len(trainable(again)) == len(trainable(policy)) > 0


def test_a_lora_that_is_none_or_of_another_network(tmp_path: Path):
    policy = policy_of(audioldm2())
    policy.adapt(LoRA(rank=2))
    policy.save(tmp_path)
    for pipe in (longcat_audio(), audioldm2(unet={"block_out_channels": (16, 48)})):
        with pytest.raises(InputError, match=r"lora.init: .* was made for another network"):
            policy_of(pipe).adapt(LoRA(init=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no LoRA that can be read"):
        policy_of(audioldm2()).adapt(LoRA(init=str(tmp_path)))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"holds no adapter_config.json"):
        policy_of(audioldm2()).adapt(LoRA(init=str(tmp_path)))


def test_full_fine_tuning_keeps_the_base(make: Any, tmp_path: Path):
    policy = policy_of(make())
    base = sounds(policy)
    policy.unfreeze()
    perturb(policy, 0.02)
    after = sounds(policy)
    with policy.reference():
        assert torch.equal(sounds(policy), base)
    assert not torch.equal(after, base)
    policy.save(tmp_path)
    pipe = make()
    setattr(pipe, policy.component, type(policy.module).from_pretrained(tmp_path))
    torch.testing.assert_close(own_sounds(policy, pipe=pipe), after, rtol=0, atol=1e-4)


def test_bf16_gives_gradients_to_fp32_weights_and_is_released(make: Any):
    policy = policy_of(make(), precision="bf16", vae_precision="bf16")
    policy.adapt(LoRA(rank=2))
    perturb(policy)
    waveforms = policy.decode(run(policy, prompts_for(policy), steps=3, grad_steps=2).final)
    assert waveforms.dtype == policy.embed(waveforms).dtype == torch.float32
    gradient = torch.autograd.grad(waveforms.square().sum(), trainable(policy))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradient)
    policy.release()
    assert {m.dtype for m in policy.pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}
    assert own_sounds(policy).isfinite().all(), "it can be called"


def test_it_can_be_saved_and_loaded(make: Any, tmp_path: Path):
    pipe = make()
    policy = policy_of(pipe, audio_seconds=0.3)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sounds(policy_of(again, audio_seconds=0.3)), sounds(policy), rtol=0, atol=1e-5)
