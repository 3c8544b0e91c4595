"""Studies of training methods: does GFT hold what it promises, with bases, seeds, corrected claims and controls?

`python -m benchmarks.experiments run STUDY` trains, `python -m benchmarks.experiments report` writes
docs/experiments.md from the results. All training runs gft_kernels.trainer.GFTTrainer and with it through the
project's kernels. Claims are files in `claims`; those of a registered study are committed before its first run.
"""
