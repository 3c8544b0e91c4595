"""One module per way to compute a `RowCall`; each has `absent()`, `refuses(call)`, `run(call)` and `scale(...)`.

- `absent() -> str | None`: why this machine cannot use the backend at all; None: ready.
- `refuses(call: RowCall) -> str | None`: why this call cannot be served; None: it can.
- `run(call: RowCall) -> RowResult`.
- `scale(gradient_STV, row_scale_R, upstream, inplace, dtype=None) -> Tensor`: the backward's one multiplication,
  rounded once; to another dtype than a float32 gradient's own, where that is asked for and not in place.

For logits sharded over the vocabulary (distributed.py), with a collective between the two:
- `shard_statistics(call, columns_R, read_R) -> ShardStatistics`: this shard's state without the target; `columns_R`,
  int64, is the target's column here, or anything outside [0, V), and then its logit is given as 0. Rows that `read_R`,
  bool, leaves out are not read and give the neutral state (-inf, 0).
- `shard_gradient(call, columns_R, agreed: AgreedRows) -> Tensor`: F7 on this shard, from numbers of the whole rows.
"""
