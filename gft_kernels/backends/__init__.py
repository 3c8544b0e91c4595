"""One module per way to compute a `RowCall`; each has `absent()`, `refuses(call)`, `run(call)` and `scale(...)`.

- `absent() -> str | None`: why this machine cannot use the backend at all; None: ready.
- `refuses(call: RowCall) -> str | None`: why this call cannot be served; None: it can.
- `run(call: RowCall) -> RowResult`.
- `scale(gradient_STV, row_scale_R, upstream, inplace) -> Tensor`: the backward's one multiplication, rounded once.
"""
