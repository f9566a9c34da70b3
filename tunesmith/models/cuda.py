"""What is there on CUDA: attention with variable lengths (flash-attn, torch's flex attention) and Liger's kernels.

The choice follows from what is installed (`choose_attention`, `liger_there`). Attentions take the layout that
`tunesmith.models.attention` does; Liger's kernels are candidates among `fused`'s, held against a module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.errors import MachineError

if TYPE_CHECKING:
    from tunesmith.models.attention import Layout


def there(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def choose_attention(wanted: str, device: str, dtype: torch.dtype, has: Callable[[str], bool] = there) -> str:
    """The attention of packed rows: grouped, rows, flash or flex.

    Raises:
        MachineError: `wanted` is not to be had here.
    """
    cuda = device.startswith("cuda")
    flash = cuda and dtype in (torch.bfloat16, torch.float16) and has("flash_attn")
    if wanted == "auto":
        return "flash" if flash else "flex" if cuda else "grouped"
    if (wanted == "flash" and not flash) or (wanted == "flex" and not cuda):
        needs = "CUDA, bfloat16 and the package flash-attn" if wanted == "flash" else "CUDA"
        raise MachineError(f"{wanted} needs {needs}", where="train.speed.attention", fix="Set it to auto.")
    return wanted


def liger_there(wanted: bool, device: str, has: Callable[[str], bool] = there) -> bool:
    """Whether Liger's kernels are to be tried."""
    return wanted and device.startswith("cuda") and has("liger_kernel")


def flash(q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """Causal attention within each row -> [T, H, E], by flash-attn. Each row's keys are what it begins with, then its
    own: its queries are the last of them, as flash-attn's causal mask has it."""
    from flash_attn import flash_attn_varlen_func

    rows = layout.once("lengths", None, lambda: lengths(layout))
    out: Tensor = flash_attn_varlen_func(
        q_THD,
        k_TGD.index_select(0, rows.keys),
        v_TGE.index_select(0, rows.keys),
        cu_seqlens_q=rows.ends_q,
        cu_seqlens_k=rows.ends_k,
        max_seqlen_q=rows.longest_q,
        max_seqlen_k=rows.longest_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )
    return out


class Lengths(NamedTuple):
    """Rows as flash-attn takes them.

    Attributes:
        keys: where the keys of all rows lie, one row's after the other's.
        ends_q, ends_k: where each row's queries and keys end, after a zero.
        longest_q, longest_k: how many the row with the most has.
    """

    keys: Tensor
    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int


def lengths(layout: Layout) -> Lengths:
    """The layout's rows; counted here, so that nothing waits for the device."""
    spans = layout.spans
    keys = [i for s in spans for i in (*range(s.at, s.at + s.before), *range(s.start, s.start + s.length))]
    queries, seen = [s.length for s in spans], [s.before + s.length for s in spans]
    ends = (torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (queries, seen))
    keys_K, ends_q, ends_k = (x.to(layout.device) for x in (torch.tensor(keys), *ends))
    return Lengths(keys_K, ends_q, ends_k, max(queries), max(seen))


def flex(q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """Causal attention within each row -> [T, H, E], by torch's flex attention, compiled."""
    mask = layout.once("flex", window, lambda: block_mask(layout, window))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q_THD, k_TGD, v_TGE))
    out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def block_mask(layout: Layout, window: int | None) -> Any:
    """Which blocks of the sequence see which, so that flex attention leaves the others out."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = layout.tokens
    return create_block_mask(sees(layout, window), None, None, tokens, tokens, device=str(layout.device))


def sees(layout: Layout, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which token sees which, as flex attention asks: those before it in its row, and what the row begins with."""
    spans, device = torch.tensor(layout.spans), layout.device
    row = torch.arange(len(spans)).repeat_interleave(spans[:, 1])
    start, _, first, before = spans[row].T
    place = before + torch.arange(len(row)) - start
    row, first, before, place = (column.to(device) for column in (row, first, before, place))

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (row[q] == row[k]) & (place[k] <= place[q])
        begun = (k >= first[q]) & (k < first[q] + before[q])
        seen = own | begun
        return seen if window is None else seen & (place[q] - place[k] < window)

    return mask


_flex: list[Any] = []


def _compiled_flex() -> Any:
    if not _flex:
        from torch.nn.attention.flex_attention import flex_attention

        _flex.append(torch.compile(flex_attention, dynamic=True))
    return _flex[0]


def liger_norm(self: Any, x: Tensor) -> Tensor:
    """A norm's forward by Liger's kernel."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    eps = getattr(self, "variance_epsilon", None) or self.eps
    out: Tensor = LigerRMSNormFunction.apply(x, self.weight, eps, 0.0, "llama", False)
    return out


def liger_norm_from_one(self: Any, x: Tensor) -> Tensor:
    """The same, of a norm whose weight is counted from one."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    out: Tensor = LigerRMSNormFunction.apply(x, self.weight, self.eps, 1.0, "gemma", False)
    return out


def liger_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up by Liger's kernel."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out
