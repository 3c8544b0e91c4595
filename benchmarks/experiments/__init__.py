"""A small study of training methods: does GFT hold what it promises, with seeds, error bars and controls?

`gft study run STUDY.yaml` trains, `gft study report` writes docs/experiments.md from the results. All training runs
through gft_kernels.trainer.GFTTrainer and with it through the project's kernels.
"""
