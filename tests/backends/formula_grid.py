"""The edges at which every formula's texts must agree: Python's, C++'s and what Triton compiles of Python's."""

from __future__ import annotations

import math

INF, NAN = math.inf, math.nan
LOG_TAU = math.log(0.7)
LOGITS = (0.0, -0.0, 1.0, -3.5, 1e4, 1e4 + 1, -1000.0, 1e-38, INF, -INF, NAN)
TOPS = (0.0, 2.0, 1e4, -1000.0, -INF, INF, NAN)
MASSES = (0.0, 1e-38, 1.0, 151936.0, NAN)
LOG_PROBS = (0.0, -1e-38, -1e-9, LOG_TAU, -1.0, -200.0, -INF, NAN)
SCALES = (0.0, 1.0, -2.5, 1e-38, NAN)
RATIOS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 1e30, INF, NAN)  # 0.75 and 1.25 are bounds, exactly
CLIPS = (RATIOS, (0.0, 2.0, -2.0, NAN), (0.0, 0.25), (0.0, 0.25), (1.5, INF))
GATED = (RATIOS, (0.0, 2.0, -2.0, NAN), (1.0, 0.1), (1.05, 9.0))
GAMMAS = (0.0, 1e-6, 0.1, 30.0)
LOG_RATIOS = (0.0, 1e-2, -0.3, 2.0, 80.0, 200.0, -200.0, INF, -INF, NAN)
CAPPED = (LOG_RATIOS, (2.0, 20.0, INF), (1, 2, 3))
GRID = {  # formula: the values of each of its arguments
    "transform": (LOGITS, (1.0, -0.5), (0.0, 30.0), (1.0, 0.6)),
    "transform_slope": ((*LOGITS, 600.0), (1.0, -0.5), (0.0, 30.0), (1.0, 0.6)),
    "observe": (TOPS, MASSES, LOGITS),
    "merge": (TOPS, MASSES, TOPS, MASSES),
    "raise_gap": ((0.0, -1.0, NAN), MASSES, (0.0, -0.5, -300.0, -INF, NAN)),
    "log_prob": (LOGITS, TOPS, MASSES),
    "row_tau": ((0.0, 1.0, -1.0, NAN), (0.0, 0.7, 1.0), (True, False)),
    "coefficient": (LOG_PROBS, (0.0, 1e-38, 0.7, 1.0)),
    "shaped_prob": (LOG_PROBS, GAMMAS),
    "rectified_coefficient": (LOG_PROBS, (0.0, 1.0, -1.0, NAN), (0.0, 0.7, 1.0), (True, False), GAMMAS),
    "shaped_coefficient": (LOG_PROBS, GAMMAS),
    "uncertainty": (LOG_PROBS,),
    "entropy_coefficient": ((0.0, 1e-38, 0.5, 2.9957, 11.9, NAN), (1.0, 0.5, 3.0)),
    "group_advantage": ((0.0, 1.0, 0.25, NAN), (0.0, 0.25, NAN), (0.0, 1e-17, 0.5), (0.0, 1e-6)),
    "log_ratio": (LOG_PROBS, LOG_PROBS),
    "is_clipped": CLIPS,
    "clipped_coefficient": CLIPS,
    "clipped_loss": CLIPS,
    "capped_coefficient": (RATIOS, (0.0, 0.25, 1.0), (0.0, 0.25, 4.0)),
    "gated_coefficient": GATED,
    "gated_loss": GATED,
    "kl_loss": CAPPED,
    "kl_kappa": CAPPED,
    "kappa": ((0.0, 1.0, -2.0, NAN), (0.0, 0.3, 1.0, NAN)),
    "token_loss": (LOG_PROBS, SCALES),
    "weighed": (SCALES, (0.0, 2.0, INF, NAN)),
    "dlogit_other": (LOG_PROBS, SCALES),
    "dlogit_target": (LOG_PROBS, SCALES),
    "dlogit_tilted": (LOG_PROBS, SCALES, SCALES, (0.0, 11.9, NAN)),
    "row_size": (SCALES, SCALES, (0.0, 11.9, NAN)),
    "entropy": ((0.0, 11.9, -INF, NAN), (0.0, -3.0, NAN)),
}
