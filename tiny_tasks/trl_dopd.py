"""DOPD inside Hugging Face TRL, for what one GPU cannot hold: many GPUs, LoRA, vLLM, checkpoints to resume from.

    torchrun --nproc_per_node 8 tiny_tasks/trl_dopd.py --model_name_or_path Qwen/Qwen3-1.7B \\
        --teacher_model_name_or_path Qwen/Qwen3-8B --data my.jsonl --recipe dopd_frozen --learning_rate 5e-6 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --output_dir runs/trl

TRL's flags hold, but for --beta. --use_peft is LoRA; --resume_from_checkpoint FOLDER goes on; batches are completions.
"""

import copy
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402


@dataclass
class DOPDConfig(trl.DistillationConfig):
    data: str = field(default="", metadata={"help": "rows of prompt, answer, and hint or hints, as for dopd.py"})
    hint: str = field(default="steps", metadata={"help": "which of the hints"})
    hint_template: str = field(default=dopd.OwnData("").hint_template, metadata={"help": "how a hint joins its prompt"})
    recipe: str = field(default="dopd", metadata={"help": "a name of dopd.RECIPES"})
    rollouts: int = field(default=4, metadata={"help": "completions sampled per prompt"})
    loss_top_k: int = field(default=128, metadata={"help": "tokens in the top-K support, besides the tail"})
    shuffle_dataset: bool = False          # main does it, prompt by prompt
    disable_dropout: bool = True           # that of LoRA, too: who is scored is who learns

    def __post_init__(self):
        super().__post_init__()
        known = [name for name, recipe in dopd.RECIPES.items() if recipe.anchor_decay in (0, 1)]    # no average
        dopd.require(self.recipe in known, f"--recipe {self.recipe}: choose from {', '.join(known)}")


class DOPDTrainer(trl.DistillationTrainer):
    """On rows of `prompt` and `hinted`. With LoRA, a frozen privileged student is the base model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos_token_ids)     # TRL's, nothing of its own
        self.recipe, self.anchor = dopd.RECIPES[self.args.recipe], None
        if self.recipe.anchor_decay and not is_peft_model(self.model):   # a copy of before a checkpoint is loaded
            self.anchor = self.accelerator.prepare_model(copy.deepcopy(self.model).eval(), evaluation_mode=True)
        models = map(self.accelerator.unwrap_model, (self.model, self.teacher_model.eval(), self.anchor or self.model))
        student, teacher, anchor = (model.get_base_model() if is_peft_model(model) else model for model in models)
        self.policies = {"student": dopd.Policy(student, "plain"), "privileged_student": dopd.Policy(anchor, "hinted"),
                         "teacher": dopd.Policy(teacher, "plain"), "privileged_teacher": dopd.Policy(teacher, "hinted")}
        odd = "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier", "final_logit_softcapping"
        for model, text in ((model, model.config.get_text_config()) for model in (student, teacher, anchor)):
            dopd.require({getattr(text, key, None) for key in odd} <= {None, 1}, f"{text.model_type}: scales logits")
            model.vocabulary, model.look = text.vocab_size, None
            if self.is_fsdp_enabled and model is not student:            # only version 1; whole on every GPU, as
                model.to(self.accelerator.device)                        # accelerate leaves what it does not wrap

    def score(self, name: str, rows: list[dict], completions: list[list[int]]) -> tuple:
        """The log-probs of one policy on this process's tokens, a function as of dopd.score, and their Scores."""
        wrapped = self.teacher_model if "teacher" in name else self.anchor or self.model_wrapped
        model, reads = self.accelerator.unwrap_model(wrapped), self.recipe.router_reads
        base = "teacher" not in name and self.recipe.anchor_decay and is_peft_model(model)

        def read(name):                    # in the forward pass of the wrapper: there FSDP and DeepSpeed gather weights
            logp = dopd.score(self.policies[name], rows, completions, self.args.per_device_train_batch_size)
            tokens = torch.tensor(sum(completions, []), device=self.accelerator.device)
            return logp, [*map(torch.Tensor.cpu, dopd.token_scores(logp, tokens))] if name in reads else []
        with self.compute_loss_context_manager(), torch.no_grad(), model.disable_adapter() if base else torch.no_grad():
            return self._forward_redirection(wrapped, model, read, name)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """TRL samples this process's share of the optimizer batch, for all accumulation steps. Then, as in
        dopd.distill_step, the policies score it, and averages over the batch of all processes decide the weights."""
        batch, reads = super()._generate_and_score_completions(inputs), self.recipe.router_reads
        completions = [ids[on.bool()].tolist() for ids, on in zip(batch["completion_ids"], batch["completion_mask"])]
        rows = [dict(zip(("plain", "hinted"), self._tokenize_prompts([x["prompt"], x["hinted"]])[0])) for x in inputs]
        scored = {name: self.score(name, rows, completions) for name in self.policies if name in reads or
                  any(row.source == name for row in self.recipe.rows)}
        lengths, parts = [*map(len, completions)], gather_object([{name: scored[name][1] for name in reads}])
        scores = {name: dopd.Scores(*map(torch.cat, zip(*(part[name] for part in parts)))) for name in reads}
        every, world = gather_object(lengths), self.accelerator.num_processes
        regimes, weights = dopd.assign(self.recipe, scores, torch.tensor(every))             # (N,), (R, N)
        own = (weights * world).split(every, 1)[len(rows) * self.accelerator.process_index:]     # DDP takes the mean
        # TRL shuffles the rows and deals them out to the accumulation steps. Each knows its place among the tokens.
        batch["dopd"] = [row | {"completion": ids, "weights": weight, "place": place, "scored": scored} for row, ids,
                         weight, place in zip(rows, completions, own, torch.arange(sum(lengths)).split(lengths))]
        mode = "train" if self.model.training else "eval"
        for row in self.recipe.rows:
            self._metrics[mode][f"regime/{row.regime.name}"].append((regimes == row.regime).float().mean().item())
        return batch

    def _compute_loss(self, student, inputs: dict, num_items_in_batch) -> tuple:
        """One micro-batch, inside the forward pass of the wrapper: its part of the loss, sum of entropies, tokens."""
        rows, completions = inputs["dopd"], [row["completion"] for row in inputs["dopd"]]
        tokens = torch.tensor(sum(completions, []), device=self.accelerator.device)
        place, weights = (torch.cat([row[key] for row in rows], -1).to(tokens.device) for key in ("place", "weights"))
        sources = {name: lambda index, logp=logp: logp(place[index]) for name, (logp, _) in rows[0]["scored"].items()}
        logp = dopd.score(self.policies["student"], rows, completions)
        loss = dopd.recipe_loss(self.recipe, logp, sources, weights, self.args.loss_top_k)
        return loss, dopd.token_scores(logp, tokens).entropy.sum(), tokens.new_tensor(len(tokens))


def main() -> None:
    config, student = trl.TrlParser((DOPDConfig, trl.ModelConfig)).parse_args_and_config()
    loading = {"dtype": student.dtype, "attn_implementation": student.attn_implementation}
    config.model_init_kwargs = loading | {"revision": student.model_revision} | (config.model_init_kwargs or {})
    config.teacher_model_init_kwargs = loading | (config.teacher_model_init_kwargs or {})
    config.chat_template_kwargs = {"enable_thinking": False} | (config.chat_template_kwargs or {})
    tokenizer = AutoTokenizer.from_pretrained(student.model_name_or_path, revision=student.model_revision)
    rows = broadcast_object_list([dopd.read_rows(config) if config.process_index == 0 else None])[0]
    dopd.require("image" not in rows[0], f"--data {config.data}: has pictures, which only dopd.py takes")
    texts = [(row["prompt"], dopd.with_hint(row, config.hint, config.hint_template)) for row in
             random.Random(config.seed).sample(rows, len(rows)) for _ in range(config.rollouts)]
    turn = (lambda text: [{"role": "user", "content": text}]) if tokenizer.chat_template else str
    data = Dataset.from_list([{"prompt": turn(plain), "hinted": turn(hinted)} for plain, hinted in texts])
    special = {"quantization_config": trl.get_quantization_config(student), "peft_config": trl.get_peft_config(student)}
    names = student.model_name_or_path, config.teacher_model_name_or_path
    trainer = DOPDTrainer(*names, config, data, processing_class=tokenizer, **special)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
