import re
from functools import partial
from pathlib import PurePosixPath

import pytest
import yaml
from huggingface_hub import ModelCard
from launch import tiny
from pictures import colored

from immiscible.configs import UnconditionalConfig
from immiscible.training.cards import name_repository, push_pipeline, text_to_image_card, unconditional_card
from immiscible.training.markdown import fenced, inline, line, table_cell

FACTS = {"noise_coupling": "assignment (l2)", "inference_steps": "20", "data": "folder a|b <script>"}


def parts(card):
    """A card's metadata, its Python example and its text."""
    front, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", str(card), re.DOTALL).groups()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(example, "example", "exec")
    return yaml.safe_load(front), example, text


def test_an_unconditional_card_says_how_to_sample_and_how_it_was_trained():
    data, example, text = parts(unconditional_card(title="digits", pipeline="DDIMPipeline", facts=FACTS))
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "unconditional-image-generation", "immiscible-diffusion"],
    }
    assert example == (
        'from diffusers import DDIMPipeline\nimage = DDIMPipeline.from_pretrained("THIS_FOLDER")(num_inference_steps=20).images[0]\n'
    )
    assert text.startswith("\n# digits\n") and "| noise coupling | assignment (l2) |\n" in text
    assert "Classes" not in text and "VAE" not in text


def test_a_card_of_classes_lists_them_and_tells_the_network():
    data, example, text = parts(
        unconditional_card(title="t", pipeline="LDMPipeline", facts=FACTS, num_classes=12, class_names=["crane", "a | b", "# big", "1. x"])
    )
    assert example.splitlines() == [
        "from diffusers import DiffusionPipeline",
        'pipeline = DiffusionPipeline.from_pretrained("THIS_FOLDER", custom_pipeline="THIS_FOLDER", trust_remote_code=True)',
        "images = pipeline(class_labels=[0, 1, 2, 3, 4, 5, 6, 7], num_inference_steps=20).images",
    ]
    assert "\nClasses:\n\n0. crane\n1. a | b\n2. \\# big\n3. 1\\. x\n\nHow" in text
    assert "Diffusers' own `LDMPipeline` loads this folder too, but has no argument for classes" in text
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "Classes" not in str(unconditional_card(title="t", pipeline="DDPMPipeline", facts=FACTS, class_names=["a"]))
    names = [str(number) for number in range(1002)]
    many = str(unconditional_card(title="t", pipeline="DDPMPipeline", facts=FACTS, num_classes=1002, class_names=names))
    assert "\n999. 999\n\nAnd 2 more.\n" in many and "1000. 1000" not in many


def test_a_text_to_image_card_loads_the_pipeline_and_shows_the_grid():
    data, example, text = parts(
        text_to_image_card(title="t", facts=FACTS, base_model="some/model", grid=PurePosixPath("samples/step-0000003.png"))
    )
    assert data["base_model"] == "some/model" and data["tags"] == ["diffusers", "stable-diffusion", "text-to-image", "immiscible-diffusion"]
    assert 'StableDiffusionPipeline.from_pretrained("THIS_FOLDER")' in example and 'pipeline("a prompt")' in example
    assert "\n![Samples of the validation prompts](samples/step-0000003.png)\n" in text
    assert "![" not in str(text_to_image_card(title="t", facts=FACTS, base_model="some/model"))


def test_a_card_of_adapters_loads_them_into_their_base(tmp_path):
    def card(**options):
        return parts(text_to_image_card(title="t", facts=FACTS, adapters=True, resolution=32, **options))

    data, example, _ = card(base_model="some/model", prediction_type="v_prediction")
    assert "lora" in data["tags"]
    assert example.splitlines()[2:] == [
        'pipeline = StableDiffusionPipeline.from_pretrained("some/model")',
        'pipeline.load_lora_weights("THIS_FOLDER")',
        'pipeline.scheduler.register_to_config(prediction_type="v_prediction")',
        'image = pipeline("a prompt", height=32, width=32).images[0]',
    ]
    data, example, _ = card(base_model=str(tmp_path))
    assert "base_model" not in data and "register_to_config" not in example  # the hub refuses a card with a path
    assert f'from_pretrained("{tmp_path}")' in example and 'load_lora_weights("THIS_FOLDER")' in example


@pytest.mark.parametrize(
    "make",
    [
        partial(unconditional_card, pipeline="DDPMPipeline"),
        partial(unconditional_card, pipeline="DDPMPipeline", num_classes=2),
        partial(text_to_image_card, base_model="some/model"),
    ],
)
def test_a_card_names_the_repository_once_it_has_one(make, tmp_path):
    make(title="t", facts=FACTS).save(tmp_path / "README.md")
    name_repository(tmp_path / "README.md", "someone/mine")
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("someone/mine"' in card and "THIS_FOLDER" not in card


NASTY = '<script>alert(1)</script> | *b* `k` [d](http://e) \\ &amp; __init__ $x$ ~~f~~\n# g "h"'


def test_what_users_name_is_text_in_a_card():
    for card in (
        unconditional_card(title=NASTY, pipeline="DDPMPipeline", facts={**FACTS, "data": NASTY}, num_classes=1, class_names=[NASTY]),
        text_to_image_card(title=NASTY, facts={"data": NASTY}, base_model=NASTY, adapters=True, resolution=8),
    ):
        _, example, text = parts(card)
        outside = text.replace(example, "")
        assert not re.search(r"(?<!\\)(<script|</script|\[d|&amp;|`k|__init|\$x|~~f|\*b)", outside) and "\n# g" not in outside
        (row,) = re.findall(r"\| data \|.*", outside)
        assert len(re.findall(r"(?<!\\)\|", row)) == 3  # two cells
        assert "\\<script>" in row and ModelCard(str(card)).data.to_dict()["library_name"] == "diffusers"


def test_classes_that_a_run_finds_are_text_in_its_card(script, tmp_path):
    for name in ("<script>alert(1)<", "[x](javascript:alert(1))"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        colored(tmp_path / "photos" / name, count=2)
    result = script(tiny(tmp_path / "run", train_data_dir=tmp_path / "photos", class_conditional=True, train_batch_size=2))
    assert result.code == 0
    text = (tmp_path / "run" / "README.md").read_text()
    assert "\\<script>alert" in text and "\\[x\\](javascript" in text and not re.search(r"(?<!\\)(<script|\[x)", text)


def test_a_pushed_card_names_its_repository(monkeypatch, tmp_path):
    import huggingface_hub

    sent = {}
    unconditional_card(title="t", pipeline="DDPMPipeline", facts=FACTS).save(tmp_path / "README.md")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{name}"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.update(card=(tmp_path / "README.md").read_text()))
    push_pipeline(UnconditionalConfig(output_dir=str(tmp_path)), 3)
    assert f'from_pretrained("someone/{tmp_path.name}")' in sent["card"] and "THIS_FOLDER" not in sent["card"]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("text", "inside", "first"),
    [
        ("immiscible_speed + a=3", "immiscible_speed + a=3", "immiscible_speed + a=3"),
        ("_private __x__ a_", "\\_private \\_\\_x\\_\\_ a\\_", "\\_private \\_\\_x\\_\\_ a\\_"),
        ("< 0.95x (> 0.5)", "< 0.95x (> 0.5)", "< 0.95x (> 0.5)"),
        ("<b>", "\\<b>", "\\<b>"),
        ("&lt; a & b", "\\&lt; a & b", "\\&lt; a & b"),
        ("> 500", "> 500", "\\> 500"),
        ("12) a", "12) a", "12\\) a"),
        ("1.25x", "1.25x", "1.25x"),
        ("- a", "- a", "\\- a"),
        ("---", "---", "\\---"),
        ("-0.5 +3.1", "-0.5 +3.1", "-0.5 +3.1"),
        ("a\n\n# b\tc", "a # b c", "a # b c"),
        ("C:\\x*", "C:\\\\x\\*", "C:\\\\x\\*"),
    ],
)
def test_marks_are_shown_as_they_are(text, inside, first):
    assert inline(text) == inside and line(text) == first
    assert table_cell(text + "|") == inside + "\\|"


def test_code_cannot_end_its_block():
    assert fenced("a") == "```\na\n```"
    assert fenced("a '\n```\n# b") == "````\na '\n```\n# b\n````"
