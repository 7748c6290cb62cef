"""The row kernels that are reported by name: which compiled variant each is."""

# Row kernels as ``--kernel`` names them, and bytes they move per element of a row in the dtype
# asked for: reads that miss the caches, and writes.
ROW_KERNELS = {
    "token_loss": ("loss, clipped", lambda size: 2 * size),
    "log_sum_exp": ("forward", lambda size: size),
    "gradient": ("backward", lambda size: 2 * size),
    "head_softmax": ("block, softmax", lambda size: 4),
    "head_gradient": ("block, dz", lambda size: 4 + size),
}
