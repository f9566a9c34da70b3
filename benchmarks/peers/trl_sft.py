"""TRL's supervised fine-tuning on given rows; runs in an environment of its own and prints one JSON line.

    python trl_sft.py MODEL ROWS.jsonl MODE STEPS

MODE `default` is TRL as it comes; `best` gives it the cheap wins too: weights in the machine's faster
precision, no gradient checkpointing, one row at a time. Rows are {"messages": [...]} lines.
"""

import json
import resource
import sys
import time

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, rows_path, mode, steps, precision = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5]
with open(rows_path, encoding="utf-8") as file:
    rows = [json.loads(line)["messages"] for line in file]
data = Dataset.from_list([{"prompt": r[:-1], "completion": r[-1:]} for r in rows])
tokenizer = AutoTokenizer.from_pretrained(model_path)

settings: dict = {"output_dir": "/tmp/trl-out", "max_steps": steps, "report_to": "none", "save_strategy": "no"}
settings |= {"logging_steps": 1, "disable_tqdm": True, "seed": 7, "use_cpu": not torch.cuda.is_available()}
model = model_path
if mode == "best":
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": False}
    settings |= {"bf16": False}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, precision))


class Clock(TrainerCallback):
    """Wall time at each step's end; the first step, which warms up, is not counted."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(time.perf_counter())


clock = Clock()
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**settings),
    train_dataset=data,
    peft_config=lora,
    processing_class=tokenizer,
    callbacks=[clock],
)
seen: list[int] = []
plain = trainer.training_step


def counted(model, inputs, *args, **kwargs):
    seen.append(int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel())
    return plain(model, inputs, *args, **kwargs)


trainer.training_step = counted
trainer.train()
per_step = len(seen) // len(clock.ends)
tokens = sum(seen[per_step:])
seconds = clock.ends[-1] - clock.ends[0]
print(
    json.dumps(
        {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
            "versions": {"trl": trl.__version__, "torch": torch.__version__},
        }
    )
)
