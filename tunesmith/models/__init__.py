"""Base models: their names, where they are, how they are loaded, what they cost."""

import logging

# What optional libraries say of accelerators that are not here, whenever transformers finds them installed.
for _library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_library).addFilter(lambda record: record.levelno >= logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
