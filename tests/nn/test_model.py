"""What users rely on: states carried anywhere, packed sequences apart, every dtype, any T."""

from dataclasses import replace

import pytest
import torch
from random_model import SMALL, error, random_model, random_state, random_tokens, rows

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.nn import parameter_count
from rwkv7.nn.linear import Linear

MODEL = random_model()
LENGTHS = [3, 0, 1, 5, 0, 2]


def packed(seed=2):
    """(tokens [1, 11], offsets, the documents one by one)."""
    tokens = random_tokens(SMALL, 1, sum(LENGTHS), seed=seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    return tokens, offsets, tokens.split(LENGTHS, 1)


def assert_close(state, expected, bound=1e-12):
    for x, y in zip(rows(state), rows(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=bound, atol=bound)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cut", range(8))
def test_a_sequence_may_be_cut_anywhere(cut, given):
    tokens = random_tokens(SMALL, 2, 7)
    state = random_state(SMALL, 2) if given else None
    whole, after = MODEL(tokens, state)
    first, middle = MODEL(tokens[:, :cut], state)
    second, end = MODEL(tokens[:, cut:], middle)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-11, atol=1e-11)
    assert_close(end, after, 1e-11)


def test_gradients_flow_through_a_cut():
    tokens, state = random_tokens(SMALL, 2, 6), random_state(SMALL, 2)
    leaves = [x.requires_grad_() for x in rows(state)]
    parameters = [*MODEL.parameters(), *leaves]
    weights = torch.randn(2, 6, 29, dtype=torch.float64)
    whole = torch.autograd.grad((MODEL(tokens, state)[0] * weights).sum(), parameters)
    first, middle = MODEL(tokens[:, :4], state)
    logits = torch.cat((first, MODEL(tokens[:, 4:], middle)[0]), 1)
    cut = torch.autograd.grad((logits * weights).sum(), parameters)
    for x, y in zip(cut, whole, strict=True):
        assert error(x, y) < 1e-11


def test_arguments_are_left_alone():
    tokens, state = random_tokens(SMALL, 2, 3), random_state(SMALL, 2)
    kept = state.clone()
    with torch.no_grad():
        for T in (1, 3):
            _, after = MODEL(tokens[:, :T], state)
            assert_close(state, kept, 0)
            for x in rows(after):
                x.fill_(9)
            assert_close(state, kept, 0)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_sequences_are_separate_sequences(given, kind):
    tokens, offsets, documents = packed()
    state = random_state(SMALL, len(LENGTHS)) if given else None
    logits, after = MODEL(tokens, state, cu_seqlens=offsets.to(kind))
    weights = torch.randn_like(logits)
    together = torch.autograd.grad((logits * weights).sum(), list(MODEL.parameters()))

    alone, ends = [], []
    for i, document in enumerate(documents):
        out, end = MODEL(document, None if state is None else state.select([i]))
        alone.append(out)
        ends.append(end)
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)
    assert_close(after, ModelState.cat(ends))
    if state is not None:
        empty = [i for i, length in enumerate(LENGTHS) if length == 0]
        assert_close(after.select(empty), state.select(empty), 0)
    apart = torch.autograd.grad((torch.cat(alone, 1) * weights).sum(), list(MODEL.parameters()))
    for x, y in zip(together, apart, strict=True):
        assert error(x, y) < 1e-11


def test_a_document_never_feels_its_neighbours():
    tokens, offsets, _ = packed()
    changed = tokens.clone()
    changed[0, :3] = (changed[0, :3] + 1) % 29
    changed[0, 4:9] = (changed[0, 4:9] + 1) % 29
    logits, state = MODEL(tokens, cu_seqlens=offsets, backend="reference")
    other, moved = MODEL(changed, cu_seqlens=offsets, backend="reference")
    assert not torch.equal(logits[:, :3], other[:, :3])
    assert torch.equal(logits[:, [3, 9, 10]], other[:, [3, 9, 10]])
    assert_close(state.select([2, 5]), moved.select([2, 5]), 0)


@pytest.mark.parametrize("document", [0, 2, 3, 5])
def test_packed_gradients_reach_each_state_alone(document):
    tokens, offsets, _ = packed()
    state = random_state(SMALL, len(LENGTHS))
    leaves = [x.requires_grad_() for x in rows(state)]
    logits, _ = MODEL(tokens, state, cu_seqlens=offsets)
    start, end = offsets[document : document + 2]
    for x in torch.autograd.grad(logits[:, start:end].sum(), leaves):
        touched = x.flatten(1).any(1)
        assert touched.tolist() == [i == document for i in range(len(LENGTHS))]


def test_last_only():
    tokens = random_tokens(SMALL, 2, 5)
    whole, state = MODEL(tokens)
    last, after = MODEL(tokens, last_only=True)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-12, atol=1e-12)
    assert_close(after, state)
    tokens, offsets, _ = packed()
    whole, _ = MODEL(tokens, cu_seqlens=offsets)
    last, _ = MODEL(tokens, cu_seqlens=offsets, last_only=True)
    assert last.shape == (1, len(LENGTHS), 29)
    # The second and the fifth document have no last token.
    assert last[0].isnan().all(1).tolist() == [length == 0 for length in LENGTHS]
    ends = [2, 3, 8, 10]
    torch.testing.assert_close(last[:, [0, 2, 3, 5]], whole[:, ends], rtol=1e-12, atol=1e-12)


def test_no_tokens():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    logits, state = MODEL(nothing)
    assert logits.shape == (2, 0, 29)
    assert_close(state, ModelState.zeros(SMALL, 2, torch.float64), 0)
    given = random_state(SMALL, 2)
    assert_close(MODEL(nothing, given)[1], given, 0)
    assert MODEL(nothing, last_only=True)[0].isnan().all()
    assert MODEL(nothing, last_only=True)[0].shape == (2, 1, 29)
    offsets = torch.zeros(4, dtype=torch.int32)
    logits, state = MODEL(nothing[:1], cu_seqlens=offsets, last_only=True)
    assert logits.shape == (1, 3, 29) and state.batch == 3
    logits, state = MODEL(torch.zeros(0, 4, dtype=torch.long))
    assert logits.shape == (0, 4, 29) and state.batch == 0


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 6e-3)]
)
def test_other_dtypes_come_close(dtype, bound):
    tokens, state = random_tokens(SMALL, 2, 9), random_state(SMALL, 2)
    model = random_model(dtype=dtype)
    expected, after = MODEL(tokens, state)
    logits, end = model(tokens, state.to(dtype=dtype))
    assert logits.dtype == dtype
    assert error(logits, expected) < bound
    for layer, wanted in zip(end.layers, after.layers, strict=True):
        assert layer.wkv.dtype == torch.float32
        assert layer.time_shift.dtype == layer.channel_shift.dtype == dtype
        assert error(layer.wkv, wanted.wkv) < bound
    logits.float().square().mean().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, device):
    tokens = random_tokens(SMALL, 2, 9).to(device)
    model = random_model(dtype=dtype).to(device)
    with torch.autocast(device, torch.bfloat16):
        logits, state = model(tokens[:, :8])
        model(tokens[:, 8:], state)
    assert logits.dtype == torch.bfloat16
    assert state.layers[0].time_shift.dtype == dtype
    assert error(logits.cpu(), MODEL(tokens[:, :8].cpu())[0]) < 3e-2
    logits.float().square().mean().backward()
    assert all(x.grad is not None for x in model.parameters())


def test_a_vanishing_key_is_no_nan():
    model = random_model(dtype=torch.float16)
    with torch.no_grad():
        model.blocks[1].att.k_k.zero_()
    logits, _ = model(random_tokens(SMALL, 1, 4))
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert all(x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize(("batch", "compiled"), [(1, False), (3, False), (1, True)])
def test_decoding_takes_the_same_numbers_by_another_path(batch, compiled):
    model = random_model(dtype=torch.float32)
    tokens, given = random_tokens(SMALL, batch, 6), random_state(SMALL, batch, torch.float32)
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for state in (None, given):
        whole, after = model(tokens, state)
        with torch.no_grad():
            for t in range(6):
                before = None if state is None else state.clone()
                logits, new = step(tokens[:, t : t + 1], state)
                assert error(logits, whole[:, t : t + 1]) < 1e-5
                if before is not None:
                    assert_close(state, before, 0)
                state = new
        assert_close(state, after, 1e-4)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("outputs", [6, 7])
def test_one_row_equals_many(outputs, halves, monkeypatch):
    monkeypatch.setattr("rwkv7.nn.linear._halves_are_fast", lambda: halves)
    layer = Linear(5, outputs)
    x = torch.randn(1, 1, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        wide = torch.randn(1, 9)
        torch.testing.assert_close(layer(wide[:, 4:]), wide[:, 4:] @ layer.weight.T)
        torch.testing.assert_close(layer(wide[:, :9:2]), wide[:, :9:2] @ layer.weight.T)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x[0].expand(outputs, 5))


@pytest.mark.parametrize("given", [False, True])
def test_compiles_whole(given):
    model = random_model(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, offsets, _ = packed()
    state = random_state(SMALL, len(LENGTHS), torch.float32) if given else None
    logits, after = compiled(tokens, state, cu_seqlens=offsets)
    expected, end = model(tokens, state, cu_seqlens=offsets)
    assert error(logits, expected) < 1e-5
    assert isinstance(after, ModelState)
    assert_close(after, end, 1e-4)
    logits.sum().backward()
    assert all(x.grad is not None for x in model.parameters())


def test_learns():
    torch.manual_seed(0)
    config = ModelConfig.from_sizes(vocab_size=11, width=32, layers=2, head_size=16)
    model = RWKV7(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = random_tokens(config, 2, 13)
    losses = []
    for _ in range(30):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0 and losses[-1] < 0.5


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"tokens": [[1]]}, TypeError, "tokens: expected an int32 or int64 tensor, found list"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens: .*float32"),
        ({"tokens": torch.tensor([1])}, ValueError, r"tokens: expected \[B, T\]"),
        ({"tokens": torch.tensor([[3, 29]])}, ValueError, "ids from 0 to 28, found 3 to 29"),
        ({"tokens": torch.tensor([[-1]])}, ValueError, "found -1 to -1"),
        ({"state": random_state(SMALL, 3)}, ValueError, r"wkv: expected \[2, 3, 8, 8\] for 2"),
        ({"state": random_state(SMALL, 2, torch.float32)}, TypeError, "expected torch.float64"),
        ({"state": ModelState(random_state(SMALL, 2).layers[:2])}, ValueError, "3 layers, found 2"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"packed tokens are \[1, T\]"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens: expected an int32 or int64 tensor"),
        ({"backend": "warp"}, ValueError, "backend: .*'warp'"),
    ],
)
def test_refuses(change, kind, says):
    arguments = {"tokens": random_tokens(SMALL, 2, 3), **change}
    with pytest.raises(kind, match=says):
        MODEL(**arguments)


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([1, 3], "start at 0, found 1"),
        ([0, 2, 1, 3], "never fall, found 2 then 1"),
        ([0, 2], "end at T = 3, found 2"),
        ([0, 4], "end at T = 3, found 4"),
        ([], r"\[S \+ 1\] offsets"),
    ],
)
def test_refuses_offsets(offsets, says):
    with pytest.raises(ValueError, match=says):
        MODEL(random_tokens(SMALL, 1, 3), cu_seqlens=torch.tensor(offsets, dtype=torch.long))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_parameters_are_counted_without_the_model(layers):
    config = replace(SMALL, layers=layers)
    assert parameter_count(config) == sum(x.numel() for x in RWKV7(config).parameters())
