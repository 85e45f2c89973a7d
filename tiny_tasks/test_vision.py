"""Pictures: does tiny_tasks/vision.py show every row its own picture?"""

import runpy
import sys

import pytest
import torch
import transformers
from PIL import Image

import dopd
from dopd import Policy
from test_dopd import SMALL, bpe, quiet_place, save, tiny, write_rows  # noqa: F401
from tiny_tasks import vision


# --- pictures
def eyes(family):
    """A tiny vision-language model and its processor. <image> is token 300."""
    chat = "<image>{{ messages[0].content[1].text }}"
    names = ("fake_image_token", "global_image_token", "end_of_utterance_token")
    tokens = {"image_token": "<image>"} | {name: f"<{name}>" for name in names}
    words = bpe(chat, extra_special_tokens=tokens)
    words.add_tokens([f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)])
    text, more = tiny().config.to_dict(), {}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 4}
    sight |= {"num_attention_heads": 2, "image_size": 16, "initializer_range": 0.4}
    sight |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    kind = {"Qwen3VL": "Qwen2VL", "Llava": "CLIP"}.get(family, family)
    lens = getattr(transformers, f"{kind}ImageProcessorPil")
    if family == "Qwen3VL":
        rope = {"rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        text |= {"model_type": "qwen3_vl_text", "rope_parameters": rope}
        lens = lens(patch_size=4, min_pixels=64, max_pixels=4096)
        processor = transformers.Qwen3VLProcessor(lens, words, chat_template=chat)
    elif family == "Idefics3":
        more = {"scale_factor": 2, "pad_token_id": 0, "tie_word_embeddings": False}
        lens = lens(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        processor = transformers.Idefics3Processor(lens, words, 4, chat_template=chat)
    else:
        if family == "LlavaNext":
            more = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
        crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        kind = getattr(transformers, f"{family}Processor")
        processor = kind(lens(**crop, **more), words, 4, "default", chat, "<image>", 1)
    more |= {"image_token_id": 300, "video_token_id": 299}  # as if 299 were one
    kind = getattr(transformers, f"{family}Config")
    config = kind(text_config=text, vision_config=sight, **more)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config), processor


def pictures(**change):
    """Rows with pictures of unequal sizes. The last row is changed."""
    rows = []
    for i in range(24):
        for name, number in ((f"{i}.png", i), (f"box{i}.png", 24 + i)):
            Image.new("RGB", (16 + 8 * (number % 5), 24), (5 * number, 0, 99)).save(name)
        row = {"prompt": "three", "answer": "4", "hint": ""}
        rows.append(row | {"image": f"{i}.png", "hinted_image": f"box{i}.png"})
    write_rows("rows.jsonl", [*rows[:-1], rows[-1] | change])
    own = "--data rows.jsonl --max_new_tokens 6 --recipe dopd --out run"
    return f"{SMALL} {own} --teacher eyes --student".split()


def note_splits(monkeypatch):
    splits, split = [], dopd.split
    monkeypatch.setattr(dopd, "split", lambda rows: splits.append(split(rows)) or splits[-1])
    return splits


@pytest.mark.parametrize("family", ["Qwen3VL", "Llava", "LlavaNext", "Idefics3"])
def test_a_real_model_sees_the_picture_of_its_row(family, monkeypatch):
    """Catches the picture of another row, or without the box; positions of text; padding that is
    seen; a placeholder that is sampled; a processor that is not saved."""
    parts = ["image_processor", "tokenizer"]  # without videos, which would need torchvision
    monkeypatch.setattr(transformers.Qwen3VLProcessor, "get_attributes", lambda *_: parts)
    save("eyes", *eyes(family))
    monkeypatch.setattr(sys, "argv", ["vision.py", *pictures(), "eyes", "--steps", "2"])
    monkeypatch.setattr(dopd, "TASKS", {**dopd.TASKS})  # the script registers its own
    splits = note_splits(monkeypatch)
    runpy.run_path(vision.__file__, run_name="__main__")
    rows = splits[0]["train"]
    assert (len({len(row["plain"]) for row in rows}) > 1) == (family != "Llava")  # which crops
    see = transformers.AutoProcessor.from_pretrained("run/dopd")
    config = dopd.Config(teacher="eyes", student="eyes")
    _, _, student = vision.Pictures(config).load(config, 3)
    options = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    for reads, image in (("plain", "image"), ("hinted", "hinted_image")):
        completions, alone = [], []
        for row in rows:
            inputs = see(Image.open(row[image]["path"]), "<image>three", return_tensors="pt")
            out = student.generate(**inputs, **options)
            assert (torch.cat(out.scores)[:, [299, 300]] == -torch.inf).all()
            alone.append(torch.cat(out.logits)[:, : student.vocabulary].log_softmax(-1))
            completions.append(out.sequences[0, len(row[reads]) :].tolist())
        together = dopd.score(Policy(student, reads), rows, completions)[:]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)
        differences = [(other[0] - alone[0][0]).abs().max() for other in alone[1:]]
        assert min(differences) > 1e-3  # other pictures, other scores


def test_bad_pictures(capsys):
    """One line, before the training; also for models that see in two ways."""
    model, processor = eyes("Llava")
    save("eyes", model, processor)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    save("other", model, processor)
    for change, student, told in (
        ({"image": None}, "eyes", "row 24: no picture"),
        ({"image": "gone.png"}, "eyes", "row 24: no picture"),
        ({"hinted_image": "gone.png"}, "eyes", "'three', its picture"),
        ({"prompt": "<image>"}, "eyes", "'<image>', its picture"),
        ({}, "other", "processors: ValueError: they differ"),
    ):
        with pytest.raises(SystemExit) as stopped:
            dopd.main([*pictures(**change), student], vision.Pictures)
        assert stopped.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_the_tiny_task_with_pictures(monkeypatch):
    """The models read no names, and see noisy tiles, always with the same noise; the box shows the
    digits. Catches a warm start, or a privileged policy, that sees another picture."""
    calls, look = [], vision.Vision.look
    monkeypatch.setattr(vision.Vision, "look", lambda *args: calls.append(args[1:]) or look(*args))
    monkeypatch.setattr(dopd.warm_start, "__defaults__", (3,))  # steps
    splits = note_splits(monkeypatch)
    dopd.main(f"{SMALL} --task vision_box --recipe dopd --steps 2 --out run".split())
    seen = {(row.get("is_hinted"), hinted) for row, hinted in calls}
    assert seen == {(False, False), (True, True), (None, False), (None, True)}
    rows = splits[0]["test"]
    for name, has_box in (("vision", False), ("vision_box", True)):
        task = dopd.TASKS[name]
        tokenizer, *models = task.load(dopd.Config(out="run"), 7)
        task.encode(rows, tokenizer, models, task.hint_template)
        for row in rows:
            plain = f"{row['prompt'][0]}###="
            hinted = plain if has_box else f"{row['hint']}|{plain}"
            texts = tokenizer.batch_decode([row["plain"], row["hinted"]])
            assert texts == [plain, hinted]
        for reads, is_box in (("plain", False), ("hinted", has_box)):
            shown = "".join(row["hint"] if is_box else row["prompt"][1:-1] for row in rows)
            tiles = torch.stack([vision.TILES[name] for name in shown]).unsqueeze(1)
            pixels, again = [model.see(rows, reads, tiles)["pixel_values"] for model in models]
            assert torch.equal(pixels, again)
            assert (pixels - tiles).std().item() == pytest.approx(0.0 if is_box else 0.3, abs=0.01)
