"""DOPD inside Hugging Face TRL, for what one GPU cannot hold: many GPUs, LoRA, runs that resume.

    python tiny_tasks/trl_dopd.py --model_name_or_path Qwen/Qwen3-1.7B \\
        --teacher_model_name_or_path Qwen/Qwen3-8B --data my.jsonl --recipe dopd_frozen \\
        --learning_rate 5e-6 --per_device_train_batch_size 8 --gradient_accumulation_steps 64 \\
        --output_dir runs/trl

is one process. On 8 GPUs each takes an eighth of the batch. With `accelerate launch --config_file
engine.yaml` in place of `python` and `--gradient_accumulation_steps 8`, engine.yaml decides how:

    num_processes: 8                # DDP: the whole student on every GPU
    distributed_type: MULTI_GPU

    num_processes: 8                # FSDP 2: each GPU holds an eighth of all models
    distributed_type: FSDP
    fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP,
                  fsdp_state_dict_type: FULL_STATE_DICT}

    num_processes: 8                # ZeRO-3, the same with DeepSpeed; zero_stage: 2 is ZeRO-2
    distributed_type: DEEPSPEED
    deepspeed_config: {zero_stage: 3, zero3_init_flag: true, zero3_save_16bit_model: true}

A batch counts completions: 8 x 8 x 8 GPUs are 128 prompts with 4 rollouts each. TRL's flags hold;
--use_peft is LoRA, --resume_from_checkpoint FOLDER goes on, --bf16 is on if you do not say no.
"""

import math
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from accelerate.utils import (
    broadcast_object_list,
    fsdp2_prepare_model,
    gather_object,
    is_peft_model,
)
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402


@dataclass
class DOPDConfig(trl.DistillationConfig):
    data: str = dopd.flag("", "rows of prompt, answer and hint, as for dopd.py")
    hint_template: str = dopd.flag(dopd.Config.hint_template, "what privileged policies read")
    recipe: str = dopd.flag("dopd", "a method", choices=dopd.RECIPES)
    rollouts: int = dopd.flag(4, "completions sampled per prompt")
    loss_top_k: int = dopd.flag(128, "words in the top-K support, besides the tail")
    shuffle_dataset: bool = False  # we do it, prompt by prompt
    disable_dropout: bool = True  # that of LoRA, too: who is scored is who learns


class DOPDTrainer(trl.DistillationTrainer):
    """`models`: student, teacher and, for a frozen privileged student, the student once more; with
    LoRA that is the student without its adapter. `rows`: as dopd.encode leaves them."""

    def __init__(self, models: dict, rows: list[dict], config: DOPDConfig, **more):
        each = [row for row in rows for _ in range(config.rollouts)]
        data = [row | {"prompt": row["plain"]} for row in each]  # TRL samples after "prompt"
        super().__init__(
            models["student"], args=config, train_dataset=Dataset.from_list(data), **more
        )
        self.rows, self.recipe, self.checked = rows, dopd.RECIPES[config.recipe], False
        frozen = {who: self.prepare_frozen(models[who]) for who in models if who != "student"}
        self.teacher_model, self.anchor = frozen["teacher"], frozen.get("anchor")

    def prepare_frozen(self, model):
        """Places or shards a model that does not learn."""
        model.eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if not self.is_fsdp_enabled:
            return model.to(self.accelerator.device)
        plugin = self.accelerator.state.fsdp_plugin
        before = dict(vars(plugin))
        model = fsdp2_prepare_model(self.accelerator, model)
        vars(plugin).update(
            before
        )  # else it looks for layers of the teacher's class in the student
        return model

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple:
        return prompts, None, {}  # they are token ids already

    def inside(self, who: str, function, *given):
        """function(model, *given) in the forward pass of the wrapper of the model: only there do
        FSDP and DeepSpeed gather its weights."""
        wrapped = {"teacher": self.teacher_model, "anchor": self.anchor}.get(who)
        wrapped = wrapped or self.model_wrapped
        model = self.accelerator.unwrap_model(wrapped)
        return self._forward_redirection(wrapped, model, lambda: function(bare(model), *given))

    def score(self, name: str, rows: list[dict], completions: list[list[int]]) -> dopd.LogProbs:
        """The log-probs of a policy on the tokens of this process."""
        who, reads = dopd.POLICIES[name]
        model = self.accelerator.unwrap_model(self.model_wrapped)
        without_adapter = torch.no_grad()
        if who == "anchor" and self.recipe.anchor_decay == 1 and is_peft_model(model):
            without_adapter = model.disable_adapter()

        def read(model) -> dopd.LogProbs:
            size = self.args.per_device_train_batch_size
            return dopd.score(dopd.Policy(model, reads), rows, completions, size)

        with without_adapter:
            return self.inside(who, read)

    def check(self) -> None:
        """As in dopd.prepare, but with the models as they will be used."""
        for wrapped in (self.teacher_model, self.model_wrapped):
            with unwrap_model_for_generation(wrapped, self.accelerator) as model:
                dopd.check_scores(bare(model), self.rows)
        self.checked = True

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """TRL samples this process's share of an optimizer step. Then, as in dopd.distill_step, the
        other policies score it, and means over the tokens of all processes decide the weights."""
        with torch.no_grad(), self.accelerator.autocast():
            if not self.checked:
                self.check()
            batch = super()._generate_and_score_completions(inputs)
            masks = batch["completion_mask"].bool()
            pairs = zip(batch["completion_ids"], masks, strict=True)
            completions = [ids[mask].tolist() for ids, mask in pairs]
            tokens, reads = batch["completion_ids"][masks], self.recipe.router_reads  # (N,)
            others = [term.source for term in self.recipe.terms] + [*reads]
            # Not in a set: all processes have to take the models in the same order.
            sources = {
                name: self.score(name, inputs, completions) for name in dict.fromkeys(others)
            }
            scores = {}
            for name in reads:
                own = dopd.token_scores(sources[name], tokens)
                scores[name] = dopd.Scores(*map(of_all_processes, own))
        lengths = masks.sum(1)
        every = of_all_processes(lengths)
        regimes, weights = dopd.assign(self.recipe, scores, every)  # of the tokens of all processes
        begin = every[: self.accelerator.process_index * len(inputs)].sum()
        weights = weights[:, begin : begin + len(tokens)] * self.accelerator.num_processes

        # TRL shuffles the rows among the micro-batches: each keeps the places of its tokens.
        places = torch.arange(len(tokens)).split(lengths.tolist())
        batch["dopd"] = []
        for row, completion, place in zip(inputs, completions, places, strict=True):
            own = {"completion": completion, "place": place, "weights": weights[:, place]}
            batch["dopd"].append(row | own | {"sources": sources})
        for regime in {term.regime for term in self.recipe.terms}:
            share = (regimes == regime).float().mean().item()
            self._metrics["train"][f"regime/{regime.name}"].append(share)
        return batch

    def _compute_loss(self, student, inputs: dict, num_items_in_batch) -> tuple:
        """Of one micro-batch, in the forward pass of the wrapper: its part of the loss, the sum of
        the entropies, the number of tokens."""
        rows, device = inputs["dopd"], self.accelerator.device
        completions = [row["completion"] for row in rows]
        tokens = torch.tensor(sum(completions, []), device=device)
        place = torch.cat([row["place"] for row in rows]).to(device)
        weights = torch.cat([row["weights"] for row in rows], 1).to(device)
        sources = {}
        for name, logp in rows[0]["sources"].items():
            sources[name] = dopd.LogProbs(logp.hidden[place], logp.weight, logp.bias)
        with self.accelerator.autocast():
            logp = dopd.score(dopd.Policy(bare(student), "plain"), rows, completions)
            loss = dopd.recipe_loss(self.recipe, logp, sources, weights, self.args.loss_top_k)
            entropy = dopd.token_scores(logp, tokens).entropy.sum()
        if not loss.isfinite():  # TRL would leave it out of its log, and go on
            raise dopd.UserError(f"the loss is {loss.item()}; try a lower --learning_rate")
        return loss, entropy, tokens.new_tensor(len(tokens))


def bare(model):
    """The model inside LoRA. FSDP 2 shards the head by itself, and `score` reads its weight."""
    if is_peft_model(model):
        model = model.get_base_model()
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()
    return model


def of_all_processes(own: Tensor) -> Tensor:
    """One tensor, on the CPU, of the parts of all processes."""
    return torch.cat(gather_object([own.cpu()]))


def check_flags(config: DOPDConfig, model: trl.ModelConfig) -> None:
    for name in ("rollouts", "loss_top_k", "max_completion_length", "learning_rate"):
        value = getattr(config, name)
        if not value or not 0 < value < math.inf:
            raise dopd.UserError(f"--{name} {value}: must be above 0")
    for name in ("beta", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if getattr(config, name) != DOPDConfig.__dataclass_fields__[name].default:
            raise dopd.UserError(f"--{name}: students sample from their own distribution, for DOPD")
    if 0 < dopd.RECIPES[config.recipe].anchor_decay < 1:
        raise dopd.UserError(f"--recipe {config.recipe}: its anchor moves; only in dopd.py")
    if model.model_revision != "main" or config.teacher_model_revision:
        raise dopd.UserError("--model_revision: download that revision, and give its folder")


def load(config: DOPDConfig, model: trl.ModelConfig) -> tuple:
    """Tokenizer and models. All are read from disk: of a student in shards there is no copy."""
    names = {"teacher": config.teacher_model_name_or_path, "student": model.model_name_or_path}
    names = {role: (role, name) for role, name in names.items()}
    if dopd.RECIPES[config.recipe].anchor_decay and not model.use_peft:
        names["anchor"] = names["student"]
    more = {"attn_implementation": model.attn_implementation}
    own = {"quantization_config": trl.get_quantization_config(model)}
    kwargs = {"teacher": more | (config.teacher_model_init_kwargs or {})}
    kwargs["student"] = more | own | (config.model_init_kwargs or {})
    config.model_init_kwargs, tokenizers, models = None, [], {}
    for who, (role, name) in names.items():
        reader = partial(transformers.AutoModelForCausalLM.from_pretrained, **kwargs[role])
        auto = SimpleNamespace(from_pretrained=reader)
        tokenizer, models[who] = dopd.load_model(role, name, model.dtype, None, auto)
        tokenizers.append(tokenizer)
    dopd.set_sampling(tokenizers[:2], [*models.values()], config.max_completion_length)
    tokenizer = tokenizers[1]
    if tokenizer.eos_token is None:  # TRL needs one; the teacher's tokenizer has it
        ends = models["student"].generation_config.eos_token_id
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer, models


def train(config: DOPDConfig, model: trl.ModelConfig) -> None:
    check_flags(config, model)
    rows = [None]
    if config.process_index == 0:
        rows = [dopd.read_rows(config)]
    rows = broadcast_object_list(rows)[0]
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    step *= config.world_size
    if len(rows) * config.rollouts < step:
        raise dopd.UserError(
            f"--data {config.data}: {len(rows)} rows x {config.rollouts} rollouts are fewer than "
            f"the {step} completions of one optimizer step"
        )
    tokenizer, models = load(config, model)
    dopd.encode(rows, tokenizer, (*models.values(),), config.hint_template)
    rows = random.Random(config.seed).sample(rows, len(rows))
    peft = trl.get_peft_config(model)
    trainer = DOPDTrainer(models, rows, config, processing_class=tokenizer, peft_config=peft)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


def main(argv: list[str]) -> None:
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show must not end a run
    config, model = trl.TrlParser((DOPDConfig, trl.ModelConfig)).parse_args_and_config(argv)
    try:
        train(config, model)
    except dopd.UserError as error:
        text = " ".join(str(error).split())
        for ours, theirs in FLAGS.items():
            text = text.replace(ours, theirs)
        print(f"dopd.py: {text[:400]}", file=sys.stderr)
        sys.exit(2)


# What the flags of dopd.py are called here.
FLAGS = {
    "--student": "--model_name_or_path",
    "--teacher": "--teacher_model_name_or_path",
    "--max_new_tokens": "--max_completion_length",
}

if __name__ == "__main__":
    main(sys.argv[1:])
