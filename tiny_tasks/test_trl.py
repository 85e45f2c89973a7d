"""DOPD inside TRL: does tiny_tasks/trl_dopd.py do what dopd.py does, on one process and on two?"""

import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

import dopd
from test_dopd import SAID, bpe, load, policies_of, quiet_place, save, tiny, write_rows  # noqa: F401

pytest.importorskip("trl", "1.16.0")
peft = pytest.importorskip("peft")
from tiny_tasks import trl_dopd  # noqa: E402

FLAGS = """--model_name_or_path student --teacher_model_name_or_path teacher --data rows.jsonl
    --report_to none --max_completion_length 6 --loss_top_k 3 --rollouts 2 --learning_rate 1e-3
    --lr_scheduler_type constant --max_steps 4 --save_steps 2 --logging_steps 1 --bf16 False
    --disable_tqdm True --output_dir out --per_device_train_batch_size 2"""
ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
ZERO |= {"gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
SAVES = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
ENGINES = {
    "ddp": {},
    "fsdp2": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    "zero2": ZERO | {"zero_optimization": {"stage": 2}},
    "zero3": ZERO | {"zero_optimization": SAVES | {"stage3_param_persistence_threshold": 0}},
}


def rare(scores):
    """A router that trains on one token of the batch."""
    logp = scores["privileged_teacher"].logp
    return torch.where(logp == logp.max(), dopd.Regime.HT, -1)


def write_pair():
    """Two families, tables of two heights; prompts and completions of many lengths."""
    rows = [{"prompt": f"What is {i}? " * (1 + i % 3), "answer": "7"} for i in range(16)]
    write_rows("rows.jsonl", [row | {"hint": f"Count {i * i}."} for i, row in enumerate(rows)])
    student = tiny(seed=5, height=352)
    student.generation_config.eos_token_id = list(range(260, 300))
    save("student", student)
    save("teacher", tiny("Llama", seed=4, hidden_size=48))


def train(monkeypatch, *flags):
    """Trains in TRL. Returns the trainer, a copy of the first student if it has LoRA, and for each
    step the rows of all processes with their completions."""
    trainers, first, steps, trainer_class = [], [], [], trl_dopd.DOPDTrainer
    generate = trainer_class._generate_and_score_completions

    def noted(trainer, inputs):
        trainers.append(trainer)
        first.append(copy.deepcopy(trainer.model) if "--use_peft" in flags else None)
        batch, own = generate(trainer, inputs), []
        for rows, completions, *_ in batch["parts"]:
            for row, ids in zip(rows, completions, strict=True):
                own.append(row | {"completion": ids})
        steps.append(trl_dopd.utils.gather_object(own))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "_generate_and_score_completions", noted)
        patch.setattr(trainer_class, "end", lambda trainer: None)  # the next recipe goes on
        trl_dopd.main([*FLAGS.split(), *flags])
    return trainers[0], first[0], steps


def replay(monkeypatch, name, steps, student=None):
    """dopd.distill_step on the same completions, in one process. Returns the metrics of the steps,
    the weights before and after."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # it shards what is loaded
    _, teacher, first = load("teacher", "student")
    student = student or copy.deepcopy(first)
    learner = getattr(student, "get_base_model", lambda: student)()
    policies = policies_of(learner, first if name == "dopd_frozen" else learner, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.0)
    before = {key: weight.detach().clone() for key, weight in student.named_parameters()}
    recipe, config, metrics = dopd.RECIPES[name], dopd.Config(rollouts=1, top_k=3), []
    with monkeypatch.context() as patch:
        patch.setattr(dopd, "rollout", lambda _, rows, *size: [row["completion"] for row in rows])
        for rows in steps:
            metrics.append(dopd.distill_step(recipe, policies, optimizer, rows, config))
    return metrics, before, dict(student.named_parameters())


def compare(trainer, trained, metrics, before, after):
    """Loss, norm and regimes of every step, and the whole way of every weight."""
    log = [row for row in trainer.state.log_history if "loss" in row]
    for row, step in zip(log, metrics, strict=True):
        shares = {f"regime/{regime}": share for regime, share in step["regime_share"].items()}
        ours = shares | {"loss": step["loss"], "grad_norm": step["grad_norm"]}
        theirs = {key: float(row[key]) for key in ours}
        assert theirs == pytest.approx(ours, rel=1e-4) and ours["loss"] > 1e-4
    for key, weight in after.items():
        if weight.requires_grad:
            way = (weight - before[key]).norm()
            assert (trained[key] - weight).norm() < 1e-2 * way and way > 0, key


def flags_of(engine, monkeypatch):
    """accelerate drops FSDP and DeepSpeed where it sees a CPU, and says nothing: it must not."""
    import accelerate

    backend = ("gloo", accelerate.DistributedType.MULTI_GPU)
    monkeypatch.setattr(accelerate.state.PartialState, "_prepare_backend", lambda *_: backend)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    Path("engine.json").write_text(json.dumps(ENGINES[engine]))
    if engine == "fsdp2":
        return ["--fsdp", "full_shard", "--fsdp_config", "engine.json"]
    import deepspeed  # noqa: F401

    module = sys.modules["deepspeed.comm.torch"]
    monkeypatch.setattr(module, "build_shm_op", lambda: None)  # it compiles C++ for a minute
    return ["--deepspeed", "engine.json"]


def share_held(model):
    """The share of a model's weights that is in this process."""
    held = whole = 0
    for weight in model.parameters():
        whole += math.prod(getattr(weight, "ds_shape", weight.shape))
        part = getattr(weight, "ds_tensor", weight)
        held += getattr(part, "to_local", lambda part=part: part)().numel()
    return held / whole


def in_each_process(engine):
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(dopd, "AT_ONCE", 5)  # then the processes have unequal numbers of chunks
    flags = ["--use_cpu"] if engine == "ddp" else flags_of(engine, monkeypatch)
    flags += ["--gradient_accumulation_steps", "2"]
    for name in ("opd", "dopd", "dopd_frozen"):
        trainer, _, steps = train(monkeypatch, *flags, "--recipe", name)
        shares = [share_held(each) for each in (trainer.model_wrapped, *trainer.frozen.values())]
        if engine in ("fsdp2", "zero3"):  # FSDP 2 does not give the teacher's head back
            assert shares[0] == 0.5 and max(shares) < 0.65
        if engine == "zero2":
            parts = trainer.optimizer.optimizer.single_partition_of_fp32_groups
            assert sum(part.numel() for part in parts) == trainer.model.num_parameters() / 2
        tokens = [[len(row["completion"]) for row in rows] for rows in steps]
        assert any(sum(each[:4]) // 5 != sum(each[4:]) // 5 for each in tokens)
        if trainer.args.process_index == 0:
            saved = load_file("out/model.safetensors")
            compare(trainer, saved, *replay(monkeypatch, name, steps))
    flags += ["--resume_from_checkpoint", "out/checkpoint-2", "--output_dir", "again"]
    train(monkeypatch, *flags, "--recipe", name)
    if trainer.args.process_index == 0:
        assert_close(load_file("again/model.safetensors"), saved, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes(engine):
    """Catches means per process; a gradient that is half as large; processes that wait for one
    another; an engine that is off; a resumed run whose anchor or completions are others."""
    if "zero" in engine and not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed")
    write_pair()
    tests = f"import sys; sys.path[:0] = {sys.path}; import {Path(__file__).stem} as tests"
    Path("two.py").write_text(f"{tests}; tests.in_each_process({engine!r})")
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 two.py".split()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "flags", ["rare", "dopd_frozen", "dopd --use_peft", "dopd_frozen --use_peft"]
)
def test_one_process(flags, monkeypatch):
    """Catches means per micro-batch; parts with nothing to learn; an anchor with its adapter; other
    prompts; sampling in the checkpoint's own way, or of ids without a word."""
    write_pair()
    drawn, draw = [], torch.multinomial
    monkeypatch.setitem(dopd.RECIPES, "rare", dopd.dopd()._replace(router=rare))
    monkeypatch.setattr(torch, "multinomial", lambda p, **more: drawn.append(p) or draw(p, **more))
    flags = ["--gradient_accumulation_steps", "4", "--use_cpu", "--recipe", *flags.split()]
    trainer, student, steps = train(monkeypatch, *flags)
    trained = dict(trainer.model.named_parameters())
    compare(trainer, trained, *replay(monkeypatch, flags[4], steps, student))
    row, first = steps[0][0], load("teacher", "student")[2]
    expected = first(torch.tensor([row["plain"]])).logits[0, -1, :300].softmax(-1)
    probabilities = next(each for each in drawn if len(each) == 8)[0]
    assert_close(probabilities, torch.cat([expected, torch.zeros(52)]))
    assert steps[0][1]["plain"] == row["plain"]  # the second completion of the first prompt
    assert row["hinted"] == bpe()(SAID.format(f"{row['prompt']}\n\nHint: {row['hint']}")).input_ids


def test_bfloat16(monkeypatch):
    """Catches --bf16 that the loss or the scores do not see."""
    write_pair()
    flags = "--use_cpu --recipe dopd --bf16 True --per_device_train_batch_size 8 --max_steps 1"
    trainer, _, steps = train(monkeypatch, *flags.split())
    loss, off = float(trainer.state.log_history[0]["loss"]), []
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
            (metrics,), *_ = replay(monkeypatch, "dopd", steps)
        off.append(abs(loss / metrics["loss"] - 1))
    assert off[0] < 1e-5 and off[1] > 1e-3, off


BAD = {
    "--temperature 0.5": "temperature",
    "--rollouts 0": "rollouts",
    "--gradient_accumulation_steps 20": "16 rows 40",
    "--hint_template {prompt}": "hint",
    "--max_completion_length 120": "tokens --max_completion_length",
    "--model_name_or_path other": "tokenizers differ",
    "--model_name_or_path cut": "--model_name_or_path cut up_proj",
    "--model_name_or_path adapter": "adapter learn",
    "--teacher_model_name_or_path capped": "capped not supported",
}


@pytest.mark.parametrize("flags", BAD)
def test_refuses_what_dopd_refuses(flags, capsys):
    """In one line, with exit code 2, and before a student is saved."""
    write_pair()
    save("other", tiny(), bpe(additional_special_tokens=["<|other|>"]))
    save("capped", tiny("Gemma2", final_logit_softcapping=1.0))
    cut = tiny()
    cut.model.layers[1].mlp.up_proj = None
    save("cut", cut)
    base = transformers.AutoModelForCausalLM.from_pretrained("student")
    save("adapter", peft.get_peft_model(base, peft.LoraConfig()))
    with pytest.raises(SystemExit) as stopped:
        trl_dopd.main([*FLAGS.split(), "--use_cpu", *flags.split()])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("dopd.py: ")]
    assert stopped.value.code == 2 and all(word in line for word in BAD[flags].split()), line
    assert not Path("out/model.safetensors").exists()
