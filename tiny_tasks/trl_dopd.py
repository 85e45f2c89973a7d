"""DOPD inside Hugging Face TRL: many GPUs, LoRA, runs that resume.

    accelerate launch --config_file engine.yaml tiny_tasks/trl_dopd.py --recipe dopd_frozen \\
        --teacher_model_name_or_path Qwen/Qwen3-8B --model_name_or_path Qwen/Qwen3-1.7B \\
        --data my.jsonl --learning_rate 5e-6 --per_device_train_batch_size 8 \\
        --gradient_accumulation_steps 8 --output_dir runs/trl

A step takes 8 x 8 completions on each GPU. engine.yaml is, for DDP, FSDP 2 and ZeRO-3 (or 2):

    {num_processes: 8, distributed_type: MULTI_GPU}
    {num_processes: 8, distributed_type: FSDP,
     fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP,
                   fsdp_state_dict_type: FULL_STATE_DICT}}
    {num_processes: 8, distributed_type: DEEPSPEED,
     deepspeed_config: {zero_stage: 3, zero3_init_flag: true, zero3_save_16bit_model: true}}

TRL's flags hold: --use_peft is LoRA, --resume_from_checkpoint FOLDER goes on, --bf16 is True.
Tried: two CPU processes, tiny models; they equal dopd.py. Never: GPUs, vLLM, models of real size.
"""

import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
import trl
from accelerate import utils
from datasets import Dataset
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402

NAMES = {"--teacher": "--teacher_model_name_or_path", "--student": "--model_name_or_path"}
NAMES |= {"--max_new_tokens": "--max_completion_length", "--lr": "--learning_rate"}
REFUSED = """beta temperature top_p top_k min_p repetition_penalty attn_implementation
    load_in_4bit load_in_8bit model_revision teacher_model_revision""".split()


@dataclass
class DOPDConfig(trl.DistillationConfig):
    data: str = dopd.flag("", "as for dopd.py")
    hint_template: str = dopd.flag(dopd.Config.hint_template, "as for dopd.py")
    recipe: str = dopd.flag("dopd", "the method", choices=dopd.RECIPES)
    rollouts: int = dopd.flag(4, "completions per prompt")
    loss_top_k: int = dopd.flag(128, "--top_k of dopd.py")
    shuffle_dataset: bool = False  # `train` does it
    disable_dropout: bool = True  # LoRA's, too: who is scored is who learns


class DOPDTrainer(trl.DistillationTrainer):
    """`models`: student, teacher and, where it is a third model, the anchor."""

    def __init__(self, models: dict, rows: list[dict], config: DOPDConfig, **more):
        data = Dataset.from_list([row for row in rows for _ in range(config.rollouts)])
        super().__init__(models["student"], args=config, train_dataset=data, **more)
        self.models, self.rows, self.recipe = models, rows, dopd.RECIPES[config.recipe]
        self.frozen = {who: self.shard(models[who]) for who in models if who != "student"}

    def shard(self, model):
        """Places a model that does not learn."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if not self.is_fsdp_enabled:
            return model.to(self.accelerator.device)
        plugin = self.accelerator.state.fsdp_plugin
        before = dict(vars(plugin))
        utils.fsdp2_prepare_model(self.accelerator, model)
        vars(plugin).update(before)  # else the student needs the teacher's class
        return model

    def wrapped(self, who: str):
        return self.frozen.get(who, self.model_wrapped)

    def check(self) -> None:
        for who in ("student", "teacher"):
            check = partial(dopd.check_scores, self.models[who], self.rows)
            with unwrap_model_for_generation(self.wrapped(who), self.accelerator) as model:
                self._forward_redirection(self.wrapped(who), model, check)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        return prompts, None, {}  # dopd.encode did it

    def log_probs(self, who: str, reads: str, rows: list, completions: list) -> dopd.LogProbs:
        """Inside the forward pass of a wrapper: only there do FSDP and DeepSpeed gather weights."""
        model = self.models.get(who, self.models["student"])
        size = self.args.per_device_train_batch_size
        return dopd.score(dopd.Policy(model, reads), rows, completions, size)

    def score(self, name: str, *given) -> dopd.LogProbs:
        who, reads = dopd.POLICIES[name]
        model = self.accelerator.unwrap_model(self.wrapped(who))
        without_lora = who == "anchor" and self.recipe.anchor_decay and who not in self.models
        with model.disable_adapter() if without_lora else nullcontext():
            read = partial(self.log_probs, who, reads, *given)
            return self._forward_redirection(self.wrapped(who), model, read)

    @torch.no_grad()
    def _generate_and_score_completions(self, rows: list[dict]) -> dict:
        """This process's share of a step: parts 1 to 3 of dopd.distill_step."""
        here, world = self.accelerator.process_index, self.accelerator.num_processes
        with self.accelerator.autocast():
            if self._step == 0:
                self.check()
            # Seed, step and process decide every draw.
            torch.manual_seed((self.args.seed * 10**6 + self.state.global_step) * world + here)
            completions = self._generate([row["plain"] for row in rows])[1]
            tokens = torch.tensor(sum(completions, []), device=self.accelerator.device)  # (N,)
            others = {term.source for term in self.recipe.terms} | {*self.recipe.router_reads}
            # Sorted: the same order in every process.
            sources = {name: self.score(name, rows, completions) for name in sorted(others)}
            scores = {}
            for name in self.recipe.router_reads:
                own = dopd.token_scores(sources[name], tokens)
                scores[name] = dopd.Scores(*map(gathered, own))
        # Means over all processes decide. Of their gradients, the mean is taken.
        lengths = gathered(torch.tensor([len(ids) for ids in completions]))
        regimes, weights = dopd.assign(self.recipe, scores, lengths)
        first = lengths[: len(rows) * here].sum()
        weights = weights[:, first:].to(tokens.device) * world
        for term in self.recipe.terms:
            share = (regimes == term.regime).float().mean().item()
            self._metrics["train"][f"regime/{term.regime.name}"].append(share)

        parts, end, size = [], 0, self.args.per_device_train_batch_size
        for i in range(0, len(rows), size):
            ids = completions[i : i + size]
            start = end
            end += sum(len(each) for each in ids)
            part = (rows[i : i + size], ids, tokens[start:end], weights[:, start:end])
            parts.append((*part, sources, start))
        return {"order": torch.arange(len(parts)), "parts": parts}  # TRL deals out one at a time

    def _compute_loss(self, student, inputs: dict, num_items_in_batch) -> tuple:
        """A micro-batch: loss, sum of entropies, tokens."""
        rows, completions, tokens, weights, sources, start = inputs["parts"][0]
        with self.accelerator.autocast():
            logp = self.log_probs("student", "plain", rows, completions)
            top_k = self.args.loss_top_k
            loss = dopd.recipe_loss(self.recipe, logp, sources, weights, top_k, start)
            entropy = dopd.token_scores(logp, tokens).entropy.sum()
        return loss, entropy, tokens.new_tensor(len(tokens))


def gathered(own):
    return torch.cat(utils.gather_object([own.cpu()]))


def check(config: DOPDConfig, model: trl.ModelConfig) -> dopd.Config:
    """Refuses flags that cannot work. Returns those of dopd.py."""
    own = dopd.Config(data=config.data, recipe=[config.recipe], rollouts=config.rollouts)
    own.teacher, own.student = config.teacher_model_name_or_path, model.model_name_or_path
    own.top_k, own.lr = config.loss_top_k, config.learning_rate
    own.max_new_tokens, own.dtype = config.max_completion_length, model.dtype
    dopd.check(own)
    for flags in (config, model):
        for name in REFUSED:
            fine = getattr(flags, name, None) == getattr(type(flags), name, None)
            dopd.require(fine, f"--{name}: not supported")
    fine = dopd.RECIPES[config.recipe].anchor_decay in (0, 1)
    dopd.require(fine, f"--recipe {config.recipe}: its anchor moves; not supported")
    return own


def train(config: DOPDConfig, model: trl.ModelConfig) -> None:
    own = check(config, model)
    rows = dopd.read_rows(own)
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    step *= config.world_size
    fault = f"--data: {len(rows)} rows do not fill a step of {step} completions"
    dopd.require(len(rows) * config.rollouts >= step, fault)
    tokenizer, teacher, student = dopd.load(own, own.max_new_tokens)
    if config.process_index == 0:
        dopd.encode(rows, tokenizer, (teacher, student), config.hint_template)
    rows = utils.broadcast_object_list([rows])[0]
    models = {"student": student, "teacher": teacher}
    if dopd.RECIPES[config.recipe].anchor_decay and not model.use_peft:
        auto = transformers.AutoModelForCausalLM  # from disk: shards cannot be copied
        _, models["anchor"] = dopd.load_model("student", own, "float32", auto)
        models["anchor"].vocabulary = student.vocabulary
    rows = random.Random(config.seed).sample(rows, len(rows))
    peft = trl.get_peft_config(model)
    trainer = DOPDTrainer(models, rows, config, processing_class=tokenizer, peft_config=peft)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


def main(argv: list[str]) -> None:
    sys.stdout.reconfigure(errors="replace")
    flags = trl.TrlParser((DOPDConfig, trl.ModelConfig)).parse_args_and_config(argv)
    try:
        train(*flags)
    except dopd.UserError as error:
        line = " ".join(str(error).split())[:400]
        for of_dopd, of_trl in NAMES.items():
            line = line.replace(of_dopd, of_trl)
        print(f"dopd.py: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
