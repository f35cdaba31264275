"""Each order beside the implementation that it is named after, on the same logits."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch

from rwkv7.sampling import Sampler, probabilities

SETTINGS = list(itertools.product((0.5, 1.0, 1.8), (0, 1, 7, 400), (0.0, 0.3, 0.85, 0.999, 1.0)))
CASES = [(V, seed) for V in (5, 60, 3000) for seed in (0, 1)]


def logits_of(V, seed):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2.5


def agree(found, expected):
    """The same set and, within the rounding of float32, the same probabilities."""
    # What is 2^46 times less probable than the most probable one counts as never here.
    likely = torch.maximum(found, expected) >= 2**-46 * expected.max()
    assert torch.equal(found[likely] > 0, expected[likely] > 0)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture
def chosen_from(monkeypatch):
    """What the package gave to numpy's `choice`, newest last; it takes the forced tokens."""
    utils = pytest.importorskip("rwkv.utils")
    seen, forced = [], []

    def choice(a, p):
        seen.append(torch.from_numpy(p.copy()).double())
        return forced.pop(0) if forced else 0

    monkeypatch.setattr(utils.np.random, "choice", choice)
    return types.SimpleNamespace(utils=utils, seen=seen, forced=forced)


@pytest.mark.parametrize(("V", "seed"), CASES)
def test_the_order_rwkv_is_that_of_the_rwkv_package(chosen_from, V, seed):
    logits = logits_of(V, seed)
    for temperature, top_k, top_p in SETTINGS:
        if top_p == 1 and V > 100:
            continue  # the package's sum in float32 is 1 before the last tokens are added
        chosen_from.utils.PIPELINE.sample_logits(None, logits, temperature, top_p, top_k)
        agree(probabilities(logits, Sampler(temperature, top_k, top_p)), chosen_from.seen[-1])


def test_the_penalties_are_those_of_the_rwkv_package(chosen_from):
    V, texts = 12, ["a", "b", "1", " ", "c", "d", "e", "f", "g", "h", "i", "j"]
    tokens = [1, 2, 2, 1, 3, 4, 1, 5, 2, 1, 1, 7]
    steps = [logits_of(V, seed) for seed in range(len(tokens) + 1)]
    feeds = iter(steps)
    pipeline = types.SimpleNamespace(
        model=types.SimpleNamespace(forward=lambda ids, state: (next(feeds).clone(), state)),
        encode=lambda text: [0],
        decode=lambda ids: "".join(texts[i] for i in ids),
    )
    pipeline.sample_logits = types.MethodType(chosen_from.utils.PIPELINE.sample_logits, pipeline)
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 9}
    args = chosen_from.utils.PIPELINE_ARGS(
        **settings, alpha_frequency=0.7, alpha_presence=0.4, alpha_decay=0.9
    )
    chosen_from.forced[:] = tokens
    chosen_from.utils.PIPELINE.generate(pipeline, "x", len(tokens), args)
    penalties = {"presence": 0.4, "frequency": 0.7, "decay": 0.9, "exempt": [2, 3]}
    sampler = Sampler(**settings, **penalties)
    for logits, token, expected in zip(steps, tokens, chosen_from.seen, strict=False):
        agree(probabilities(logits, sampler), expected)
        sampler.accept(token)
    assert len(chosen_from.seen) == len(tokens)


def transcribed(scores, temperature, top_k, top_p, min_p):
    """The scores [1, V] that generation/logits_process.py of transformers 5.23 leaves finite."""
    scores = scores / temperature
    if top_k:
        scores[scores < scores.topk(min(top_k, scores.shape[1])).values[:, -1:]] = -math.inf
    if top_p < 1:
        ascending, order = scores.sort()
        removed = ascending.softmax(1).cumsum(1) <= 1 - top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, order, removed), -math.inf)
    p = scores.softmax(1)
    return scores.masked_fill(p < min_p * p.amax(1, keepdim=True), -math.inf)


def from_the_library(scores, temperature, top_k, top_p, min_p):
    """The same by transformers itself, its processors in the order of generation/utils.py."""
    peer = pytest.importorskip("transformers.generation.logits_process")
    chain = [peer.TemperatureLogitsWarper(temperature)]
    chain += [peer.TopKLogitsWarper(top_k)] if top_k else []
    chain += [peer.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [peer.MinPLogitsWarper(min_p)] if min_p else []
    for processor in chain:
        scores = processor(None, scores)
    return scores


@pytest.mark.parametrize(("V", "seed"), CASES)
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("theirs", [transcribed, from_the_library])
def test_the_order_hf_is_that_of_transformers(theirs, V, seed, min_p):
    logits = logits_of(V, seed)
    for temperature, top_k, top_p in SETTINGS:
        expected = theirs(logits[None].clone(), temperature, top_k, top_p, min_p)[0]
        sampler = Sampler(temperature, top_k, top_p, min_p=min_p, order="hf")
        agree(probabilities(logits, sampler), expected.double().softmax(0))


def test_where_probabilities_tie_transformers_keeps_some_and_we_keep_all():
    logits = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 0.0, -math.inf])
    theirs = transcribed(logits[None], 1.0, 0, 0.85, 0.0)[0].isfinite()
    assert int(theirs.sum()) == 4  # which two of the three that tie is left to its sort
    ours = probabilities(logits, Sampler(top_p=0.85, order="hf")) > 0
    assert ours.tolist() == [True] * 5 + [False] * 2
