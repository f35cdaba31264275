"""States: rows, dtypes, files, tuned states, and the foreign layouts."""

import json

import pytest
import torch
from random_model import SMALL, random_model, random_state, random_tokens, rows
from safetensors.torch import load_file, save_file

import rwkv7
from rwkv7 import ModelConfig, ModelState
from rwkv7.state import load_tuned, save_tuned

OTHER = ModelConfig.from_dict({**SMALL.to_dict(), "layers": 2, "width": 16})


def assert_equal(state, expected):
    for x, y in zip(rows(state), rows(expected), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zeros_and_dtypes(dtype):
    state = ModelState.zeros(SMALL, 4, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.batch == 4 and len(state.layers) == 3
    for layer in state.layers:
        assert layer.wkv.shape == (4, 3, 8, 8) and layer.wkv.dtype == wide
        assert layer.time_shift.shape == layer.channel_shift.shape == (4, 24)
        assert layer.time_shift.dtype == layer.channel_shift.dtype == dtype
    assert_equal(ModelState.zeros(SMALL, 4).to(dtype=dtype), state)


def test_select_and_cat():
    state = random_state(SMALL, 3)
    turned = state.select([2, 0])
    assert torch.equal(turned.layers[1].wkv, state.layers[1].wkv[[2, 0]])
    parts = [state.select([i]) for i in range(3)]
    assert_equal(ModelState.cat(parts), state)
    assert_equal(state.select(torch.tensor([1, 1])), ModelState.cat([parts[1], parts[1]]))
    with pytest.raises(ValueError, match="at least one"):
        ModelState.cat([])
    with pytest.raises(ValueError, match="number of layers"):
        ModelState.cat([state, ModelState(state.layers[:2])])


def test_clone_and_detach():
    state = random_state(SMALL, 1)
    kept = state.clone()
    state.layers[0].wkv.zero_()
    assert kept.layers[0].wkv.any()
    kept.layers[0].wkv.requires_grad_()
    assert not kept.detach().layers[0].wkv.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_file_there_and_back(tmp_path, dtype):
    state = random_state(SMALL, 2, dtype)
    state.save(tmp_path / "s.safetensors", SMALL)
    assert_equal(ModelState.load(tmp_path / "s.safetensors", SMALL), state)


def test_file_refuses_another_model(tmp_path):
    path = tmp_path / "s.safetensors"
    random_state(OTHER, 1).save(path, OTHER)
    with pytest.raises(ValueError, match=r"s\.safetensors: .*another model: it has layers 2") as e:
        ModelState.load(path, SMALL)
    assert "(the model's: 3), width 16 (the model's: 24), heads 2" in str(e.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "B, H, K, V"}, "layout 'B, H, V, K', found 'B, H, K, V'"),
        ({"version": "2"}, "version '1', found '2'"),
        ({"kind": "a model"}, "kind 'rwkv7 state', found 'a model'"),
        ({"dimensions": json.dumps({"layers": 9})}, "layers 9"),
    ],
)
def test_file_refuses_another_format(tmp_path, change, says):
    path = tmp_path / "s.safetensors"
    tensors, metadata = random_state(SMALL, 1).to_tensors(SMALL)
    save_file(tensors, path, {**metadata, **change})
    with pytest.raises(ValueError, match=says):
        ModelState.load(path, SMALL)


def test_file_refuses_what_is_not_whole(tmp_path):
    path = tmp_path / "s.safetensors"
    state = random_state(SMALL, 1)
    state.save(path, SMALL)
    whole = path.read_bytes()
    for length in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            ModelState.load(path, SMALL)
    tensors, metadata = state.to_tensors(SMALL)
    tensors["layers.1.wkv"] = tensors["layers.1.wkv"][:, :2]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"layers\[1\]\.wkv: expected \[1, 3, 8, 8\]"):
        ModelState.load(path, SMALL)
    state.save(path, SMALL)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not those that were saved"):
        ModelState.load(path, SMALL)
    del tensors["layers.1.wkv"]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"lacks layers\.1\.wkv"):
        ModelState.load(path, SMALL)
    with pytest.raises(FileNotFoundError, match="none"):
        ModelState.load(tmp_path / "none.safetensors", SMALL)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tuned_state_there_and_back(tmp_path, suffix):
    path = tmp_path / f"tuned{suffix}"
    state = ModelState.zeros(SMALL)
    for layer in state.layers:
        layer.wkv.normal_()
    save_tuned(state, path)
    content = load_file(path) if suffix == ".safetensors" else torch.load(path)
    assert list(content) == [f"blocks.{i}.att.time_state" for i in range(3)]
    # [H, V, K] in the file as in the state: nothing is transposed on the way.
    assert torch.equal(content["blocks.2.att.time_state"], state.layers[2].wkv[0])
    assert_equal(load_tuned(path, SMALL), state)
    assert load_tuned(path, SMALL, torch.bfloat16).layers[0].time_shift.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"time_state is too much"):
        load_tuned(path, OTHER)


@pytest.mark.parametrize("prefix", ["_forward_module.", "_forward_module.model."])
def test_tuned_state_with_the_prefix_of_a_trainer(tmp_path, prefix):
    state, path = ModelState.zeros(SMALL), tmp_path / "tuned.pth"
    for layer in state.layers:
        layer.wkv.normal_()
    save_tuned(state, path)
    content = {prefix + name: x for name, x in torch.load(path).items()}
    torch.save(content, path)
    assert_equal(load_tuned(path, SMALL), state)
    for odd in (f"{prefix}blocks.3.att.time_state", "blocks.2.att.time_state"):
        torch.save({**content, odd: content[f"{prefix}blocks.2.att.time_state"]}, path)
        with pytest.raises(ValueError, match=rf"{odd} is too much"):
            load_tuned(path, SMALL)


def test_tuned_state_refuses_to_lose_anything(tmp_path):
    with pytest.raises(ValueError, match="token shifts of zero"):
        save_tuned(random_state(SMALL, 1), tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match="one sequence, found 2"):
        save_tuned(ModelState.zeros(SMALL, 2), tmp_path / "tuned.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.to_sparse(), "floating point numbers, found torch.sparse_coo"),
        (lambda x: x.to(torch.complex64), "found torch.strided, torch.complex64"),
        (lambda x: x.int(), "found torch.strided, torch.int32"),
        (lambda x: x.fill_(torch.nan), "expected numbers, found NaN"),
    ],
    ids=["sparse", "complex", "int", "NaN"],
)
def test_tuned_state_refuses_other_kinds_of_tensors(tmp_path, change, says):
    save_tuned(ModelState.zeros(SMALL), tmp_path / "tuned.pth")
    content = torch.load(tmp_path / "tuned.pth")
    name = "blocks.1.att.time_state"
    torch.save(content | {name: change(content[name])}, tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match=rf"tuned\.pth: {name}: .*{says}"):
        load_tuned(tmp_path / "tuned.pth", SMALL)


def test_foreign_layouts():
    state = torch.randn(2, 3, 4, 5, requires_grad=True)  # [B, H, V, K]
    foreign = rwkv7.state_to_fla(state)
    assert foreign.shape == (2, 3, 5, 4) and foreign.is_contiguous()
    assert foreign[1, 2, 4, 3] == state[1, 2, 3, 4]
    assert torch.equal(rwkv7.state_from_fla(foreign), state)
    assert rwkv7.state_from_official(state) is state
    assert rwkv7.state_to_official(state) is state
    foreign[0, 0, 1, 2].backward()
    assert state.grad[0, 0, 2, 1] == 1 and state.grad.sum() == 1


@pytest.mark.parametrize(
    "dimensions",
    ["[]", "null", "3", "NaN", "[" * 100_000, "{", '{"layers": NaN}', '{"layers": []}'],
)
def test_dimensions_that_are_no_object_are_refused_in_words(dimensions):
    tensors, metadata = random_state(SMALL, 1).to_tensors(SMALL)
    with pytest.raises(ValueError, match="dimensions cannot be read|layers (nan|\\[\\])"):
        ModelState.from_tensors(tensors, {**metadata, "dimensions": dimensions}, SMALL)


def test_a_shift_without_rows_is_refused():
    tensors, metadata = random_state(SMALL, 1).to_tensors(SMALL)
    tensors["layers.0.time_shift"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"layers\.0\.time_shift: expected \[B, C\]"):
        ModelState.from_tensors(tensors, metadata, SMALL)


@pytest.mark.parametrize("rows_", [[True, False], [0.0], [1, True], ["1"]])
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_rows_are_whole_numbers(rows_, kind):
    if kind is torch.tensor and rows_ in ([1, True], ["1"]):
        pytest.skip("no such tensor")
    with pytest.raises(TypeError, match="rows: expected whole numbers"):
        random_state(SMALL, 2).select(kind(rows_))


@pytest.mark.parametrize("row", [-1, 3])
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_rows_are_those_there_are(row, kind):
    with pytest.raises(ValueError, match=f"rows: expected 0 to 2, found {row}"):
        random_state(SMALL, 3).select(kind([0, row]))
    assert random_state(SMALL, 3).select([]).batch == 0


def test_sizes_and_dtypes_that_no_state_has():
    with pytest.raises(ValueError, match="batch: expected 0 or more sequences, found -1"):
        ModelState.zeros(SMALL, -1)
    with pytest.raises(ValueError, match=r"dtype: .*found torch\.int64"):
        ModelState.zeros(SMALL, 1, torch.int64)
    with pytest.raises(ValueError, match=r"dtype: .*found torch\.int32"):
        ModelState.zeros(SMALL, 1).to(dtype=torch.int32)


def test_no_tokens_give_a_copy_of_the_state():
    model, state = random_model(), random_state(SMALL, 2)
    _, same = model(random_tokens(SMALL, 2, 0), state)
    assert_equal(same, state)
    same.layers[0].wkv.zero_()
    assert state.layers[0].wkv.any()
