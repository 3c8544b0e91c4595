"""A small study of training methods: does GFT hold what it promises, with seeds, error bars and controls?

`python -m benchmarks.experiments run STUDY.yaml` trains, `python -m benchmarks.experiments report` writes
docs/experiments.md from the results. All training runs gft_kernels.trainer.GFTTrainer and with it through the
project's kernels.
"""
