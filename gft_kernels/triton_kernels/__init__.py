"""The row kernels in Triton. Only this package and backends/triton.py import triton, and only on first use.

In the order to read them: formulas (F1 to F7, the text of gft_kernels/formulas.py compiled by Triton), passes (how a
row is read and written), the kernels row_loss, scale_rows, (of a sharded vocabulary) shard and (for the linear loss's
sparse products) measures, and launch (how kernels are compiled and launched). Who gets what is not here: advantages.py
does that, in torch.
"""
