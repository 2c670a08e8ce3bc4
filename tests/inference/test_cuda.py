"""The golden fixtures on a CUDA device: logits, tokens, the recorded decoding step, int8."""

import pytest
import torch
from safetensors.torch import load_file
from tolerance import ON_CUDA

import lavish
from lavish.inference.options import GenerationOptions
from lavish.inference.static_step import StaticStep

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    """Convolutions use TensorFloat-32 unless told otherwise, which has ten bits; products do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def vlm(release):
    return lavish.load(release.folder, device=DEVICE)


def inputs_of(vlm, messages, template):
    inputs = vlm.processor.apply_chat_template(messages, chat_template=template)
    return {name: value.to(vlm.device) for name, value in inputs.items()}


def test_logits_are_the_release_logits(release, vlm):
    expected = load_file(release.folder.parent / "expected.safetensors")
    for name, (messages, template) in release.prompts.items():
        with torch.no_grad():
            logits = vlm.model(**inputs_of(vlm, messages, template)).logits[0].cpu()
        torch.testing.assert_close(logits, expected[f"{name}.logits"], **ON_CUDA, msg=f"{name}: {{}}".format)


def test_chat_and_batch_give_the_release_tokens(release, vlm):
    for name, (messages, template) in release.prompts.items():
        reply = vlm.chat(messages, chat_template=template, max_new_tokens=10)
        assert reply.token_ids == release.greedy_ids[name], name
    some = [messages for messages, template in release.prompts.values() if template == "chat"]
    single = [vlm.chat(messages, chat_template="chat", max_new_tokens=6).token_ids for messages in some]
    replies = vlm.batch(some, chat_template="chat", max_new_tokens=6)
    assert [reply.token_ids for reply in replies] == single


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's compiler imports it
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_recorded_step_gives_the_release_tokens(release, vlm, is_compiled):
    step = StaticStep(vlm.model, 256, is_compiled=is_compiled, is_graphed=True)
    for name, (messages, template) in release.prompts.items():
        prompt = vlm._prompt(messages, GenerationOptions(chat_template=template))
        features = None if prompt.pixel_values is None else step.steps.image_features(prompt.pixel_values)
        token_ids = [int(step.prefill(prompt, features).argmax())]
        while len(token_ids) < 10:
            token_ids.append(int(step.decode(token_ids[-1]).argmax()))
        assert token_ids == release.greedy_ids[name], name


def test_int8_gives_what_it_gives_on_the_cpu(release):
    on_gpu, on_cpu = (lavish.load(release.folder, quantization="int8", device=device) for device in (DEVICE, "cpu"))
    for name, (messages, template) in release.prompts.items():
        with torch.no_grad():
            found, expected = (vlm.model(**inputs_of(vlm, messages, template)).logits for vlm in (on_gpu, on_cpu))
        torch.testing.assert_close(found.cpu(), expected, **ON_CUDA, msg=f"{name}: {{}}".format)
