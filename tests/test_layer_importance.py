"""Layers are ranked by what their attention is worth, left out and replaced."""

import json
import shutil

import pytest
import torch
from _convert_tools import edit
from _hybrid_tools import MULTIPLIERS, write_hybrid
from conftest import make_model

from kvtool.calibrate import layer_importance
from kvtool.calibrate.layer_importance import ImportanceOptions, rank_layers
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command

REACH = [torch.full((4,), 8.0)] * 4


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few texts of 256 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_importance, "WINDOW", 256)
        patch.setattr(layer_importance, "SOLVE", 4)
        patch.setattr(layer_importance, "TEXTS", 2)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers, of which the attention of layer 2 gives nothing."""
    path = tmp_path_factory.mktemp("layers") / "model"
    make_model("llama", path, num_hidden_layers=4)

    def silence(tensors):
        tensors["model.layers.2.self_attn.o_proj.weight"].zero_()

    (path / "kvtool_manifest.json").write_text(json.dumps({"sha256": {}}))
    edit(path, silence)
    (path / "kvtool_manifest.json").unlink()
    return path


@pytest.fixture(scope="module")
def ranked(model):
    return rank_layers(Checkpoint.open(str(model)), ImportanceOptions(3, batch=1, steps=2), REACH)


def test_a_layer_that_gives_nothing_costs_nothing(ranked):
    first = ranked[0]
    assert (first.layer, first.round) == (2, 1)
    assert (first.text, first.recall) == pytest.approx((0, 0), abs=1e-8)
    assert first.probe == pytest.approx(0, abs=1e-6)
    assert sorted(score.layer for score in ranked) == [0, 1, 2, 3]
    assert all(score.text > 0 and score.recall > 0 for score in ranked[1:])


def test_probes_stand_on_what_was_chosen_before(ranked):
    assert [score.round for score in ranked] == [1, 2, 3, None]
    probes = [score.probe for score in ranked[:3]]
    assert probes == sorted(probes)  # each beside all before it
    assert ranked[3].left_out > ranked[1].left_out


def test_without_probes_layers_are_in_the_order_of_leaving_them_out(model, capsys):
    arguments = ["calibrate", "layer-importance", str(model), "--count", "0", "--json", "--quiet"]
    assert run_command(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0] == 2
    left_out = [score["left_out"] for score in found["scores"]]
    assert left_out == sorted(left_out)
    assert all(score["probe"] is None for score in found["scores"])


@pytest.mark.parametrize("mixers", [[], [1]])
@pytest.mark.parametrize("count", ["0", "2"])
def test_models_whose_attention_is_not_replaced_are_refused(tiny, tmp_path, capsys, mixers, count):
    write_hybrid(tiny("llama"), tmp_path, mixers, **MULTIPLIERS)
    words = ["calibrate", "layer-importance", str(tmp_path), "--count", count, "--quiet"]
    assert run_command(words) == 4
    assert "is of type 'granitemoehybrid'" in capsys.readouterr().err


def test_a_copy_of_the_model_is_ranked_alike(model, ranked, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    again = rank_layers(
        Checkpoint.open(str(tmp_path / "copy")), ImportanceOptions(3, batch=1, steps=2), REACH
    )
    assert again == ranked
