"""U-Nets by preset and by configuration, with and without classes."""

from __future__ import annotations

import json

import pytest
import torch
from class_networks import CLASSES, config_of

from immiscible.errors import UserError
from immiscible.networks.kinds import classes_told
from immiscible.networks.unet import build_unet


def test_without_classes_the_configuration_is_what_it_was():
    assert "num_class_embeds" not in config_of(None)
    assert build_unet(config_of(None)).class_embedding is None


@pytest.mark.parametrize("kind", [None, "timestep"])
def test_a_network_is_built_for_the_classes_of_the_data(tmp_path, kind):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({**config_of(None), "class_embed_type": kind}))
    unet = build_unet(config_of(CLASSES, str(path)))
    assert unet.config.num_class_embeds == CLASSES and unet.config.class_embed_type == kind
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    a, b = unet(x[:1].expand(2, -1, -1, -1), t, class_labels=torch.tensor([0, CLASSES - 1])).sample
    assert not torch.equal(a, b)


def test_the_null_class_is_counted_by_the_embedding_alone_and_stays_with_the_weights(tmp_path, caplog):
    unet = build_unet(config_of(CLASSES, null_class=True))
    assert unet.class_embedding.num_embeddings == CLASSES + 1 and classes_told(unet) == CLASSES
    unet.save_pretrained(tmp_path)
    found = type(unet).from_pretrained(tmp_path)
    assert found.config["_null_class"] == classes_told(found) == CLASSES and not caplog.text
    assert classes_told(build_unet(config_of(CLASSES))) == CLASSES and classes_told(build_unet(config_of(None))) is None
    again = config_of(CLASSES, str(tmp_path), null_class=True)
    assert (again["num_class_embeds"], again["_null_class"]) == (CLASSES + 1, CLASSES)
    with pytest.raises(UserError, match="num_class_embeds is 5, but the data has 4 classes; make"):
        config_of(CLASSES, str(tmp_path))
    with pytest.raises(UserError, match="num_class_embeds is 5, but the data has 3 classes and that of no class"):
        config_of(3, str(tmp_path), null_class=True)


@pytest.mark.parametrize(
    ("settings", "num_classes", "message"),
    [
        ({"num_class_embeds": 7}, CLASSES, "num_class_embeds is 7, but the data has 4 classes"),
        ({"num_class_embeds": 7}, None, "expects class labels; give --class_conditional"),
        ({"class_embed_type": "timestep"}, None, "expects class labels; give --class_conditional"),
        ({"class_embed_type": "identity"}, CLASSES, "class_embed_type 'identity' does not take class numbers"),
    ],
)
def test_configurations_that_disagree_with_the_data(tmp_path, settings, num_classes, message):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({**config_of(None), **settings}))
    with pytest.raises(UserError, match=f"--model_config_name_or_path .*{message}"):
        config_of(num_classes, str(path))
