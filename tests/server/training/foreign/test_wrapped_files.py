import argparse
import codecs
import json

import pytest
import torch
from safetensors.torch import save_file

from server.training.foreign.wrapped_files import read_foreign
from shared.errors import InputError

LIVE, MEAN = torch.arange(3.0), torch.arange(3.0) + 7


def groups(tmp_path, tree):
    torch.save(tree, tmp_path / "file.pt")
    return {
        group: {name: tensor.tolist() for name, tensor in state.items()}
        for group, state in read_foreign(tmp_path / "file.pt").groups.items()
    }


@pytest.mark.parametrize(
    "key",
    [
        "norm.weight",
        "module.norm.weight",
        "_orig_mod.norm.weight",
        "module._orig_mod.norm.weight",
        "_orig_mod.module.model.norm.weight",
        "_forward_module.net.norm.weight",
        "nnet.norm.weight",
        "module._fsdp_wrapped_module.norm.weight",
        "_checkpoint_wrapped_module.norm.weight",
        "Model.Net.norm.weight",
        "trainer.denoiser.norm.weight",
    ],
)
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("checkpoint", "model"), ("model_state_dict", "net")])
def test_wrappers_fall_away_in_any_nesting(tmp_path, key, nest):
    tree = {key: LIVE}
    for name in reversed(nest):
        tree = {name: tree}
    assert groups(tmp_path, {**tree, "optimizer": {"state": {0: {"exp_avg": LIVE}}}}) == {
        "model": {"norm.weight": LIVE.tolist()}
    }


@pytest.mark.parametrize(
    "average",
    [
        {"ema": {"norm.weight": MEAN}},
        {"ema": {"ema_model.module.norm.weight": MEAN, "online_model.norm.weight": LIVE, "step": torch.tensor(3)}},
        {"model_ema": {"module": {"norm.weight": MEAN}}},
        {"ema_state_dict": {"_orig_mod.norm.weight": MEAN}},
        {"state_dict_ema": {"norm.weight": MEAN}},
        {"nnet_ema": {"norm.weight": MEAN}},
        {"averaged_model": {"module.norm.weight": MEAN, "n_averaged": torch.tensor(3)}},
        {"ema_0.9999": {"norm.weight": MEAN}},
        {"params_ema": {"norm.weight": MEAN}},
        {"swa_model": {"norm.weight": MEAN}},
        {"shadow": {"norm.weight": MEAN}},
        {"ema": {"shadow": {"norm.weight": MEAN}, "decay": 0.999}},
        {"state": {"ema": {"norm.weight": MEAN}, "optimizer": {"state": {0: {"exp_avg": MEAN}}}}},
        {"module.ema.norm.weight": MEAN},
        {"EMA": {"norm.weight": MEAN}},
        {"model_ema.normweight": MEAN, "model_ema.decay": torch.tensor(0.99)},
        {"model_ema.diffusion_modelnormweight": MEAN, "model_ema.num_updates": torch.tensor(3)},
    ],
)
def test_no_average_that_is_there_is_ignored(tmp_path, average):
    found = groups(tmp_path, {"model": {"norm.weight": LIVE}, **average})
    assert found == {"model": {"norm.weight": LIVE.tolist()}, "ema": {"norm.weight": MEAN.tolist()}}


def test_two_different_averages_are_refused_and_equal_ones_are_one(tmp_path):
    tree = {"ema_0.999": {"norm.weight": MEAN}, "ema_0.9999": {"norm.weight": MEAN.clone()}}
    assert groups(tmp_path, tree) == {"ema": {"norm.weight": MEAN.tolist()}}
    with pytest.raises(InputError, match="two different ema weights: keep one"):
        groups(tmp_path, {**tree, "ema_0.9999": {"norm.weight": LIVE}})


def test_averages_without_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'ema\.shadow_params' is a list of tensors without names"):
        groups(tmp_path, {"model": {"norm.weight": LIVE}, "ema": {"shadow_params": [LIVE, MEAN]}})


@pytest.mark.parametrize(
    ("hidden", "place"),
    [
        ({"optimizer": {"ema": [LIVE, MEAN]}}, "optimizer.ema"),
        ({"optimizer_states": [{"state": {0: {}}, "ema": [MEAN]}]}, "optimizer_states.0.ema"),
        ({"callbacks": {"EMA": {"norm.weight": MEAN}}}, "callbacks.EMA"),
    ],
)
def test_an_average_that_optimizer_or_callback_keeps_is_not_passed_over(tmp_path, hidden, place):
    with pytest.raises(InputError, match=f"'{place}' is an average without names"):
        groups(tmp_path, {"model": {"norm.weight": LIVE}, **hidden})


def test_weights_that_still_ask_for_gradients_are_taken(tmp_path):
    torch.save({"norm.weight": torch.nn.Parameter(LIVE.clone())}, tmp_path / "file.pt")
    found = read_foreign(tmp_path / "file.pt").groups["model"]["norm.weight"]
    assert torch.equal(found, LIVE) and not found.requires_grad


@pytest.mark.parametrize(
    ("tree", "step"),
    [
        ({"step": 5}, 5),
        ({"checkpoint": {"step": 8}}, 8),
        ({"step": 5, "state": {"step": 9}}, 5),
        ({"global_step": torch.tensor(6)}, 6),
        ({"iteration": 7.0}, 7),
        ({"step": True}, None),
        ({}, None),
    ],
)
def test_the_step_is_read_as_trainers_write_it(tmp_path, tree, step):
    torch.save({"model": {"norm.weight": LIVE}, **tree}, tmp_path / "file.pt")
    assert read_foreign(tmp_path / "file.pt").step == step


@pytest.mark.parametrize("step", [-5, 2**60])
def test_an_impossible_step_is_refused(tmp_path, step):
    torch.save({"model": {"norm.weight": LIVE}, "step": step}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=f"step is {step}"):
        read_foreign(tmp_path / "file.pt")


def test_a_file_without_tensors_lists_its_keys(tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 1.0}, "optimizer": {"a": LIVE}}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="no tensors of a network; it holds 'epoch', 'args', 'optimizer'"):
        read_foreign(tmp_path / "file.pt")
    torch.save([LIVE], tmp_path / "file.pt")
    with pytest.raises(InputError, match="holds a list, not named tensors"):
        read_foreign(tmp_path / "file.pt")


def test_the_reason_of_a_refused_file_is_one_plain_line(tmp_path):
    (tmp_path / "zero.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<html>")
    for name in ("zero.pt", "page.pt"):
        with pytest.raises(InputError) as caught:
            read_foreign(tmp_path / name)
        text = str(caught.value)
        assert "\n" not in text and "\x1b" not in text and "()" not in text


def test_safetensors_are_known_by_what_is_in_them(tmp_path):
    for name in ("MODEL.SAFETENSORS", "c0ffee", "model.ckpt"):
        save_file({"norm.weight": LIVE}, tmp_path / name)
        assert read_foreign(tmp_path / name).groups["model"]["norm.weight"].equal(LIVE)


def split_in_two(folder):
    save_file({"norm.weight": LIVE}, folder / "model-00001-of-00002.safetensors")
    save_file({"norm.bias": -LIVE}, folder / "model-00002-of-00002.safetensors")
    names = {"norm.weight": "model-00001-of-00002.safetensors", "norm.bias": "model-00002-of-00002.safetensors"}
    return folder / "model.safetensors.index.json", names


def test_a_checkpoint_in_parts_is_read_by_its_index(tmp_path):
    index, names = split_in_two(tmp_path)
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": names}))
    state = read_foreign(index).groups["model"]
    assert state["norm.weight"].equal(LIVE) and state["norm.bias"].equal(-LIVE) and len(state) == 2
    with pytest.raises(InputError, match=r"one part of a checkpoint: give model\.safetensors\.index\.json"):
        read_foreign(tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_map": {"norm.weight": "../model-00001-of-00002.safetensors"}}, "do not lie beside it"),
        ({"weight_map": {"norm.weight": "nowhere.safetensors"}}, "nowhere.safetensors: No such file"),
        ({"weight_map": {"other": "model-00001-of-00002.safetensors"}}, "'other' is not in model-00001-of-00002"),
        ({"weight_map": {}}, "do not lie beside it"),
        ({"weight_map": {"norm.weight": 3}}, "no index"),
        ({"weight_map": ["norm.weight"]}, "no index"),
        ({}, "no index"),
        ([], "no index"),
    ],
)
def test_an_index_that_is_none_is_one_line(tmp_path, change, words):
    index, _ = split_in_two(tmp_path)
    index.write_text(json.dumps(change))
    with pytest.raises(InputError, match=words):
        read_foreign(index)


def test_each_tensor_comes_from_the_part_that_the_index_names(tmp_path):
    index, names = split_in_two(tmp_path)
    save_file({"norm.bias": -LIVE, "norm.weight": MEAN}, tmp_path / "model-00002-of-00002.safetensors")
    index.write_bytes(codecs.BOM_UTF8 + json.dumps({"weight_map": names}).encode())
    assert read_foreign(index).groups["model"]["norm.weight"].tolist() == LIVE.tolist(), "not the later part's"
    del names["norm.bias"]
    index.write_text(json.dumps({"weight_map": {**names, "norm.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"holds 'norm\.bias', which it does not list"):
        read_foreign(index)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_two_weights_that_cannot_be_compared_are_two(tmp_path, make):
    with pytest.raises(InputError, match="two different model weights"):
        groups(tmp_path, {"model.norm": make(LIVE), "module.norm": make(LIVE)})


def test_a_step_without_a_number_is_no_step(tmp_path):
    torch.save({"model": {"norm": LIVE}, "step": torch.ones((), device="meta")}, tmp_path / "file.pt")
    assert read_foreign(tmp_path / "file.pt").step is None


def test_what_would_run_code_is_named(tmp_path):
    torch.save({"model": {"norm.weight": LIVE}, "args": argparse.Namespace(lr=1)}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=r"Unsupported global: GLOBAL argparse\.Namespace"):
        read_foreign(tmp_path / "file.pt")
