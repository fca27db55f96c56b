"""The key/value cache of the sequences that are being decoded, and decoding against it: slots or pages.

Both hold their sequences in rows 0 .. n - 1 and answer the same questions of the scheduler (engine.py):

    fits(n, ...)           may n more begin, too?          can_step()   is there room for a token in each row?
    admit(rows, ...)       prefill                         decode(...)  one token a row: logits
    move(dst, src), cut(n) rows change places; what lies behind n is free
    empty(rows)            they begin anew, from nothing    width(n)     n, up to where a row fewer saves time
    allocate(n_tokens)     once, before all others         clear()      no row, and no NaN, is left

`Slots` is the CPU's, for fp32: the same place of some rows side by side, read by a compiled loop
(kernels/cpu_attention.py). Its decode path is the model's own arithmetic on the trainer's weights, which it
reads where they lie: 2 loops a layer, or 8 operators where products of PyTorch's are faster.

`Pages` is the GPU's, and a CPU's where that loop cannot serve: fixed pages of PAGE tokens, a table of page
numbers for each row, prompts' full pages shared by the samples of a group (reference counts), the last one
copied for each. Its step is captured at a few fixed batch sizes, each as a CUDA graph on static tensors.

Shapes: B rows, L layers, H query heads, G kv heads, R = H / G, D head_dim, S columns, T flat tokens.
"""

PAGE = 16  # tokens in a page; slots grow by as many columns


def pages_for(n_tokens) -> int:
    return -(-n_tokens // PAGE)


def places_within(
    n_bytes: float, token_bytes: int, n_rows: int, longest: int | None, max_seq_len: int
) -> int:
    """Places for n_rows sequences of `longest` tokens, and a page more, or as many as fit into n_bytes; but
    always enough for one sequence of max_seq_len."""
    row = PAGE * pages_for(min(longest or max_seq_len, max_seq_len) + PAGE)
    return max(PAGE * pages_for(max_seq_len), min(n_rows * row, int(n_bytes / token_bytes)))
