"""Importing this gives a peer what Tunesmith does for itself where a machine hides its AMX tiles (models/tiles.py): its
bfloat16 products then run as fast as ours. TILES names the compiled library; nothing happens without it."""

import ctypes
import os

import torch

if "TILES" in os.environ:
    library = ctypes.CDLL(os.environ["TILES"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    library.trap()
    for rows, width, columns in ((64, 64, 64), (37, 53, 41), (1, 64, 33)):
        x, weight = torch.ones(rows, width, dtype=torch.bfloat16), torch.ones(columns, width, dtype=torch.bfloat16)
        torch.nn.functional.linear(x, weight)
    library.untrap()
    torch.set_num_threads(threads)
