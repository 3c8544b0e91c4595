"""The row kernels in Triton. Only this package and backends/triton.py import triton, and only on first use.

- formulas: F1 to F7, the text of gft_kernels/formulas.py compiled by Triton.
- spans: how a row of any length at any address is read and written in 16-byte vectors.
- sweeps: the two walks over a row, one for its statistics and one for its gradient.
- row_loss, shard, scale_rows, credit: the kernels. configs: how they are launched.
"""
