"""Pictures: a task for tiny policies that see, and rows with an "image" for real models.

    python tiny_tasks/vision.py                       # the CPU experiment, the hint is text
    python tiny_tasks/vision.py --task vision_box     # the hint is in the picture
    python tiny_tasks/vision.py --teacher Qwen/Qwen3-VL-8B-Instruct \\
        --student Qwen/Qwen3-VL-2B-Instruct --data my.jsonl

All flags of dopd.py work. An "image" is a path, seen from the folder of my.jsonl, or anything else
that datasets.Image reads. The privileged policies see the "hinted_image" of a row in its place, if
there is one: the same picture with a box drawn in, say; then the "hint" may be "". The chat
template puts the picture before the prompt. Pictures may have unequal sizes. Real models need
pillow, and most of them torchvision.
"""

import sys
import zlib
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor

# Not needed in a script that stands beside dopd.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402


# --- what a model gets beside the ids
def seeing(look, placeholder: int):
    """`model.see`, from look(row, hinted), which gives the inputs for the picture of one row."""

    def see(rows: list[dict], reads: str, ids: Tensor) -> dict[str, Tensor]:
        looks = {}
        for row in rows:
            if id(row) not in looks:  # the rollouts of a row look once
                looks[id(row)] = look(row, row.get("is_hinted", reads == "hinted"))
        inputs = {}
        for name in {*looks[id(rows[0])]} - {"input_ids", "attention_mask"}:
            inputs[name] = join([looks[id(row)][name] for row in rows]).to(ids.device)
            if name in ("mm_token_type_ids", "token_type_ids"):
                inputs[name] = (ids == placeholder).long()  # (B, L)
        return inputs

    return see


def join(parts: list[Tensor]) -> Tensor:
    """One after the other. Smaller pictures get zeros at the end, as in a processor's own batch."""
    sizes = torch.tensor([part.shape for part in parts])
    whole, start = parts[0].new_zeros(sum(sizes[:, 0]), *sizes[:, 1:].amax(0)), 0
    for part in parts:
        end = start + len(part)
        whole[(slice(start, end), *[slice(size) for size in part.shape[1:]])] = part
        start = end
    return whole


def load(config, max_new_tokens: int) -> tuple:
    """Models that see. None of them may write a placeholder, which would have no picture."""
    auto = transformers.AutoModelForImageTextToText
    tokenizer, *models = dopd.load(config, max_new_tokens, auto)
    kinds = ("image_token_", "video_token_", "vision_start", "vision_end", "boi_", "eoi_")
    for model in models:
        none = model.generation_config.suppress_tokens or []
        for name, value in model.config.to_dict().items():
            if name.startswith(kinds) and isinstance(value, int):
                none.append(value)
        model.generation_config.suppress_tokens = none
    return tokenizer, *models


# --- the tiny task
# Tiles of 8 x 8 dots. Glyphs of names and digits: five rows of three wide dots, in octal.
FONT = """
25755 65656 34443 65556 74647 74644 34553 55755 72227 11152
75557 26227 71747 71717 55711 74717 74757 71111 75757 75717
"""
TILES = {}
for character, glyph in zip("abcdefghij0123456789", FONT.split(), strict=True):
    dots = [[int(row) >> place & 1 for place in (2, 2, 1, 1, 0, 0)] for row in glyph]
    TILES[character] = torch.nn.functional.pad(torch.tensor(dots), (1, 1, 1, 2))  # (8, 8)
COLUMNS = torch.arange(8).expand(8, 8)
TILES |= {"k": COLUMNS % 2, "l": COLUMNS.T % 2, "m": COLUMNS // 2 % 2}  # covers: nothing but lines


class Vision(dopd.Rules):
    """`rules` with pictures: of the prompt `7fbk=` the model reads `7###=` and sees three noisy
    tiles. A stable name is a glyph. A wild name is a cover: nobody sees what is under it."""

    characters = "0123456789=|#"
    has_box = False

    def build(self, characters: str, layers: int) -> tuple:
        """A one-layer CLIP makes one token of a tile, before the tiny Qwen3."""
        tokenizer, text = dopd.tiny_policy(characters, layers)
        tokenizer.backend_tokenizer.model.unk_token = "#"  # what a name becomes
        placeholder = tokenizer.convert_tokens_to_ids("#")
        eyes = {"hidden_size": 64, "intermediate_size": 128, "num_channels": 1}
        eyes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 8}
        config = transformers.LlavaConfig(
            text_config=text.config,
            vision_config=eyes,
            image_token_id=placeholder,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        model = transformers.LlavaForConditionalGeneration(config)
        model.see = seeing(self.look, placeholder)
        return tokenizer, model

    def load(self, config, max_new_tokens: int) -> tuple:
        tokenizer, *models = load(config, max_new_tokens)
        for model in models:
            model.see = seeing(self.look, model.config.image_token_id)
        return tokenizer, *models

    def look(self, row: dict, hinted: bool) -> dict[str, Tensor]:
        """The tiles of a row (names, 1, 8, 8), always with the same noise. The box shows the digits
        in their place, without noise."""
        names, noise = row["prompt"][1:-1], 0.3
        if hinted and self.has_box:
            names, noise = row["hint"], 0.0
        generator = torch.Generator().manual_seed(zlib.crc32(row["prompt"].encode()))
        clean = torch.stack([TILES[name] for name in names])[:, None] - 0.5
        return {"pixel_values": clean + noise * torch.randn(clean.shape, generator=generator)}

    def encode(self, rows: list[dict], tokenizer, models: tuple, template: str) -> None:
        for row in rows:
            row["plain"] = tokenizer(row["prompt"]).input_ids
            row["hinted"] = tokenizer(template.format(**row)).input_ids


class VisionBox(Vision):
    has_box = True


rules = dopd.TASKS["rules"]
dopd.TASKS["vision"] = Vision(*rules)
dopd.TASKS["vision_box"] = VisionBox(*rules)._replace(hint_template="{prompt}")
blind = [author._replace(hinted=0.0) for author in (rules.teacher, rules.student)]
dopd.TASKS["vision_none"] = Vision(*blind, hint_template="{prompt}")  # nobody gets the hint


# --- rows of --data, for real models
class Reader:
    """A processor in the place of a tokenizer."""

    def __init__(self, processor):
        self.processor, self.words = processor, processor.tokenizer
        self.chat_template, self.decode = processor.chat_template, processor.decode
        self.save_pretrained = processor.save_pretrained
        self.nothing = self.apply_chat_template([{"content": ""}], tokenize=False)

    def __call__(self, text: str, **options):
        return self.words(text, **options)

    def apply_chat_template(self, turns: list[dict], **options) -> str:
        content = [{"type": "image"}, {"type": "text", "text": turns[0]["content"]}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **options)

    def look(self, row: dict, hinted: bool, text: str = ""):
        """All inputs for one row: ids of the text, with placeholders, and what becomes of them."""
        text = text or self.nothing
        begins = text.startswith(self.words.bos_token or text)
        with dopd.blame(f"{row['prompt'][:50]!r}, its picture"):
            options = {"return_tensors": "pt", "add_special_tokens": not begins}
            return self.processor(text=[text], images=[[picture(row, hinted)]], **options)


def picture(row: dict, hinted: bool):
    """Opened when it is needed: the pixels of all rows would not fit into memory."""
    image = row["image"]
    if hinted and row["hinted_image"]:
        image = row["hinted_image"]
    return datasets.Image().decode_example(image).convert("RGB")


class Pictures(dopd.OwnData):
    def read_rows(self, config) -> list[dict]:
        """Pictures become {"path", "bytes"}, plain data that a checkpoint holds. All are opened
        once: none may be missing, and none may be both trained and tested on."""
        names = ("image", "hinted_image")
        rows, folder = dopd.read_rows(config, names), Path(config.data).absolute().parent
        for number, row in enumerate(rows, 1):
            for name in names:
                if isinstance(row[name], str):
                    row[name] = {"path": str(folder / row[name]), "bytes": None}
                elif not isinstance(row[name], dict):
                    row[name] = None
            with dopd.blame(f"--data {config.data}, row {number}: no picture"):
                picture(row, True)
                row["split_by"] = zlib.crc32(picture(row, False).tobytes())
        return rows

    def load(self, config, max_new_tokens: int) -> tuple:
        _, *models = load(config, max_new_tokens)
        readers = {}
        for role, name in (("teacher", config.teacher), ("student", config.student)):
            with dopd.blame(f"--{role} {name}, its processor"):
                readers[role] = Reader(transformers.AutoProcessor.from_pretrained(name))
        ours, theirs = [reader.processor.image_processor.to_dict() for reader in readers.values()]
        if ours != theirs:
            raise dopd.UserError("--teacher, --student: their image processors differ")
        for model in models:
            model.see = seeing(readers["student"].look, model.config.image_token_id)
        return readers["student"], *models

    def encode(self, rows: list[dict], tokenizer, models: tuple, template: str) -> None:
        def read(row: dict, reads: str, text: str) -> list[int]:
            return tokenizer.look(row, reads == "hinted", text)["input_ids"][0].tolist()

        dopd.encode(rows, tokenizer, models, template, read)


if __name__ == "__main__":
    argv = sys.argv[1:]
    if "--resume" not in argv:  # which takes no other flag
        argv = ["--task", "vision", *argv]
    dopd.main(argv, Pictures)
