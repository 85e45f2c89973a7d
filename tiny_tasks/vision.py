"""Pictures: a task for tiny policies that see, and rows with an "image" for real models. With all flags of dopd.py.

    python tiny_tasks/vision.py                        # the CPU experiment; --hint box: the hint is in the picture
    python dopd.py --teacher Qwen/Qwen3-VL-8B-Instruct --student Qwen/Qwen3-VL-2B-Instruct --data my.jsonl

An "image" is a path, seen from the folder of my.jsonl, or anything that datasets.Image reads. If the first row has one,
dopd.py calls `with_eyes` below. The privileged policies see the "hinted_image" of a row in its place, if there is one:
the same picture with a box drawn in, say; then the "hint" may be "". Do not write an image placeholder into the prompt.
Real models need pillow, and most of them torchvision.
"""

import sys
import zlib
from pathlib import Path

import datasets
import torch
import transformers
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # not needed in a script beside dopd.py
import dopd  # noqa: E402

# Tiles of 8 x 8 dots. Glyphs of the stable names and digits: five rows of three wide dots, in octal. Covers: lines.
FONT = ("25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 "
        "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717").split()
DOTS = torch.tensor([[[int(row) >> place & 1 for place in (2, 2, 1, 1, 0, 0)] for row in glyph] for glyph in FONT])
TILES = dict(zip("abcdefghij0123456789", torch.nn.functional.pad(DOTS, (1, 1, 1, 2))))
TILES |= zip("klm", torch.arange(64).view(8, 8) // torch.tensor([[[1]], [[8]], [[2]]]) % 2)


def draw(row: dict, form: str) -> dict:
    """The tiles of a row (names, 1, 8, 8). Their noise is always the same, so no picture has to be stored."""
    names, noise = (row["answer"][::2], 0.0) if form == "box" else (row["prompt"][1:-1], 0.3)
    clean, luck = torch.stack([TILES[name] for name in names])[:, None] - 0.5, torch.Generator()
    luck.manual_seed(zlib.crc32(row["prompt"].encode()))
    return {"pixel_values": clean + noise * torch.randn(clean.shape, generator=luck)}


def picture(row: dict, form: str):
    """Opened when it is needed: the pixels of all rows would not fit into memory."""
    return datasets.Image().decode_example(form != "none" and row.get("hinted_image") or row["image"]).convert("RGB")


def looking(see, hint: str = "none", placeholder: int | None = None):
    """`model.look`, from see(row, form of the hint). The rows of the warm start tell the form themselves."""
    def look(rows, reads, ids) -> dict:
        seen = {key: see(row, row.get("form", hint if reads == "hinted" else "none"))
                for key, row in {id(row): row for row in rows}.items()}           # the rollouts of a row look once
        return {name: (ids == placeholder).long() if name.endswith("token_type_ids") else
                torch.cat([seen[id(row)][name] for row in rows]).to(ids.device)
                for name in {*seen[id(rows[0])]} - {"input_ids", "attention_mask"}}
    return look


def load(config, max_new_tokens: int) -> tuple:
    """Gives eyes to the models. None may write a placeholder, which would have no picture."""
    tokenizer, *models = dopd.load(config, max_new_tokens, transformers.AutoModelForImageTextToText)
    if config.data:
        with dopd.explained(f"--student {config.student}"):
            processor = transformers.AutoProcessor.from_pretrained(config.student)

        def see(row, form, text=processor.image_token):
            with dopd.explained(f"{row['prompt'][:50]!r}, its picture"):
                return processor(text=[text], images=[[picture(row, form)]], return_tensors="pt",
                                 add_special_tokens=not text.startswith(tokenizer.bos_token or "\n"))
        tokenizer.chat_template, tokenizer.save_pretrained = processor.chat_template, processor.save_pretrained
        tokenizer.apply_chat_template = lambda chats, **options: processor.apply_chat_template([[chat[0] | {"content": [
            {"type": "image"}, {"type": "text", "text": chat[0]["content"]}]}] for chat in chats], **options)
        tokenizer.read = lambda rows, form, texts: [
            see(row, form, text)["input_ids"][0].tolist() for row, text in zip(rows, texts)]
    for model in models:
        model.look = looking(see if config.data else draw, config.hint, model.config.image_token_id)
        model.generation_config.suppress_tokens = (model.generation_config.suppress_tokens or []) + [
            value for name, value in model.config.to_dict().items() if isinstance(value, int)
            and name.startswith(("image_token_", "video_token_", "vision_start", "vision_end", "boi_", "eoi_"))]
    return tokenizer, *models


def report(log, tokenizer, folder) -> None:
    """pictures.png: what the student of the tiny task saw in the rollouts that dopd.report prints."""
    dopd.report(log, tokenizer, folder)
    shown = [(row, *rollout) for row in log if "validation" in row and dopd.RECIPES[row["recipe"]].router
             for rollout in row["rollouts"]]
    figure = pyplot.figure(figsize=(12, len(shown) // 2 + 1), layout="constrained")
    for place, (row, prompt, ids, *_) in enumerate(shown, 1):
        title = f"{row['recipe']} {row['step']}: {prompt[0]}###={tokenizer.decode(ids)}"
        axis = figure.add_subplot(len(shown) // 4, 4, place, title=title, xticks=[], yticks=[])
        axis.imshow(torch.cat([*draw({"prompt": prompt}, "none")["pixel_values"][:, 0]], 1).numpy(), "gray")
    figure.savefig(f"{folder}/pictures.png", dpi=80)


class Vision(dopd.Rules):
    """`rules` with pictures: of the prompt `7fbk=` the model reads `7###=` and sees three noisy tiles. A stable name is
    a glyph. A wild name is a cover: nobody sees what is under it. The hint `box` shows the digits in their place."""
    CHARACTERS = "0123456789=|#"
    look, load, report = staticmethod(looking(draw)), staticmethod(load), staticmethod(report)

    def problem(self, rng) -> dict:
        row = super().problem(rng)
        return row | {"hints": row["hints"] | {"box": ""}}

    def policy(self, characters: str, layers: int) -> tuple:
        """A one-layer CLIP makes one token of a tile, before the tiny Qwen3."""
        tokenizer, text = dopd.tiny_policy(characters, layers)
        tokenizer.backend_tokenizer.model.unk_token = "#"               # what a name becomes: no other is unknown
        return tokenizer, transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            text_config=text.config, image_token_id=tokenizer.convert_tokens_to_ids("#"), tie_word_embeddings=True,
            vision_feature_layer=-1, vision_config={"hidden_size": 64, "intermediate_size": 128, "num_channels": 1,
                "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 8}))


class Pictures(dopd.OwnData):
    load = staticmethod(load)


def with_eyes(task, rows: list[dict], config) -> Pictures:
    """The task of --data, for models that see. Pictures become {"path", "bytes"}: plain data, as a checkpoint holds."""
    folder = Path(config.data).absolute().parent
    for number, row in enumerate(rows, 1):
        with dopd.explained(f"--data {config.data}, row {number}: no picture"):
            row |= {name: {"path": str(folder / row[name]), "bytes": None} for name in ("image", "hinted_image")
                    if isinstance(row.get(name), str)}
            row.setdefault("split_by", zlib.crc32(picture(row, "none").tobytes()))      # not both trained and tested on
    return Pictures(*task)


dopd.TASKS["vision"] = Vision(*dopd.TASKS["rules"])
if __name__ == "__main__":
    dopd.main(sys.argv[1:] if "--resume" in sys.argv else ["--task", "vision", *sys.argv[1:]])
