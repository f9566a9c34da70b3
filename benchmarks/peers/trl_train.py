"""TRL's training on given rows; runs in an environment of its own and prints one JSON line.

    python trl_train.py MODEL ROWS.jsonl lora|full|dpo default|best|grouped STEPS PRECISION

`default` is TRL as it comes; `best` gives it the cheap wins too: weights in the machine's faster precision, no
gradient checkpointing, one row at a time; `grouped` the same with eight rows of like length at a time, which is better
where rows are short. Rows are a prepared data stage's.
"""

import json
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from measured import Clock, count_tokens, tell
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, rows_path, what, mode, steps, precision = *sys.argv[1:5], int(sys.argv[5]), sys.argv[6]
with open(rows_path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
if what == "dpo":
    data = [
        {"prompt": r["messages"][: r["shared"]], "chosen": r["messages"][r["shared"] :], "rejected": r["rejected"]}
        for r in rows
    ]
else:
    data = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
tokenizer = AutoTokenizer.from_pretrained(model_path)
settings: dict = {"output_dir": tempfile.mkdtemp(), "max_steps": steps, "report_to": "none", "save_strategy": "no"}
settings |= {"logging_steps": 1, "disable_tqdm": True, "seed": 7, "use_cpu": not torch.cuda.is_available()}
model = model_path
if mode == "best":
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
if mode == "grouped":
    settings |= {"train_sampling_strategy": "group_by_length"}
if mode != "default":
    settings |= {"gradient_checkpointing": False, "bf16": False}
    weights = "float32" if what == "full" else precision  # as ours: a full fine-tune's own weights are its masters
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, weights))
trainer_class, config = (trl.DPOTrainer, trl.DPOConfig) if what == "dpo" else (trl.SFTTrainer, trl.SFTConfig)
seen, clock = count_tokens(trainer_class), Clock()
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = trainer_class(
    model=model,
    args=config(**settings),
    train_dataset=Dataset.from_list(data),
    peft_config=None if what == "full" else lora,
    processing_class=tokenizer,
    callbacks=[clock],
)
trainer.train()
tell(seen, clock.ends, {"trl": trl.__version__, "torch": torch.__version__})
