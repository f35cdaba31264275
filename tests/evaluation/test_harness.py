"""Answers to lm-evaluation-harness's requests are those of plain passes over whole texts."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from random_model import random_model
from talking_model import talking_model

from rwkv7 import ModelConfig
from rwkv7.tokenizer import get_tokenizer
from rwkv7.weights import save_model

pytest.importorskip("lm_eval")

import jinja2  # which lm-eval brings
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from rwkv7.evaluation import harness
from rwkv7.evaluation.harness import model as harness_model
from rwkv7.evaluation.harness.model import HarnessModel

BYTE = get_tokenizer("byte")


class Ended:
    """Bytes with an end of document."""

    name, vocab_size, end_of_document = "ended", 256, 0
    encode, decode_bytes = BYTE.encode, BYTE.decode_bytes


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8)
    return random_model(config).eval()


def asked(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def plain(model, context, rest):
    """(log-probability, greedy) by one pass over ids."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([[*context, *rest]]))
    log_p = logits[0, len(context) - 1 : -1].log_softmax(1)
    ids = torch.tensor(list(rest))
    return float(log_p.gather(1, ids[:, None]).sum()), bool((log_p.argmax(1) == ids).all())


SHOTS = "Q: one? A: 1\n\n" * 5
QUESTIONS = [
    *((SHOTS + f"Q: {word}? A:", f" {answer}") for word in "ab" for answer in ("no", "é", "yes")),
    ("Who ", "is it?"),  # the space belongs to the continuation
    ("", "alone"),
    ("x", "y"),
]


@pytest.mark.parametrize("tokenizer", [Ended, BYTE], ids=["ended", "byte"])
def test_loglikelihood(model, tokenizer):
    start = [0] if tokenizer is Ended else []
    found = HarnessModel(model, tokenizer).loglikelihood(asked("loglikelihood", *QUESTIONS))
    for (context, rest), (log_p, greedy) in zip(QUESTIONS, found, strict=True):
        kept = context.rstrip()
        rest = context[len(kept) :] + rest
        ids = [*start, *kept.encode()] or list(b"\n")
        expected, is_greedy = plain(model, ids, rest.encode())
        assert log_p == pytest.approx(expected, rel=1e-12)
        assert greedy == is_greedy


def test_what_contexts_share_is_read_once(model, monkeypatch):
    read = []
    hidden = type(model).hidden

    def counted(self, tokens, *arguments):
        read.append(tokens.numel())
        return hidden(self, tokens, *arguments)

    monkeypatch.setattr(type(model), "hidden", counted)
    HarnessModel(model, Ended).loglikelihood(asked("loglikelihood", *QUESTIONS[:6]))
    assert sum(read) < len(SHOTS) + 100


@pytest.mark.parametrize("carried_from", [8192, 10])
def test_rolling(model, monkeypatch, carried_from):
    monkeypatch.setattr(harness_model, "CARRIED_FROM", carried_from)
    texts = ["In the beginning", "é", "", "and so on and on"]
    asks = asked("loglikelihood_rolling", *((text,) for text in texts))
    found = HarnessModel(model, Ended).loglikelihood_rolling(asks)
    expected = [plain(model, [0], text.encode())[0] if text else 0.0 for text in texts]
    assert found == pytest.approx(expected, rel=1e-12)


def greedy(model, prompt, count, end=None):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return bytes(ids[len(prompt) :])


def test_generate_until():
    model = talking_model().double()
    prompts = ["\n", "b", "so it goes: é", SHOTS, SHOTS + "a"]
    settings = {"until": ["\n", ""], "max_gen_toks": 30, "do_sample": False, "temperature": 1.0}
    asks = asked("generate_until", *((prompt, settings) for prompt in prompts))
    found = HarnessModel(model, BYTE, slots=2).generate_until(asks)
    for prompt, text in zip(prompts, found, strict=True):
        expected = greedy(model, prompt.encode(), 30).decode(errors="replace")
        assert text == expected.partition("\n")[0]
    assert found[0] == "aé€𝄞b"
    (short,) = HarnessModel(model, BYTE).generate_until(
        asked("generate_until", ("\n", {"until": "€𝄞", "max_new_tokens": 4}))
    )
    assert short == "aé\ufffd"


def test_an_end_of_document_ends_a_text():
    model = talking_model()
    with torch.no_grad():
        model.head.weight[0] = 100 * model.head.weight[ord("a")]
    (found,) = HarnessModel(model, Ended).generate_until(asked("generate_until", ("x\n", {})))
    assert found == ""


def test_sampling_follows_torch_s_seed():
    def text(seed, **settings):
        torch.manual_seed(seed)
        given = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 20, **settings}
        return HarnessModel(talking_model(), BYTE).generate_until(
            asked("generate_until", ("a", given), ("a", given))
        )

    assert text(1) == text(1) != text(2)
    assert len(set(text(1))) == 2
    assert len(set(text(1, top_k=1))) == 1


@pytest.mark.parametrize(
    ("settings", "words"), [({"num_beams": 4}, "num_beams"), ({"typical_p": 0.3}, "typical_p")]
)
def test_settings_that_are_not_known(model, settings, words):
    with pytest.raises(ValueError, match=f"generation_kwargs: .*found {words}"):
        HarnessModel(model, BYTE).generate_until(asked("generate_until", ("a", settings)))


TALK = [
    {"role": "system", "content": " Be brief.\r\n\r\n\r\nAlways. "},
    {"role": "user", "content": "one?\n\ntwo?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "é?"},
]
TALKED = "System: Be brief.\nAlways.\n\nUser: one?\ntwo?\n\nAssistant: 1\n\nUser: é?\n\n"
PROMPTS = {
    "plain": "Assistant: ",
    "paragraphs": "Assistant: ",
    "think": "Assistant: <think",
    "empty-think": "Assistant: <think>\n</think>\n",
}


@pytest.mark.parametrize("template", PROMPTS)
def test_conversations_are_in_the_form_of_the_official_models(model, template):
    adaptor = HarnessModel(model, BYTE, template=template)
    assert adaptor.apply_chat_template(TALK) == TALKED + PROMPTS[template]
    # The form that the harness keeps with its results gives the same text.
    jinja = jinja2.Template(adaptor.chat_template(True))
    assert jinja.render(messages=TALK, add_generation_prompt=True) == TALKED + PROMPTS[template]
    assert jinja.render(messages=TALK) == TALKED
    assert adaptor.chat_template(False) is None


def test_a_message_that_is_begun_stays_open(model):
    adaptor = HarnessModel(model, BYTE)
    begun = {"role": "assistant", "content": "It is\n\nthe "}
    text = adaptor.apply_chat_template([*TALK, begun], add_generation_prompt=False)
    assert text == TALKED + "Assistant: It is\nthe "
    assert adaptor.apply_chat_template([]) == "Assistant: "
    assert adaptor.apply_chat_template([], add_generation_prompt=False) == ""


def test_a_template_is_chosen_by_its_name_and_keeps_caches_apart(model):
    adaptor = HarnessModel(model, BYTE)
    assert adaptor.tokenizer_name == "byte-plain"
    assert adaptor.chat_template("think") == HarnessModel(model, BYTE, 4, "think").chat_template(
        True
    )
    assert adaptor.tokenizer_name == "byte-think"
    assert adaptor.apply_chat_template(TALK).endswith("Assistant: <think")

    class Elsewhere(Ended):
        name = "some where/t.json"

    assert HarnessModel(model, Elsewhere).tokenizer_name == "some__where__t.json-plain"
    for choose in (adaptor.chat_template, lambda name: HarnessModel(model, BYTE, 4, name)):
        with pytest.raises(ValueError, match="template: expected one of plain.*found 'alpaca'"):
            choose("alpaca")
    with pytest.raises(ValueError, match="role: expected one of .*found 'tool'"):
        adaptor.apply_chat_template([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(("template", "rest"), [("plain", b" no"), ("empty-think", b"\nno")])
def test_choices_after_a_template_are_scored_with_the_blank_before_them(model, template, rest):
    adaptor = HarnessModel(model, Ended, template=template)
    prompt = adaptor.apply_chat_template(TALK)
    (found,) = adaptor.loglikelihood(asked("loglikelihood", (prompt, "no")))
    expected = plain(model, [0, *prompt.rstrip().encode()], rest)
    assert found == (pytest.approx(expected[0], rel=1e-12), expected[1])


@pytest.mark.parametrize(
    ("template", "written", "until", "answer", "stops"),
    [
        ("plain", " no\nyes", ["\n", ""], "no\nyes", ["\n\n", "\n"]),
        ("plain", "\n  x", "y", "\n  x", ["\n\n", "y"]),
        ("paragraphs", " a\n\nb", None, "a\n\nb", ["\n\nUser:"]),
        ("think", "> 1\n\n2</think>\n3\n4", ["\n"], "3", ["\n\nUser:"]),
        ("think", "> 1 2", ["2"], "<think> 1 ", ["\n\nUser:"]),
        ("empty-think", "\n\n3\n4", "\n", "3", ["\n\nUser:"]),
    ],
)
def test_answers_after_a_template(model, monkeypatch, template, written, until, answer, stops):
    submitted = []

    class Written:
        def __init__(self, *arguments, **settings): ...

        def submit(self, request):
            submitted.append(request)
            text = written if len(submitted) == 1 else " as it is"
            return SimpleNamespace(result=lambda: SimpleNamespace(text=text))

    monkeypatch.setattr(harness_model, "Engine", Written)
    adaptor = HarnessModel(model, Ended, template=template)
    settings = {"until": until}
    asks = ((adaptor.apply_chat_template(TALK), settings), ("Q: a? A:", settings))
    found = adaptor.generate_until(asked("generate_until", *asks))
    assert found == [answer, " as it is"]
    assert bytes(submitted[0].tokens[1:]).decode() == TALKED + PROMPTS[template].rstrip()
    assert list(submitted[0].stop_strings) == stops
    assert list(submitted[1].stop_strings) == [x for x in until or [] if x]


def test_answers_are_kept_where_the_harness_keeps_them(model):
    class Hook(list):
        def add_partial(self, *what):
            self.append(what)

    adaptor, hook = HarnessModel(model, Ended), Hook()
    adaptor.set_cache_hook(hook)
    (found,) = adaptor.loglikelihood(asked("loglikelihood", ("a", " b")))
    (text,) = adaptor.generate_until(asked("generate_until", ("a", {"max_gen_toks": 2})))
    assert hook == [
        ("loglikelihood", ("a", " b"), found),
        ("generate_until", ("a", {"max_gen_toks": 2}), text),
    ]
    assert adaptor.generate_until([]) == adaptor.loglikelihood([]) == []


def test_it_is_found_by_its_name(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    harness.register()
    harness.register()
    arguments = f"path={tmp_path / 'm.safetensors'},tokenizer=byte,dtype=fp64"
    made = get_model("rwkv7").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    found = made.loglikelihood(asked("loglikelihood", QUESTIONS[0]))[0][0]
    expected = plain(model, *(text.encode() for text in QUESTIONS[0]))[0]
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_a_device_named_it_is_the_best_there_is(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness_model, "device_called", lambda name: name or torch.device("cpu"))
    save_model(model, tmp_path / "m.safetensors")
    given = {"path": str(tmp_path / "m.safetensors")}
    made = HarnessModel.create_from_arg_obj(given, {"device": "cuda:0", "batch_size": 1})
    assert made.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tokenizer=byte", "found no path"),
        ("path=a,size=3", "found size"),
        ("path=a,dtype=int7", "dtype: .*int7"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        HarnessModel.create_from_arg_string(arguments)


class Task:
    """A task with three examples."""

    def __init__(self, own, **config):
        self.config = SimpleNamespace(fewshot_split="test" if own else "train", test_split="test")
        self.get_config = config.get

    def fewshot_docs(self):
        return iter("abc")


@pytest.mark.parametrize(
    ("task", "most"), [(Task(own=False), 3), (Task(own=True), 2), (Task(True, num_fewshot=0), 9)]
)
def test_more_shots_than_examples_are_refused_before_a_model_is_read(task, most, monkeypatch):
    manager = SimpleNamespace(all_tasks=["tiny"])
    tasks = SimpleNamespace(
        TaskManager=lambda include_path: manager,
        get_task_dict=lambda names, manager: {"a group": {"tiny": task}},
    )
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    harness.HarnessTasks(["tiny"], shots=most)
    if most < 9:
        words = f"shots: expected at most the {most} examples of tiny, found {most + 1}"
        with pytest.raises(ValueError, match=words):
            harness.HarnessTasks(["tiny"], shots=most + 1)
    with pytest.raises(ValueError, match="no task 'other'"):
        harness.HarnessTasks(["tiny", "other"])


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"rwkv7\[harness\]"):
        harness.register()


def test_the_library_does_without_the_package():
    program = "import sys; import rwkv7.evaluation, rwkv7.cli.eval; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
