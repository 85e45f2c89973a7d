"""Pictures: a tiny task, and rows with an "image" for real models. All flags of dopd.py work.

    python tiny_tasks/vision.py                       # the CPU experiment
    python tiny_tasks/vision.py --task vision_box     # the hint is in the picture
    python tiny_tasks/vision.py --teacher Qwen/Qwen3-VL-8B-Instruct \\
        --student Qwen/Qwen3-VL-2B-Instruct --data my.jsonl

An "image" is a path, seen from the folder of my.jsonl, or anything else that datasets.Image reads.
Privileged policies see the "hinted_image" of a row in its place, if there is one: with a box drawn
in, say; then the "hint" may be "". Most models need pillow and torchvision.
"""

import sys
import zlib
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402


def seeing(look, placeholder: int):
    """`model.see`, from look(row, hinted), which gives the inputs for one picture."""

    def see(rows: list[dict], reads: str, ids: Tensor) -> dict[str, Tensor]:
        looks, inputs = {}, {}
        for row in rows:
            if id(row) not in looks:  # the rollouts of a row look once
                looks[id(row)] = look(row, row.get("is_hinted") or reads == "hinted")
        for name in {*looks[id(rows[0])]} - {"input_ids", "attention_mask"}:
            inputs[name] = join([looks[id(row)][name] for row in rows]).to(ids.device)
            if name.endswith("token_type_ids"):
                inputs[name] = (ids == placeholder).long()
        return inputs

    return see


def join(parts: list[Tensor]) -> Tensor:
    """One after the other; with zeros at the end of smaller ones, as processors do."""
    sizes = torch.tensor([part.shape for part in parts])
    whole = parts[0].new_zeros(sum(sizes[:, 0]), *sizes[:, 1:].amax(0))
    for place, part in zip(whole.split(sizes[:, 0].tolist()), parts, strict=True):
        place[tuple(slice(size) for size in part.shape)] = part
    return whole


def load(config, max_new_tokens: int, look) -> tuple:
    """Models that see, and write no placeholders: these would have no picture."""
    auto = transformers.AutoModelForImageTextToText
    tokenizer, *models = dopd.load(config, max_new_tokens, auto)
    placeholders = ("image_token_", "video_token_", "audio_token_")
    for model in models:
        model.see = seeing(look, model.config.image_token_id)
        banned = model.generation_config.suppress_tokens or []
        for name, value in model.config.to_dict().items():
            if name.startswith(placeholders) and isinstance(value, int):
                banned.append(value)
        model.generation_config.suppress_tokens = banned
    return tokenizer, *models


# --- the tiny task
# A picture of 8 x 8 random dots for every name and digit
DOTS = torch.rand(23, 8, 8, generator=torch.Generator().manual_seed(0)).round()
TILES = dict(zip("abcdefghijklm0123456789", DOTS, strict=True))


class Vision(dopd.Rules):
    """`rules`, but of `7fbk=` the model reads `7###=`, and it sees three noisy tiles."""

    characters = "0123456789=|#"
    has_box = False

    def build(self, characters: str, layers: int) -> tuple:
        """A one-layer CLIP makes one token of a tile, before the tiny Qwen3."""
        tokenizer, text = dopd.tiny_policy(characters, layers)
        tokenizer.backend_tokenizer.model.unk_token = "#"  # what a name becomes
        eyes = {"hidden_size": 64, "intermediate_size": 128, "num_channels": 1, "patch_size": 8}
        eyes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
        parts = {"vision_config": eyes, "text_config": text.config, "vision_feature_layer": -1}
        config = transformers.LlavaConfig(
            **parts, image_token_id=len(tokenizer) - 1, tie_word_embeddings=True
        )
        model = transformers.LlavaForConditionalGeneration(config)
        model.see = seeing(self.look, config.image_token_id)
        return tokenizer, model

    def load(self, config, max_new_tokens: int) -> tuple:
        return load(config, max_new_tokens, self.look)

    def look(self, row: dict, hinted: bool) -> dict[str, Tensor]:
        """Tiles (names, 1, 8, 8), always with the same noise. The box shows the digits, clean."""
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


dopd.TASKS["vision"] = Vision(dopd.STRONG, dopd.WEAK)
dopd.TASKS["vision_box"] = VisionBox(dopd.STRONG, dopd.WEAK, "{prompt}")


# --- rows of --data, for real models
def open_picture(image: dict):
    """When it is needed: the pixels of all rows would not fit into memory."""
    return datasets.Image().decode_example(image).convert("RGB")


class Pictures(dopd.OwnData):
    def read_rows(self, config) -> list[dict]:
        """Pictures become {"path", "bytes"}. None is both trained and tested on."""
        names, folder = ("image", "hinted_image"), Path(config.data).absolute().parent
        rows = dopd.read_rows(config, names)
        for number, row in enumerate(rows, 1):
            for name in names:
                if isinstance(row[name], str) and row[name]:
                    row[name] = {"path": str(folder / row[name]), "bytes": None}
                elif not isinstance(row[name], dict):
                    row[name] = row["image"]
            with dopd.blame(f"--data {config.data}, row {number}: no picture"):
                row["split_by"] = zlib.crc32(open_picture(row["image"]).tobytes())
        return rows

    def load(self, config, max_new_tokens: int) -> tuple:
        with dopd.blame("--teacher, --student: their processors"):
            other = transformers.AutoProcessor.from_pretrained(config.teacher)
            self.processor = transformers.AutoProcessor.from_pretrained(config.student)
            self.no_text = self.chat([{"content": ""}])
            if other.image_processor.to_dict() != self.processor.image_processor.to_dict():
                raise ValueError("they differ")
        tokenizer, *models = load(config, max_new_tokens, self.look)
        # The processor writes the prompts, and is saved with the student.
        tokenizer.chat_template = self.processor.chat_template
        tokenizer.apply_chat_template = self.chat
        tokenizer.save_pretrained = self.processor.save_pretrained
        return tokenizer, *models

    def chat(self, turns: list[dict], **options) -> str:
        content = [{"type": "image"}, {"type": "text", "text": turns[0]["content"]}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, **options)

    def look(self, row: dict, hinted: bool, text: str = "") -> dict:
        """The ids of the text, with placeholders, and the picture."""
        text = text or self.no_text
        begins = text.startswith(self.processor.tokenizer.bos_token or text)
        options = {"return_tensors": "pt", "add_special_tokens": not begins}
        with dopd.blame(f"{row['prompt'][:50]!r}, its picture"):
            image = open_picture(row["hinted_image" if hinted else "image"])
            return self.processor(text=[text], images=[[image]], **options)

    def ids(self, row: dict, reads: str, text: str) -> list[int]:
        return self.look(row, reads == "hinted", text)["input_ids"][0].tolist()

    def encode(self, rows: list[dict], *more) -> None:
        dopd.encode(rows, *more, self.ids)


if __name__ == "__main__":
    dopd.main(["--task", "vision", *sys.argv[1:]], Pictures)
